"""The shortest path is the best of all chains, whatever the tables."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable

import pytest

from hispec.planner.acceptance import ORIGINS, Acceptance, Key
from hispec.planner.cost_table import TARGET, CostTable
from hispec.planner.shortest_path import SOURCES, Chain, Route, chain_latency, shortest

WIDE = 33  # numbers of rows, none included


def random_costs(draw: random.Random, exits: list[str], models: list[str]) -> CostTable:
    depths = sorted(draw.sample(range(1, 30), len(exits)))
    steep = draw.choice((0.0, 0.01, 0.1))

    def row(least: float) -> list[float]:
        return [least * (1 + steep * width) for width in range(WIDE)]

    return CostTable(
        dict(zip([*exits, TARGET], [*depths, 30], strict=True)),
        row(draw.choice((0.0, 0.2))),
        row(1.0),
        {name: row(draw.uniform(0.5, 8)) for name in [*exits, TARGET]},
        round_s={name: draw.uniform(0, 2) for name in exits},
        kept_s={name: draw.uniform(0, 0.5) for name in exits},
        models_s={name: row(draw.uniform(0.5, 20)) for name in models},
        step_s=draw.choice((0.0, 0.3)),
        ask_s=draw.uniform(0.1, 1),
    )


def random_acceptance(draw: random.Random, drafters: list[str]) -> Acceptance:
    table = Acceptance()
    names = [*drafters, TARGET]
    for j, i in itertools.combinations(range(len(names)), 2):
        if draw.random() < 0.1:
            continue  # never tried: never stands
        for origin in ORIGINS if draw.random() < 0.7 else ORIGINS[:1]:
            for via in names[:j] if origin != "own" else [""]:
                for place in range(draw.choice((1, 3))):
                    key = Key(names[j], names[i], origin, via)
                    table.add(key, place, 100, draw.randrange(101))
    return table


def random_case(seed: int, most: int = 4) -> tuple[CostTable, Acceptance, list[str]]:
    draw = random.Random(seed)
    exits = [f"exit {i}" for i in range(draw.randint(1, most - 1))]
    models = [f"model {i}" for i in range(draw.choice((0, 0, 1)))]
    drafters = list(exits)
    for model in models:
        drafters.insert(draw.randint(0, len(drafters)), model)
    if draw.random() < 0.5:
        drafters.insert(0, SOURCES)
    costs = random_costs(draw, exits, models)
    return costs, random_acceptance(draw, drafters), drafters


def every_chain(drafters: list[str], longest: int):
    for count in range(len(drafters) + 1):
        for levels in itertools.combinations(drafters, count):
            for windows in itertools.product(range(1, longest + 1), repeat=count):
                yield tuple(zip(levels, windows, strict=True))


@pytest.mark.parametrize("block", range(10))
def test_it_equals_trying_every_chain(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        costs, acceptance, drafters = random_case(seed, 3)
        paper, longest = seed % 3 == 0, 2 + seed % 2
        best = min(
            chain_latency(chain, costs, acceptance, paper=paper)
            for chain in every_chain(drafters, longest)
        )
        found = shortest(costs, acceptance, drafters, max_window=longest, paper=paper)[0]
        assert found.latency_s == pytest.approx(best, rel=1e-9), seed
        own = chain_latency(found.chain, costs, acceptance, paper=paper)
        assert own == pytest.approx(best, rel=1e-9)


def test_an_option_more_never_makes_the_plan_worse() -> None:
    for seed in range(60):
        costs, acceptance, drafters = random_case(seed)
        whole = shortest(costs, acceptance, drafters)[0].latency_s
        for left_out in drafters:
            fewer = [name for name in drafters if name != left_out]
            assert whole <= shortest(costs, acceptance, fewer)[0].latency_s + 1e-12
        assert whole <= shortest(costs, acceptance, drafters, max_window=5)[0].latency_s + 1e-12
        tree = Route((), whole * random.Random(seed).uniform(0.5, 1.5), "tree")
        found = shortest(costs, acceptance, drafters, options=[tree])[0]
        assert found.latency_s == min(whole, tree.latency_s)


def test_the_paper_recurrence_with_one_rate_for_each_edge() -> None:
    costs = CostTable(
        {TARGET: 30},
        [0.0] * WIDE,
        [0.0] * WIDE,
        {TARGET: [10.0] * WIDE},
        models_s={"small": [1.0] * WIDE, "middle": [3.0] * WIDE},
    )
    rates = {("small", "middle"): 0.6, ("middle", TARGET): 0.8, ("small", TARGET): 0.5}
    acceptance = Acceptance.constant(rates)

    def affine(below: float, window: int, cost: float, rate: float) -> float:
        return (window * below + cost) * (1 - rate) / (1 - rate ** (window + 1))

    wanted: dict[Chain, float] = {}
    for first, second in itertools.product(range(1, 7), repeat=2):
        middle = affine(1.0, first, 3.0, 0.6)
        wanted[("small", first), ("middle", second)] = affine(middle, second, 10.0, 0.8)
    for chain, latency in wanted.items():
        assert chain_latency(chain, costs, acceptance, paper=True) == pytest.approx(latency)
        # Steps are not divisible: what a window holds and costs is a little more in earnest.
        assert chain_latency(chain, costs, acceptance) == pytest.approx(latency, rel=0.3)
    best = shortest(costs, acceptance, ["small", "middle"], max_window=6, paper=True)[0]
    assert best.chain == min(wanted, key=lambda chain: wanted[chain])


def test_shared_layers_are_paid_once() -> None:
    """Between exits an edge costs the layers above the exit below, and one row lifted to it."""
    flat = [1.0] * WIDE
    costs = CostTable(
        {"exit 10": 10, TARGET: 30},
        [0.0] * WIDE,
        flat,
        {"exit 10": [0.0] * WIDE, TARGET: [0.0] * WIDE},
    )
    acceptance = Acceptance.constant({("exit 10", TARGET): 0.0})
    assert chain_latency((("exit 10", 2),), costs, acceptance) == 2 * 10 + 20 + 10


def test_useless_drafts_leave_plain_decoding() -> None:
    costs, _, drafters = random_case(1)
    acceptance = Acceptance.constant({(name, TARGET): 0.0 for name in drafters})
    best = shortest(costs, acceptance, drafters)[0]
    assert best.chain == () and best.latency_s == costs.plain_s


def test_runners_up_are_distinct_and_in_order() -> None:
    costs, acceptance, drafters = random_case(7)
    found = shortest(costs, acceptance, drafters, keep=6)
    assert len({route.chain for route in found}) == len(found) == 6
    assert [x.latency_s for x in found] == sorted(x.latency_s for x in found)
    for route in found:
        assert route.latency_s == pytest.approx(chain_latency(route.chain, costs, acceptance))


def test_twelve_levels_with_windows_to_sixteen_take_no_time() -> None:
    draw = random.Random(3)
    exits = [f"exit {i}" for i in range(10)]
    drafters = [SOURCES, *exits]
    costs = random_costs(draw, exits, [])
    acceptance = random_acceptance(draw, drafters)

    def least(work: Callable[[], object]) -> float:
        times = []
        for _ in range(9):
            started = time.thread_time()
            work()
            times.append(time.thread_time() - started)
        return min(times)

    def count() -> None:
        total = 0
        for i in range(2_000_000):
            total += i

    # 50 ms where Python counts to two million in half as long; slower machines take in proportion,
    # which interpreters and caches make a rough one.
    allowed = max(0.05, 2 * least(count))
    assert least(lambda: shortest(costs, acceptance, drafters, max_window=16)) < allowed
