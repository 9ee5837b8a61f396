"""What a chain of strict levels will do, in expectation: tokens a pass, every level's passes, time.

The engine's round (:mod:`hispec.engine`) as a Markov chain, walked exactly. A level gathers windows
of the level below until it has at least its own; each step keeps what stands and adds a token of
the level's own, which is dropped if all stood and it is one more than was asked for. What is
followed is how many tokens a level hands up, and how many of them the level above will let stand;
how a token came to be decides its rate (:mod:`hispec.planner.acceptance`). Costs and rates may be
measured, or those of a machine and a model that are not at hand (:mod:`hispec.planner.devices`).

:mod:`hispec.planner.shortest_path` follows means instead of distributions, which is what lets it
search; its choice is forecast again here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hispec.hierarchy import MAX_WIDTH
from hispec.planner.acceptance import ACCEPTED, BONUS, CORRECTED, Acceptance, survival
from hispec.planner.cost_table import TARGET, CostTable
from hispec.planner.shortest_path import SOURCES, Chain


@dataclass(frozen=True)
class Forecast:
    """What a hierarchy is expected to do.

    Attributes:
        tokens_per_pass: committed by a full pass, the target's own included.
        passes: of each level, by name, to one of the target's.
        rows: of the target's pass.
        latency_s: a token.
        speedup: over plain decoding.
    """

    tokens_per_pass: float
    passes: Mapping[str, float]
    rows: float
    latency_s: float
    speedup: float


@dataclass
class _Window:
    """What a level hands up.

    Attributes:
        outcomes: chance of (tokens handed up, of these let stand by the level above).
        passes: expected, by level.
        seconds: expected.
        checked: chance that the newest token has this level's state: a token more was dropped.
    """

    outcomes: dict[tuple[int, int], float]
    passes: dict[str, float]
    seconds: float
    checked: float = 0.0


def forecast(chain: Chain, costs: CostTable, acceptance: Acceptance) -> Forecast:
    """Returns what a chain of levels and windows is expected to do under the target.

    Args:
        chain: levels from below up; ``SOURCES`` first if at all.
        costs: of every pass.
        acceptance: of every edge.
    """
    names = [*(name for name, _ in chain), TARGET]
    window, known, first = _Window({(0, 0): 1.0}, {}, 0.0), 0, 0.0
    for place, (name, goal) in enumerate(chain):
        upper, own = names[place + 1], costs.depths.get(name, known)
        if place == 0:
            window = _drafted(name, goal, upper, costs, acceptance)
        else:
            by_origin = [
                acceptance.rates(name, upper, 2 * MAX_WIDTH, origin, names[place - 1])
                for origin in (ACCEPTED, CORRECTED, BONUS)
            ]
            step = _step_s(name, known, window, costs)
            window = _checked(name, goal, window, step, by_origin)
        first += costs.first_s(name, known)
        known = own
    seconds = window.seconds + _step_s(TARGET, known, window, costs)
    seconds += first
    tokens = 1 + sum(chance * stood for (_, stood), chance in window.outcomes.items())
    rows = 1 + sum(chance * count for (count, _), chance in window.outcomes.items())
    latency = seconds / tokens
    passes = {**window.passes, TARGET: 1.0}
    return Forecast(tokens, passes, rows, latency, costs.plain_s / latency)


def _drafted(name: str, goal: int, upper: str, costs: CostTable, acceptance: Acceptance) -> _Window:
    """A window that a level drafts alone, one token a step; of databases, at one price."""
    reach = [1.0, *survival(acceptance.rates(name, upper, goal)), 0.0]
    outcomes = {(goal, stood): reach[stood] - reach[stood + 1] for stood in range(goal + 1)}
    if name == SOURCES:
        return _Window(outcomes, {}, costs.ask_s)
    return _Window(outcomes, {name: float(goal)}, goal * costs.pass_s(name, 0, 1))


def _step_s(name: str, known: int, window: _Window, costs: CostTable) -> float:
    """Seconds of a level's own pass over a window, by the number of its tokens."""
    lifted = 1 - window.checked
    return sum(
        chance * costs.pass_s(name, known, count + 1, lifted)
        for (count, _), chance in window.outcomes.items()
    )


def _checked(
    name: str, goal: int, below: _Window, step_s: float, by_origin: Sequence[Sequence[float]]
) -> _Window:
    """The window of a level that checks windows of the one below, until it has ``goal`` tokens.

    Args:
        name: the level.
        goal: its own window.
        below: what it is handed.
        step_s: seconds of its pass.
        by_origin: rates of its accepted, corrected and bonus tokens at the level above, by place.
    """
    accepted, corrected, bonus = by_origin
    # (tokens so far, of these let stand above) → chance; all of them stand where they are equal.
    at: list[dict[int, float]] = [defaultdict(float) for _ in range(goal)]
    at[0][0] = 1.0
    ends: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    steps = checked = 0.0
    for depth in range(goal):
        standing = at[depth].pop(depth, 0.0)
        total = standing + sum(at[depth].values())
        steps += total
        for (count, stood), chance in below.outcomes.items():
            alive, surplus = standing, 0 < stood == count
            drop = surplus and depth + stood + 1 > goal
            end = depth + stood + (not drop)
            checked += total * chance * drop
            where = at[end] if end < goal else ends[end]
            rates = accepted[depth : depth + stood]
            if not drop:
                rates = [*rates, (bonus if surplus else corrected)[depth + stood]]
            for place, rate in enumerate(rates, depth):
                where[place] += chance * alive * (1 - rate)
                alive *= rate
            where[end] += chance * alive
            for stands, weight in at[depth].items():
                where[stands] += chance * weight
    passes = {lower: steps * count for lower, count in below.passes.items()}
    passes[name] = steps
    outcomes = {(end, stands): x for end, row in ends.items() for stands, x in row.items()}
    return _Window(outcomes, passes, steps * (below.seconds + step_s), checked)
