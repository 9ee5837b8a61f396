"""The hierarchy that takes the least expected time a token, found as a shortest path.

HSD (arXiv 2510.19705). Nodes are what may draft or check: the databases, exits, separate models,
and last the target. An edge (j → i, T) lets level i check windows of T tokens of level j. The
expected time a token of level i is affine in that of level j:

    ℓ_i = a ℓ_j + b,    a = T / G,    b = c_ji(T + 1) / G,    G = 1 + Σ_{p ≤ T} S_ji(p)

where S_ji(p) is the chance that the first p tokens stand; with one rate α for all of them
G = (1 − α^{T+1}) / (1 − α), the paper's form. c_ji is the edge's: i runs only the layers above the
exit below (:mod:`hispec.planner.cost_table`).

Two refinements, left out with ``paper=True``:

- A level whose steps yield one to T' + 1 tokens goes on until it has *at least* T, and so hands up
  more. Its steps are a renewal process: with U_d the chance that a step starts at d tokens,
  N(T) = Σ_{d < T} U_d steps are made and n(T) tokens handed up.
- Whether a token stands depends on how it came to be (:mod:`hispec.planner.acceptance`), so S_ji
  depends on what j itself checks, and through the mix of origins on the edge below.

**Why the path is the best one.** Edges ascend, so the graph has no cycles and needs no
label-setting. Every edge is a function ℓ_i = a ℓ_j + b with a ≥ 0, which never falls in ℓ_j: of two
ways to reach the same state, the cheaper one is cheaper whatever follows. What remains is that a
and b depend on nothing but the state and the edge. So a state is not a level but a level with all
that an edge above it may ask for: *the edge that feeds it* (which fixes its mix of origins and its
yields, both by the level's own rates) and *the layers already known* (an exit's own, or those of
the exit below a separate model, which shares none). Ways into one state differ in ℓ alone, the
minimum over them is exact, and the result equals that of trying every chain, which
:func:`chain_latency` makes possible.

What an exit's first step of a round takes more is charged once a window, which is too often below a
level that gathers several; :mod:`hispec.planner.simulator` counts it right.

What has no chain's closed form, trees and ranking exits, is forecast by replaying answers
(:mod:`hispec.planner.replay`) and enters as an edge straight to the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hispec.hierarchy import MAX_WIDTH
from hispec.planner.acceptance import ORIGINS, OWN, Acceptance, survival
from hispec.planner.cost_table import TARGET, CostTable

#: The node below all others: the databases, which hand up a chain whatever its length at one price.
SOURCES = "sources"

#: Levels from below up with their windows; what the target does is not said.
Chain = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Route:
    """A way to decode and what it is expected to cost.

    Attributes:
        chain: the levels below the target; empty for plain decoding.
        latency_s: expected seconds a token.
        option: the name of a replayed hierarchy that is no chain; empty for chains.
    """

    chain: Chain
    latency_s: float
    option: str = ""


def shortest(
    costs: CostTable,
    acceptance: Acceptance,
    drafters: Sequence[str],
    *,
    max_window: int = 8,
    options: Sequence[Route] = (),
    paper: bool = False,
    keep: int = 8,
) -> list[Route]:
    """Returns the fastest routes, the best first.

    The first is the fastest there is. Of those that follow, each is the fastest of all that feed
    the target alike: by the same level, with the same window, itself fed by the same.

    Args:
        costs: seconds of every level's passes.
        acceptance: rates between all levels; an edge of which nothing is known never stands.
        drafters: what there is below the target, from below up; ``SOURCES`` first, exits ascending.
        max_window: the longest window, at most 16.
        options: replayed hierarchies.
        paper: HSD's recurrence to the letter.
        keep: how many to return.
    """
    assert 1 <= max_window <= MAX_WIDTH // 2, "two windows fit a pass"
    solver = _Solver(costs, acceptance, [*drafters, TARGET], max_window, paper)
    found = [Route((), costs.plain_s), *options, *solver.routes(keep)]
    return sorted(found, key=lambda route: route.latency_s)[:keep]


@dataclass
class _States:
    """All states of one level, one a row.

    Attributes:
        latency: (M,) seconds a token.
        step: (M,) seconds a step, drafting below included.
        via: (M,) number of the level below, -1 where there is none.
        mix: (M, 4) shares of ``ORIGINS`` among its tokens.
        steps: (M, T) expected steps to gather a window of 1 … T.
        handed: (M, T) tokens then handed up.
        checked: (M, T) chance that a token more than was asked for was dropped: then the newest has
            this level's state and is not lifted for the level above.
        known: (M,) layers whose states its tokens have.
        first: (M,) seconds that the first step of a window takes more than the others.
        row: (M,) row of the state below, -1 where there is none.
        window: (M,) tokens the level below hands up.
    """

    latency: np.ndarray
    step: np.ndarray
    via: np.ndarray
    mix: np.ndarray
    steps: np.ndarray
    handed: np.ndarray
    checked: np.ndarray
    known: np.ndarray
    first: np.ndarray
    row: np.ndarray
    window: np.ndarray


class _Solver:
    """The dynamic programme, one level after the other from below up."""

    def __init__(
        self,
        costs: CostTable,
        acceptance: Acceptance,
        names: Sequence[str],
        longest: int,
        paper: bool,
    ) -> None:
        self.costs, self.acceptance, self.names = costs, acceptance, names
        self.longest, self.paper = longest, paper
        self.states: list[_States] = []
        for i in range(len(names) - 1):
            self.states.append(self._level(i))

    def routes(self, keep: int) -> list[Route]:
        """Returns the ``keep`` best ways through a level to the target."""
        last = len(self.names) - 1
        ways: list[tuple[float, int, int, int]] = []
        for j in range(last):
            latencies = self._edges(j, last)  # (M, T)
            best = np.argsort(latencies, axis=None)[:keep]
            rows, windows = np.unravel_index(best, latencies.shape)
            ways += [
                (float(latencies[row, t]), j, int(row), int(t) + 1)
                for row, t in zip(rows, windows, strict=True)
            ]
        return [Route(self._chain(*way[1:]), way[0]) for way in sorted(ways)[:keep]]

    def _chain(self, level: int, row: int, window: int) -> Chain:
        chain: list[tuple[str, int]] = []
        while level >= 0:
            states = self.states[level]
            chain.append((self.names[level], window))
            level, row, window = (int(x[row]) for x in (states.via, states.row, states.window))
        return tuple(reversed(chain))

    def _level(self, i: int) -> _States:
        """Returns level i's states: drafting alone, and fed by each (j, T) over known layers."""
        name, costs = self.names[i], self.costs
        windows = np.arange(1.0, self.longest + 1)
        step = costs.ask_s if name == SOURCES else costs.pass_s(name, 0, 1)
        once = np.ones_like(windows) if name == SOURCES else windows
        alone = np.array([1.0, 0.0, 0.0, 0.0])
        never = np.zeros_like(windows)
        known = costs.depths.get(name, 0)
        first = costs.first_s(name, 0)
        rows = [(step, step, -1, alone, once, windows, never, known, first, -1, 0)]
        for j in range(0 if name == SOURCES else i):
            latencies = self._edges(j, i)  # (M, T)
            stands = np.cumprod(self.acceptance.rates(self.names[j], name, self.longest))
            gains, mixes, steps, handed, checked = renewal(stands, paper=self.paper)
            for known in np.unique(self.states[j].known):
                among = np.flatnonzero(self.states[j].known == known)
                best = among[np.argmin(latencies[among], axis=0)]  # (T,)
                depth = costs.depths.get(name, int(known))
                first = costs.first_s(name, int(known))
                for t, row in enumerate(best):
                    time = latencies[row, t]
                    state = (time, time * gains[t], j, mixes[t], steps[t], handed[t], checked[t])
                    rows.append((*state, depth, first, row, t + 1))
        return _States(*(np.array(column) for column in zip(*rows, strict=True)))

    def _edges(self, j: int, i: int) -> np.ndarray:
        """Returns level i's seconds a token, by level j's state and window, (M, T)."""
        lower, costs, name = self.states[j], self.costs, self.names[i]
        stands = np.cumprod(self._rates(j, i)[:, : 2 * self.longest], axis=1)  # (M, 2 T)
        sums = np.pad(np.cumsum(stands, axis=1), ((0, 0), (1, 0)))
        whole = np.minimum(lower.handed.astype(int), sums.shape[1] - 2)  # (M, T)
        part = lower.handed - whole
        low = np.take_along_axis(sums, whole, 1)
        gain = 1 + low + part * (np.take_along_axis(sums, whole + 1, 1) - low)
        passes = np.empty_like(lower.handed)
        for known in np.unique(lower.known):
            row = [costs.pass_s(name, int(known), n) for n in range(MAX_WIDTH + 1)]
            at = lower.known == known
            passes[at] = np.interp(lower.handed[at] + 1, np.arange(MAX_WIDTH + 1), row)
            if name in costs.depths:
                passes[at] -= lower.checked[at] * costs.lifted_s(0, int(known))
        return (lower.steps * lower.step[:, None] + lower.first[:, None] + passes) / gain

    def _rates(self, j: int, i: int) -> np.ndarray:
        """Returns the chance of each of level j's tokens to stand at i, by its state, (M, 2 T)."""
        lower, count = self.states[j], 2 * self.longest
        names = self.names[j], self.names[i]
        own = np.array(self.acceptance.rates(*names, count))
        rates = np.empty((len(lower.latency), count))
        for h in np.unique(lower.via):
            at = lower.via == h
            if h < 0 or self.paper:
                rates[at] = own
                continue
            by_origin = [own] + [
                np.array(self.acceptance.rates(*names, count, origin, self.names[h]))
                for origin in ORIGINS[1:]
            ]
            rates[at] = lower.mix[at] @ np.stack(by_origin)
        return rates


