"""What a pass yields and what an exit brings, counted while decoding: what is worth its time.

Time is what drafting is paid in, and all of it has one price: the *rate*, the tokens that a unit of
time, a pass over one row, has yielded lately. Rows and exits that bring more than they cost at that
price make the text faster, others slower (Dinkelbach's rule for a ratio of sums).

An exit is judged by what its passes brought. What a round would have yielded without the lowest one
is known: the databases have proposed their own tree before it is asked, and where the text went is
seen. So it brought the tokens beyond those of that tree, and it is charged for the rows by which
the tree that was run is wider. A level above brought the tokens from the first node on that is due
to it, which the one below is not paid for. Tokens are expected in proportion to the chance that an
exit was asked for, that nobody else knows what comes next. Rows are as many whatever that chance:
what it has added of late, but its own pick at least.

    run the exit   ⇔   brought per chance · chance  >  rate · (cost + rows' cost per run)

An exit that remembers what came before has to read the prompt first, in this text once. It is not
asked before it is clear that this comes back: what its first run of each round would have brought
so far, were it ready, is added up, and a text is expected to go on for ``FORESEEN`` times as long.

An exit that does not pay is still asked now and then, as texts change: for ``EXPLORED`` of the time
where it nearly pays, and the less the less it brings, down to ``LEAST_EXPLORED`` of that. The time
is that of all texts, so that short ones add up; it includes reading, so that it is prompts that are
soon read in which this happens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

#: Tokens a pass is expected to yield before any was run, and what that guess counts for, in passes.
FIRST_RATE = 1.5
FIRST_PASSES = 4.0
#: What an exit is expected to bring before it was run, and what that guess counts for, in passes.
FIRST_BROUGHT = 0.4
FIRST_RUNS = 3.0
#: What an exit would have brought in a text so far is a share of what it will bring: one to this.
FORESEEN = 4.0
#: The share of the time that goes to asking exits that seem not to pay.
EXPLORED = 0.01
LEAST_EXPLORED = 0.1
#: The time that counts for it fades: after so many passes it weighs 1/e.
EXPLORED_MEMORY = 1024.0
#: What is counted fades: after so many passes, or runs of an exit, it weighs 1/e.
MEMORY = 32.0


@dataclass
class Gain:
    """What one exit brought, of late.

    Attributes:
        chances: it was asked for, summed.
        brought: tokens.
        runs: how often it ran.
        rows: relative time of the rows that are due to it.
    """

    chances: float = FIRST_RUNS
    brought: float = FIRST_RUNS * FIRST_BROUGHT
    runs: float = FIRST_RUNS
    rows: float = 0.0

    def add(self, chance: float, brought: float, rows: float) -> None:
        """Counts a run."""
        fade = 1.0 - 1.0 / MEMORY
        self.chances = self.chances * fade + chance
        # An exit can but be useless, whatever it kept from a tree in one round.
        self.brought = max(self.brought * fade + brought, 0.0)
        self.runs = self.runs * fade + 1.0
        self.rows = self.rows * fade + rows


@dataclass
class Gains:
    """What exits brought in all texts of a model.

    Attributes:
        by_level: each one's.
        total: time that passed, of late.
        explored: of it, what went to exits that seemed not to pay.
    """

    by_level: dict[str, Gain] = field(default_factory=dict)
    total: float = FIRST_PASSES
    explored: float = 0.0


class Worth:
    """Prices of rows and exits in one text.

    Args:
        costs: relative time of a target's pass by width; None if width costs nothing.
        level_costs: relative time of a pass of each exit, by name; those that are missing always
            pay.
        gains: of the exits; outlives the text.
        starts: relative time that an exit's first pass takes more, by name.
    """

    def __init__(
        self,
        costs: Sequence[float] | None,
        level_costs: Mapping[str, float],
        gains: Gains,
        starts: Mapping[str, float] | None = None,
    ) -> None:
        self._costs = costs
        self._level_costs = level_costs
        self._gains = gains
        self._starts = dict(starts or {})  # of exits that have not run yet
        self._missed = dict.fromkeys(self._starts, 0.0)  # what they would have brought, in time
        for name in level_costs:
            gains.by_level.setdefault(name, Gain())
        self._tokens = FIRST_RATE * FIRST_PASSES
        self._time = FIRST_PASSES
        self._spent = 0.0  # of this round, on exits
        self._runs: list[tuple[str, float]] = []  # of this round: exit, chance

    @property
    def rate(self) -> float:
        """Tokens per unit of time, of late."""
        return self._tokens / self._time

    def prices(self, width: int) -> Callable[[int], float]:
        """Returns the price, in tokens, of so many rows beyond ``width``."""
        costs = self._costs
        if costs is None:
            return lambda rows: 0.0
        rate, last = self.rate, len(costs) - 1
        base = costs[min(width, last)]
        return lambda rows: rate * (costs[min(width + rows, last)] - base)

    def _cost(self, width: int) -> float:
        """Relative time of a target's pass."""
        return 1.0 if self._costs is None else self._costs[min(width, len(self._costs) - 1)]

    def pays(self, level: str, chance: float, width: int) -> bool:
        """Returns whether to run an exit, and counts it as run if so.

        Args:
            level: its name.
            chance: that nobody else knows what follows.
            width: rows that there are.
        """
        cost = self._level_costs.get(level)
        if cost is None:
            return True
        gain = self._gains.by_level[level]
        rows = max(gain.rows / gain.runs, self._cost(width + 1) - self._cost(width))
        value, price = gain.brought / gain.chances * chance, self.rate * (cost + rows)
        start = self._starts.get(level, 0.0)
        if value <= price:
            share = EXPLORED * max(value / price, LEAST_EXPLORED)
            if self._gains.explored + cost + start > share * self._gains.total:
                return False
            self._gains.explored += cost + start
        elif start:
            self._missed[level] += (value - price) / self.rate
            if FORESEEN * self._missed[level] < start:
                return False
        self._gains.total += self._starts.pop(level, 0.0)
        self._spent += cost
        self._runs.append((level, chance))
        return True

    def passed(
        self,
        origins: Sequence[str],
        width: int,
        lowest: str = "",
        alone: int = 0,
        alone_width: int = 1,
    ) -> None:
        """Counts a round.

        Args:
            origins: who drafted each committed token; the last is the target's own.
            width: rows of the target's pass.
            lowest: the hierarchy's lowest level.
            alone: how many of the committed tokens the databases' own tree held.
            alone_width: its rows, the root included.
        """
        fade = 1.0 - 1.0 / MEMORY
        brought: dict[str, float] = dict.fromkeys((level for level, _ in self._runs), 0.0)
        # Above a level that drafted unasked, or before one below it ran, nobody knows what the
        # round would have been without.
        due = lowest if self._runs and self._runs[0][0] == lowest else ""
        rows = 0.0
        if due:
            brought[due] -= alone
            rows = self._cost(width) - self._cost(alone_width)
        for origin in origins[:-1]:
            due = origin if origin in brought else due
            if due:
                brought[due] += 1.0
        for level, chance in self._runs:
            mine = rows if level == lowest else 0.0
            self._gains.by_level[level].add(chance, brought.pop(level, 0.0), mine)
            rows -= mine
        self._runs.clear()
        spent = self._cost(width) + self._spent
        self._spent = 0.0
        forget = 1.0 - 1.0 / EXPLORED_MEMORY
        self._gains.total = self._gains.total * forget + spent
        self._gains.explored *= forget
        self._tokens = self._tokens * fade + len(origins)
        self._time = self._time * fade + spent
