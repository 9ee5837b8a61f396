"""What drafting costs, for a first text that waits for it: rows, exits and models, in plain passes.

Decoding streams the weights whatever the width, so the second row of a pass is nearly free and the
thirtieth is not; where the bend lies differs from processor to processor. So whole passes are timed
by width, and what drafts beside plain passes, as it runs in a round: right after one. Each is
measured in a second or two, or with some dozens of passes where those take longer, and remembered;
:mod:`hispec.planner.prices` corrects them ever after, and a plan measures them anew.
"""

from __future__ import annotations

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
    WIDTHS,
    beside,
    drafted,
    fitting,
    plain_pass,
    run_rows,
    untimed,
)

#: A text long enough to tell what its length costs, and rows that tell it of more than one.
FAR, SEVERAL = 1280, 6
#: Passes this wide are timed seldom: where they are dear nobody runs them.
WIDE = 12
#: Everything is timed so often in turn, until so many seconds are over.
REPEATS, PATIENCE_S = 12, 1.5
#: Rows of an exit's pass where nobody knows better: the root, and one that the databases propose.
LEVEL_ROWS = 2


class LevelCost(NamedTuple):
    """What an exit or a separate model takes, in target's passes over one row.

    Attributes:
        each: a pass.
        token: of a text's first one, a token of the prompt that it has to read.
    """

    each: float
    token: float


def pass_costs(model: Llama, *, anew: bool = False) -> list[float]:
    """Returns the time of a target's pass by width, relative to width 1; remembered.

    Args:
        model: the target.
        anew: measure now, whatever is remembered.

    Returns:
        ``MAX_WIDTH + 1`` numbers that never fall; ``costs[w]`` is a pass of w rows through all
        layers and the vocabulary head. ``costs[0]`` is 0.
    """

    def measure() -> list[float]:
        keep_price_slope(model, 1.0)  # what corrected an older table
        return _whole_passes(model)

    return list(remembered("rows", model, measure, f"{WIDTHS}", anew=anew))


def context_growth(model: Llama, *, anew: bool = False) -> Growth:
    """Returns how passes get slower as the text gets longer; remembered.

    Args:
        model: the target.
        anew: measure now, whatever is remembered.
    """

    def measure() -> list[float]:
        near, far = fitting(model, CONTEXT), fitting(model, FAR)
        if far < 2 * near:
            return [near, 0.0, 0.0]
        with torch.inference_mode():
            cache = model.new_cache([model.config.num_layers], far + MAX_WIDTH)
            # Memory of its own, which has to be read: untouched pages are all the same one.
            cache.kv.storage[..., : far + MAX_WIDTH, :].zero_()
            near_plain, *passes = (
                partial(plain_pass, model, context, cache, width)
                for context in (near, far)
                for width in (1, SEVERAL)
            )
            found = _beside_plain(model, near_plain, dict(enumerate(passes)))
        several, far_one, far_several = found.values()
        reach = far - near
        first, more = far_one - 1.0, (far_several - several - far_one + 1.0) / (SEVERAL - 1)
        return [near, max(first / reach, 0.0), max(more / reach, 0.0)]

    context, first, more = remembered("contexts", model, measure, f"{FAR}|{SEVERAL}", anew=anew)
    return Growth(int(context), first, more)


def price_slope(model: Llama) -> float:
    """Returns by how much rows have proved dearer than :func:`pass_costs` says; 1 if never seen."""
    return float(remembered("slopes", model, lambda: 1.0))


def keep_price_slope(model: Llama, slope: float) -> None:
    """After the call :func:`price_slope` returns ``slope``, in later processes too."""
    remembered("slopes", model, lambda: slope, anew=True)


def level_cost(
    model: Llama, head: ExitHead, exit_layer: int, label: str = "", *, anew: bool = False
) -> LevelCost:
    """Returns what an exit takes: its first pass of a round, over two rows, and its reading.

    Args:
        model: the target.
        head: the exit's.
        exit_layer: e.
        label: what tells these heads from others at the same layer; without one nothing is
            remembered.
        anew: measure now, whatever is remembered.
    """

    def measure() -> list[float]:
        context = fitting(model, CONTEXT)
        cache = model.new_cache([exit_layer, model.config.num_layers], context + MAX_WIDTH)

        def knowing(known: int) -> float:
            run_rows(model, cache, exit_layer, context, LEVEL_ROWS)
            return drafted(head, cache, context, LEVEL_ROWS, known)

        with torch.inference_mode():
            plain = partial(plain_pass, model, context, cache)
            passes = {0: partial(knowing, context - CAUGHT_UP), 1: partial(knowing, 0)}
            each, whole = _beside_plain(model, plain, passes).values()
            head.truncate(0)
        reading = 0.0 if slots_read(head) is None else max(whole - each, 0.0)
        return [each, reading / context]

    if not label:
        return LevelCost(*measure())
    detail = f"{label}|{exit_layer}|and reading"
    return LevelCost(*remembered("levels", model, measure, detail, anew=anew))


def model_cost(model: Llama, other: Llama, *, anew: bool = False) -> LevelCost:
    """Returns the time of a separate model's pass over two rows, and of reading a prompt.

    Args:
        model: the target.
        other: the separate model.
        anew: measure now, whatever is remembered.
    """

    def measure() -> list[float]:
        context = min(fitting(model, CONTEXT), fitting(other, CONTEXT))
        cache = model.new_cache([model.config.num_layers], context + MAX_WIDTH)
        apart = other.new_cache([other.config.num_layers], context + MAX_WIDTH)

        def reads() -> float:
            apart.truncate(0)
            other.prefill(apart, [0] * context)
            return float(apart.states[other.config.num_layers][0, 0])  # sync: the prompt is read

        run = partial(plain_pass, other, context, apart, LEVEL_ROWS)
        with torch.inference_mode():
            plain = partial(plain_pass, model, context, cache)
            each, whole = _beside_plain(model, plain, {0: run, 1: reads}).values()
        return [each, whole / context]

    detail = f"{other.config}|{other.dtype}|and reading"
    return LevelCost(*remembered("levels", model, measure, detail, anew=anew))


def _whole_passes(model: Llama) -> list[float]:
    context = fitting(model, CONTEXT)
    with torch.inference_mode():
        cache = model.new_cache([model.config.num_layers], context + MAX_WIDTH)
        passes = {width: partial(plain_pass, model, context, cache, width) for width in WIDTHS}
        # Each pass drives what the one before has left out of the caches.
        plain = passes.pop(1)
        times = _beside_plain(model, plain, passes, seldom=lambda width: width >= WIDE)
    return filled({1: 1.0, **times})


def _beside_plain(
    model: Llama,
    plain: Callable[[], object],
    tasks: Mapping[int, Callable[[], object]],
    seldom: Callable[[int], bool] = lambda task: False,
) -> dict[int, float]:
    """Returns the time of each task right after a plain pass, relative to that pass."""
    return beside(plain, tasks, REPEATS, PATIENCE_S, seldom=seldom, untimed=untimed(model))
