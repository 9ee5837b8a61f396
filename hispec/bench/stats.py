"""Ratios of total times, and how far chance alone could have moved them.

    speed-up = Σ_p T_ar(p) / Σ_p T_m(p)       T(p): median over the repeats of prompt p

The interval is a bootstrap over prompts. Both arms keep the same draw, so what a prompt costs by
itself cancels, and a method that is always a tenth slower shows even where prompts differ a
hundredfold. Draws from few prompts scatter too little; the interval is widened as Student's t
widens a normal one (with 12 prompts it then covers the truth 94 % of the time in simulation, and
90 % without). Below five prompts even that fails, and each prompt's repeats are redrawn as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
COVERAGE = 0.95
_FEW = 5  # prompts


@dataclass(frozen=True)
class Ratio:
    """A ratio of total times with its interval.

    Attributes:
        value: baseline over method; above 1 the method is faster.
        low: lower end, 95 % coverage; None where a single measurement leaves it open.
        high: upper end.
    """

    value: float
    low: float | None
    high: float | None


def ratio(
    baseline: Sequence[Sequence[float]], method: Sequence[Sequence[float]], *, seed: int = 0
) -> Ratio:
    """Returns Σ baseline / Σ method over the same prompts, in seconds or any one unit.

    Args:
        baseline: for each prompt its repeats' times; repeats may differ in number.
        method: likewise, the same prompts in the same order.
        seed: of the bootstrap.

    Raises:
        ValueError: the arms have different prompts, or none.
    """
    if len(baseline) != len(method) or not baseline:
        raise ValueError(f"cannot compare {len(baseline)} prompts with {len(method)}")
    generator = np.random.default_rng(seed)
    value = _total(baseline) / _total(method)
    if len(baseline) == 1 and len(baseline[0]) == len(method[0]) == 1:
        return Ratio(value, None, None)
    redraw = len(baseline) < _FEW
    above = _medians(baseline, generator, redraw=redraw)  # (draws or 1, prompts)
    below = _medians(method, generator, redraw=redraw)
    chosen = generator.integers(len(baseline), size=(DRAWS, len(baseline)))
    rows = np.arange(DRAWS)[:, None] if redraw else 0
    ratios = above[rows, chosen].sum(1) / below[rows, chosen].sum(1)
    tail = 100 * (1 - COVERAGE) / 2
    low, high = np.percentile(ratios, [tail, 100 - tail])
    if not redraw:
        wider = _widening(len(baseline))
        low, high = value * (low / value) ** wider, value * (high / value) ** wider
    return Ratio(value, float(low), float(high))


def _widening(prompts: int) -> float:
    """How much wider an interval from so few prompts must be: t over z, and √(n / (n − 1))."""
    z, freedom = 1.96, prompts - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return t / z * math.sqrt(prompts / freedom)


def _total(arm: Sequence[Sequence[float]]) -> float:
    return float(sum(np.median(repeats) for repeats in arm))


def _medians(
    arm: Sequence[Sequence[float]], generator: np.random.Generator, *, redraw: bool
) -> np.ndarray:
    """Returns each prompt's median (1, prompts), or those of redrawn repeats (draws, prompts)."""
    if not redraw:
        return np.array([[np.median(repeats) for repeats in arm]])
    columns = []
    for repeats in arm:
        times = np.asarray(repeats, dtype=float)
        redrawn = times[generator.integers(len(times), size=(DRAWS, len(times)))]
        columns.append(np.median(redrawn, axis=1))
    return np.stack(columns, axis=1)
