"""The heads of several exits over one frozen head matrix: what training moves and measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hispec.model.checkpoint import Checkpoint
from hispec_training.batches import Batch
from hispec_training.heads import HeadSpec, build_heads, frequent_tokens
from hispec_training.losses import sparse_cross_entropy, sparse_targets
from hispec_training.trunk import fast_dtype


@dataclass(frozen=True)
class Guess:
    """What one exit made of a batch.

    Attributes:
        loss: () fp32, summed over positions, with gradient.
        picks: (N,) int64 the head's picks, as token ids; while training, -1 for a wrong one.
    """

    loss: Tensor
    picks: Tensor


class Exits(nn.Module):
    """All heads under training. Only their tensors are parameters.

    Args:
        specs: One per exit.
        checkpoint: The base; its head matrix is kept in ``dtype``, not as a parameter.
        counts: (V,) the target's picks in the training data, which rank the vocabulary.
        dtype: Of the vocabulary product; None for the device's fastest.
    """

    def __init__(
        self,
        specs: Sequence[HeadSpec],
        checkpoint: Checkpoint,
        counts: Tensor,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = checkpoint.config
        self.final_layer = config.num_layers
        self.specs = {spec.exit_layer: spec for spec in specs}
        self.heads = build_heads(specs, checkpoint)
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self._lm_head = [
            checkpoint.tensor(name).to(dtype or fast_dtype())
        ]  # (V, D), in a list: not a buffer
        for spec in specs:
            tokens = frequent_tokens(counts, spec.vocab_size, checkpoint.eos_token_ids)
            self.set_vocabulary(spec.exit_layer, tokens)

    def set_vocabulary(self, exit_layer: int, tokens: Tensor) -> None:
        """The head of an exit has the rows of these token ids (V',), in their order."""
        tokens, lm_head = tokens.long(), self._lm_head[0]
        row_of = torch.full((len(lm_head),), -1)
        row_of[tokens] = torch.arange(len(tokens))
        # all rows in their own order need no copy
        rows = lm_head if len(tokens) == len(lm_head) else lm_head[tokens]
        for kind, tensor in (("tokens", tokens), ("row_of", row_of), ("rows", rows)):
            self.register_buffer(f"{kind}_{exit_layer}", tensor, persistent=False)

    @property
    def layers(self) -> list[int]:
        """The layers whose states are needed, L among them if some head looks at it."""
        deep = any(s.context == "deep" or s.feature for s in self.specs.values())
        return sorted(self.specs) + ([self.final_layer] if deep else [])

    def vocab_ids(self, exit_layer: int) -> Tensor:
        """(V',) int64 token id of each row of an exit's head."""
        return getattr(self, f"tokens_{exit_layer}")

    def normed(self, batch: Batch, exit_layer: int) -> Tensor:
        """(N, D) what an exit's rows are applied to, at the chosen positions."""
        head = self.heads[str(exit_layer)]
        deep = batch.states.get(self.final_layer)
        return head(batch.states[exit_layer], deep, batch.positions, batch.roots)[batch.chosen]

    def forward(self, batch: Batch, soft: float = 0.5) -> dict[int, Guess]:
        """Every exit's loss and picks.

        Args:
            batch: The texts.
            soft: Weight of the target's distribution against its pick.
        """
        guesses = {}
        for exit_layer in self.specs:
            x = self.normed(batch, exit_layer)
            rows, weights = sparse_targets(
                batch.pick,
                batch.top_ids,
                batch.top_logits,
                getattr(self, f"row_of_{exit_layer}"),
                soft,
            )
            loss, best = sparse_cross_entropy(x, getattr(self, f"rows_{exit_layer}"), rows, weights)
            picks = self.vocab_ids(exit_layer)[best.clamp_min(0)].masked_fill(best < 0, -1)
            guesses[exit_layer] = Guess(loss, picks)
        return guesses
