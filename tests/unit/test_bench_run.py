"""The run: order, failures, divergences, resuming."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers.bench import PROMPTS, FakeMethod, save_agreeing_llama
from helpers.bench_runs import TWO_LEVELS, prepare

from hispec.bench import markdown, page, roster
from hispec.bench.folder import RunFolder
from hispec.bench.methods import Question, Workbench
from hispec.bench.run import Plan
from hispec.bench.summary import summarize
from hispec.errors import UsageError
from hispec.generation import LM
from hispec.loading import load


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = save_agreeing_llama(tmp_path_factory.mktemp("agreeing") / "llama")
    return load(folder, dtype="fp32", device="cpu")


def test_plain_decoding_comes_first_and_last_and_the_others_take_turns(
    lm: LM, tmp_path: Path
) -> None:
    run = prepare(lm, tmp_path, lambda ar: [FakeMethod("b", ar), FakeMethod("c", ar)])
    run()
    blocks: dict[Any, list[str]] = {}
    for row in run.folder.rows:
        blocks.setdefault((row["item"], row["repeat"]), []).append(row["method"])
    assert [item for item, repeat in blocks if not repeat] == ["talk/1", "talk/2", "sum", "ids"]
    orders = set(map(tuple, blocks.values()))
    assert all(order[0] == order[-1] == "ar" for order in orders)
    assert {order[1] for order in orders} == {"hispec", "b", "c"}
    assert all(sorted(order[1:-1]) == ["b", "c", "hispec"] for order in orders)


def test_a_second_turn_continues_on_plain_decodings_answer(lm: LM, tmp_path: Path) -> None:
    seen: list[FakeMethod] = []

    def wrong(ar: Any) -> list[FakeMethod]:
        seen.append(FakeMethod("wrong", ar, change=lambda ids: [1] * len(ids)))
        return seen

    run = prepare(lm, tmp_path, wrong, rows=PROMPTS[:1], repeats=1)
    run()
    asked = [list(question.ids) for question in seen[0].calls[-2:]]
    answer = next(row["text"] for row in run.folder.rows if row["item"] == "talk/1").strip()
    chat = [
        {"role": "user", "content": "Say something."},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Say more."},
    ]
    assert asked == [lm.encode("Say something."), lm.encode(chat)]


def test_a_method_that_raises_leaves_a_row_and_the_run_goes_on(lm: LM, tmp_path: Path) -> None:
    run = prepare(lm, tmp_path, lambda ar: [FakeMethod("bad", ar, error=ValueError("no\nway"))])
    run()
    bad = [row for row in run.folder.rows if row["method"] == "bad"]
    assert len(bad) == 8 and all(row["error"] == "ValueError: no" for row in bad)
    document = summarize(run.folder)
    assert document["methods"]["bad"]["failed_prompts"] == 4
    assert document["methods"]["bad"]["speedup"] is None
    assert document["methods"]["hispec"]["prompts"] == 4
    assert "**failed** on 4 answers: ValueError: no" in markdown.render(document)
    assert "ValueError: no" in page.render(document, run.folder.rows)


def test_where_plain_decoding_fails_nothing_is_compared(lm: LM, tmp_path: Path) -> None:
    run = prepare(lm, tmp_path)
    run.methods[0] = FakeMethod("ar", run.methods[0], error=RuntimeError("out of memory"))
    run()
    assert {row["item"] for row in run.folder.rows} == {"talk/1", "sum", "ids"}  # no second turn
    document = summarize(run.folder)
    assert document["answers"] == 0
    assert document["methods"]["hispec"]["speedup"] is None
    assert "out of memory" in markdown.render(document)


def test_a_prompt_longer_than_the_context_is_skipped_and_named(lm: LM, tmp_path: Path) -> None:
    rows = [{"id": "long", "prompt_ids": [5] * 300}, {"id": "tight", "prompt_ids": [5] * 250}]
    run = prepare(lm, tmp_path, rows=rows)
    run()
    assert run.folder.skipped == [
        {"item": "long", "category": "all", "reason": "300 tokens, and the context holds 256"}
    ]
    assert {row["item"] for row in run.folder.rows} == {"tight"}
    assert max(row["num_tokens"] for row in run.folder.rows) <= 6
    assert "skipped 1 prompts: long (300 tokens" in markdown.render(summarize(run.folder))


def test_a_different_answer_is_found_with_its_position_and_gap(lm: LM, tmp_path: Path) -> None:
    def change(ids: list[int]) -> list[int]:
        return [*ids[:3], (ids[3] + 1) % 256, *ids[4:]] if len(ids) > 3 else ids

    run = prepare(
        lm,
        tmp_path,
        lambda ar: [
            FakeMethod("other", ar, change=change),
            FakeMethod("short", ar, change=lambda ids: ids[:2]),
        ],
        rows=PROMPTS[2:],
    )
    run()
    document = summarize(run.folder)
    (found,) = document["methods"]["other"]["divergences"]
    wanted = next(row["token_ids"] for row in run.folder.rows if row["method"] == "ar")
    assert (found["item"], found["index"], found["position"]) == ("ids", 3, 8)
    assert (found["expected"], found["found"]) == (wanted[3], (wanted[3] + 1) % 256)
    assert found["gap"] >= found["top2_gap"] >= 0 and found["tie"] is False
    assert document["methods"]["other"]["mismatched_prompts"] == 1
    assert document["methods"]["hispec"]["mismatched_prompts"] == 0
    (found,) = document["methods"]["short"]["divergences"]
    assert found["index"] == 2 and "found" not in found
    assert "no tie" in markdown.render(document) and "length" in markdown.render(document)


def test_a_planted_slow_down_shows_and_plain_decoding_equals_itself(lm: LM, tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt_ids": [5 + i, 6, 7], "category": "ab"[i % 2]} for i in range(8)]
    run = prepare(
        lm,
        tmp_path,
        lambda ar: [FakeMethod("same", ar), FakeMethod("slow", ar, factor=1.1)],
        rows=rows,
    )
    run()
    document = summarize(run.folder)
    same, slow = document["methods"]["same"], document["methods"]["slow"]
    assert same["speedup"] == pytest.approx(1.0)
    assert slow["speedup"] == pytest.approx(1 / 1.1)
    assert slow["speedup_high"] < 0.95
    assert document["drift"]["ratio"] == pytest.approx(1.0)
    assert slow["by_category"]["a"]["speedup"] == pytest.approx(1 / 1.1)
    assert document["baseline"] == "ar"


def test_the_baseline_is_1_and_drift_is_told_by_itself(lm: LM, tmp_path: Path) -> None:
    """Plain decoding is a quarter slower whenever it comes last in its block."""
    rows = [{"id": str(i), "prompt_ids": [5 + i, 6, 7], "category": "ab"[i % 2]} for i in range(8)]
    run = prepare(lm, tmp_path, rows=rows)
    run()
    for row in run.folder.rows:
        row["decode_s"] *= 1.25 if row["place"] == row["of"] - 1 else 1.0
    document = summarize(run.folder)
    ar = document["methods"]["ar"]
    for entry in (ar, *ar["by_category"].values()):
        for key in ("speedup", "total_speedup"):
            assert (entry[key], entry[f"{key}_low"], entry[f"{key}_high"]) == (1.0, None, None)
    drift = document["drift"]
    assert drift["ratio"] == pytest.approx(0.8)
    assert drift["ratio_low"] <= drift["ratio"] <= drift["ratio_high"] < 1
    text = markdown.render(document)
    assert "Drift (`ar` first over `ar` last): 0.80 [0.80, 0.80]: **the machine was not" in text
    assert markdown.method_rows(document)[1][0][:3] == ["ar", "1.00", "1.00"]


def test_both_turns_of_a_conversation_count_as_one_prompt(lm: LM, tmp_path: Path) -> None:
    run = prepare(lm, tmp_path, lambda ar: [FakeMethod("slow", ar, factor=1.1)], rows=PROMPTS[:1])
    run()
    document = summarize(run.folder)
    slow = document["methods"]["slow"]
    assert slow["prompts"] == 2, "two answers"
    assert slow["speedup"] == pytest.approx(1 / 1.1)
    assert slow["speedup_low"] is None and slow["total_speedup_low"] is None
    assert document["drift"]["ratio_low"] is None


def test_a_decoded_token_counts_the_same_in_every_arm(lm: LM, tmp_path: Path) -> None:
    """An answer that stops half way in half the time is not twice as fast."""

    def halves(ar: Any) -> list[FakeMethod]:
        return [FakeMethod("half", ar, factor=3 / 7, change=lambda ids: ids[:4])]

    run = prepare(lm, tmp_path, halves, rows=PROMPTS[2:])
    run()
    entry = summarize(run.folder)["methods"]["half"]
    assert entry["speedup"] == pytest.approx(1.0)
    assert entry["mismatched_prompts"] == 1


def test_the_faster_plain_decoding_is_the_baseline(lm: LM, tmp_path: Path) -> None:
    run = prepare(lm, tmp_path, lambda ar: [FakeMethod("ar-fast", ar, factor=0.8)])
    run()
    document = summarize(run.folder)
    assert document["baseline"] == "ar-fast"
    assert document["methods"]["ar-fast"]["speedup"] == 1.0
    assert document["methods"]["ar"]["speedup"] == pytest.approx(0.8)


def test_a_stopped_run_goes_on_and_ends_with_the_same_rows(lm: LM, tmp_path: Path) -> None:
    whole = prepare(lm, tmp_path / "a") if (tmp_path / "a").mkdir() is None else None
    assert whole
    whole()

    (tmp_path / "b").mkdir()
    part = prepare(lm, tmp_path / "b", lambda ar: [])
    answered = 0
    answer = part._answer

    def interrupted(method: Any, question: Question) -> Any:
        nonlocal answered
        answered += 1
        if answered > 20:
            raise KeyboardInterrupt
        return answer(method, question)

    part._answer = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        part()
    left = len(RunFolder.open(tmp_path / "b" / "run").rows)
    assert 0 < left < len(whole.folder.rows)
    rest = prepare(lm, tmp_path / "b")
    rest()

    def stable(row: dict[str, Any]) -> dict[str, Any]:
        noisy = ("prefill_s", "decode_s", "memory_bytes", "levels")
        return {key: value for key, value in row.items() if key not in noisy}

    found = RunFolder.open(tmp_path / "b" / "run").rows
    assert list(map(stable, found)) == list(map(stable, whole.folder.rows))
    size = (tmp_path / "b" / "run" / "rows.jsonl").stat().st_size
    prepare(lm, tmp_path / "b")()  # nothing is left to do
    assert (tmp_path / "b" / "run" / "rows.jsonl").stat().st_size == size


def test_settings_that_matter_are_part_of_the_run(lm: LM, tmp_path: Path) -> None:
    run = prepare(lm, tmp_path)
    for changes in ({"max_new_tokens": 9}, {"repeats": 3}, {"raw": True}):
        plan = dataclasses.replace(run.plan, **changes)
        other = RunFolder.create(tmp_path / "run", plan.settings(lm, run.methods), {})
        with pytest.raises(UsageError, match="holds another run"), other:
            pass
    other = RunFolder.create(tmp_path / "run", run.plan.settings(lm, run.methods[:1]), {})
    with pytest.raises(UsageError, match="its methods"), other:
        pass
    with pytest.raises(UsageError, match="--repeats must be at least 1, got 0"):
        Plan(run.plan.prompts, repeats=0)


def test_a_questions_prefill_is_run_once(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, methods = roster.engines(lm, {"hispec": TWO_LEVELS})
    runs: list[int] = []
    prefill = lm.model.prefill
    monkeypatch.setattr(lm.model, "prefill", lambda *a: runs.append(1) or prefill(*a))
    question = Question([5, 6, 7], 4)
    for method in methods:
        method(question)
    assert len(runs) == 1
    methods[0](Question([5, 6, 7], 4))
    assert len(runs) == 2
    assert isinstance(bench, Workbench)
