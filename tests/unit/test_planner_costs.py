"""What passes cost: the table's arithmetic, and filling it by measuring."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from helpers.lms import open_lm, save_model

from hispec.engine import LevelCounts
from hispec.hierarchy import MAX_WIDTH
from hispec.planner import costs, devices, timing
from hispec.planner.acceptance import OWN, Acceptance, Key
from hispec.planner.calibrate import Calibration, fitted, rows_dearer
from hispec.planner.cost_table import LOWEST_STEP, TARGET, CostTable, at, filled
from hispec.result import Result

ROWS = MAX_WIDTH + 1


def table(**changes) -> CostTable:
    fields = {
        "depths": {"exit 4": 4, "exit 8": 8, TARGET: 30},
        "call_s": [0.5] * ROWS,
        "layer_s": [float(rows) for rows in range(ROWS)],
        "heads_s": {name: [10.0] * ROWS for name in ("exit 4", "exit 8", TARGET)},
    }
    return CostTable(**{**fields, **changes})


def test_a_pass_is_layers_head_and_what_is_lifted() -> None:
    made = table(step_s=0.25, models_s={"small": [7.0] * ROWS})
    assert made.pass_s("exit 4", 0, 1) == 0.5 + 4 + 10 + 0.25 * LOWEST_STEP
    # Three rows through layers 4 to 8, the newest of them alone through layers 0 to 4 before.
    assert made.pass_s("exit 8", 4, 3) == 4 + (0.5 + 3 * 4) + 10 + 0.25
    lifts = table(step_s=0.25, lift_s=0.125, kept_s={"exit 4": 0.5})
    assert lifts.pass_s("exit 8", 4, 3) == made.pass_s("exit 8", 4, 3) + 0.125 - 4 * 0.5
    assert lifts.lifted_s(4, 8, 3) == 0.125 + 3 * 4 and lifts.lifted_s(4, 4) == 0.0
    assert made.pass_s("exit 8", 4, 3, lifted=0) == (0.5 + 3 * 4) + 10 + 0.25
    assert made.pass_s("small", 4, 9) == 7.25, "a separate model shares nothing"
    assert made.plain_s == 0.5 + 30 + 10 + 0.25


def test_the_first_step_of_a_round_finds_nothing_in_the_caches() -> None:
    cold, made = table(), table(round_s={"exit 4": 3.0, "exit 8": 3.0}, kept_s={"exit 8": 0.25})
    for name, known, first in (("exit 4", 0, 3), ("exit 8", 0, 3 + 2), ("exit 8", 4, 3 + 1)):
        assert made.first_s(name, known) == first
        both = made.pass_s(name, known, 2) + made.first_s(name, known)
        assert both == cold.pass_s(name, known, 2) + 3, "own layers alone are kept"
    assert made.first_s("sources", 0) == made.first_s("small", 4) == 0.0
    assert made.plain_s == cold.plain_s


def test_between_two_numbers_of_rows_and_past_the_last() -> None:
    assert at([0.0, 1.0, 3.0], 1.5) == 2.0
    assert at([0.0, 1.0, 3.0], 9) == 3.0
    values = filled({1: 1.0, 4: 4.0, 8: 3.0, MAX_WIDTH: 5.0})
    assert values[:6] == [0.0, 1.0, 2.0, 3.0, 4.0, 4.0], "a wider pass is never cheaper"
    assert len(values) == ROWS and values[-1] == 5.0


def test_relative_costs_start_at_one_and_never_fall() -> None:
    relative = table().relative()
    assert relative[:2] == [0.0, 1.0] and len(relative) == ROWS
    assert relative == sorted(relative)


def test_it_survives_json() -> None:
    made = table(
        round_s={"exit 4": 0.1}, lift_s=0.3, kept_s={"exit 4": 0.05}, ask_s=0.2, context=256
    )
    assert CostTable.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_measured_once_and_remembered(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = open_lm(save_model(tmp_path / "llama", "gqa"))
    heads = {2: lm.head(2)}
    found = costs.cost_table(lm.model, heads, 64, "some exits")
    assert found.depths == {"exit 2": 2, TARGET: 6}
    assert found.plain_s > 0 and found.pass_s("exit 2", 0, 1) > 0
    assert found.pass_s("exit 2", 0, 4) < found.pass_s(TARGET, 0, 4) * 1.5
    assert found.spread >= 0 and found.context == 64

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(costs, "measure", never)
    monkeypatch.setattr(costs, "measure_head", never)
    assert costs.cost_table(lm.model, heads, 64, "some exits") == found
    with pytest.raises(AssertionError, match="measured again"):
        costs.cost_table(lm.model, heads, 64, "some exits", anew=True)
    with pytest.raises(AssertionError, match="measured again"):
        costs.cost_table(lm.model, heads, 128, "some exits")
    with pytest.raises(AssertionError, match="measured again"):
        costs.cost_table(lm.model, heads, 64, "other exits")


def test_what_the_caches_keep_is_what_a_first_draft_takes_more(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = open_lm(save_model(tmp_path / "llama", "gqa"))

    def found(first: float, again: float, cold: float) -> CostTable:
        row = [(2.0 + width, 0.1) for width in timing.WIDTHS]
        passes = {"few": row, "all": [(3 * x, y) for x, y in row], "head": row, "short": 1}
        passes["lift"] = [(12.2, 0.1)]
        head = {"rows": [(1.0, 0.1)] * len(costs.HEAD_WIDTHS)}
        drafts = (first, again, first + 32.0, cold, 3.0)
        head |= {x: [(time, 0.1)] for x, time in zip(costs.DRAFTS, drafts, strict=True)}
        monkeypatch.setattr(costs, "measure", lambda *_: passes)
        monkeypatch.setattr(costs, "measure_head", lambda *_: head)
        return costs.cost_table(lm.model, {2: lm.head(2)}, 64, anew=True)

    assert found(5.5, 4.0, 4.0).layer_s[1] == pytest.approx(1.2)
    # Of 1.5 that a first draft takes more, its two layers save 1 later on.
    cases = ((5.5, 4.0, 4.0, 0.5), (4.5, 4.0, 2.0, 0.0), (9.0, 1.0, 9.0, 1.2), (4.0, 3.0, 9.0, 0.5))
    for first, again, cold, kept in cases:
        made = found(first, again, cold)
        assert made.round_s["exit 2"] == pytest.approx(max(first - again - 2 * kept, 0.0))
        assert made.prompt_s["exit 2"] == 0.0, "the model's own head reads nothing"
        # Two rows take 12, one row less through a layer 0.4 less.
        assert made.lift_s == pytest.approx(12.2 - (12 - 0.4))
        assert made.kept_s["exit 2"] == pytest.approx(kept), "of each of two layers, within bounds"
        if kept < 1:
            assert made.first_s("exit 2", 0) == pytest.approx(first - again)


def test_dear_and_wide_passes_are_timed_less_often() -> None:
    ran: list[str] = []
    tasks = {name: (lambda name=name: ran.append(name) or 0.0) for name in ("narrow", "wide")}
    wide = {"seldom": lambda name: name == "wide"}
    times = timing.in_turn(tasks, lambda _: None, 9, 1e9, **wide)
    assert (ran.count("narrow"), ran.count("wide")) == (1 + 9, 1 + 3)
    assert all(usual > 0 and spread >= 0 for usual, spread in times.values())
    ran.clear()
    timing.in_turn(tasks, lambda _: None, 9, 0.0, **wide, untimed=2)
    assert (ran.count("narrow"), ran.count("wide")) == (2 + 2, 2 + 1), "out of patience"


def test_machines_that_are_not_at_hand() -> None:
    shape = devices.SHAPES["llama-3-8b"]
    exits = {4: devices.Head(), 8: devices.Head(vocab_size=8192, blocks=1)}
    first, second = (
        devices.cost_table(shape, devices.DEVICES[name], exits) for name in ("h100", "h200")
    )
    # 8.0 G weights, the input embeddings not read: 15 GB at 3.35 TB/s.
    assert first.plain_s == pytest.approx(4.5e-3, rel=0.02)
    assert first.plain_s / second.plain_s == pytest.approx(4.8 / 3.35)
    assert first.pass_s(TARGET, 0, MAX_WIDTH) == first.plain_s, "rows are free there"
    assert first.heads_s["exit 8"][1] < first.heads_s["exit 4"][1]
    assert all(device.source for device in devices.DEVICES.values())


def plain(passes: int, passes_s: float, decode_s: float) -> Result:
    levels = [LevelCounts("target", passes=passes, time_s=passes_s)]
    return Result(passes=passes, decode_s=decode_s, levels=levels)


def test_passes_in_earnest_are_slower_in_proportion_and_the_rest_is_the_engine_s_own() -> None:
    made = table(
        round_s={"exit 4": 1.0},
        kept_s={"exit 4": 0.5},
        models_s={"small": [7.0] * ROWS},
        prompt_s={"small": 0.5},
    )
    found = fitted(made, plain(10, 12 * made.plain_s, 12 * made.plain_s + 20))
    assert found.step_s == pytest.approx(2)
    bare = replace(found, step_s=0.0)
    for name, known in (("exit 4", 0), ("exit 8", 4), (TARGET, 8), ("small", 0)):
        assert bare.pass_s(name, known, 3) == pytest.approx(1.2 * made.pass_s(name, known, 3))
    assert found.round_s == {"exit 4": 1.2} and found.kept_s == {"exit 4": 0.6}
    assert found.prompt_s == {"small": 0.6}
    assert fitted(found, plain(10, 12 * made.plain_s, 12 * made.plain_s + 20)).plain_s == (
        pytest.approx(found.plain_s)
    ), "what was fitted already stays"
    stopped = fitted(made, plain(10, 10 * made.plain_s, 1e6))
    assert stopped.step_s == pytest.approx(0.2 * made.plain_s), "a process that slept"
    assert fitted(made, Result()) == made


def test_answers_tell_how_dear_rows_are() -> None:
    made = table()  # rows of a layer cost as much as the first
    more = made.pass_s(TARGET, 0, 3) - made.plain_s
    for factor in (0.5, 1.0, 2.0):
        answers, beside = [], []
        for machine in (1.0, 7.0):  # slower at the second prompt
            took = machine * (4 * made.plain_s + 3 * factor * more)
            wide = LevelCounts("target", passes=4, time_s=took, passes_of=[0, 1, 0, 3])
            answers.append(Result(levels=[LevelCounts("exit 4"), wide]))
            beside.append(plain(8, 8 * machine * made.plain_s, 1.0))
        assert rows_dearer(made, answers, beside) == pytest.approx(factor)
        found = made.dearer(factor)
        assert found.plain_s == made.plain_s
        assert found.pass_s(TARGET, 0, 3) - found.plain_s == pytest.approx(factor * more)
        assert found.pass_s("exit 8", 4, 1) == made.pass_s("exit 8", 4, 1)
    assert rows_dearer(made, answers[:1], [Result()]) == 1.0
    assert rows_dearer(made, [], []) == 1.0


def test_what_is_known_too_badly_to_plan_by_is_said() -> None:
    few, many = Acceptance(), Acceptance()
    few.add(Key("exit 4", TARGET, OWN), 0, 40, 20)
    many.add(Key("exit 4", TARGET, OWN), 0, 4000, 2000)
    assert Calibration(table(spread=0.05), many, [], 4000).doubts() == []
    (doubt,) = Calibration(table(spread=0.05), few, [], 40).doubts()
    wide = float(doubt.partition("±")[2].split()[0])
    assert wide == pytest.approx(few.widest(), abs=0.01) and "from 40 rounds" in doubt
    (doubt,) = Calibration(table(spread=0.31), many, [], 4000).doubts()
    assert "scatter by 31%" in doubt


def test_what_a_machine_does_besides_falls_out_of_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, speed, calls = [0.0], [1.0], []

    def work(seconds: float, name: str) -> None:
        calls.append(name)
        clock[0] += seconds * speed[0]
        if name != "plain":
            speed[0] *= 1.5  # ever slower

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    tasks = {name: partial(work, cost, name) for name, cost in (("two", 1.2), ("wide", 3.0))}
    plain = partial(work, 1.0, "plain")
    found = timing.beside(plain, tasks, 9, 1e9, seldom=lambda name: name == "wide", untimed=1)
    assert found["two"] == pytest.approx([1.2] * 9) and found["wide"] == pytest.approx([3.0] * 3)
    assert calls.count("two") == 10 and calls.count("wide") == 4
    assert calls[::2] == ["plain"] * len(tasks) * 7, "one right before each"
    calls.clear()
    timing.beside(plain, tasks, 9, 0.0, untimed=2)
    assert calls.count("two") == 2 + 3, "three are timed whatever the patience"
