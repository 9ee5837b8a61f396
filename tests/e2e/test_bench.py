"""``hispec bench`` as a user runs it: results on stdout, one sentence for each mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.bench import save_agreeing_llama, write_prompts

from hispec.cli import main

ROOT = Path(__file__).parents[2]
TABLE = "| method "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_agreeing_llama(tmp_path_factory.mktemp("agreeing") / "llama")


@pytest.fixture
def bench(model: Path, tmp_path: Path, cache_home: Path, capsys: pytest.CaptureFixture[str]):
    """Runs ``hispec bench``; returns the exit code, stdout and stderr."""
    write_prompts(tmp_path / "prompts.jsonl")

    def run(*arguments: str) -> tuple[int, str, str]:
        command = [*arguments, "--model", str(model), "--dtype", "fp32", "--device", "cpu"]
        if "--prompts" not in command:
            command += ["--prompts", str(tmp_path / "prompts.jsonl")]
        capsys.readouterr()
        code = main(["bench", *command])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def short(tmp_path: Path, *more: str) -> list[str]:
    return ["--max-new-tokens", "8", "--repeats", "2", "--out", str(tmp_path / "run"), *more]


def test_all_methods_side_by_side(bench: Any, tmp_path: Path) -> None:
    methods = (
        "ar,layerskip,hispec,hispec-paper,hd,auto,lookahead,adadecode,"
        "hf,hf-early-exit,hf-prompt-lookup"
    )
    code, out, err = bench(*short(tmp_path, "--methods", methods, "--json"))
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    assert set(methods.split(",")) <= set(document["methods"])
    for name, entry in document["methods"].items():
        assert entry["prompts"] == 4, name
        assert entry["mismatched_prompts"] == 0, name  # transformers too: fp32, no ties here
        if name == document["baseline"]:
            assert (entry["speedup"], entry["speedup_low"]) == (1, None)
        else:
            assert entry["speedup_low"] <= entry["speedup"] <= entry["speedup_high"], name
    assert document["provenance"]["model"]
    assert {x["name"] for x in document["methods"]["hd"]["sources"]} >= {"context", "recycle"}
    assert document["methods"]["lookahead"]["sources"][0]["name"] == "pool"
    assert TABLE in out and "Sources: what each put into the tree" in out
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} - {".lock"} == {
        *("run.json", "rows.jsonl", "report.md", "report.html", "report.json"),
    }
    assert str(folder / "report.html") in err
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 2 * (len(document["methods"]) + 1)

    # The same again has nothing to do; other settings are refused.
    before = (folder / "rows.jsonl").read_bytes()
    assert bench(*short(tmp_path, "--methods", methods))[0] == 0
    assert (folder / "rows.jsonl").read_bytes() == before
    code, out, err = bench(*short(tmp_path, "--methods", "hf"))
    assert (code, out) == (2, "") and "holds another run: its methods" in err

    assert main(["bench", "report", str(folder)]) == 0


def test_reports_without_a_model(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        code, _, _ = bench("--methods", "hispec", "--max-new-tokens", "4", "--repeats", "1",
                           "--out", str(tmp_path / name))  # fmt: skip
        assert code == 0
    capsys.readouterr()
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["bench", "report", *runs, "--out", str(tmp_path / "both"), "--json"]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]).keys() == {"a", "b"}
    assert (tmp_path / "both" / "comparison.html").exists()
    written = (tmp_path / "a" / "report.md").stat().st_mtime_ns
    assert main(["bench", "report", runs[0], "--out", str(tmp_path / "one")]) == 0
    out, err = capsys.readouterr()
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        *("report.md", "report.html", "report.json"),
    }
    assert (tmp_path / "one" / "report.md").read_text() in out
    assert str(tmp_path / "one" / "report.html") in err
    assert (tmp_path / "a" / "report.md").stat().st_mtime_ns == written
    (tmp_path / "file").write_text("")
    assert main(["bench", "report", runs[0], "--out", str(tmp_path / "file")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main(["bench", "report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_sweep_writes_the_best_hierarchies(bench: Any, tmp_path: Path) -> None:
    options = ["--exit-layers", "0,4", "--windows", "1,3", "--check-windows", "3"]
    code, out, err = bench("sweep", *options, "--finalists", "1", *short(tmp_path, "--json"))
    assert code == 0, err
    chosen = json.loads((tmp_path / "run" / "hierarchies.json").read_text())
    assert chosen.keys() == {"layerskip", "hispec", "auto"}
    document = json.loads(out.splitlines()[-1])
    assert document["hierarchies"] == chosen
    assert {"0x1", "4x3", "4x3r", "0x3-4x3"} <= document["grid"]["methods"].keys()
    html = (tmp_path / "run" / "sweep.html").read_text()
    assert "Draft exit and check exit" in html and "One exit, ranking" in html
    for name, hierarchy in chosen.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(hierarchy))
    code, _, err = bench("--methods", str(tmp_path / "hispec.json"), "--max-new-tokens", "4",
                         "--out", str(tmp_path / "again"))  # fmt: skip
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--methods", "hispeck"], "unknown method 'hispeck'. Did you mean 'hispec'?"),
        (["--methods", "lookahed"], "unknown method 'lookahed'. Did you mean 'lookahead'?"),
        (["--methods", ","], "--methods names no method"),
        (["--method", "ar", "--repets", "2"], "unknown argument --repets. Did you mean --repeats?"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--prompts", "nowhere.jsonl"], "no prompts in nowhere.jsonl"),
        (["--numerics", "quick"], "unknown numerics 'quick'"),
        (["sweep", "--windows", "1,x"], "--windows should be numbers such as 1,2,4"),
        (["sweep", "--exit-layers", "9"], "exit_layer must be in [0, 5] for this 6-layer model"),
        (["sweep", "--finalists", "0"], "--finalists must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence_before_any_work(
    bench: Any, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    code, out, err = bench(*arguments, "--out", str(tmp_path / "run"))
    assert (code, out) == (2, "")
    assert complaint in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_malformed_line_is_named(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    code, _, err = bench("--prompts", str(tmp_path / "bad.jsonl"))
    assert code == 2
    assert "bad.jsonl line 2: prompt should be a text, got 3." in err


def test_ids_outside_the_vocabulary_are_named(bench: Any, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "ids.jsonl", [{"prompt": "a"}, {"prompt_ids": [1, 10**6]}])
    code, _, err = bench(*short(tmp_path, "--prompts", str(file), "--methods", "hispec"))
    assert code == 2
    assert "prompt 2: token id 1000000 is not in [0, 319]" in err


def test_nothing_is_tuned_on_spec_bench(bench: Any, tmp_path: Path) -> None:
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        {"question_id": 161, "category": "translation", "turns": ["a"]},
        {"question_id": 481, "category": "rag", "turns": ["a"]},
    ]
    file = write_prompts(tmp_path / "question.jsonl", rows)
    code, _, err = bench("sweep", "--prompts", str(file))
    assert code == 2 and "nothing is tuned on it" in err


def test_a_failing_method_ends_with_code_1(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hispec.bench import baselines

    def broken(self: Any, question: Any) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr(baselines.HF, "__call__", broken)
    code, out, _ = bench(*short(tmp_path, "--methods", "hispec,hf", "--json"))
    assert code == 1
    document = json.loads(out.splitlines()[-1])
    assert document["methods"]["hf"]["error"] == "RuntimeError: it broke"
    assert document["methods"]["hispec"]["prompts"] == 4
    assert "`hf` **failed** on 4 answers: RuntimeError: it broke" in out


@pytest.mark.slow
def test_a_killed_run_goes_on(model: Path, tmp_path: Path, cache_home: Path) -> None:
    rows = [{"id": str(i), "prompt_ids": [5 + i, 6, 7]} for i in range(20)]
    prompts = write_prompts(tmp_path / "prompts.jsonl", rows)
    command = [sys.executable, "-m", "hispec.cli", "bench", "--model", str(model)]
    command += ["--dtype", "fp32", "--device", "cpu", "--prompts", str(prompts)]
    command += ["--methods", "hispec", "--max-new-tokens", "48", "--repeats", "2"]
    command += ["--out", str(tmp_path / "run"), "--json"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path}
    file = tmp_path / "run" / "rows.jsonl"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = [line for line in file.read_bytes().split(b"\n") if line]
    assert 0 < len(done) < 20 * 2 * 3, "killed too early or too late to show anything"

    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    document = json.loads(finished.stdout.splitlines()[-1])
    assert document["methods"]["hispec"]["prompts"] == 20
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    places = {(row["item"], row["repeat"], row["place"]) for row in kept}
    per_block = kept[0]["of"]
    assert len(kept) == len(places) == 20 * 2 * per_block
    whole = len(done) // per_block * per_block
    assert [json.dumps(row, ensure_ascii=False).encode() for row in kept[:whole]] == done[:whole]
