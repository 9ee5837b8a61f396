"""What a hierarchy is: which databases, models and exits draft and verify, and how far.

A value, not a program: these are settings of one type, and the engine knows no other difference
between them.

    ar          nothing                           the target emits one token a pass
    layerskip   one exit drafts                   arXiv 2404.16710
    hispec      one drafts, a deeper one checks   arXiv 2510.01336
    hd          n-gram databases draft            arXiv 2502.05609

A level may also be a separate, smaller model of the same vocabulary (arXiv 2510.19705). It shares
no states with the target, so it stands below the exits.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from hispec.errors import UsageError

#: The widest pass of a round, the root included; see :data:`hispec.model.nodes.MAX_WIDTH`.
MAX_WIDTH = 32

#: The databases there are, in the order they are asked: the nearest in time first.
SOURCES = ("context", "history", "corpus", "recycle")


#: Tokens a separate model gathers where nobody says how many.
MODEL_WINDOW = 4


@dataclass(frozen=True)
class Level:
    """An exit, or a separate model, that drafts or verifies early.

    Attributes:
        exit_layer: e in 0 … L − 1: ``layers[0:e]`` have run; 0 for a separate model, which shares
            none of them.
        window: tokens this level gathers before the one above runs, ≥ 1.
        ranks: leave what contradicts this level's picks standing as branches for the levels above
            to judge, instead of pruning it.
        model: a separate model, as ``--model`` takes it; empty for an exit.
        adaptive: run only while that is expected to be worth its time; the window is the most then,
            not the goal. Levels that rank do, unless the whole hierarchy does not adapt.
    """

    exit_layer: int
    window: int
    ranks: bool = False
    model: str = ""
    adaptive: bool = False

    @property
    def name(self) -> str:
        """``exit 4``, or ``model`` and the last part of its path."""
        if self.model:
            return f"model {_last_part(self.model)}"
        return f"exit {self.exit_layer}"

    def to_json(self) -> dict[str, Any]:
        """Returns the level as :meth:`Hierarchy.from_json` reads it."""
        which = {"model": self.model} if self.model else {"exit_layer": self.exit_layer}
        flags = {name: True for name in ("ranks", "adaptive") if getattr(self, name)}
        return {**which, "window": self.window, **flags}

    def __str__(self) -> str:
        most = "at most " if self.ranks or self.adaptive else ""
        return f"{self.name} (window {most}{self.window})"


@dataclass(frozen=True)
class Hierarchy:
    """The levels below the target, from the shallowest up, and the databases below them.

    Attributes:
        levels: none means that the target alone checks.
        name: for tables.
        sources: (name, budget) of each database: the most tokens it may propose at a time; 0 turns
            it off.
        nodes: the most nodes all databases together may add to a tree at a time.
        branches: whether they may branch; otherwise only the likeliest chain is drafted.
        adaptive: draft only as far as it pays, ask ranking and adaptive levels only where they pay,
            and learn from the text how often what is proposed is right. Otherwise trees are always
            as large, and windows as long, as they may be, and of what a ranking level finds likely
            its pick alone is added.
    """

    levels: tuple[Level, ...] = ()
    name: str = "custom"
    sources: tuple[tuple[str, int], ...] = ()
    nodes: int = 0
    branches: bool = True
    adaptive: bool = True

    def __post_init__(self) -> None:
        for level in self.levels:
            if level.window < 1:
                raise UsageError(
                    f"window must be at least 1, got {level.window} at {level.name}. "
                    f"Use 1 or more, or drop the level."
                )
        names = [level.name for level in self.models]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UsageError(f"two levels are called {twice}. Name each once, or rename a folder.")
        if self.models != self.levels[: len(self.models)]:
            raise UsageError(
                f"a separate model shares no states with the exits, so it stands below them: put "
                f"{names[-1]} first."
            )
        exits = self.exit_layers
        for lower, upper in pairwise(exits):
            if lower == upper:
                raise UsageError(f"exit_layer {lower} is given twice. Name each exit once.")
            if lower > upper:
                raise UsageError(
                    f"exit layers must ascend, got {', '.join(map(str, exits))}. "
                    f"Write {', '.join(map(str, sorted(exits)))}."
                )
        windows = sum(level.window for level in self.levels)
        if windows > MAX_WIDTH - 1:
            raise UsageError(
                f"the windows add up to {windows} tokens; a pass takes at most "
                f"{MAX_WIDTH - 1}. Make them smaller."
            )
        for name, budget in self.sources:
            if name not in SOURCES:
                near = difflib.get_close_matches(name, SOURCES, 1) or SOURCES[:1]
                raise UsageError(
                    f"unknown source {name!r}. Did you mean {near[0]!r}? "
                    f"Known: {', '.join(SOURCES)}."
                )
            if not 0 <= budget <= MAX_WIDTH - 1:
                raise UsageError(
                    f"the budget of {name} must be in [0, {MAX_WIDTH - 1}], got {budget}; 0 turns "
                    f"the source off."
                )
        if len(dict(self.sources)) < len(self.sources):
            raise UsageError("a source is given twice. Name each source once.")
        if not 0 <= self.nodes <= MAX_WIDTH - 1 - windows:
            raise UsageError(
                f"nodes must be in [0, {MAX_WIDTH - 1 - windows}], what the windows leave of a "
                f"pass of {MAX_WIDTH} rows; got {self.nodes}."
            )

    def check(self, num_layers: int) -> None:
        """Raises ``UsageError`` if an exit does not exist in a model of ``num_layers`` layers."""
        for exit_layer in self.exit_layers:
            if not 0 <= exit_layer < num_layers:
                hint = (
                    f"Use {num_layers - 1} or drop the level."
                    if exit_layer >= num_layers
                    else "Use 0 or more."
                )
                raise UsageError(
                    f"exit_layer must be in [0, {num_layers - 1}] for this {num_layers}-layer "
                    f"model, got {exit_layer}. {hint}"
                )

    def adapts(self, level: Level) -> bool:
        """Returns whether one of its levels runs only while that is expected to be worth it."""
        return self.adaptive and (level.ranks or level.adaptive)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The exits, ascending."""
        return tuple(level.exit_layer for level in self.levels if not level.model)

    @property
    def models(self) -> tuple[Level, ...]:
        """The levels that are separate models, from the lowest up."""
        return tuple(level for level in self.levels if level.model)

    def over(self, models: Sequence[str]) -> Hierarchy:
        """Returns this hierarchy with separate models below its levels, above its databases.

        Where databases draft below them they rank, lest they veto what comes for nothing.

        Args:
            models: as ``--model`` takes them, from the lowest up.
        """
        own = [level.model for level in self.models]  # a plan may have them
        models = [model for model in models if model not in own]
        if not models:
            return self
        ranks = bool(self.nodes)
        added = tuple(Level(0, MODEL_WINDOW, ranks, model) for model in models)
        names = "+".join([self.name, *map(_last_part, models)])
        levels = (*added, *self.levels)
        room = MAX_WIDTH - 1 - sum(level.window for level in levels)
        return replace(self, levels=levels, name=names, nodes=max(0, min(self.nodes, room)))

    def to_json(self) -> dict[str, Any]:
        """Returns what :meth:`from_json` reads."""
        levels = [level.to_json() for level in self.levels]
        document: dict[str, Any] = {"name": self.name, "levels": levels}
        if self.sources:
            document |= {"sources": dict(self.sources), "nodes": self.nodes}
            document |= {} if self.branches else {"branches": False}
        document |= {} if self.adaptive else {"adaptive": False}
        return document

    @staticmethod
    def from_json(document: Any, name: str = "custom") -> Hierarchy:
        """Returns the hierarchy of a parsed JSON document.

        A block ``plan`` says how a planner came by it and changes nothing here; see
        :mod:`hispec.planner.plan`.

        Raises:
            UsageError: a field is missing, unknown, or not an integer.
        """
        if not isinstance(document, dict) or not isinstance(document.get("levels"), list):
            raise UsageError(
                'a hierarchy is a JSON object such as {"levels": [{"exit_layer": 4, "window": 2}], '
                '"sources": {"context": 12}, "nodes": 8}.'
            )
        _check_fields("a hierarchy", document, {"levels"}, _HIERARCHY)
        levels = []
        for entry in document["levels"]:
            if not isinstance(entry, dict):
                raise UsageError(f"a level is an object, got {entry!r}.")
            known = _MODEL if "model" in entry else _EXIT
            _check_fields("a level", entry, {*known} - {"ranks", "adaptive"}, known)
            if entry.get("model") == "":
                raise UsageError("model must name a folder or a hub id, got an empty text.")
            levels.append(Level(**{"exit_layer": 0, **entry}))
        sources = document.get("sources", {})
        for source, budget in sources.items():
            _check_type(f"the budget of {source}", budget, int)
        return Hierarchy(
            tuple(levels),
            document.get("name", name),
            tuple(sources.items()),
            document.get("nodes", min(8, MAX_WIDTH - 1) if sources else 0),
            document.get("branches", True),
            document.get("adaptive", True),
        )

    @staticmethod
    def load(path: Path) -> Hierarchy:
        """Returns the hierarchy stored in a JSON file.

        Raises:
            UsageError: the file cannot be read or is no hierarchy.
        """
        try:
            document = json.loads(path.read_text())
        except OSError as error:
            raise UsageError(f"cannot read hierarchy {path}: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not JSON: {error}.") from None
        try:
            return Hierarchy.from_json(document, path.stem)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None

    def __str__(self) -> str:
        levels = self.levels
        if not self.adaptive:  # windows are not the most that is gathered, but what is
            levels = tuple(replace(level, ranks=False, adaptive=False) for level in levels)
        parts = [str(level) for level in levels]
        names = [source for source, budget in self.sources if budget > 0]
        if names and self.nodes:
            kind = "nodes" if self.branches else "tokens in a chain"
            most = "" if self.adaptive else "always "
            parts.insert(0, f"{' + '.join(names)} ({most}{self.nodes} {kind})")
        if not parts:
            return f"{self.name}: plain decoding"
        return f"{self.name}: {' → '.join(parts)} → target"


