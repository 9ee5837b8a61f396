"""What drafting costs, for a first text that waits for it: rows, exits and models, in plain passes.

Decoding streams the weights whatever the width, so the second row of a pass is nearly free and the
thirtieth is not; where the bend lies differs from processor to processor. So whole passes are timed
by width, and what drafts beside plain passes, as it runs in a round: right after one.

To time everything well takes some seconds, which nobody waits for: a text waits for a *glance*, and
each later start takes another, until there have been enough. All are remembered. Passes themselves
correct prices ever after (:mod:`hispec.planner.prices`); a plan measures anew, benchmarks at once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from hispec.model.exits import ExitHead
from hispec.model.level import slots_read
from hispec.model.llama import Llama
from hispec.model.measured import remembered
from hispec.model.nodes import MAX_WIDTH
from hispec.planner.cost_table import filled
from hispec.planner.prices import Growth
from hispec.planner.timing import (
    CAUGHT_UP,
    CONTEXT,
    LEVEL_ROWS,
    WIDTHS,
    beside,
    exit_pass,
    fitting,
    plain_pass,
    untimed,
)

#: A text long enough to tell what its length costs, and rows that tell it of more than one.
FAR, SEVERAL = 1280, 6
#: Passes this wide are timed seldom: where they are dear nobody runs them.
WIDE = 12
#: Everything is timed so often in turn, until so many seconds are over; a text waits for fewer.
REPEATS, PATIENCE_S, GLANCE_S = 12, 1.5, 0.15
#: A plain pass, and what is timed right after one.
Passes = tuple[Callable[[], object], Mapping[int, Callable[[], object]]]


class LevelCost(NamedTuple):
    """What an exit or a separate model takes, in target's passes over one row.

    Attributes:
        each: a pass.
        token: of a text's first one, a token of the prompt that it has to read.
    """

    each: float
    token: float


def pass_costs(model: Llama, *, glance: bool = False, anew: bool = False) -> list[float]:
    """Returns the time of a target's pass by width, relative to width 1; remembered.

    Args:
        model: the target.
        glance: time no more than a text may wait for, and the rest at later starts.
        anew: measure now, whatever is remembered.

    Returns:
        ``MAX_WIDTH + 1`` numbers that never fall; ``costs[w]`` is a pass of w rows through all
        layers and the vocabulary head. ``costs[0]`` is 0.
    """

    def passes() -> Passes:
        keep_price_slope(model, 1.0)  # what corrected an older table
        context = fitting(model, CONTEXT)
        cache = model.new_cache([model.config.num_layers], context + MAX_WIDTH)
        # Each pass drives what the one before has left out of the caches.
        plain, *wider = (partial(plain_pass, model, context, cache, width) for width in WIDTHS)
        return plain, dict(zip(WIDTHS[1:], wider, strict=True))

    times = _beside_plain("rows", model, f"{WIDTHS}", passes, glance=glance, anew=anew)
    return filled({1: 1.0, **times})


def context_growth(model: Llama, *, glance: bool = False, anew: bool = False) -> Growth:
    """Returns how passes get slower as the text gets longer; remembered.

    Args:
        model: the target.
        glance: time no more than a text may wait for, and the rest at later starts.
        anew: measure now, whatever is remembered.
    """
    near, far = fitting(model, CONTEXT), fitting(model, FAR)
    if far < 2 * near:
        return Growth(near)

    def passes() -> Passes:
        cache = model.new_cache([model.config.num_layers], far + MAX_WIDTH)
        # Memory of its own, which has to be read: untouched pages are all the same one.
        cache.kv.storage[..., : far + MAX_WIDTH, :].zero_()
        near_plain, *others = (
            partial(plain_pass, model, context, cache, width)
            for context in (near, far)
            for width in (1, SEVERAL)
        )
        return near_plain, dict(enumerate(others))

    detail = f"{near}|{far}|{SEVERAL}"
    found = _beside_plain("contexts", model, detail, passes, glance=glance, anew=anew)
    several, far_one, far_several = found.values()
    reach = far - near
    first, more = far_one - 1.0, (far_several - several - far_one + 1.0) / (SEVERAL - 1)
    return Growth(near, max(first / reach, 0.0), max(more / reach, 0.0))


def price_slope(model: Llama) -> float:
    """Returns by how much rows have proved dearer than :func:`pass_costs` says; 1 if never seen."""
    return float(remembered("slopes", model, lambda: 1.0))


def keep_price_slope(model: Llama, slope: float) -> None:
    """After the call :func:`price_slope` returns ``slope``, in later processes too."""
    remembered("slopes", model, lambda: slope, anew=True)


def level_cost(
    model: Llama,
    head: ExitHead,
    exit_layer: int,
    label: str = "",
    *,
    glance: bool = False,
    anew: bool = False,
) -> LevelCost:
    """Returns what an exit takes: its first pass of a round, over two rows, and its reading.

    Args:
        model: the target.
        head: the exit's.
        exit_layer: e.
        label: what tells these heads from others at the same layer; without one nothing is
            remembered.
        glance: time no more than a text may wait for, and the rest at later starts.
        anew: measure now, whatever is remembered.
    """
    context = fitting(model, CONTEXT)

    timed = False

    def passes() -> Passes:
        nonlocal timed
        timed = True
        cache = model.new_cache([exit_layer, model.config.num_layers], context + MAX_WIDTH)
        plain = partial(plain_pass, model, context, cache)
        knowing = partial(exit_pass, model, head, cache, context)
        return plain, {0: partial(knowing, context - CAUGHT_UP), 1: partial(knowing, 0)}

    detail = f"{label}|{exit_layer}|{context}" if label else ""
    try:
        found = _beside_plain("levels", model, detail, passes, glance=glance, anew=anew)
    finally:
        if timed:
            head.truncate(0)
    each, whole = found.values()
    reading = 0.0 if slots_read(head) is None else max(whole - each, 0.0)
    return LevelCost(each, reading / context)


def model_cost(
    model: Llama, other: Llama, *, glance: bool = False, anew: bool = False
) -> LevelCost:
    """Returns the time of a separate model's pass over two rows, and of reading a prompt.

    Args:
        model: the target.
        other: the separate model.
        glance: time no more than a text may wait for, and the rest at later starts.
        anew: measure now, whatever is remembered.
    """
    context = min(fitting(model, CONTEXT), fitting(other, CONTEXT))

    def passes() -> Passes:
        cache = model.new_cache([model.config.num_layers], context + MAX_WIDTH)
        apart = other.new_cache([other.config.num_layers], context + MAX_WIDTH)

        def reads() -> float:
            apart.truncate(0)
            other.prefill(apart, [0] * context)
            return float(apart.states[other.config.num_layers][0, 0])  # sync: the prompt is read

        run = partial(plain_pass, other, context, apart, LEVEL_ROWS)
        return partial(plain_pass, model, context, cache), {0: run, 1: reads}

    detail = f"{other.config}|{other.dtype}"
    found = _beside_plain("levels", model, detail, passes, glance=glance, anew=anew)
    each, whole = found.values()
    return LevelCost(each, whole / context)


def _beside_plain(
    kind: str,
    model: Llama,
    detail: str,
    passes: Callable[[], Passes],
    *,
    glance: bool,
    anew: bool,
) -> dict[int, float]:
    """Returns the usual time of each task right after a plain pass, relative to that pass.

    Args:
        kind: see :func:`~hispec.model.measured.remembered`.
        model: likewise.
        detail: likewise; where it is empty nothing is remembered.
        passes: makes what is timed.
        glance: begin no round after ``GLANCE_S``, and leave the rest to later calls.
        anew: forget what is remembered.
    """
    detail = detail and f"{detail}|glances"
    known: dict[str, list[float]] = {}
    if detail and not anew:
        known = remembered(kind, model, dict, detail)
    enough = bool(known.pop("enough", []))  # patience has been at an end once
    rounds = max(map(len, known.values()), default=0)
    if rounds < REPEATS and not enough:
        patience = GLANCE_S if glance else PATIENCE_S
        with torch.inference_mode():
            plain, tasks = passes()
            more = beside(
                plain,
                tasks,
                REPEATS - rounds,
                patience,
                seldom=lambda task: kind == "rows" and task >= WIDE,
                untimed=untimed(model),
            )
        known = {str(task): known.get(str(task), []) + row for task, row in more.items()}
        record = {**known, "enough": [] if glance else [1.0]}
        if detail:
            remembered(kind, model, lambda: record, detail, anew=True)
    return {int(task): statistics.median(row) for task, row in known.items()}
