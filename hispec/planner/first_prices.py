"""What drafting costs, for a first text that waits for it: rows, exits and models, in plain passes.

Decoding streams the weights whatever the width, so the second row of a pass is nearly free and the
thirtieth is not; where the bend lies differs from processor to processor. So whole passes are timed
by width, and what drafts beside plain passes, as it runs in a round: right after one. Each is
measured in a second, or with some dozens of passes where those take longer, and remembered;
:mod:`hispec.planner.prices` corrects them ever after, and a plan measures them anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from hispec.model.cache import Cache
from hispec.model.exits import ExitHead
from hispec.model.llama import Llama
from hispec.model.measured import remembered
from hispec.model.nodes import MAX_WIDTH
from hispec.planner.cost_table import filled
from hispec.planner.timing import (
    CAUGHT_UP,
    CONTEXT,
    WIDTHS,
    drafted,
    fitting,
    in_turn,
    plain_pass,
    run_rows,
    untimed,
)

#: Passes this wide are timed seldom: where they are dear nobody runs them.
WIDE = 12
#: Everything is timed so often in turn, until so many seconds are over.
REPEATS, PATIENCE_S = 12, 1.0
#: Rows of an exit's pass where nobody knows better: the root, and one that the databases propose.
LEVEL_ROWS = 2


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


def price_slope(model: Llama) -> float:
    """Returns by how much rows have proved dearer than :func:`pass_costs` says; 1 if never seen."""
    return float(remembered("slopes", model, lambda: 1.0))


def keep_price_slope(model: Llama, slope: float) -> None:
    """After the call :func:`price_slope` returns ``slope``, in later processes too."""
    remembered("slopes", model, lambda: slope, anew=True)


def level_cost(
    model: Llama, head: ExitHead, exit_layer: int, label: str = "", *, anew: bool = False
) -> float:
    """Returns the time of an exit's first pass of a round, over two rows, in target's of one.

    Args:
        model: the target.
        head: the exit's.
        exit_layer: e.
        label: what tells these heads from others at the same layer; without one nothing is
            remembered.
        anew: measure now, whatever is remembered.
    """

    def measure() -> float:
        context = fitting(model, CONTEXT)
        cache = model.new_cache([exit_layer, model.config.num_layers], context + MAX_WIDTH)

        def first_pass() -> float:
            run_rows(model, cache, exit_layer, context, LEVEL_ROWS)
            return drafted(head, cache, context, LEVEL_ROWS, context - CAUGHT_UP)

        with torch.inference_mode():
            ratio = _beside_plain(model, context, cache, first_pass)
            head.truncate(0)
        return ratio

    if not label:
        return measure()
    return float(remembered("levels", model, measure, f"{label}|{exit_layer}", anew=anew))


def model_cost(model: Llama, other: Llama, *, anew: bool = False) -> float:
    """Returns the time of a separate model's pass over two rows, relative to a target's of one.

    Args:
        model: the target.
        other: the separate model.
        anew: measure now, whatever is remembered.
    """

    def measure() -> float:
        context = min(fitting(model, CONTEXT), fitting(other, CONTEXT))
        cache = model.new_cache([model.config.num_layers], context + MAX_WIDTH)
        apart = other.new_cache([other.config.num_layers], context + MAX_WIDTH)
        run = partial(plain_pass, other, context, apart, LEVEL_ROWS)
        with torch.inference_mode():
            return _beside_plain(model, context, cache, run)

    detail = f"{other.config}|{other.dtype}"
    return float(remembered("levels", model, measure, detail, anew=anew))


def _whole_passes(model: Llama) -> list[float]:
    context = fitting(model, CONTEXT)
    with torch.inference_mode():
        cache = model.new_cache([model.config.num_layers], context + MAX_WIDTH)
        tasks = {width: partial(plain_pass, model, context, cache, width) for width in WIDTHS}
        # Each pass drives what the one before has left out of the caches.
        times = in_turn(
            *(tasks, lambda _: None, REPEATS, PATIENCE_S),
            seldom=lambda width: width >= WIDE,
            untimed=untimed(model),
        )
    seconds = filled({width: usual for width, (usual, _) in times.items()})
    return [time / seconds[1] for time in seconds]


def _beside_plain(model: Llama, context: int, cache: Cache, task: Callable[[], float]) -> float:
    """Returns the time of a task right after a plain pass, relative to that pass."""
    plain = partial(plain_pass, model, context, cache)
    tasks: dict[str, Callable[[], float]] = {"plain": plain, "task": task}
    times = in_turn(tasks, lambda _: None, REPEATS, PATIENCE_S, untimed=untimed(model))
    return times["task"][0] / times["plain"][0]
