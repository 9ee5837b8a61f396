"""What is made of a run's rows: the document, the page, comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.bench import FakeMethod, save_agreeing_llama
from helpers.bench_runs import TWO_LEVELS, prepare

from hispec.bench import compare, markdown, page, rouge, sweep
from hispec.bench.folder import RunFolder
from hispec.bench.report import write_comparison, write_report
from hispec.bench.run import pieces
from hispec.generation import LM
from hispec.loading import load


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = save_agreeing_llama(tmp_path_factory.mktemp("agreeing") / "llama")
    return load(folder, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def finished(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = prepare(lm, tmp_path_factory.mktemp("finished"), max_new_tokens=30)
    run()
    return run.folder


def test_the_document_has_what_the_command_promises(finished: RunFolder) -> None:
    document = write_report(finished)
    assert json.loads((finished.path / "report.json").read_text()) == json.loads(
        json.dumps(document)
    )
    entry = document["methods"]["hispec"]
    promised = (
        "prompts mismatched_prompts speedup speedup_low speedup_high tok_per_s block_efficiency "
        "acceptance_rate layer_visits_per_token by_category"
    )
    assert set(promised.split()) <= entry.keys()
    assert entry["by_category"].keys() == {"chat", "maths"}
    assert entry["by_category"]["maths"]["prompts"] == 2
    assert document["methods"]["ar"]["layer_visits_per_token"] == 6
    assert document["methods"]["ar"]["block_efficiency"] == 1
    drafted = [level for level in entry["levels"] if level["drafted"]]
    assert [level["name"] for level in drafted] == ["exit 2", "exit 4"]
    assert all(sum(level["drafted_at"]) == level["drafted"] for level in drafted)
    assert entry["acceptance_rate"] == drafted[1]["accepted"] / drafted[1]["drafted"]
    assert "other" in entry["time_share"] and len(entry["time_share"]) == 4


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(finished: RunFolder) -> None:
    write_report(finished)
    html = (finished.path / "report.html").read_text()
    assert "http" not in html and "src=" not in html and "<script" not in html
    assert "a &lt;CPU&gt;" in html and "<CPU>" not in html
    for title in ("Speed-up by category", "Acceptance by level", "Where the time goes"):
        assert title in html
    assert html.count('class="token') >= 30
    assert 'class="token exit' in html and 'class="token target' in html


def test_speed_ups_with_prefill_stand_beside_the_others(
    finished: RunFolder, tmp_path: Path
) -> None:
    document = write_report(finished)
    best = document["methods"]["hispec"]
    headline = page.render(document, finished.rows).split('class="best">')[1].split("</p>")[0]
    assert f"({best['total_speedup']:.2f}x with prefill)" in headline
    write_comparison([finished, finished], tmp_path)
    for name in ("comparison.md", "comparison.html"):
        assert f"{best['total_speedup']:.2f} with prefill" in (tmp_path / name).read_text()
    chosen = {"hispec": TWO_LEVELS.to_json(), "auto": {"name": "ar", "levels": []}}
    grid = {"2x2-4x4": TWO_LEVELS}
    renamed = {"ar": document["methods"]["ar"], "2x2-4x4": best}
    found = {**document, "methods": renamed}
    html = sweep.render(found, grid, found, chosen)
    assert "<th>with prefill</th>" in html and f"<td>{best['total_speedup']:.2f}</td>" in html


def test_other_weights_are_told_wherever_the_row_stands(
    finished: RunFolder, tmp_path: Path
) -> None:
    document = write_report(finished)
    document["methods"]["llama-cpp"] = document["methods"].pop("hispec")
    document["settings"] = {**document["settings"]}
    document["settings"]["methods"] = {"ar": {}, "llama-cpp": {"gguf": "a/M-Q8_0/m.q4_k_m.gguf"}}
    told = "llama-cpp (4-bit weights, Q4_K_M)"
    assert markdown.render(document).count(f"| {told} ") == 2  # all answers, and by category
    assert page.render(document, []).count(f">{told}<") >= 4  # each with its bar
    assert f"| {told} " in compare.markdown({"a": document})
    assert f"<h3>{told}</h3>" in compare.html({"a": document})
    assert markdown.quantization("m.f16.gguf") == "the GGUF file's weights"


def test_a_ratio_that_is_open_is_not_written_out() -> None:
    entry = {"speedup": 0.5, "speedup_low": 0.001, "speedup_high": 7e4}
    assert markdown.interval(entry, "speedup") == "0.50 [0.00, > 100]"


def test_a_report_is_the_same_whenever_it_is_made(finished: RunFolder) -> None:
    write_report(finished)
    before = (finished.path / "report.md").read_text(), (finished.path / "report.html").read_text()
    write_report(RunFolder.open(finished.path))
    after = (finished.path / "report.md").read_text(), (finished.path / "report.html").read_text()
    assert before == after


def test_runs_are_compared(finished: RunFolder, lm: LM, tmp_path: Path) -> None:
    other = prepare(lm, tmp_path, lambda ar: [FakeMethod("new", ar)], repeats=1)
    other()
    documents = write_comparison([finished, other.folder], tmp_path / "out")
    assert len(documents) == 2  # both folders are named run
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| repeats" in text and "| new " in text
    assert "http" not in (tmp_path / "out" / "comparison.html").read_text()


def test_rouge_where_there_are_references(finished: RunFolder) -> None:
    pytest.importorskip("rouge_score")
    found = rouge.scores(finished.rows)
    assert found["ar"] == found["hispec"]
    assert found["ar"]["maths"]["n"] == 1


def test_pieces_are_the_text(lm: LM) -> None:
    ids = lm.encode("the café ∑ 🌍 the end", raw=True)
    found = pieces(lm.tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == "the café ∑ 🌍 the end"
