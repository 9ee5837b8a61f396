"""What a first text takes passes to cost: glances, what is remembered, and what reading takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.lms import HEAD_KINDS, open_lm, save_exits, save_model

from hispec import shelf
from hispec.generation import LM
from hispec.hierarchy import MAX_WIDTH, Hierarchy, Level
from hispec.model.checkpoint import open_checkpoint
from hispec.planner import first_prices, timing
from hispec.planner.first_prices import LevelCost
from hispec.planner.prices import Growth

ROWS = MAX_WIDTH + 1


def test_first_prices_wait_for_nothing_but_a_second(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = open_lm(save_model(tmp_path / "llama", "gqa"))
    head = lm.head(2)

    def prices() -> tuple[object, ...]:
        return (
            first_prices.pass_costs(lm.model),
            first_prices.context_growth(lm.model),
            first_prices.level_cost(lm.model, head, 2, "some exits"),
            first_prices.model_cost(lm.model, lm.model),
        )

    found = prices()
    relative = found[0]
    assert relative[:2] == [0.0, 1.0] and relative == sorted(relative) and len(relative) == ROWS
    assert found[2].each > 0 and found[3].each > 0.5
    assert found[2].token == 0 < found[3].token
    assert found[1].context == 256 and found[1].first >= 0 and found[1].more >= 0
    assert prices() == found, "remembered"
    assert first_prices.level_cost(lm.model, head, 2) != found[2], "nobody says whose head"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(first_prices, "beside", never)
    assert prices() == found
    with pytest.raises(AssertionError, match="measured again"):
        first_prices.level_cost(lm.model, head, 2, "other exits")
    with pytest.raises(AssertionError, match="measured again"):
        first_prices.model_cost(lm.model, lm.model, anew=True)


@pytest.fixture
def reader(tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> LM:
    """A model whose exit 2 reads what came before: a pass takes 0.1, its first one 0.256 more."""
    folder = save_model(tmp_path / "llama", "gqa")
    kinds = {2: HEAD_KINDS["deep"]}
    exits = save_exits(tmp_path / "exits", open_checkpoint(folder), kinds)
    monkeypatch.setattr(
        first_prices, "beside", lambda _, tasks, *__, **___: {n: [0.1 + 0.256 * n] for n in tasks}
    )
    monkeypatch.setattr(shelf, "pass_costs", lambda model, **_: [0.0, *[1.0] * MAX_WIDTH])
    monkeypatch.setattr(shelf, "context_growth", lambda model, **_: Growth(256))
    return open_lm(folder, exits=exits)


def test_reading_a_prompt_is_told_from_drafting(reader: LM, monkeypatch) -> None:
    model = reader.model
    assert first_prices.level_cost(model, reader.head(2), 2) == LevelCost(0.1, pytest.approx(0.001))
    blind = first_prices.level_cost(model, reader.head(3), 3)
    assert blind == LevelCost(0.1, 0.0), "it reads nothing, and what was measured is chance"
    monkeypatch.setattr(model, "config", replace(model.config, max_positions=34))
    assert first_prices.level_cost(model, reader.head(2), 2).token == pytest.approx(0.256 / 2)


def test_what_has_been_read_costs_nothing(reader: LM, monkeypatch) -> None:
    hierarchy = Hierarchy((Level(2, 1, ranks=True),))

    def starts(**options: Any) -> Any:
        return reader.drafter(hierarchy, learn=False, **options).worth._starts

    assert starts(length=50) == {"exit 2": pytest.approx(0.05)}
    assert starts(length=50, read={"exit 2": 30}) == {"exit 2": pytest.approx(0.02)}
    told: list[Any] = []
    monkeypatch.setattr(reader._shelf, "drafter", lambda *_, read, **__: told.append(read))
    prompt = [5, 6, 7, 8] * 5
    strict = Hierarchy((Level(2, 1),))
    first = reader.generate(prompt, hierarchy=strict, max_new_tokens=4)
    longer = [*prompt, *first.token_ids, 9]
    reader.generate(longer, hierarchy=strict, max_new_tokens=4, continued=True)
    reader.generate(longer, hierarchy=strict, max_new_tokens=4)
    assert told[0] == told[2] == {"exit 2": 0}
    assert told[1]["exit 2"] >= len(prompt), "a chat goes on from what its exits know"


def test_what_length_costs_is_told_by_passes_far_out(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_lm(save_model(tmp_path / "llama", "gqa")).model  # 1,024 positions
    far = 1024 - MAX_WIDTH
    # Seconds: 2 of a row near by, 3 of six; 2.5 and 5.5 far out.
    asked: list[int] = []

    def beside(
        _: object, tasks: Mapping[int, partial[float]], *__: object, **___: object
    ) -> object:
        asked.extend(task.args[1] for task in tasks.values())
        return {task: [time / 2.0] for task, time in zip(tasks, (3.0, 2.5, 5.5), strict=True)}

    monkeypatch.setattr(first_prices, "beside", beside)
    found = first_prices.context_growth(model)
    assert asked == [256, far, far]
    assert found.first * 2.0 * (far - 256) == pytest.approx(0.5)
    assert found.more * 2.0 * (far - 256) == pytest.approx((5.5 - 3.0 - 0.5) / 5)
    short = replace(model.config, max_positions=300)
    monkeypatch.setattr(model, "config", short)
    assert first_prices.context_growth(model, anew=True) == Growth(256)


def test_a_plan_prices_anew(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = open_lm(save_model(tmp_path / "llama", "gqa"))
    hierarchy = Hierarchy((Level(2, 1, ranks=True),))

    def all_take(cost: float) -> None:
        monkeypatch.setattr(
            first_prices,
            "beside",
            lambda _, tasks, repeats, *__, **___: {task: [cost] * repeats for task in tasks},
        )

    all_take(1.25)
    prices = lm.drafter(hierarchy, learn=False)._prices
    assert prices.costs[3:5] == [1.25, 1.25] and prices.levels == {"exit 2": 1.25}
    first_prices.keep_price_slope(lm.model, 2.0)
    all_take(1.5)
    assert lm.drafter(hierarchy, learn=False)._prices.levels == {"exit 2": 1.25}, "remembered"
    lm.reprice([2])
    for model in (lm, open_lm(tmp_path / "llama")):  # a later process too
        prices = model.drafter(hierarchy)._prices
        assert prices.costs[3:5] == [1.5, 1.5] and prices.levels == {"exit 2": 1.5}
        assert prices.slope == 1.0, "it corrected the old table"


def test_a_text_waits_for_a_glance_and_later_ones_for_another(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "llama", "gqa")
    hierarchy = Hierarchy((Level(2, 1, ranks=True),))
    calls: list[tuple[int, float, int]] = []

    def beside(_: object, tasks: Any, repeats: int, patience: float, **__: object) -> Any:
        calls.append((len(tasks), patience, repeats))
        cost = float(len(calls))
        rounds = repeats if patience > 1 else timing.ENOUGH
        return {task: [cost] * rounds for task in tasks}

    monkeypatch.setattr(first_prices, "beside", beside)
    exit_s, rows_s = (2, 0.15, 12), (len(timing.WIDTHS) - 1, 0.15, 12)
    for start in range(4):  # each a process of its own
        calls.clear()
        lm = open_lm(folder)
        lm.drafter(hierarchy, length=20)
        lm.drafter(hierarchy, length=20)
        left = 12 - timing.ENOUGH * start
        assert calls == [(*exit_s[:2], left), (*rows_s[:2], left)]
        lm.drafter(hierarchy, length=600)
        assert calls[2:] == [(3, 0.15, left)], "only a long text waits for what length costs"
    calls.clear()
    lm = open_lm(folder)
    lm.drafter(hierarchy, length=600)
    lm.drafter(hierarchy, learn=False, length=600)
    assert not calls, "there have been enough"


def test_what_is_measured_is_priced_in_full(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = open_lm(save_model(tmp_path / "llama", "gqa"))
    hierarchy = Hierarchy((Level(2, 1, ranks=True),))
    patience: list[float] = []

    def beside(_: object, tasks: Any, repeats: int, seconds: float, **__: object) -> Any:
        patience.append(seconds)
        return {task: [1.0 + len(patience)] * min(repeats, 4) for task in tasks}

    monkeypatch.setattr(first_prices, "beside", beside)
    assert lm.drafter(hierarchy, length=20)._prices.levels == {"exit 2": 2.0}
    assert patience == [0.15, 0.15]
    prices = lm.drafter(hierarchy, learn=False, length=20)._prices
    assert patience[2:] == pytest.approx([1.5] * 3, abs=0.5), "the exit, rows, and their growth"
    assert prices.levels == {"exit 2": 3.0}, "the middle of four rounds of 2 and four of 4"
    assert lm.drafter(hierarchy, length=20)._prices.levels == {"exit 2": 2.0}, "of this process"
