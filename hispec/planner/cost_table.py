"""What passes cost, as a table: seconds by layers, rows and head.

A pass of a level runs the layers that its rows lack, then its head:

    c(i → j, n rows) = call(n) + (j − i) · layer(n) + head_j(n)

``call`` is what any pass costs however short. Its newest row has seen no layer at all: it is
lifted, alone, through those below, which is a run of layers more in the same pass. A separate model
shares nothing and costs what a whole pass of its own does.

A target's pass drives all else from the caches. An exit's first pass of a round finds its weights
in memory; when it drafts on, the caches hold some of them, which is what its passes are priced at.
The first one's surcharge is :meth:`CostTable.first_s`.

Nothing here runs a model: :mod:`hispec.planner.costs` fills such a table by measuring,
:mod:`hispec.planner.devices` from sizes and bandwidths of machines that are not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from hispec.hierarchy import MAX_WIDTH

#: The name of the last node, which has all layers.
TARGET = "target"
#: What the engine's own work takes of a lowest exit's step, where nothing adapts: its passes are
#: short and follow each other, so that Python finds itself in the caches (0.25 to 0.35 measured).
LOWEST_STEP = 0.3


@dataclass(frozen=True)
class CostTable:
    """Seconds of passes of one model, its exits and what else drafts for it.

    Attributes:
        depths: layers below each exit and the target, by name; ascending.
        call_s: (MAX_WIDTH + 1,) of a pass, whatever its layers, by rows.
        lift_s: of one that lifts, besides what it lifts through.
        layer_s: (MAX_WIDTH + 1,) of one layer.
        heads_s: of each exit's head and the target's, picks included, by rows.
        round_s: of what each exit's head takes more at a root than from there on: to catch up on
            what was committed, and to come from memory once.
        kept_s: of what one of an exit's layers takes less from there on, and where the level above
            lifts what has seen no layer.
        models_s: of a whole pass of each separate model, by rows.
        prompt_s: of a token of a prompt that a separate model reads, or an exit's head, before it
            first drafts in a text.
        step_s: of the engine's own work in a level's step; of a lowest exit's ``LOWEST_STEP``.
        ask_s: of asking the databases once and teaching them what came of it.
        spread: how far measurements scattered: the median's distance from the least, relative.
        context: positions before the passes that were measured.
    """

    depths: Mapping[str, int]
    call_s: Sequence[float]
    layer_s: Sequence[float]
    heads_s: Mapping[str, Sequence[float]]
    round_s: Mapping[str, float] = field(default_factory=dict)
    kept_s: Mapping[str, float] = field(default_factory=dict)
    models_s: Mapping[str, Sequence[float]] = field(default_factory=dict)
    prompt_s: Mapping[str, float] = field(default_factory=dict)
    lift_s: float = 0.0
    step_s: float = 0.0
    ask_s: float = 0.0
    spread: float = 0.0
    context: int = 0

    def layers_s(self, lower: int, upper: int, rows: float) -> float:
        """Returns the time of a pass through ``layers[lower:upper]`` over so many rows."""
        if lower == upper:
            return 0.0
        return at(self.call_s, rows) + (upper - lower) * at(self.layer_s, rows)

    def lifted_s(self, lower: int, upper: int, rows: float = 1) -> float:
        """Returns what a pass takes more that begins by lifting rows through these layers.

        Where an exit is behind them it has just drafted.
        """
        if lower == upper:
            return 0.0
        names = (name for name, depth in self.depths.items() if depth == upper)
        kept = max((self.kept_s.get(name, 0.0) for name in names), default=0.0)
        return self.lift_s + (upper - lower) * max(at(self.layer_s, rows) - kept, 0.0)

    def pass_s(self, name: str, known: int, rows: float, lifted: float = 1.0) -> float:
        """Returns the time of a level's step, drafting below it not included.

        An exit's first of a round takes :meth:`first_s` more.

        Args:
            name: an exit, a separate model or ``target``.
            known: layers whose states the rows have from the exit below; 0 if there is none.
            rows: of the pass, may be an average.
            lifted: how many of them have seen no layer yet where others have.
        """
        if name in self.models_s:
            return at(self.models_s[name], rows) + self.step_s
        depth = self.depths[name]
        below = lifted * self.lifted_s(0, known)
        own = self.layers_s(known, depth, rows) - self.kept_s.get(name, 0.0) * (depth - known)
        lowest = name != TARGET and not known
        besides = self.step_s * (LOWEST_STEP if lowest else 1.0)
        return below + own + at(self.heads_s[name], rows) + besides

    def first_s(self, name: str, known: int) -> float:
        """Returns what a level's first step of a round takes more than the others.

        Args:
            name: an exit, a separate model or the databases.
            known: layers whose states the exit below has; 0 if there is none.
        """
        own = self.depths.get(name, known) - known
        return self.round_s.get(name, 0.0) + self.kept_s.get(name, 0.0) * own

    @property
    def plain_s(self) -> float:
        """Seconds a token of plain decoding."""
        return self.pass_s(TARGET, 0, 1)

    def times(self, factor: float) -> CostTable:
        """Returns the table of passes that take ``factor`` times as long; the rest stays."""

        def slower(table: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
            return {name: [factor * time for time in row] for name, row in table.items()}

        return replace(
            self,
            call_s=[factor * time for time in self.call_s],
            layer_s=[factor * time for time in self.layer_s],
            heads_s=slower(self.heads_s),
            round_s={name: factor * time for name, time in self.round_s.items()},
            kept_s={name: factor * time for name, time in self.kept_s.items()},
            models_s=slower(self.models_s),
            prompt_s={name: factor * time for name, time in self.prompt_s.items()},
            lift_s=factor * self.lift_s,
        )

    def dearer(self, factor: float) -> CostTable:
        """Returns the table with further rows ``factor`` times as dear; one row costs the same."""

        def steeper(row: Sequence[float]) -> list[float]:
            return [row[0], *(row[1] + factor * (time - row[1]) for time in row[1:])]

        return replace(
            self,
            call_s=steeper(self.call_s),
            layer_s=steeper(self.layer_s),
            heads_s={name: steeper(row) for name, row in self.heads_s.items()},
            models_s={name: steeper(row) for name, row in self.models_s.items()},
        )

    def relative(self) -> list[float]:
        """Returns the target's passes by rows, relative to one row; never falling, 0 for none."""
        costs, least = [0.0], 0.0
        for rows in range(1, MAX_WIDTH + 1):
            least = max(least, self.pass_s(TARGET, 0, rows))
            costs.append(least)
        return [cost / costs[1] for cost in costs]

    def to_json(self) -> dict[str, Any]:
        """Returns what :meth:`from_json` reads."""
        return {
            "depths": dict(self.depths),
            "call_s": list(self.call_s),
            "layer_s": list(self.layer_s),
            "heads_s": {name: list(row) for name, row in self.heads_s.items()},
            "round_s": dict(self.round_s),
            "kept_s": dict(self.kept_s),
            "models_s": {name: list(row) for name, row in self.models_s.items()},
            "prompt_s": dict(self.prompt_s),
            "lift_s": self.lift_s,
            "step_s": self.step_s,
            "ask_s": self.ask_s,
            "spread": self.spread,
            "context": self.context,
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> CostTable:
        """Returns the table of a parsed JSON document."""
        return CostTable(**document)


def at(row: Sequence[float], rows: float) -> float:
    """Returns a table's value at a number of rows, between its entries on a straight line."""
    last = len(row) - 1
    if rows >= last:
        return row[last]
    low = int(rows)
    value = row[low]
    return value if rows == low else value + (rows - low) * (row[low + 1] - value)


def filled(times: Mapping[int, float]) -> list[float]:
    """Returns ``MAX_WIDTH + 1`` values from some: straight lines between them, never falling.

    Args:
        times: by rows; holds 1 and ``MAX_WIDTH``.
    """
    points, least = [], 0.0
    for rows in sorted(times):
        least = max(least, times[rows])
        points.append((rows, least))
    values = [0.0, points[0][1]]
    for (low, a), (high, b) in pairwise(points):
        values += [a + (b - a) * (rows - low) / (high - low) for rows in range(low + 1, high + 1)]
    return values
