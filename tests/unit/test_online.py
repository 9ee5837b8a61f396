"""Rows and exits have a price: the tokens their time would bring otherwise."""

from __future__ import annotations

import math

import pytest

from hispec.planner.online import (
    FIRST_BROUGHT,
    FIRST_RATE,
    FIRST_RUNS,
    FORESEEN,
    MEMORY,
    Gain,
    Gains,
    Worth,
)

COSTS = [0.0] + [1.0 + 0.05 * rows for rows in range(32)]


def play(worth: Worth, rounds: int, brings: int, level: str = "exit 4", chance: float = 1.0) -> int:
    """Rounds that yield a token, and ``brings`` more where the exit runs; returns how often."""
    runs = 0
    for _ in range(rounds):
        ran = worth.pays(level, chance, 1)
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
    gains = Gains({"exit 4": Gain(10.0, 0.01, 10.0)})
    assert play(Worth(None, {"exit 4": 0.2}, gains), 250, 0) <= 1  # known from earlier texts


def test_an_exit_that_has_to_read_first_waits_until_that_comes_back() -> None:
    worth = Worth(None, {"exit 4": 0.2}, Gains(), {"exit 4": 2.0})
    net = FIRST_BROUGHT / FIRST_RATE - 0.2  # what it is expected to bring in a round, in time
    # All the more in later rounds, which yield less than the first are thought to.
    rounds = math.ceil(2.0 / (FORESEEN * net))
    asked = [play(worth, 1, 1) for _ in range(rounds)]
    assert rounds // 2 < asked.index(1) < rounds
    assert play(worth, 50, 1) == 50, "it has read all by now"
    assert play(Worth(None, {"exit 4": 0.2}, Gains(), {"exit 4": 0.1}), 50, 1) == 50
    seldom = Worth(None, {"exit 4": 0.2}, Gains(), {"exit 4": 2.0})
    assert play(seldom, 50, 1, chance=0.4) == 0, "others know what comes: nothing is read"


def test_where_others_know_what_comes_an_exit_has_less_to_bring() -> None:
    worth = Worth(None, {"exit 4": 0.2}, Gains())
    assert worth.pays("exit 4", 1.0, 1)
    assert not worth.pays("exit 4", 0.1, 1)


def brought(origins: list[str], *passed, levels=("exit 0",), lowest="exit 0") -> dict:
    """What each level is paid for a round in which all ran in turn: tokens, and time of rows."""
    gains = Gains()
    worth = Worth(COSTS, dict.fromkeys(levels, 0.1), gains)
    assert all(worth.pays(level, 1.0, 1) for level in levels)
    worth.passed([*origins, "target"], passed[0], lowest, *passed[1:])
    fade = 1 - 1 / MEMORY
    assert all(
        gain.runs == gain.chances == 1 + fade * FIRST_RUNS for gain in gains.by_level.values()
    )
    return {
        name: (
            pytest.approx(gain.brought - fade * FIRST_RUNS * FIRST_BROUGHT),
            pytest.approx(gain.rows),
        )
        for name, gain in gains.by_level.items()
    }


def test_an_exit_brings_what_the_databases_own_tree_would_not_have() -> None:
    own = ["context", "exit 0", "exit 0"]
    assert brought(own, 4, 0, 4)["exit 0"] == (3, 0)
    assert brought(own, 4, 2, 4)["exit 0"] == (1, 0), "the databases' tree had two"
    assert brought(["context"], 4, 2, 4)["exit 0"] == (-1, 0), "it had narrowed that tree"
    assert brought(own, 9, 2, 4)["exit 0"] == (1, 5 * 0.05), "rows have their price"
    assert brought(own, 3, 2, 4)["exit 0"] == (1, -0.05)
    both = brought(["exit 0", "context", "exit 8"], 9, 1, 4, levels=("exit 0", "exit 8"))
    assert both == {"exit 0": (1, 5 * 0.05), "exit 8": (1, 0)}, "each token is paid for once"


def test_the_next_row_may_be_too_dear() -> None:
    """Two rows cost hardly more than one where the third fills no half of a register."""
    costs = [0.0, 1.0, 1.04, *(1.04 + 0.2 * rows for rows in range(1, 31))]
    worth = Worth(costs, {"exit 0": 0.1}, Gains({"exit 0": Gain(10.0, 4.0, 10.0)}))
    assert worth.pays("exit 0", 0.8, 1)
    assert not worth.pays("exit 0", 0.8, 2)


def test_what_a_level_drafts_unasked_no_exit_brings() -> None:
    """A smaller model always drafts; an exit that adapts is above it, or ran before the lowest."""
    mine = ["model cut", "model cut", "exit 0", "context"]
    assert brought(mine, 6, 3, 4, lowest="model cut")["exit 0"] == (2, 0)
    assert brought(mine[:2], 6, 3, 4, lowest="model cut")["exit 0"] == (0, 0)
    late = brought(["context", "exit 8", "exit 0"], 6, 3, 4, levels=("exit 8", "exit 0"))
    assert late == {"exit 8": (1, 0), "exit 0": (1, 0)}


def test_rows_do_not_starve_an_exit_that_had_nothing_to_say() -> None:
    worth = Worth([0.0] + [1.0 + 0.04 * rows for rows in range(32)], {"exit 0": 0.06}, Gains())
    for chance in (0.02, 0.1, 0.3) * 700:  # a text that the databases know by heart
        ran = worth.pays("exit 0", chance, 4)
        worth.passed(["context"] * 3 + ["target"], 4 + 2 * ran, "exit 0", 3, 4)
    runs = 0
    for _ in range(300):
        ran = worth.pays("exit 0", 0.6, 1)
        runs += ran
        worth.passed(["exit 0"] * ran + ["target"], 1 + 2 * ran, "exit 0", 0, 1)
    assert runs > 200


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
