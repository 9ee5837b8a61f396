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
from hispec.model.level import slots_read
from hispec.model.llama import Llama
from hispec.model.measured import remembered
from hispec.model.nodes import MAX_WIDTH
from hispec.planner.cost_table import TARGET, CostTable, filled
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
#: What is timed of a head besides; see :func:`measure_head`.
DRAFTS = ("first", "again", "prompt", "cold", "kept")
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
    key = f"{context}|{WIDTHS}|and lifting"
    passes = remembered("passes", model, lambda: measure(model, context), key, anew=anew)
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
    # Of two rows all but the first few layers run as ever; there one row is lifted alone.
    lifted = whole[2] - short * (layer[2] - layer[1])
    lift = max(passes["lift"][0][0] - lifted, 0.0) if layers > short else 0.0
    depths, heads_s, round_s, kept_s, prompt_s = {}, {}, {}, {}, {}
    for exit_layer in sorted(heads):
        name = f"exit {exit_layer}"
        own = partial(measure_head, model, heads[exit_layer], exit_layer, context)
        key = f"{label}|{exit_layer}|{context}|{HEAD_WIDTHS}|{REPEATS}|{DRAFTS}"
        found = remembered("heads", model, own, key, anew=anew) if label else own()
        heads_s[name] = filled(
            {width: times[0] for width, times in zip(HEAD_WIDTHS, found["rows"], strict=True)}
        )
        depths[name] = exit_layer
        first, again, prompt, cold, kept = (found[task][0][0] for task in DRAFTS)
        # Layers and head together, as the caches hold less of both than of either alone.
        surcharge = max(first - again, 0.0)
        kept_s[name] = min(max(cold - kept, 0.0), surcharge) / max(exit_layer, 1)
        kept_s[name] = min(kept_s[name], layer[1])
        round_s[name] = surcharge - exit_layer * kept_s[name]
        reads = slots_read(heads[exit_layer]) is not None
        prompt_s[name] = max(prompt - first, 0.0) / context if reads else 0.0
    return CostTable(
        {**depths, TARGET: layers},
        call,
        layer,
        {**heads_s, TARGET: head},
        round_s,
        kept_s,
        prompt_s=prompt_s,
        lift_s=lift,
        spread=statistics.median(scatter),
        context=context,
    )


def measure(model: Llama, context: int) -> dict[str, int | list[Times]]:
    """Returns seconds of passes through few layers and through all, and of the head, by width.

    Args:
        model: the target.
        context: positions before them.

    Returns:
        ``short``, the number of layers in ``few``; ``few``, ``all`` and ``head``: for each of
        ``WIDTHS`` the usual time and how it scatters; and ``lift``: of a pass through all over two
        rows, the second of which is first lifted through ``few``, where that is not all.
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

        def lifting() -> float:
            part.computed.update({short: context + 1, layers: context})
            model.advance(part, [0] * (context + 2), context + 2, layers)
            return float(part.states[layers][context, 0])  # sync

        tasks: dict[tuple[str, int], Callable[[], float]] = {}
        if short < layers:
            tasks["lift", 2] = lifting
        for width in WIDTHS:
            tasks["all", width] = partial(through, layers, width)
            tasks["few", width] = partial(through, short, width)
            tasks["head", width] = partial(head_alone, model, states[:width])
        before = partial(plain_pass, model, context, whole)
        times = in_turn(tasks, lambda _: before(), REPEATS, PATIENCE_S, untimed=untimed(model))
    found = {row: [times[row, width] for width in WIDTHS] for row in ("few", "all", "head")}
    return {"short": short, **found, "lift": [x for key, x in times.items() if key[0] == "lift"]}


def measure_head(
    model: Llama, head: ExitHead, exit_layer: int, context: int
) -> dict[str, list[Times]]:
    """Returns seconds of an exit's head over ``HEAD_WIDTHS`` rows, and of drafts of one row.

    At a new root the target's weights have just gone through the caches, and an exit's come from
    memory. One that drafts on finds there what they hold of it from the row before.

    Returns:
        ``rows``: the head by itself, drafting on. ``first`` and ``again``: layers and head, at a
        new root and drafting on; ``prompt``: a text's very first, before which the head reads it.
        ``cold`` and ``kept``: the layers alone, at a new root and behind a draft.
    """
    layers = model.config.num_layers
    with torch.inference_mode():
        cache = model.new_cache([exit_layer, layers], context + MAX_WIDTH)

        def picked(rows: int, known: int) -> float:
            return drafted(head, cache, context, rows, known)

        tasks: dict[tuple[str, int], Callable[[], float]] = {
            ("rows", width): partial(picked, width, context) for width in HEAD_WIDTHS
        }

        def lifts() -> float:
            return float(run_rows(model, cache, exit_layer, context, 1)[0, 0])  # sync

        def drafts(known: int) -> float:
            run_rows(model, cache, exit_layer, context, 1)
            return picked(1, known)

        first, again = partial(drafts, context - CAUGHT_UP), partial(drafts, context)
        named: tuple[Callable[[], float], ...] = (first, again, partial(drafts, 0), lifts, lifts)
        tasks.update({(name, 1): task for name, task in zip(DRAFTS, named, strict=True)})

        def before(task: tuple[str, int]) -> None:
            plain_pass(model, context, cache)
            if task[0] == "rows":
                tasks[task]()
            elif task[0] in ("again", "kept"):
                first()

        times = in_turn(tasks, before, REPEATS, PATIENCE_S, untimed=untimed(model))
        head.truncate(0)
    found = {name: [times[name, 1]] for name in DRAFTS}
    return {"rows": [times["rows", width] for width in HEAD_WIDTHS], **found}
