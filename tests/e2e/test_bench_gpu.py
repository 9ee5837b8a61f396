"""``scripts/bench_gpu.py`` runs on any machine, small, and says no to what it does not know."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hispec_kernels import gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    path = ROOT / "scripts" / "bench_gpu.py"
    spec = importlib.util.spec_from_file_location("bench_gpu", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_stage_tiny(
    script: Any, tiny_llama: Path, tmp_path: Path, cache_home: Path, capsys: Any
) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["--tiny", "--device", "cpu", "--model", str(tiny_llama), "--out", str(out)]
    assert script.main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["stage"] == "machine"
    assert rows[0]["copy_gb_per_s"] > 0 and rows[0]["commit"]
    stages = {stage: [row for row in rows if row["stage"] == stage] for stage in script.STAGES}
    if not gpu.why_not(torch.device("cpu")):
        names = {row["kernel"] for row in stages["kernels"] if "kernel" in row}
        theirs = {row["peer"]: row for row in stages["kernels"] if "peer" in row}
        assert {"torch.mm qkv", "torch rms_norm", "torch sdpa"} <= set(theirs)
        assert {"product qkv", "gated_product", "attention", "exit_head", "rope_write"} <= names
        assert {"attention tree", "add_rms_norm", "top_k", "noisy", "follow", "compact"} <= names
        assert all(row["right"] and row["ms"] > 0 for row in stages["kernels"] if "why" not in row)
        agree, *_ = stages["ar"]
        assert agree["right"] and 0 <= agree["differ"] <= 5
        exact, *others = [row for row in stages["ar"] if "passes" in row]
        assert exact["passes"] == "triton" and exact["numerics"] == "exact"
        assert {row["numerics"] for row in others} == {"fast"}
        assert exact["cost"] == exact["ms"] / min(row["ms"] for row in others) - 1
        assert all(row["device_ms"] > 0 for row in (exact, *others))
        parts = [row for row in stages["ar"] if "op" in row]
        assert parts[-1]["op"] == "all else" and not any("right" in row for row in parts)
        assert sum(row["ms"] for row in parts) == pytest.approx(exact["ms"])
    assert stages["ar"][1]["floor_ms"] > 0
    assert {row["method"] for row in stages["spec"]} >= {"ar", "layerskip", "hispec"}
    assert {row["method"]: row["exact"] for row in stages["spec"]}["layerskip"]
    assert all(row["ttft_s"] > 0 and row["memory_gib"] is None for row in stages["peers"])
    assert all(row["differ"] == 0 and 0 <= row["host"] < 1 for row in stages["spec"])
    peers = {row["method"]: row for row in stages["peers"]}
    assert set(peers) >= {"ar", "hf", "hf-early-exit", "hf-prompt-lookup", "hf-static"}
    assert peers["hf-static"]["passes"] == peers["hf"]["passes"] == peers["ar"]["passes"] == 3
    ways: dict[float, dict[str, float]] = {}
    for row in stages["shapes"]:
        if "way" in row:
            ways.setdefault(row["acceptance"], {})[row["way"]] = row["speedup"]
    assert set(ways) == {0.4, 0.6, 0.8}
    for found in ways.values():
        assert found["planned"] >= 0.97 * max(1.0, *found.values()), "the planner's is the fastest"
    printed = capsys.readouterr().out
    assert all(f"\n{stage} (" in printed for stage in script.STAGES)


def test_a_stage_begins_nothing_when_its_time_is_over(script: Any, capsys: Any) -> None:
    command = ["--tiny", "--device", "cpu", "--only", "ar,shapes", "--stage-s", "1e-9"]
    assert script.main(command) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "plain decoding of tiny: left out, 1e-09 s are over",
        "passes of tiny: left out, 1e-09 s are over",
    ]


def test_what_fails_ends_neither_its_stage_nor_the_rest(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto")

    def broken(*_: Any) -> Any:
        yield {"method": "layerskip", "exact": True, "differ": 1}
        raise RuntimeError("no such thing")

    monkeypatch.setattr(script.gpu_shapes, "random_llama", full)
    monkeypatch.setitem(script.STAGES, "spec", broken)
    out = tmp_path / "rows.jsonl"
    command = ["--tiny", "--device", "cpu", "--only", "ar,spec,shapes", "--out", str(out)]
    assert script.main(command) == 1
    _, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["ar", "spec", "spec", "shapes"]
    assert rows[0]["why"] == (
        "CUDA out of memory. Tried: leave it out (--shapes), or lower --limit"
    )
    assert rows[2] == {"stage": "spec", "right": False, "why": "no such thing"}
    assert "no such thing" in capsys.readouterr().out


def test_other_tokens_than_plain_decoding_s_are_a_failure(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"method": "hf", "exact": False, "differ": 3}]
    monkeypatch.setitem(script.STAGES, "spec", lambda bench: iter(rows))
    command = ["--tiny", "--device", "cpu", "--only", "spec"]
    assert script.main(command) == 0
    rows += [{"method": "layerskip", "exact": True, "differ": 1}]
    assert script.main(command) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "kernel"], "unknown stage 'kernel'. Known: kernels, ar,"),
        (["--stage-s", "0"], "--stage-s must be above 0"),
        (["--shapes", "7B"], "unknown shape '7B'. Known: tiny, 135M,"),
    ],
)
def test_what_it_does_not_know(script: Any, options: list[str], words: str, capsys: Any) -> None:
    assert script.main(["--tiny", *options]) == 2
    assert words in capsys.readouterr().err
