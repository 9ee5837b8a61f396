"""From a calibration to hierarchies worth measuring, the best expected one first.

Chains of strict exits are searched as a shortest path, by how many tokens they draft. What has no
closed form, databases' trees, exits that rank them and chains that stop where drafting does not
pay, is a handful of shapes, each replayed on the calibration's answers. The best of all are
forecast by the same replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

from hispec.hierarchy import AR, HD, MAX_WIDTH, Hierarchy, Level
from hispec.planner.calibrate import Calibration
from hispec.planner.replay import Replayed
from hispec.planner.shortest_path import Chain, Route, shortest

if TYPE_CHECKING:
    from hispec.generation import LM

#: Nodes of the databases' trees that are tried besides the preset's.
NODES = (4, 8, 16, 24)
#: Windows of an exit that ranks the databases' tree, and of one that prunes it.
RANKING_WINDOWS, PRUNING_WINDOWS = (1, 2, 4), (2, 4)
#: The longest window of a strict exit.
MAX_WINDOW = 8
#: Chains that are forecast again by replay.
CHAINS = 6


@dataclass(frozen=True)
class Candidate:
    """A hierarchy and what it is expected to do.

    Attributes:
        hierarchy: with a name of its own.
        done: its replay.
        speedup: expected, over plain decoding.
    """

    hierarchy: Hierarchy
    done: Replayed
    speedup: float


def candidates(
    lm: LM, calibration: Calibration, exits: Sequence[int], models: Sequence[str] = ()
) -> list[Candidate]:
    """Returns hierarchies with their forecasts, the best first; plain decoding is among them.

    Args:
        lm: the model.
        calibration: of this model and machine.
        exits: layers that may be used, ascending.
        models: separate ones that may, below the exits.
    """
    plain = calibration.replay(lm, AR).latency_s

    def forecast(hierarchy: Hierarchy) -> Candidate:
        done = calibration.replay(lm, hierarchy)
        return Candidate(hierarchy, done, plain / done.latency_s)

    found = {shape.name: forecast(shape) for shape in shapes(lm, exits, models)}
    options = [Route((), x.done.latency_s, x.hierarchy.name) for x in found.values()]
    levels = {level.name: level for level in _levels(exits, models)}
    routes = shortest(
        calibration.costs,
        calibration.acceptance,
        list(levels),
        max_window=MAX_WINDOW,
        options=options,
        keep=CHAINS + len(options) + 1,
    )
    for route in routes:
        chain = of_chain(route.chain, levels) if route.chain else None
        for shape in (chain, stopping(chain)) if chain else ():
            if shape.name not in found:
                found[shape.name] = forecast(shape)
    return sorted(found.values(), key=lambda candidate: -candidate.speedup)


def _levels(exits: Sequence[int], models: Sequence[str]) -> list[Level]:
    """All levels there are, from the lowest up."""
    return [*(Level(0, 1, model=model) for model in models), *(Level(e, 1) for e in exits)]


def shapes(lm: LM, exits: Sequence[int], models: Sequence[str] = ()) -> list[Hierarchy]:
    """Returns plain decoding, the presets, and the trees and levels over them that are tried."""
    found = {"ar": AR}
    for name in ("layerskip", "hispec", "hd"):
        preset = lm.hierarchy(name)
        if set(preset.exit_layers) <= set(exits) and {x.model for x in preset.models} <= set(
            models
        ):
            found[name] = replace(preset, name=name)
    best = (lm.exits.best.get("auto") if lm.exits else None) or HD
    sources = best.sources or HD.sources
    for nodes in NODES:
        found[f"tree{nodes}"] = Hierarchy((), f"tree{nodes}", sources, nodes)
    found["chain8"] = Hierarchy((), "chain8", sources, 8, branches=False)
    for level in _levels(exits, models):
        for ranks, sign, windows in ((True, "+", RANKING_WINDOWS), (False, "-", PRUNING_WINDOWS)):
            for window in windows:
                name = f"tree12{sign}{_short(level)}x{window}"
                levels = (replace(level, window=window, ranks=ranks),)
                found[name] = Hierarchy(levels, name, sources, 12)
    for pair in combinations(_levels(exits, models), 2):
        name = "tree12" + "".join(f"+{_short(level)}" for level in pair)
        both = tuple(replace(level, window=1, ranks=True) for level in pair)
        found[name] = Hierarchy(both, name, sources, 12)
    return list(found.values())


def of_chain(chain: Chain, levels: Mapping[str, Level]) -> Hierarchy | None:
    """Returns the hierarchy of a chain of strict levels, None if no pass can hold its windows."""
    if sum(window for _, window in chain) > MAX_WIDTH - 1:
        return None
    parts = tuple(replace(levels[name], window=window) for name, window in chain)
    return Hierarchy(parts, "-".join(f"{_short(level)}x{level.window}" for level in parts))


def stopping(chain: Hierarchy) -> Hierarchy:
    """Returns a chain whose windows are the most its levels draft: they stop where it pays."""
    levels = tuple(replace(level, adaptive=True) for level in chain.levels)
    return replace(chain, levels=levels, name=f"~{chain.name}")


def _short(level: Level) -> str:
    """An exit's layer, or a separate model's folder."""
    return level.name.partition(" ")[2]


def finalists(found: Sequence[Candidate], count: int = 3) -> list[Candidate]:
    """Returns what is worth measuring: the best few, the best without databases, the presets."""
    best = list(found[:count])
    best += [x for x in found if x.hierarchy.levels and not x.hierarchy.sources][:1]
    best += [x for x in found if x.hierarchy.name in ("layerskip", "hispec", "hd")]
    kept = {x.hierarchy.name: x for x in best if x.hierarchy.name != "ar"}
    return sorted(kept.values(), key=lambda candidate: -candidate.speedup)
