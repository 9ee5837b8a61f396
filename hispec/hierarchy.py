"""What a hierarchy is: which exits draft and verify, and how many tokens each gathers.

A value, not a program: plain decoding, LayerSkip and HiSpec are three settings of one type, and the
engine knows no other difference between them.

    ar          no exits                          the target emits one token a pass
    layerskip   one exit drafts                   arXiv 2404.16710
    hispec      one drafts, a deeper one checks   arXiv 2510.01336
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hispec.errors import UsageError

#: The widest pass of a round, the root included; see :data:`hispec.model.llama.MAX_WIDTH`.
MAX_WIDTH = 32


@dataclass(frozen=True)
class Level:
    """An exit that drafts or verifies early.

    Attributes:
        exit_layer: e in 1 … L − 1: ``layers[0:e]`` have run.
        window: tokens this level gathers before the one above runs, ≥ 1.
    """

    exit_layer: int
    window: int


@dataclass(frozen=True)
class Hierarchy:
    """The levels below the target, from the shallowest up; none means plain decoding."""

    levels: tuple[Level, ...] = ()
    name: str = "custom"

    def __post_init__(self) -> None:
        for level in self.levels:
            if level.window < 1:
                raise UsageError(
                    f"window must be at least 1, got {level.window} at exit {level.exit_layer}. "
                    f"Use 1 or more, or drop the level."
                )
        exits = [level.exit_layer for level in self.levels]
        for lower, upper in pairwise(exits):
            if lower == upper:
                raise UsageError(f"exit_layer {lower} is given twice. Name each exit once.")
            if lower > upper:
                raise UsageError(
                    f"exit layers must ascend, got {', '.join(map(str, exits))}. "
                    f"Write {', '.join(map(str, sorted(exits)))}."
                )
        width = 1 + sum(level.window for level in self.levels)
        if width > MAX_WIDTH:
            raise UsageError(
                f"the windows add up to {width - 1} tokens; a pass takes at most "
                f"{MAX_WIDTH - 1}. Make them smaller."
            )

    def check(self, num_layers: int) -> None:
        """Raises ``UsageError`` if an exit does not exist in a model of ``num_layers`` layers."""
        for level in self.levels:
            if not 1 <= level.exit_layer < num_layers:
                hint = (
                    f"Use {num_layers - 1} or drop the level."
                    if level.exit_layer >= num_layers
                    else "Use 1 or more."
                )
                raise UsageError(
                    f"exit_layer must be in [1, {num_layers - 1}] for this {num_layers}-layer "
                    f"model, got {level.exit_layer}. {hint}"
                )

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The exits, ascending."""
        return tuple(level.exit_layer for level in self.levels)

    def to_json(self) -> dict[str, Any]:
        """Returns what :meth:`from_json` reads."""
        return {
            "name": self.name,
            "levels": [{"exit_layer": x.exit_layer, "window": x.window} for x in self.levels],
        }

    @staticmethod
    def from_json(document: Any, name: str = "custom") -> Hierarchy:
        """Returns the hierarchy of a parsed JSON document.

        Raises:
            UsageError: a field is missing, unknown, or not an integer.
        """
        if not isinstance(document, dict) or not isinstance(document.get("levels"), list):
            raise UsageError(
                'a hierarchy is a JSON object such as {"levels": [{"exit_layer": 4, "window": 2}]}.'
            )
        levels = []
        for entry in document["levels"]:
            if not isinstance(entry, dict):
                raise UsageError(f"a level is an object, got {entry!r}.")
            unknown = set(entry) - {"exit_layer", "window"}
            missing = {"exit_layer", "window"} - set(entry)
            if unknown or missing:
                raise UsageError(
                    f"a level has exit_layer and window; {json.dumps(entry)} "
                    + (f"lacks {sorted(missing)[0]}." if missing else f"has {sorted(unknown)[0]}.")
                )
            for key, value in entry.items():
                if isinstance(value, bool) or not isinstance(value, int):
                    raise UsageError(f"{key} must be a whole number, got {value!r}.")
            levels.append(Level(**entry))
        return Hierarchy(tuple(levels), str(document.get("name", name)))

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
        if not self.levels:
            return f"{self.name}: plain decoding"
        parts = (f"exit {x.exit_layer} (window {x.window})" for x in self.levels)
        return f"{self.name}: {' → '.join(parts)} → target"


def eighth_and_quarter(num_layers: int) -> tuple[int, int]:
    """Returns HiSpec's exits, L/8 and L/4, rounded half up and kept apart: 4 and 8 of 30."""
    draft = max(1, (num_layers + 4) // 8)
    return draft, max(draft + 1, (num_layers + 2) // 4)


def _paper_layerskip(num_layers: int) -> Hierarchy:
    # LayerSkip's runs of Llama-2-7B: exit 8 of 32, 6 tokens a draft.
    return Hierarchy((Level(eighth_and_quarter(num_layers)[1], 6),), "layerskip-paper")


def _paper_hispec(num_layers: int) -> Hierarchy:
    draft, check = eighth_and_quarter(num_layers)
    return Hierarchy((Level(draft, 2), Level(check, 4)), "hispec-paper")


AR = Hierarchy((), "ar")
PAPERS = {"layerskip-paper": _paper_layerskip, "hispec-paper": _paper_hispec}
PRESETS = ("ar", "layerskip", "hispec", "auto", *PAPERS)


def preset(name: str, num_layers: int, best: dict[str, Hierarchy] | None = None) -> Hierarchy:
    """Returns a hierarchy by name.

    Args:
        name: ``ar``; ``layerskip`` or ``hispec``, with the windows measured best for the exits at
            hand where there are such; ``layerskip-paper`` or ``hispec-paper``; ``auto``, the best
            known for these exits, plain decoding if none is.
        num_layers: L.
        best: hierarchies measured for the exits at hand, by preset name.

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
        found = Hierarchy(best[name].levels, best[name].name if name == "auto" else name)
    elif name == "auto":
        return AR
    else:
        found = Hierarchy(PAPERS[f"{name}-paper"](num_layers).levels, name)
    found.check(num_layers)
    return found


def check_preset(name: str) -> None:
    """Raises ``UsageError`` with the nearest known name if there is no such preset."""
    if name not in PRESETS:
        near: Sequence[str] = difflib.get_close_matches(name, PRESETS, 1) or ("auto",)
        raise UsageError(
            f"unknown hierarchy {name!r}. Did you mean {near[0]!r}? "
            f"Known: {', '.join(PRESETS)}, or a JSON file."
        )
