"""Timing passes, one kind after the other, as decoding would find them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

from hispec.drafter import RANKS, SHOWN
from hispec.model.cache import Cache
from hispec.model.exits import ExitHead, SharedHead
from hispec.model.llama import Llama, raised
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Found
from hispec_kernels import top_k

#: Positions before the passes that are timed, where nobody says how many.
CONTEXT = 256
#: Rows of the passes that are timed. Products work on a few rows at a time, so that time goes up in
#: steps: on AVX2 behind two rows and behind six.
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, MAX_WIDTH)
#: Tokens that a round commits: what a head with a memory has to catch up on at the next root.
CAUGHT_UP = 2
#: Rows of an exit's pass where nobody knows better: the root, and one that the databases propose.
LEVEL_ROWS = 2
#: What is timed seldom is timed every so many times.
SELDOM = 4
#: Rounds after which a median no longer goes by one that was interrupted.
ENOUGH = 3

Task = TypeVar("Task", bound=Hashable)
#: What was measured: the usual time, and how far the median lies above the least, relative.
Times = tuple[float, float]


def untimed(model: Llama) -> int:
    """Returns how often passes run before they are timed.

    A GPU's second is captured; and a head that is still to read its text has one more behind it.
    """
    return 3 if model.device.type == "cuda" else 1


def fitting(model: Llama, context: int) -> int:
    """Returns so many positions, or as many as a model leaves beside its widest pass."""
    return max(min(context, model.config.max_positions - MAX_WIDTH), 2)


def run_rows(model: Llama, cache: Cache, boundary: int, context: int, rows: int) -> torch.Tensor:
    """Runs rows from ``context`` on up to a boundary, as decoding does; which ids does not matter.

    Returns:
        Their states there, (rows, D).
    """
    cache.computed.update(dict.fromkeys(cache.boundaries, context))
    model.advance(cache, [0] * (context + rows), context + rows, boundary)
    return cache.states[boundary][context : context + rows]


def plain_pass(model: Llama, context: int, cache: Cache, rows: int = 1) -> float:
    """Runs a pass over all layers and the head, so that every weight goes through the caches."""
    layers = cache.boundaries[-1]
    asked = Asked(SHOWN, 1.0, None, range(context + 1, context + 1 + rows), odds=False)
    return whole_pass(model, SharedHead(model, layers), cache, layers, context, asked)


def exit_pass(model: Llama, head: ExitHead, cache: Cache, context: int, known: int) -> float:
    """Runs an exit's first pass of a round over two rows; its head knows ``known`` positions."""
    head.truncate(known)
    asked = Asked(RANKS, 1.0, None, range(context + 1, context + 1 + LEVEL_ROWS))
    return whole_pass(model, head, cache, cache.boundaries[0], context, asked)


def whole_pass(
    model: Llama, head: ExitHead, cache: Cache, boundary: int, context: int, asked: Asked
) -> float:
    """Runs a level's pass as the engine does, over as many rows as are asked about."""
    cache.computed.update(dict.fromkeys(cache.boundaries, context))
    end = context + len(asked.positions)
    nodes = Nodes.line(context, end - context)
    lifts, _ = model.lifts(cache, [0] * end, end, boundary, nodes=nodes)
    with raised(cache, boundary, end, lifts):
        return _picked(head.best(cache, context, nodes, asked, lifts))


def head_alone(model: Llama, states: torch.Tensor) -> float:
    """Runs the target's head over final states, (rows, D)."""
    asked = Asked(SHOWN, 1.0, None, range(len(states)), odds=False)
    found = model.narrow.best(model.head, states, model.norm, asked, None)
    return _picked(model.logits(states) if found is None else found)


def drafted(head: ExitHead, cache: Cache, context: int, rows: int, known: int) -> float:
    """An exit's head, which knows ``known`` positions, picks after rows from ``context`` on."""
    exit_layer, layers = cache.boundaries
    cache.computed.update({exit_layer: context + rows, layers: context})
    head.truncate(known)
    asked = Asked(RANKS, 1.0, None, range(context + 1, context + 1 + rows))
    return _picked(head.best(cache, context, Nodes.line(context, rows), asked))


def _picked(found: Found) -> float:
    ids = found[0] if isinstance(found, tuple) else top_k(found, 1)[1]
    return float(ids[0, 0])  # sync: the pass is over


def in_turn(
    tasks: Mapping[Task, Callable[[], float]],
    before: Callable[[Task], object],
    repeats: int,
    patience: float,
    *,
    seldom: Callable[[Task], bool] = lambda task: False,
    untimed: int = 1,
) -> dict[Task, Times]:
    """Returns the time of each task, one after the other several times, and how it scatters.

    The median is what a pass usually takes. The machine is not the same from one moment to the
    next, but it changes for all of them alike.

    Args:
        tasks: what to time.
        before: called with the task, untimed. In a round a pass of the target comes before an
            exit's first; without one its layers and its head (20 MB) stay in the caches, and it
            seems to cost half of what it does.
        repeats: how often.
        patience: seconds after which no further round begins, if there were two.
        seldom: whether a task is timed in the first round and every ``SELDOM``-th after it only.
        untimed: rounds beforehand.
    """
    for _ in range(untimed):
        for key, task in tasks.items():
            before(key)
            task()
    begun = time.perf_counter()
    times: dict[Task, list[float]] = {key: [] for key in tasks}
    for repeat in range(repeats):
        if repeat > 1 and time.perf_counter() - begun > patience:
            break
        for key, task in tasks.items():
            if repeat % SELDOM and seldom(key):
                continue
            before(key)
            started = time.perf_counter()
            task()
            times[key].append(time.perf_counter() - started)
    middle = {key: statistics.median(row) for key, row in times.items()}
    return {key: (middle[key], middle[key] / min(row) - 1) for key, row in times.items()}


def beside(
    plain: Callable[[], object],
    tasks: Mapping[Task, Callable[[], object]],
    repeats: int,
    patience: float,
    *,
    seldom: Callable[[Task], bool] = lambda task: False,
    untimed: int = 1,
) -> dict[Task, list[float]]:
    """Returns the times of each task relative to that of a plain pass right before it.

    What the machine does besides lasts longer than two passes, and so falls out of their ratio.

    Args:
        plain: a plain pass.
        tasks: what to time.
        repeats: how often.
        patience: seconds after which no further round begins, if there were ``ENOUGH``.
        seldom: see :func:`in_turn`.
        untimed: likewise.
    """
    ratios: dict[Task, list[float]] = {key: [] for key in tasks}
    begun = time.perf_counter()
    for repeat in range(-untimed, repeats):
        if repeat == 0:
            begun = time.perf_counter()
        if repeat >= ENOUGH and time.perf_counter() - begun > patience:
            break
        for key, task in tasks.items():
            if repeat > 0 and repeat % SELDOM and seldom(key):
                continue
            started = time.perf_counter()
            plain()
            middle = time.perf_counter()
            task()
            if repeat >= 0:
                ratios[key].append((time.perf_counter() - middle) / (middle - started))
    return ratios
