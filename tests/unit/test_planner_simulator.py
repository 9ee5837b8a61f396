"""The simulator against closed forms, the planner's means, and the field's reading."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.scripts import script

from hispec.planner import devices
from hispec.planner.acceptance import Acceptance, Key
from hispec.planner.cost_table import TARGET, CostTable
from hispec.planner.shortest_path import SOURCES, chain_latency, shortest
from hispec.planner.simulator import forecast

WIDE = 33
COSTS = CostTable(
    {"exit 4": 4, "exit 8": 8, TARGET: 30},
    [0.0] * WIDE,
    [1.0 + 0.01 * rows for rows in range(WIDE)],
    {"exit 4": [2.0] * WIDE, "exit 8": [2.0] * WIDE, TARGET: [8.0] * WIDE},
    round_s={"exit 4": 0.5},
    kept_s={"exit 4": 0.25, "exit 8": 0.125},
    ask_s=0.5,
)


def table(low: float, middle: float, high: float) -> Acceptance:
    return Acceptance.constant(
        {("exit 4", TARGET): low, ("exit 4", "exit 8"): middle, ("exit 8", TARGET): high}
    )


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_one_exit_in_closed_form(window: int, rate: float) -> None:
    found = forecast((("exit 4", window),), COSTS, table(rate, 0, 0))
    assert found.tokens_per_pass == pytest.approx(sum(rate**n for n in range(window + 1)))
    assert found.passes == {"exit 4": window, TARGET: 1.0}
    assert found.rows == pytest.approx(window + 1)
    latency = chain_latency((("exit 4", window),), COSTS, table(rate, 0, 0))
    assert found.latency_s == pytest.approx(latency)


def test_the_caches_keep_what_a_draft_has_just_run() -> None:
    acceptance, cold = table(0.6, 0.7, 0.8), replace(COSTS, kept_s={})

    def saved(*chain: tuple[str, int]) -> float:
        found, wanted = (forecast(chain, costs, acceptance) for costs in (COSTS, cold))
        return (wanted.latency_s - found.latency_s) * found.tokens_per_pass

    four, eight = (layers * COSTS.kept_s[f"exit {layers}"] for layers in (4, 8))
    # Every draft but the first, and the last one's pick, which the level above lifts.
    assert saved(("exit 4", 1)) == pytest.approx(four)
    assert saved(("exit 4", 3)) == pytest.approx(3 * four)
    # Where exit 8 agrees its own pick is one too many, and the target lifts nothing.
    assert saved(("exit 4", 1), ("exit 8", 1)) == pytest.approx(four + 0.3 * eight)


def test_nothing_below_is_plain_decoding() -> None:
    found = forecast((), COSTS, Acceptance())
    assert (found.tokens_per_pass, found.speedup, found.rows) == (1.0, 1.0, 1.0)


def test_databases_cost_one_question_a_window() -> None:
    acceptance = Acceptance.constant({(SOURCES, TARGET): 0.5})
    found = forecast(((SOURCES, 4),), COSTS, acceptance)
    seconds = 0.5 + COSTS.pass_s(TARGET, 0, 5)
    assert found.latency_s == pytest.approx(seconds / found.tokens_per_pass)


def test_an_exit_that_agrees_with_everyone_fills_every_window() -> None:
    """Drafts that all stand: the token more than was asked for is dropped and not lifted."""
    found = forecast((("exit 4", 2), ("exit 8", 4)), COSTS, table(1, 1, 1))
    # Two tokens and a bonus, then two more and a bonus that nobody asked for: five are handed up.
    assert found.rows == 6 and found.tokens_per_pass == 6
    assert found.passes == {"exit 4": 4, "exit 8": 2, TARGET: 1}


def test_means_are_close_to_distributions() -> None:
    for low, middle, high in itertools.product((0.3, 0.6, 0.85), repeat=3):
        acceptance = table(low, middle, high)
        for windows in itertools.product((1, 2, 4), repeat=2):
            chain = (("exit 4", windows[0]), ("exit 8", windows[1]))
            exact = forecast(chain, COSTS, acceptance).latency_s
            assert chain_latency(chain, COSTS, acceptance) == pytest.approx(exact, rel=0.05)


def test_origins_matter_where_they_differ_and_only_there() -> None:
    """Rates by origin that average to the level's own give its own yield, or nearly."""
    own, agree = 0.6, 0.5
    plain = table(0.4, agree, own)
    split = table(0.4, agree, own)
    sure = 1e9
    for origin, rate in (("accepted", 0.8), ("corrected", 0.4), ("bonus", 0.6)):
        split.add(Key("exit 8", TARGET, origin, "exit 4"), 0, sure, sure * rate)
    chain = (("exit 4", 1), ("exit 8", 3))
    first, second = (forecast(chain, COSTS, x).tokens_per_pass for x in (plain, split))
    assert second == pytest.approx(first, rel=0.05)
    better = table(0.4, agree, own)
    better.add(Key("exit 8", TARGET, "corrected", "exit 4"), 0, sure, sure * 0.9)
    assert forecast(chain, COSTS, better).tokens_per_pass > 1.05 * first


def test_random_tables_keep_what_must_hold() -> None:
    draw = random.Random(2)
    for _ in range(50):
        acceptance = table(draw.random(), draw.random(), draw.random())
        chain = (("exit 4", draw.randint(1, 6)), ("exit 8", draw.randint(1, 8)))
        found = forecast(chain, COSTS, acceptance)
        goal, most = chain[1][1], chain[1][1] + chain[0][1]
        assert goal + 1 - 1e-9 <= found.rows <= most + 1 + 1e-9
        assert 1 <= found.tokens_per_pass <= found.rows + 1e-9
        assert found.passes["exit 4"] == pytest.approx(chain[0][1] * found.passes["exit 8"])
        more = table(draw.random(), draw.random(), 1.0)
        assert forecast(chain, COSTS, more).tokens_per_pass == pytest.approx(
            forecast(chain, COSTS, more).rows
        )


def test_models_and_machines_that_are_not_at_hand(tmp_path: Path, capsys) -> None:
    out = tmp_path / "forecast.jsonl"
    assert script("forecast_machines").main(["--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(capsys.readouterr().out.splitlines()) - 2 == 12
    for row in rows:
        slow, fast = row["plain_tok_per_s"]
        assert fast / slow == pytest.approx(4.8 / 3.35), "bandwidths"
        assert row["best"] >= row["best_single"] >= 1 and row["best"] >= row["hispec_paper"]
    strong = {(x["model"], x["head"]): x["best"] for x in rows if x["exits"] == "strong"}
    weak = {(x["model"], x["head"]): x["best"] for x in rows if x["exits"] == "weak"}
    assert all(strong[key] > weak[key] for key in weak)


def test_what_the_field_reads_from_such_tables() -> None:
    """Weak exits: HiSpec's own windows lose to one exit, and to plain decoding on small models."""
    speed = {}
    for name in ("llama-3-8b", "smollm2-135m"):
        costs = devices.cost_table(
            devices.SHAPES[name], devices.DEVICES["h100"], {4: devices.Head(), 8: devices.Head()}
        )
        acceptance = table(0.4, 0.7, 0.45)
        paper = forecast((("exit 4", 2), ("exit 8", 4)), costs, acceptance).speedup
        best = costs.plain_s / shortest(costs, acceptance, ["exit 4", "exit 8"])[0].latency_s
        speed[name] = paper, best
    assert speed["smollm2-135m"][0] < speed["llama-3-8b"][0] < 1
    assert speed["smollm2-135m"][1] >= 1 and speed["llama-3-8b"][1] > speed["smollm2-135m"][1]
