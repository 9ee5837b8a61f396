"""The identity check on a tiny model: it passes, it can fail, and what it keeps is not trusted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lms import open_lm, save_model

from hispec.errors import UsageError
from hispec.model.cache import Cache
from hispec.model.device import Choice

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "check_identity", ROOT / "scripts" / "check_identity.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, tmp_path: Path):
    """Runs the check with two prompts; returns its exit code and the rows it wrote."""
    save_model(tmp_path / "model", "gqa")
    prompts = [{"id": i, "category": "abc"[i], "prompt": "the " * (i + 1)} for i in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))

    def check(*options: str) -> tuple[int, list[dict]]:
        places = {"model": "model", "prompts": "prompts.jsonl", "cache": "kept.json"}
        arguments = [f"--{name}={tmp_path / place}" for name, place in places.items()]
        arguments += [f"--out={tmp_path / 'out.jsonl'}", "--limit=2", "--max-new-tokens=12"]
        code = script.main([*arguments, "--positions=40", "--context=330", *options])
        rows = (tmp_path / "out.jsonl").read_text().splitlines()
        return code, [json.loads(row) for row in rows]

    return check


def test_all_the_same(run, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run("--hf")
    assert code == 0
    kinds = ["provenance", "tokens", "tokens", "summary", "bits"]
    assert [row["kind"] for row in rows] == kinds * 2
    assert [row["dtype"] for row in rows if row["kind"] == "summary"] == ["bf16", "fp32"]
    assert {row["category"] for row in rows if row["kind"] == "tokens"} == {"a", "b"}
    fp32 = rows[8]["counts"]
    assert fp32 == {name: [2, 2] for name in ("layerskip", "hispec", "late", "transformers")}
    assert rows[9]["positions"] >= 40
    assert rows[9]["rows_that_differ"] == rows[9]["picks_that_differ"] == 0
    assert rows[9]["trees"] > 0
    assert rows[0]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "late: 2 of 2 texts equal plain decoding's" in printed


def test_a_bug_is_found(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "keep", lambda self, root, kept: None)  # nothing is rejected
    code, rows = run("--dtypes", "fp32", "--positions", "0")
    assert code == 1
    assert min(row["late"]["first_difference"] for row in rows if row["kind"] == "tokens") < 12


def test_kept_ids_are_run_anew_where_a_hierarchy_differs(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--dtypes", "fp32", "--positions", "0", "--hierarchies", "late")
    assert run(*options)[0] == 0
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert len(kept) == 2
    spoilt = {key: [*ids[:-1], (ids[-1] + 1) % 256] for key, ids in kept.items()}
    (tmp_path / "kept.json").write_text(json.dumps(spoilt))
    capsys.readouterr()
    assert run(*options)[0] == 0
    assert "plain decoding itself has changed" in capsys.readouterr().out
    assert json.loads((tmp_path / "kept.json").read_text()) == kept


def test_hierarchies_from_files_and_patterns(run, script, tmp_path: Path) -> None:
    folder = tmp_path / "hierarchies"
    folder.mkdir()
    levels = '{"levels": [{"exit_layer": 1, "window": 2}], "sources": {"context": 4}, "nodes": 4}'
    for name in ("b", "a"):
        (folder / f"{name}.json").write_text(levels)
    names = f"hd,{folder}/*.json"
    code, rows = run("--device=cpu", "--dtypes=fp32", "--positions=0", "--hierarchies", names)
    assert code == 0
    files = [str(folder / f"{name}.json") for name in "ab"]
    assert rows[-1]["counts"] == {name: [2, 2] for name in ("hd", *files)} | {
        "transformers": [0, 0]
    }
    assert rows[0]["settings"]["device"] == "cpu"
    with pytest.raises(UsageError, match=r"c\*\.json"):
        run("--positions=0", "--hierarchies", f"{folder}/c*.json")


def test_a_gpu_runs_its_own_dtypes(
    run, script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cuda = torch.device("cuda")
    asked: list[tuple[str, str]] = []

    def load(model: str, *, exits: Any, dtype: str, device: str) -> Any:
        asked.append((dtype, device))
        return open_lm(tmp_path / "model")

    monkeypatch.setattr(script, "choose", lambda name: Choice(cuda, torch.bfloat16, name))
    monkeypatch.setattr(script.hispec, "load", load, raising=False)
    code, rows = run("--positions=0", "--hierarchies=hispec", "--hf", "--device=cuda")
    assert code == 0
    assert asked == [("bf16", "cuda"), ("fp16", "cuda")]
    assert [row["dtype"] for row in rows if row["kind"] == "summary"] == ["bf16", "fp16"]
    assert "transformers: left out" in capsys.readouterr().out


def test_a_cpu_has_no_fp16(run) -> None:
    with pytest.raises(UsageError, match="fp16 needs a CUDA device"):
        run("--device=cpu", "--dtypes=fp16")
