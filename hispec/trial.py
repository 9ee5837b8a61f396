"""A short trial of exits: how often they would have picked the target's token.

Teacher-forced on the target's own greedy answers to a few prompts: each exit is asked once a token,
with everything before it known, as for the first draft of a round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hispec.generation import LM
from hispec.hierarchy import AR
from hispec.model.nodes import Nodes
from hispec.sampling import Sampling

_PROMPTS = (
    "Explain why leaves are green.",
    "A train travels 60 miles in 1.5 hours. What is its speed?",
    "Write a Python function that reverses a list.",
)


def agreement(
    lm: LM, exit_layers: Sequence[int], *, tokens_each: int = 48
) -> tuple[dict[int, float], int]:
    """Returns each exit's rate of agreement with the target's greedy pick, and the tokens tried.

    Args:
        lm: a loaded model.
        exit_layers: exits to try, ascending.
        tokens_each: tokens to generate for each of three prompts.
    """
    agreed = dict.fromkeys(exit_layers, 0)
    tried = 0
    greedy = Sampling()
    for prompt in _PROMPTS:
        ids = lm.encode(prompt)
        answer = lm.generate(ids, hierarchy=AR, max_new_tokens=tokens_each).token_ids
        heads = {layer: lm.head(layer) for layer in exit_layers}
        with torch.inference_mode():
            cache = lm.model.new_cache([*exit_layers, lm.model.config.num_layers])
            for head in heads.values():
                head.truncate(0)
            known = list(ids)
            for token in answer:
                root = len(known) - 1
                lm.model.prefill(cache, known[:-1])
                for layer, head in heads.items():
                    lm.model.advance(cache, known, root + 1, layer)
                    logits = head.logits(cache, root, Nodes(root))
                    agreed[layer] += greedy.pick(logits, root + 1, head.vocab_ids)[0] == token
                tried += 1
                known.append(token)
            for head in heads.values():
                head.truncate(0)
    return {layer: agreed[layer] / max(tried, 1) for layer in exit_layers}, tried
