"""Prices follow the passes: what a table says is where they start, not where they end."""

from __future__ import annotations

import random

import pytest

from hispec.planner.prices import INTERRUPTED, Growth, Prices

TABLE = [0.0] + [1.0 + 0.02 * rows + 0.002 * rows * rows for rows in range(32)]


def seconds(rows: int, unit: float, slope: float) -> float:
    return unit * (1.0 + slope * (TABLE[rows] - 1.0))


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("unit", [1e-3, 0.2])
def test_passes_tell_what_rows_cost(unit: float, slope: float) -> None:
    draw, prices = random.Random(1), Prices(TABLE, {})
    for _ in range(2000):
        rows = draw.choice((1, 3, 8, 12))
        noise = 1.0 + 0.1 * draw.random()
        if draw.random() < 0.02:
            noise = 10 * INTERRUPTED
        prices.took(rows, seconds(rows, unit, slope) * noise)
    assert prices.slope == 1.0 and prices.costs == pytest.approx(TABLE)  # a text is under way
    prices.refine()
    assert prices.slope == pytest.approx(slope, rel=0.15)
    wanted = [seconds(rows, 1.0, slope) for rows in range(1, 32)]
    assert prices.costs[1:32] == pytest.approx(wanted, rel=0.1)
    assert prices.costs[0] == 0.0


def test_a_few_passes_and_passes_of_one_width_move_little() -> None:
    prices = Prices(TABLE, {})
    prices.refine()
    assert prices.slope == 1.0
    prices.took(8, 3.0)
    prices.refine()
    assert prices.slope == pytest.approx(1.0, abs=0.1)
    for _ in range(3000):
        prices.took(8, 3.0)
    prices.refine()
    assert prices.slope == pytest.approx(1.0, abs=0.05)


def test_prices_follow_a_machine_that_changes() -> None:
    prices = Prices(TABLE, {})
    for slope in (0.5, 2.0):
        for i in range(6000):
            rows = 1 + i % 12
            prices.took(rows, seconds(rows, 0.01, slope))
        prices.refine()
        assert prices.slope == pytest.approx(slope, rel=0.15)


def test_an_exits_price_is_its_time_over_that_of_a_row() -> None:
    kept: list[float] = []
    prices = Prices(TABLE, {"exit 2": 0.1}, save=kept.append)
    for i in range(2000):
        rows = 1 + i % 8
        prices.took(rows, seconds(rows, 0.01, 1.0))
        prices.level_took("exit 2", 0.002)
    prices.level_took("exit 2", 5.0)  # interrupted
    prices.refine()
    assert prices.levels == {"exit 2": pytest.approx(0.2, rel=0.1)}
    assert kept == [prices.slope]
    prices.add({"exit 2": 0.7, "exit 4": 0.3})
    assert prices.levels == {"exit 2": pytest.approx(0.2, rel=0.1), "exit 4": 0.3}


def test_what_was_known_before_is_where_prices_start() -> None:
    prices = Prices(TABLE, {}, slope=3.0)
    for i in range(20):
        rows = 1 + i % 12
        prices.took(rows, seconds(rows, 0.01, 3.0))
    prices.refine()
    assert prices.slope == pytest.approx(3.0, rel=0.05)


def test_levels_without_a_price_are_left_out() -> None:
    prices = Prices(TABLE, {"exit 2": 0.1})
    prices.took(1, 0.01)
    prices.level_took("exit 4", 0.002)  # a strict one, which always runs
    prices.refine()
    assert set(prices.levels) == {"exit 2"}


def test_rows_are_dearer_the_longer_the_text_is() -> None:
    growth = Growth(256, first=1e-4, more=2e-4)
    table = [0.0, 1.0, 1.2, 1.4, 1.4]
    assert growth.table(table, 256) == table
    far = growth.table(table, 1256)
    assert far[:2] == [0.0, 1.0]
    assert far[2:] == pytest.approx([(1.2 + 0.1 + 0.2) / 1.1, 1.9 / 1.1, 2.1 / 1.1])
    assert growth.table(table, 6) == sorted(growth.table(table, 6)), "it never falls"
    steep = Growth(256, first=1e-2, more=0.0)
    assert steep.table(table, 6) == table, "beyond what was measured"


def test_a_text_has_prices_of_its_length_and_what_was_learnt() -> None:
    growth = Growth(0, first=0.0, more=1e-3)
    prices = Prices([0.0, 1.0, 1.1, 1.2], {"exit 2": 0.1}, slope=2.0, growth=growth)
    held = prices.costs
    assert held == pytest.approx([0.0, 1.0, 1.2, 1.4])
    prices.begin(100)
    assert held is prices.costs and held == pytest.approx([0.0, 1.0, 1.4, 1.8])
    prices.begin(0)
    assert held == pytest.approx([0.0, 1.0, 1.2, 1.4])
    plain = Prices([0.0, 1.0, 1.1], {})
    plain.add({"exit 2": 0.1}, {"exit 2": 0.002})
    plain.add({"exit 2": 0.3}, {"exit 2": 0.004})  # known already
    plain.begin(50)
    assert plain.starts == {"exit 2": pytest.approx(0.1)} and plain.levels == {"exit 2": 0.1}
    plain.begin(1000)
    assert plain.costs == [0.0, 1.0, 1.1]
