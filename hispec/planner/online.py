"""What a pass yields and what an exit brings, counted while decoding: what is worth its time.

Time is what drafting is paid in, and all of it has one price: the *rate*, the tokens that a unit of
time, a pass over one row, has yielded lately. Rows and exits that bring more than they cost at that
price make the text faster, others slower (Dinkelbach's rule for a ratio of sums).

An exit is judged by what its passes brought. What a round would have yielded without is known: the
databases have proposed their own tree before an exit is asked, and where the text went is seen. So
the lowest exit that ran brought the tokens beyond those of that tree, less what the rows of the
tree that was run cost more than those of that one. A level above brought the tokens from the first
node on that is due to it, which the one below is not paid for. They are expected in proportion to
the chance that an exit was asked for, that nobody else knows what comes next.

    run the exit   ⇔   brought per chance · chance  >  rate · cost

An exit that does not pay is still asked now and then, as texts change: for ``EXPLORED`` of the time
where it nearly pays, and the less the less it brings, down to ``LEAST_EXPLORED`` of that. The time
is that of all texts, so that short ones add up.
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
#: The share of the time that goes to asking exits that seem not to pay.
EXPLORED = 0.01
LEAST_EXPLORED = 0.1
#: The time that counts for it fades: after so many passes it weighs 1/e.
EXPLORED_MEMORY = 1024.0
#: What is counted fades: after so many passes, or runs of an exit, it weighs 1/e.
MEMORY = 32.0


@dataclass
class Gains:
    """What exits brought in all texts of a model.

    Attributes:
        by_level: chances each was asked for, and tokens it brought.
        total: time that passed, of late.
        explored: of it, what went to exits that seemed not to pay.
    """

    by_level: dict[str, list[float]] = field(default_factory=dict)
    total: float = FIRST_PASSES
    explored: float = 0.0


class Worth:
    """Prices of rows and exits in one text.

    Args:
        costs: relative time of a target's pass by width; None if width costs nothing.
        level_costs: relative time of a pass of each exit, by name; those that are missing always
            pay.
        gains: of the exits; outlives the text.
    """

    def __init__(
        self,
        costs: Sequence[float] | None,
        level_costs: Mapping[str, float],
        gains: Gains,
    ) -> None:
        self._costs = costs
        self._level_costs = level_costs
        self._gains = gains
        for name in level_costs:
            gains.by_level.setdefault(name, [FIRST_RUNS, FIRST_RUNS * FIRST_BROUGHT])
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

    def pays(self, level: str, chance: float) -> bool:
        """Returns whether to run an exit, and counts it as run if so.

        Args:
            level: its name.
            chance: that nobody else knows what follows.
        """
        cost = self._level_costs.get(level)
        if cost is None:
            return True
        chances, brought = self._gains.by_level[level]
        value, price = brought / chances * chance, self.rate * cost
        if value <= price:
            share = EXPLORED * max(value / price, LEAST_EXPLORED)
            if self._gains.explored + cost > share * self._gains.total:
                return False
            self._gains.explored += cost
        self._spent += cost
        self._runs.append((level, chance))
        return True

    def passed(
        self, origins: Sequence[str], width: int, alone: int = 0, alone_width: int = 1
    ) -> None:
        """Counts a round.

        Args:
            origins: who drafted each committed token; the last is the target's own.
            width: rows of the target's pass.
            alone: how many of the committed tokens the databases' own tree held.
            alone_width: its rows, the root included.
        """
        fade = 1.0 - 1.0 / MEMORY
        brought: dict[str, float] = dict.fromkeys((level for level, _ in self._runs), 0.0)
        if brought:
            lowest = due = next(iter(brought))
            for origin in origins[:-1]:
                due = origin if origin in brought else due
                brought[due] += 1
            brought[lowest] -= alone + self.prices(alone_width)(width - alone_width)
        for level, chance in self._runs:
            gain = self._gains.by_level[level]
            gain[0] = gain[0] * fade + chance
            gain[1] = gain[1] * fade + brought.pop(level, 0.0)
        self._runs.clear()
        pass_time = 1.0 if self._costs is None else self._costs[min(width, len(self._costs) - 1)]
        spent = pass_time + self._spent
        self._spent = 0.0
        forget = 1.0 - 1.0 / EXPLORED_MEMORY
        self._gains.total = self._gains.total * forget + spent
        self._gains.explored *= forget
        self._tokens = self._tokens * fade + len(origins)
        self._time = self._time * fade + spent
