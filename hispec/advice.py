"""When a hierarchy cannot pay: what acceptance it would need, and what to say about it.

Costs are counted in blocks, for a machine that is bound by reading weights: a pass over any few
rows costs the blocks between its level and the one below, plus its head (for SmolLM2-135M the full
vocabulary is worth 8 blocks). With every level's tokens accepted at one rate α, a level that checks
windows of T tokens costs per token it keeps (HSD, arXiv 2510.19705, for exits that share layers)

    ℓ_k = (T ℓ_{k−1} + c_k) (1 − α) / (1 − α^{T+1})
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hispec.generation import LM, Result
from hispec.hierarchy import Hierarchy


def head_blocks(lm: LM, boundary: int) -> float:
    """Returns what the head at a boundary costs, in blocks of the model."""
    config = lm.model.config
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    block = config.hidden_size * (
        width + config.num_heads * config.head_dim + 3 * config.intermediate_size
    )
    head = lm.head(boundary)
    rows = config.vocab_size if head.vocab_ids is None else len(head.vocab_ids)
    own = 1.0 if getattr(head, "block", None) is not None else 0.0
    return own + rows * config.hidden_size / block


def costs(lm: LM, hierarchy: Hierarchy) -> list[float]:
    """Returns the cost of a pass of each level, the target last, in blocks."""
    boundaries = [0, *hierarchy.exit_layers, lm.model.config.num_layers]
    return [upper - lower + head_blocks(lm, upper) for lower, upper in pairwise(boundaries)]


def cost_per_token(pass_costs: Sequence[float], windows: Sequence[int], rate: float) -> float:
    """Returns the expected cost of a committed token.

    Args:
        pass_costs: of each level, the target last.
        windows: tokens each level below the target hands up.
        rate: acceptance at every level, in [0, 1).
    """
    latency = pass_costs[0]
    for window, cost in zip(windows, pass_costs[1:], strict=True):
        latency = (window * latency + cost) * (1 - rate) / (1 - rate ** (window + 1))
    return latency


def break_even(pass_costs: Sequence[float], windows: Sequence[int], plain: float) -> float | None:
    """Returns the acceptance at which a hierarchy costs what plain decoding does, or None.

    Args:
        pass_costs: see :func:`cost_per_token`.
        windows: likewise.
        plain: cost of a plain decoding step.
    """
    low, high = 0.0, 0.999
    if cost_per_token(pass_costs, windows, high) > plain:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        if cost_per_token(pass_costs, windows, middle) > plain:
            low = middle
        else:
            high = middle
    return high


def warning(lm: LM, result: Result) -> str | None:
    """Returns a sentence with numbers if this generation's drafts cost more than they gained."""
    hierarchy = result.hierarchy
    if not hierarchy.levels or result.passes < 8:
        return None  # too little to judge by
    pass_costs = costs(lm, hierarchy)
    plain = lm.model.config.num_layers + head_blocks(lm, lm.model.config.num_layers)
    spent = sum(cost * level.passes for cost, level in zip(pass_costs, result.levels, strict=True))
    if spent <= plain * result.committed:
        return None
    top = result.levels[-2]
    rate = top.accepted / top.drafted if top.drafted else 0.0
    needed = break_even(pass_costs, [level.window for level in hierarchy.levels], plain)
    threshold = f"about {needed:.0%} are needed to break even" if needed else "it cannot pay here"
    trained = lm.exits is not None and all(
        layer in lm.exits.exit_layers for layer in hierarchy.exit_layers
    )
    advice = (
        "Try --hierarchy auto or smaller windows"
        if trained
        else "These exits look untrained: train some with hispec train --model "
        f"{lm.checkpoint.name} --data prompts.jsonl --out exits, or use --hierarchy ar"
    )
    return (
        f"the target accepted {rate:.1%} of {top.drafted} drafted tokens, where {threshold}: "
        f"plain decoding would have been faster. {advice}."
    )
