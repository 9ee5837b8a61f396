"""What passes cost while a text is written: a table at first, refined by the passes themselves.

A table measured beforehand is right for the context it was measured at and for the machine as it
was then. Both change: attention makes a row dearer the longer the text is, and a neighbour who
takes half of the memory's bandwidth makes it cheaper beside the weights. So every pass is timed,
which costs nothing, and between texts two numbers are fitted: the time u of a pass over one row,
and s, by how much rows are dearer than the table says.

    seconds(w) = u · (1 + s · (table[w] − 1))

How much dearer attention makes a row by a text's length (1,200 tokens made the second to fourth
rows twice as dear on AVX2) is measured when a long text first comes, and the table is that of the
text's prompt.

An exit that remembers what came before reads the whole prompt in its first pass of a text. That
costs by the token, is measured beforehand, and is told apart from what its other passes take.

Passes of earlier texts fade. A pass that takes several times as long as expected was interrupted,
and counts as if it had not been; a text's first ones, which catch up on its prompt, do not count at
all. While a text is written prices stand still.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

#: What is counted fades: after so many passes it weighs 1/e.
MEMORY = 1000.0
#: What the table counts for, in passes.
TRUSTED = 50.0
#: A pass that takes so many times the time expected was interrupted.
INTERRUPTED = 3.0
#: Bounds of s.
LEAST, MOST = 0.25, 4.0


@dataclass(frozen=True)
class Growth:
    """How passes get slower with the text, in passes over one row at ``context``, by token.

    Attributes:
        context: tokens at which the table was measured.
        first: of the first row.
        more: of each further one.
    """

    context: int = 0
    first: float = 0.0
    more: float = 0.0

    def table(self, table: Sequence[float], length: int) -> list[float]:
        """Returns a table of relative times by width as it is behind so many tokens."""
        far = length - self.context
        one = 1.0 + far * self.first
        if one <= 0.5:  # shorter than what was measured by more than it can say
            return list(table)
        wider = [cost + far * (self.first + self.more * (w - 1)) for w, cost in enumerate(table)]
        costs = [0.0, *(max(cost / one, 1.0) for cost in wider[1:])]
        return list(accumulate(costs, max))


class Prices:
    """Relative times of passes, by rows and by exit.

    Args:
        table: relative time of a target's pass by width, ``table[w]`` for 0 … MAX_WIDTH.
        levels: relative time of a pass of each exit, by name.
        slope: s to start with.
        save: is told s after every text.
        growth: of the table with the text.
        reading: relative time that a token of the prompt takes an exit, likewise.

    Attributes:
        costs: the table as it has proved to be.
        levels: likewise.
        starts: relative time that an exit's first pass of this text takes more than others.
        slope: s.
        growth: of the table with the text; None while nobody knows.
    """

    def __init__(
        self,
        table: Sequence[float],
        levels: Mapping[str, float],
        slope: float = 1.0,
        save: Callable[[float], object] = lambda slope: None,
        growth: Growth | None = None,
        reading: Mapping[str, float] | None = None,
    ) -> None:
        self._measured, self.growth = list(table), growth
        self._table = list(table)  # for this text
        self._save = save
        self._known = slope
        self._start: dict[str, float] = {}
        self.costs: list[float] = []
        self.levels: dict[str, float] = {}
        self.starts: dict[str, float] = {}
        self._reading: dict[str, float] = {}
        self.add(levels, reading)
        # Σ 1, Σ x, Σ x², Σ t, Σ x t over passes, x = table[w] − 1; and Σ t, Σ 1 by exit.
        self._sums = [0.0] * 5
        self._level_sums: dict[str, list[float]] = {}
        self._set(slope)

    def begin(self, length: int, read: Mapping[str, int] | None = None) -> None:
        """Makes prices those of a text.

        Args:
            length: tokens of its prompt.
            read: of these, by name, those that an exit has read already.
        """
        known = read or {}
        self.starts = {
            name: max(length - known.get(name, 0), 0) * token
            for name, token in self._reading.items()
        }
        if self.growth:
            self._table = self.growth.table(self._measured, length)
            self._set(self.slope)

    def add(self, levels: Mapping[str, float], reading: Mapping[str, float] | None = None) -> None:
        """Makes exits known; those that are keep their times."""
        for name, cost in levels.items():
            if name not in self._start:
                self._start[name] = self.levels[name] = cost
        self._reading = {**(reading or {}), **self._reading}

    def took(self, rows: int, seconds: float) -> None:
        """Counts a target's pass."""
        x = self._table[min(rows, len(self._table) - 1)] - 1.0
        count, _, _, total, _ = self._sums
        unit = total / (count + self.slope * self._sums[1]) if count else seconds
        expected = unit * (1.0 + self.slope * x)
        if count and seconds > INTERRUPTED * expected:
            seconds = expected
        fade = 1.0 - 1.0 / MEMORY
        for i, value in enumerate((1.0, x, x * x, seconds, x * seconds)):
            self._sums[i] = self._sums[i] * fade + value

    def level_took(self, name: str, seconds: float) -> None:
        """Counts an exit's pass, its head included; one that has no price is left out."""
        if name not in self._start:
            return
        sums = self._level_sums.setdefault(name, [0.0, 0.0])
        if sums[1] and seconds > INTERRUPTED * sums[0] / sums[1]:
            return
        fade = 1.0 - 1.0 / MEMORY
        sums[0] = sums[0] * fade + seconds
        sums[1] = sums[1] * fade + 1.0

    def refine(self) -> None:
        """Fits the prices to what was counted; for between texts."""
        count, x, xx, t, xt = self._sums
        if count < 1.0:
            return
        # What was known before, as passes of its own at both ends of a usual tree.
        known, end = self._known, self._table[len(self._table) // 4] - 1.0
        unit, half = t / (count + known * x), TRUSTED / 2
        far = unit * (1.0 + known * end)
        count, x, xx = count + TRUSTED, x + half * end, xx + half * end * end
        t, xt = t + half * (unit + far), xt + half * end * far
        spread = count * xx - x * x
        slope = (count * xt - x * t) / spread if spread > 0 else 0.0
        one = max((t - slope * x) / count, 0.1 * unit)
        self._set(min(max(slope / one, LEAST), MOST) if spread > 0 else self.slope)
        for name, (total, runs) in self._level_sums.items():
            start = self._start[name] * one
            self.levels[name] = (total + TRUSTED * start) / (runs + TRUSTED) / one
        self._save(self.slope)

    def _set(self, slope: float) -> None:
        self.slope = slope
        if not self.costs:
            self.costs = list(self._table)
        # In place: whoever decides by them holds this list.
        self.costs[1:] = [1.0 + slope * (cost - 1.0) for cost in self._table[1:]]
