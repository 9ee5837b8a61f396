"""What passes cost, measured on this machine: their time by layers, rows and head.

A pass through an eighth of the layers and one through all of them, taken in turn so that neither
finds its weights in a cache, give the time of a layer and of what a call costs besides. They are
measured once for a machine, library, number of threads, dtype and model, and remembered; heads
likewise. It takes half a minute, so only plans do it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch

from hispec.model.exits import ExitHead
from hispec.model.llama import Llama
from hispec.model.measured import remembered
from hispec.model.nodes import MAX_WIDTH
from hispec.planner.cost_table import TARGET, CostTable, at, filled
from hispec.planner.timing import (
    CAUGHT_UP,
    CONTEXT,
    WIDTHS,
    Times,
    drafted,
    fitting,
    head_alone,
    in_turn,
    plain_pass,
    run_rows,
    untimed,
)

HEAD_WIDTHS = (1, 2, 4, 8, MAX_WIDTH)
#: Everything is timed so often in turn, until so many seconds are over.
REPEATS, PATIENCE_S = 15, 30.0


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
    context = fitting(model, context)
    passes = remembered(
        "passes", model, lambda: measure(model, context), f"{context}|{WIDTHS}|as run", anew=anew
    )
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
    depths, heads_s, round_s, kept_s, prompt_s = {}, {}, {}, {}, {}
    for exit_layer in sorted(heads):
        name = f"exit {exit_layer}"
        own = partial(measure_head, model, heads[exit_layer], exit_layer, context)
        key = f"{label}|{exit_layer}|{context}|{HEAD_WIDTHS}|{REPEATS}|and reading"
        found = remembered("heads", model, own, key, anew=anew) if label else own()
        heads_s[name] = filled(
            {width: times[0] for width, times in zip(HEAD_WIDTHS, found["rows"], strict=True)}
        )
        round_s[name] = max(found["root"][0][0] - at(heads_s[name], 1), 0.0)
        depths[name] = exit_layer
        # Layers and head together, as the caches hold less of both than of either alone.
        first = found["first"][0][0]
        prompt_s[name] = max(found["prompt"][0][0] - first, 0.0) / context
        surcharge = first - found["again"][0][0]
        kept = (surcharge - round_s[name]) / max(exit_layer, 1)
        kept_s[name] = min(max(kept, 0.0), layer[1])
    return CostTable(
        {**depths, TARGET: layers},
        call,
        layer,
        {**heads_s, TARGET: head},
        round_s,
        kept_s,
        prompt_s=prompt_s,
        spread=statistics.median(scatter),
        context=context,
    )


def measure(model: Llama, context: int) -> dict[str, int | list[Times]]:
    """Returns seconds of passes through few layers and through all, and of the head, by width.

    Args:
        model: the target.
        context: positions before them.

    Returns:
        ``short``, the number of layers in ``few``; and ``few``, ``all`` and ``head``: for each of
        ``WIDTHS`` the usual time and how it scatters.
    """
    layers = model.config.num_layers
    short = max(1, layers // 8)
    with torch.inference_mode():
        positions = context + MAX_WIDTH
        whole = model.new_cache([layers], positions)
        part = model.new_cache([short, layers], positions) if short < layers else whole
        states = run_rows(model, whole, layers, context, MAX_WIDTH)

        def through(count: int, width: int) -> float:
            cache = whole if count == layers else part
            found = run_rows(model, cache, count, context, width)
            return float(found[0, 0])  # sync: the pass is over

        tasks: dict[tuple[str, int], Callable[[], float]] = {}
        for width in WIDTHS:
            tasks["all", width] = partial(through, layers, width)
            tasks["few", width] = partial(through, short, width)
            tasks["head", width] = partial(head_alone, model, states[:width])
        before = partial(plain_pass, model, context, whole)
        times = in_turn(tasks, lambda _: before(), REPEATS, PATIENCE_S, untimed=untimed(model))
    found = {row: [times[row, width] for width in WIDTHS] for row in ("few", "all", "head")}
    return {"short": short, **found}


def measure_head(
    model: Llama, head: ExitHead, exit_layer: int, context: int
) -> dict[str, list[Times]]:
    """Returns seconds of an exit's head over ``HEAD_WIDTHS`` rows, and over one at a new root.

    At a new root the target's weights have just gone through the caches, and the head's come from
    memory. A head that drafts on finds there what they hold of it from the row before. So do the
    exit's layers: ``first`` and ``again`` are both together, over one row, at a new root and as it
    drafts on; ``prompt`` is a text's very first, before which the head reads it.
    """
    layers = model.config.num_layers
    with torch.inference_mode():
        cache = model.new_cache([exit_layer, layers], context + MAX_WIDTH)

        def picked(rows: int, known: int) -> float:
            return drafted(head, cache, context, rows, known)

        tasks: dict[tuple[str, int], Callable[[], float]] = {
            ("rows", width): partial(picked, width, context) for width in HEAD_WIDTHS
        }
        tasks["root", 1] = partial(picked, 1, context - CAUGHT_UP)

        def drafts(known: int) -> float:
            run_rows(model, cache, exit_layer, context, 1)
            return picked(1, known)

        tasks["first", 1] = partial(drafts, context - CAUGHT_UP)
        tasks["again", 1] = partial(drafts, context)
        tasks["prompt", 1] = partial(drafts, 0)

        def before(task: tuple[str, int]) -> None:
            plain_pass(model, context, cache)
            if task[0] in ("rows", "again"):
                tasks[task]()

        times = in_turn(tasks, before, REPEATS, PATIENCE_S, untimed=untimed(model))
        head.truncate(0)
    found = {name: [times[name, 1]] for name in ("root", "first", "again", "prompt")}
    return {"rows": [times["rows", width] for width in HEAD_WIDTHS], **found}
