"""What passes cost, measured on this machine: their time by layers, rows and head.

Decoding streams the weights whatever the width, so the second row of a pass is nearly free and the
thirtieth is not; where the bend lies differs from processor to processor. A pass through an eighth
of the layers and one through all of them, taken in turn so that neither finds its weights in a
cache, give the time of a layer and of what a call costs besides. They are measured once for a
machine, library, number of threads, dtype and model, and remembered; heads likewise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from hispec.drafter import RANKS, SHOWN
from hispec.model.cache import KVCache
from hispec.model.exits import ExitHead
from hispec.model.llama import Llama
from hispec.model.measured import remembered
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Found
from hispec.planner.cost_table import TARGET, CostTable, at, filled
from hispec_kernels import top_k

WIDTHS = (1, 2, 4, 8, 16, MAX_WIDTH)
HEAD_WIDTHS = (1, 2, 4, 8, MAX_WIDTH)
CONTEXT = 256
#: How often everything is timed: for a plan, and for a first text, which waits for it. Prices of
#: rows follow ordinary passes afterwards.
THOROUGH, REPEATS = 15, 5
#: Seconds after which two repeats are enough, likewise.
THOROUGH_S, PATIENCE_S = 30.0, 0.4
#: Rows of an exit's pass where nobody knows better: the root, and one that the databases propose.
LEVEL_ROWS = 2
#: Tokens that a round commits: what a head with a memory has to catch up on at the next root.
CAUGHT_UP = 2

#: What was measured: the usual time, and how far the median lies above the least, relative.
Times = tuple[float, float]


def pass_costs(model: Llama) -> list[float]:
    """Returns the time of a target's pass by width, relative to width 1; remembered.

    Returns:
        ``MAX_WIDTH + 1`` numbers that never fall; ``costs[w]`` is a pass of w rows through all
        layers and the vocabulary head. ``costs[0]`` is 0.
    """
    return cost_table(model, {}).relative()


def price_slope(model: Llama) -> float:
    """Returns by how much rows have proved dearer than :func:`pass_costs` says; 1 if never seen."""
    return float(remembered("slopes", model, lambda: 1.0))


def keep_price_slope(model: Llama, slope: float) -> None:
    """After the call :func:`price_slope` returns ``slope``, in later processes too."""
    remembered("slopes", model, lambda: slope, anew=True)


def level_cost(model: Llama, head: ExitHead, exit_layer: int, label: str = "") -> float:
    """Returns the time of an exit's first pass of a round, over two rows, in target's of one.

    Args:
        model: the target.
        head: the exit's.
        exit_layer: e.
        label: see :func:`cost_table`.
    """
    costs, name = cost_table(model, {exit_layer: head}, label=label), f"exit {exit_layer}"
    return (costs.pass_s(name, 0, LEVEL_ROWS) + costs.round_s[name]) / costs.plain_s


def model_cost(model: Llama, other: Llama) -> float:
    """Returns the time of a separate model's pass over two rows, relative to a target's of one.

    Args:
        model: the target.
        other: the separate model.
    """
    return cost_table(other, {}).pass_s(TARGET, 0, LEVEL_ROWS) / cost_table(model, {}).plain_s


def cost_table(
    model: Llama,
    heads: Mapping[int, ExitHead],
    context: int = CONTEXT,
    label: str = "",
    *,
    anew: bool = False,
) -> CostTable:
    """Returns the times of a model's passes on this machine.

    Args:
        model: the target.
        heads: of the exits, by layer.
        context: positions before the passes; attention takes longer the more there are.
        label: what tells these heads from others at the same layers; they are measured anew where
            there is none.
        anew: measure now, whatever is remembered.
    """
    context = max(min(context, model.config.max_positions - MAX_WIDTH), 2)
    effort = (THOROUGH, THOROUGH_S) if anew else (REPEATS, PATIENCE_S)
    passes = remembered(
        *("passes", model, lambda: measure(model, context, effort), f"{context}|{WIDTHS}"),
        anew=anew,
    )
    if anew:
        keep_price_slope(model, 1.0)  # what corrected the old table
    short, layers = passes["short"], model.config.num_layers
    scatter = [spread for row in ("few", "all", "head") for _, spread in passes[row]]
    few, whole, head = (
        filled({width: times[0] for width, times in zip(WIDTHS, passes[row], strict=True)})
        for row in ("few", "all", "head")
    )
    if layers > short:
        layer = [max(b - a, 0.0) / (layers - short) for a, b in zip(few, whole, strict=True)]
    else:
        layer = [time / layers for time in whole]
    call = [max(time - layers * one, 0.0) for time, one in zip(whole, layer, strict=True)]
    depths, heads_s, round_s = {}, {}, {}
    for exit_layer in sorted(heads):
        name = f"exit {exit_layer}"
        own = partial(measure_head, model, heads[exit_layer], exit_layer, context, effort)
        key = f"{label}|{exit_layer}|{context}|{HEAD_WIDTHS}"
        found = remembered("heads", model, own, key, anew=anew) if label else own()
        heads_s[name] = filled(
            {width: times[0] for width, times in zip(HEAD_WIDTHS, found["rows"], strict=True)}
        )
        round_s[name] = max(found["root"][0][0] - at(heads_s[name], 1), 0.0)
        depths[name] = exit_layer
    return CostTable(
        {**depths, TARGET: layers},
        call,
        layer,
        {**heads_s, TARGET: head},
        round_s,
        spread=statistics.median(scatter),
        context=context,
    )


def measure(model: Llama, context: int, effort: tuple[int, float]) -> dict[str, int | list[Times]]:
    """Returns seconds of passes through few layers and through all, and of the head, by width.

    Args:
        model: the target.
        context: positions before them.
        effort: repeats and patience, see :func:`in_turn`.

    Returns:
        ``short``, the number of layers in ``few``; and ``few``, ``all`` and ``head``: for each of
        ``WIDTHS`` the usual time and how it scatters.
    """
    layers = model.config.num_layers
    short = max(1, layers // 8)
    rows = torch.zeros(MAX_WIDTH, model.config.hidden_size, dtype=model.narrow.state_dtype)
    rows = rows.to(model.device)
    with torch.inference_mode():
        kv = model.new_cache([layers]).kv

        def through(count: int, width: int) -> float:
            states = model.run_layers(rows[:width], 0, count, context, kv)
            return float(states[0, 0])  # sync: the pass is over

        tasks: dict[tuple[str, int], Callable[[], float]] = {}
        for width in WIDTHS:
            tasks["all", width] = partial(through, layers, width)
            tasks["few", width] = partial(through, short, width)
            tasks["head", width] = partial(_head_alone, model, rows[:width])
        times = in_turn(tasks, lambda _: _plain_pass(model, context, kv), *effort)
    found = {row: [times[row, width] for width in WIDTHS] for row in ("few", "all", "head")}
    return {"short": short, **found}


def measure_head(
    model: Llama, head: ExitHead, exit_layer: int, context: int, effort: tuple[int, float]
) -> dict[str, list[Times]]:
    """Returns seconds of an exit's head over ``HEAD_WIDTHS`` rows, and over one at a new root.

    At a new root the target's weights have just gone through the caches, and the head's come from
    memory. A head that drafts on finds there what they hold of it from the row before.
    """
    layers = model.config.num_layers
    with torch.inference_mode():
        cache = model.new_cache([exit_layer, layers])

        def logits(rows: int, known: int) -> float:
            cache.computed.update({exit_layer: context + rows, layers: context})
            head.truncate(known)
            asked = Asked(RANKS, 1.0, None, range(context + 1, context + 1 + rows))
            return _picked(head.best(cache, context, Nodes.line(context, rows), asked))

        tasks: dict[tuple[str, int], Callable[[], float]] = {
            ("rows", width): partial(logits, width, context) for width in HEAD_WIDTHS
        }
        tasks["root", 1] = partial(logits, 1, context - CAUGHT_UP)

        def before(task: tuple[str, int]) -> None:
            _plain_pass(model, context, cache.kv)
            if task[0] == "rows":
                tasks[task]()

        times = in_turn(tasks, before, *effort)
        head.truncate(0)
    return {"rows": [times["rows", width] for width in HEAD_WIDTHS], "root": [times["root", 1]]}


def _head_alone(model: Llama, states: torch.Tensor) -> float:
    asked = Asked(SHOWN, 1.0, None, range(len(states)), odds=False)
    found = model.narrow.best(model.head, states, model.norm, asked, None)
    return _picked(model.logits(states) if found is None else found)


def _plain_pass(model: Llama, context: int, kv: KVCache) -> None:
    """Every weight of the model has gone through the caches."""
    width, dtype = model.config.hidden_size, model.narrow.state_dtype
    row = torch.zeros(1, width, dtype=dtype, device=model.device)
    _head_alone(model, model.run_layers(row, 0, model.config.num_layers, context, kv))


def _picked(found: Found) -> float:
    ids = found[0] if isinstance(found, tuple) else top_k(found, 1)[1]
    return float(ids[0, 0])  # sync: the pass is over


def in_turn(
    tasks: Mapping[tuple[str, int], Callable[[], float]],
    before: Callable[[tuple[str, int]], None],
    repeats: int,
    patience: float,
) -> dict[tuple[str, int], Times]:
    """Returns the time of each task, one after the other several times, and how it scatters.

    Of a few timings the least is what a pass takes when nothing befalls it. Of many the median is
    what it usually takes, and steadier.

    Args:
        tasks: what to time.
        before: called with the task, untimed. In a round a pass of the target comes before an
            exit's first; without one its layers and its head (20 MB) stay in the caches, and it
            seems to cost half of what it does.
        repeats: how often.
        patience: seconds after which no further round begins, if each task was timed twice.
    """
    begun = time.perf_counter()
    times: dict[tuple[str, int], list[float]] = {key: [] for key in tasks}
    for repeat in range(repeats + 1):
        if repeat > 2 and time.perf_counter() - begun > patience:
            break
        for key, task in tasks.items():
            before(key)
            started = time.perf_counter()
            task()
            if repeat:  # the first round warms up
                times[key].append(time.perf_counter() - started)
    usual = statistics.median if repeats >= THOROUGH else min
    return {key: (usual(row), statistics.median(row) / min(row) - 1) for key, row in times.items()}
