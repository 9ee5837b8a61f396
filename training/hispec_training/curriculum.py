"""LayerSkip's schedules (arXiv 2404.16710, section 4), as pure functions of the step.

Which exits have a loss at a step, how much each weighs, and how likely a layer is left out. The
paper: deeper exits weigh more, rows of the curriculum switch exits on and off so that the last
layer is not drowned out, and layers are dropped with a chance that grows exponentially with depth.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def exits_at(step: int, steps: int, exits: Sequence[int], kind: str) -> list[int]:
    """Returns the exits with a loss at ``step``.

    Args:
        step: From 0.
        steps: Of the whole run.
        exits: All exits to train.
        kind: ``"all"``; ``"rotate"``, one after the other; or ``"gradual"``, the deepest first
            and one more at equal intervals over the first half of the run.
    """
    ordered = sorted(exits)
    if kind == "all":
        return ordered
    if kind == "rotate":
        return [ordered[-1 - step % len(ordered)]]
    if kind == "gradual":
        on = 1 + 2 * step * len(ordered) // max(1, steps)
        return ordered[-min(on, len(ordered)) :]
    raise ValueError(f"no curriculum {kind!r}")


def exit_weights(exits: Sequence[int], scale: float) -> dict[int, float]:
    """Returns weights that add up to 1 and grow with depth as ``1 + scale · (0 + 1 + … + (e-1))``.

    The paper's e(l) is the sum alone; the 1 makes ``scale`` 0 mean equal weights.
    """
    raw = {e: 1.0 + scale * e * (e - 1) / 2 for e in exits}
    total = sum(raw.values())
    return {e: value / total for e, value in raw.items()}


def drop_rates(num_layers: int, highest: float) -> list[float]:
    """Returns each layer's chance to be left out: ``highest · (2^(l / (L - 1)) - 1)``."""
    last = max(1, num_layers - 1)
    return [highest * (2 ** (layer / last) - 1) for layer in range(num_layers)]


def dropped_layers(rates: Sequence[float], seed: int, step: int) -> frozenset[int]:
    """Returns the layers left out at a step, the same on every process and after resuming."""
    coin = random.Random(f"drop:{seed}:{step}")
    return frozenset(layer for layer, rate in enumerate(rates) if coin.random() < rate)