def _last_part(model: str) -> str:
    return Path(model).absolute().name


_LEVEL = {"window": int, "ranks": bool, "adaptive": bool}
_EXIT = {"exit_layer": int, **_LEVEL}
_MODEL = {"model": str, **_LEVEL}
_HIERARCHY = {
    "name": str,
    "levels": list,
    "sources": dict,
    "nodes": int,
    "branches": bool,
    "adaptive": bool,
    "plan": dict,
}
_TYPES = {int: "a whole number", bool: "true or false", str: "a text", dict: "an object"}


def _check_fields(what: str, entry: dict, needed: set[str], known: dict[str, type]) -> None:
    unknown, missing = set(entry) - set(known), needed - set(entry)
    if unknown or missing:
        raise UsageError(
            f"{what} has {', '.join(known)}; {json.dumps(entry)} "
            + (f"lacks {sorted(missing)[0]}." if missing else f"has {sorted(unknown)[0]}.")
        )
    for key, value in entry.items():
        _check_type(key, value, known[key])


def _check_type(key: str, value: Any, kind: type) -> None:
    # bool is a subclass of int.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{key} must be {_TYPES.get(kind, kind.__name__)}, got {value!r}.")


def eighth_and_quarter(num_layers: int) -> tuple[int, int]:
    """Returns HiSpec's exits, L/8 and L/4, rounded half up and kept apart: 4 and 8 of 30.

    Two layers have exits 0 and 1. One layer has exit 0 alone, which is then both.
    """
    draft = max(1, (num_layers + 4) // 8)
    check = min(max(draft + 1, (num_layers + 2) // 4), num_layers - 1)
    return min(draft, max(check - 1, 0)), check


def _paper_layerskip(num_layers: int) -> Hierarchy:
    # LayerSkip's runs of Llama-2-7B: exit 8 of 32, 6 tokens a draft.
    return Hierarchy((Level(eighth_and_quarter(num_layers)[1], 6),), "layerskip-paper")


def _paper_hispec(num_layers: int) -> Hierarchy:
    draft, check = eighth_and_quarter(num_layers)
    checks = (Level(check, 4),) if check > draft else ()
    return Hierarchy((Level(draft, 2), *checks), "hispec-paper")


AR = Hierarchy((), "ar")
HD = Hierarchy((), "hd", tuple((name, 12) for name in SOURCES), 12)
PAPERS = {"layerskip-paper": _paper_layerskip, "hispec-paper": _paper_hispec}
PRESETS = ("ar", "layerskip", "hispec", "hd", "auto", *PAPERS)


def preset(name: str, num_layers: int, best: dict[str, Hierarchy] | None = None) -> Hierarchy:
    """Returns a hierarchy by name.

    Args:
        name: ``ar``; ``layerskip`` or ``hispec``, with exits and windows for the exits at hand
            where there are such; ``layerskip-paper`` or ``hispec-paper``; ``hd``, databases alone;
            ``auto``, the best known for these exits, ``hd`` where there are none.
        num_layers: L.
        best: hierarchies for the exits at hand, measured or :func:`untuned`, by preset name.

    Raises:
        UsageError: an unknown name, with the nearest known one.
    """
    check_preset(name)
    best = best or {}
    if name == "ar":
        return AR
    if name in PAPERS:
        found = PAPERS[name](num_layers)
    elif name in best:
        found = best[name] if name == "auto" else replace(best[name], name=name)
    elif name in ("hd", "auto"):
        found = HD
    else:
        found = Hierarchy(PAPERS[f"{name}-paper"](num_layers).levels, name)
    found.check(num_layers)
    return found


def untuned(exits: Sequence[int]) -> dict[str, Hierarchy]:
    """Returns presets for trained exits that nobody has measured yet, by name.

    The lowest drafts, as it costs least, and the highest checks. All rank: they run only while that
    is expected to be worth their time, so that a guess costs little.

    Args:
        exits: layers, ascending, at least one.
    """
    lowest = Level(exits[0], 2, ranks=True)
    alone = (replace(lowest, window=4),)
    both = (lowest, Level(exits[-1], 3, ranks=True)) if len(exits) > 1 else (lowest,)
    return {
        "layerskip": Hierarchy(alone, "layerskip"),
        "hispec": Hierarchy(both, "hispec"),
        "auto": Hierarchy((lowest,), "hd+exit", HD.sources, HD.nodes),
    }


def check_preset(name: str) -> None:
    """Raises ``UsageError`` with the nearest known name if there is no such preset."""
    if name not in PRESETS:
        near: Sequence[str] = difflib.get_close_matches(name, PRESETS, 1) or ("auto",)
        raise UsageError(
            f"unknown hierarchy {name!r}. Did you mean {near[0]!r}? "
            f"Known: {', '.join(PRESETS)}, or a JSON file."
        )