def renewal(
    stands: np.ndarray, *, paper: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns what a level's steps yield, for each window T' = 1 … T of the level below.

    Args:
        stands: (T,) chances that the first 1 … T tokens of the level below stand.
        paper: a step may be made in part, so that a window holds what it should.

    Returns:
        (T,) tokens a step, its own included; (T, 4) shares of ``ORIGINS`` among them; (T, T) steps
        to gather a window of 1 … T tokens; (T, T) tokens then handed up; and (T, T) the chance that
        a token more was dropped.
    """
    longest = len(stands)
    accepted = np.cumsum(stands)
    gains = 1 + accepted
    mixes = np.stack([np.zeros(longest), accepted, 1 - stands, stands], 1) / gains[:, None]
    windows = np.arange(1.0, longest + 1)
    if paper:
        whole = np.tile(windows, (longest, 1))
        return gains, mixes, whole / gains[:, None], whole, np.zeros_like(whole)
    reach = np.concatenate([[1.0], stands, [0.0]])  # the first 0, 1, …, T stand
    yields = np.zeros((longest, longest + 2))  # (T', y): chance that a step yields y tokens
    for below in range(1, longest + 1):
        yields[below - 1, 1 : below + 1] = reach[:below] - reach[1 : below + 1]
        yields[below - 1, below + 1] = reach[below]
    starts = np.zeros((longest, longest))  # (T', d): chance that a step starts at d tokens
    starts[:, 0] = 1.0
    for depth in range(1, longest):
        starts[:, depth] = np.sum(yields[:, 1 : depth + 1] * starts[:, depth - 1 :: -1], axis=1)
    steps = np.cumsum(starts, axis=1)  # (T', T)
    before = np.pad(steps, ((0, 0), (1, 0)))
    # The token more than a window that is all accepted is not kept where it was not asked for.
    late = np.maximum(np.arange(1, longest + 1) - windows[:, None].astype(int), 0)  # (T', T)
    dropped = stands[:, None] * (steps - np.take_along_axis(before, late, 1))
    return gains, mixes, steps, steps * gains[:, None] - dropped, dropped


def chain_latency(
    chain: Chain, costs: CostTable, acceptance: Acceptance, *, paper: bool = False
) -> float:
    """Returns the expected seconds a token of one chain: the model above, one edge at a time."""
    if not chain:
        return costs.plain_s
    lower, via = chain[0][0], ""
    drafts_alone = lower != SOURCES
    step = costs.pass_s(lower, 0, 1) if drafts_alone else costs.ask_s
    known, first = costs.depths.get(lower, 0), costs.first_s(lower, 0)
    mix = [1.0, 0.0, 0.0, 0.0]
    latency, below = step, 0
    stands: list[float] = []
    for (lower, window), (upper, _) in zip(chain, (*chain[1:], (TARGET, 0)), strict=True):
        if not below:
            steps, handed, checked = (float(window) if drafts_alone else 1.0), float(window), 0.0
        else:
            steps, handed, checked = _gathering(stands, window, paper)
        rates = [0.0] * MAX_WIDTH
        for origin, share in zip(ORIGINS, mix if not paper else (1.0, 0, 0, 0), strict=True):
            if share:
                some = acceptance.rates(
                    lower, upper, MAX_WIDTH, origin, "" if origin == OWN else via
                )
                rates = [rate + share * more for rate, more in zip(rates, some, strict=True)]
        survive = survival(rates)
        whole = int(handed)
        gain = 1 + sum(survive[:whole]) + (handed - whole) * survive[whole]
        passed = costs.pass_s(upper, known, handed + 1, 1 - checked)
        latency = (steps * step + first + passed) / gain
        stands = survival(acceptance.rates(lower, upper, window))
        own_gain = 1 + sum(stands)
        step, below, via = latency * own_gain, window, lower
        mix = [0.0, sum(stands) / own_gain, (1 - stands[-1]) / own_gain, stands[-1] / own_gain]
        first, known = costs.first_s(upper, known), costs.depths.get(upper, known)
    return latency


def _gathering(stands: Sequence[float], window: int, paper: bool) -> tuple[float, float, float]:
    """As :func:`renewal`, of one window of a level below whose tokens stand so often."""
    below, gain = len(stands), 1 + sum(stands)
    if paper:
        return window / gain, float(window), 0.0
    reach = [1.0, *stands, 0.0]
    yields = [reach[y - 1] - reach[y] for y in range(1, below + 1)] + [reach[below]]
    starts = [1.0]
    for depth in range(1, window):
        starts.append(
            sum(chance * starts[depth - y] for y, chance in enumerate(yields, 1) if y <= depth)
        )
    steps = sum(starts)
    dropped = stands[-1] * sum(starts[max(window - below, 0) :])
    return steps, steps * gain - dropped, dropped
