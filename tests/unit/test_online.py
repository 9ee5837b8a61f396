"""Rows and exits have a price: the tokens their time would bring otherwise."""

from __future__ import annotations

import pytest

from hispec.planner.online import FIRST_RATE, MEMORY, Gains, Worth

COSTS = [0.0] + [1.0 + 0.05 * rows for rows in range(32)]


def play(worth: Worth, rounds: int, brings: int, level: str = "exit 4", chance: float = 1.0) -> int:
    """Rounds that yield a token, and ``brings`` more where the exit runs; returns how often."""
    runs = 0
    for _ in range(rounds):
        ran = worth.pays(level, chance)
        worth.passed([level] * brings * ran + ["target"], 1)
        runs += ran
    return runs


def test_rows_cost_what_their_time_would_bring() -> None:
    price = Worth(COSTS, {}, Gains()).prices(4)
    assert price(3) == pytest.approx(FIRST_RATE * 0.15)
    assert Worth(None, {}, Gains()).prices(4)(20) == 0.0
    worth = Worth(COSTS, {}, Gains())
    for _ in range(200):
        worth.passed(["context", "context", "target"], 3)
    assert worth.rate == pytest.approx(3 / 1.1, rel=0.01)


def test_an_exit_runs_while_it_brings_more_than_it_costs() -> None:
    worth = Worth(None, {"exit 4": 0.2}, Gains())
    assert play(worth, 100, 1) == 100
    assert worth.rate == pytest.approx(2 / 1.2, rel=0.05)
    assert play(Worth(None, {"exit 4": 0.2}, Gains()), 100, 1, "exit 8") == 100  # of unknown cost


def test_a_useless_exit_is_asked_ever_more_rarely() -> None:
    worth = Worth(None, {"exit 4": 0.2}, Gains())
    runs = [play(worth, 250, 0) for _ in range(4)]
    assert 0.2 * sum(runs) <= 0.01 * 1000
    assert runs[0] > runs[-1]
    gains = Gains({"exit 4": [10.0, 0.01]})
    assert play(Worth(None, {"exit 4": 0.2}, gains), 250, 0) <= 1  # known from earlier texts


def test_where_others_know_what_comes_an_exit_has_less_to_bring() -> None:
    worth = Worth(None, {"exit 4": 0.2}, Gains())
    assert worth.pays("exit 4", 1.0)
    assert not worth.pays("exit 4", 0.1)


def test_an_exit_brings_what_the_databases_own_tree_would_not_have() -> None:
    def brought(origins: list[str], *passed: int, levels: tuple[str, ...] = ("exit 0",)) -> dict:
        gains = Gains()
        worth = Worth(COSTS, dict.fromkeys(levels, 0.1), gains)
        before = {level: gains.by_level[level][1] for level in levels}
        assert all(worth.pays(level, 1.0) for level in levels)
        worth.passed([*origins, "target"], *passed)
        fade = 1 - 1 / MEMORY
        return {name: gains.by_level[name][1] - fade * before[name] for name in levels}

    own = ["context", "exit 0", "exit 0"]
    assert brought(own, 4, 0, 4)["exit 0"] == pytest.approx(3)
    assert brought(own, 4, 2, 4)["exit 0"] == pytest.approx(1), "the databases' tree had two"
    assert brought(["context"], 4, 2, 4)["exit 0"] == pytest.approx(-1), "it had narrowed that tree"
    row = FIRST_RATE * 0.05
    assert brought(own, 9, 2, 4)["exit 0"] == pytest.approx(1 - 5 * row), "rows have their price"
    assert brought(own, 3, 2, 4)["exit 0"] == pytest.approx(1 + row)
    both = brought(["exit 0", "context", "exit 8"], 4, 1, 4, levels=("exit 0", "exit 8"))
    assert both == pytest.approx({"exit 0": 1.0, "exit 8": 1.0}), "each token is paid for once"


def test_exits_are_followed_when_the_text_changes() -> None:
    worth = Worth(None, {"exit 4": 0.2}, Gains())
    play(worth, 100, 1)
    for _ in range(3):
        assert play(worth, 200, 0) < 80
        assert play(worth, 200, 1) > 120


def test_short_texts_do_not_starve_an_exit_for_good() -> None:
    gains, level = Gains(), {"exit 4": 0.2}
    for _ in range(10):
        play(Worth(None, level, gains), 60, 0, chance=0.8)
    ran = [play(Worth(None, level, gains), 60, 1, chance=0.8) for _ in range(40)]
    assert sum(ran[-10:]) > 9 * 60, "it brings a token wherever it runs"
