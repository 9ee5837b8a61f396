"""``scripts/bench_gpu.py`` runs on any machine, small, and says no to what it does not know."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

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
    if importlib.util.find_spec("triton") is not None:
        names = {row["kernel"] for row in stages["kernels"] if "kernel" in row}
        theirs = {row["peer"]: row for row in stages["kernels"] if "peer" in row}
        assert {"torch.mm qkv", "torch rms_norm", "torch sdpa"} <= set(theirs)
        assert {"product qkv", "gated_product", "attention", "exit_head", "rope_write"} <= names
        assert {"attention tree", "add_rms_norm", "top_k", "noisy", "follow", "compact"} <= names
        assert all(row["right"] and row["ms"] > 0 for row in stages["kernels"] if "why" not in row)
        exact, *others = [row for row in stages["ar"] if "passes" in row]
        assert exact["passes"] == "triton" and exact["numerics"] == "exact"
        assert {row["numerics"] for row in others} == {"fast"}
        assert exact["cost"] == exact["ms"] / min(row["ms"] for row in others) - 1
        assert all(row["device_ms"] > 0 for row in (exact, *others))
        parts = [row for row in stages["ar"] if "op" in row]
        assert parts[-1]["op"] == "all else" and not any("right" in row for row in parts)
        assert sum(row["ms"] for row in parts) == pytest.approx(exact["ms"])
    assert stages["ar"][0]["floor_ms"] > 0
    assert {row["method"] for row in stages["spec"]} >= {"ar", "layerskip", "hispec"}
    assert all(row["differ"] == 0 and 0 <= row["host"] < 1 for row in stages["spec"])
    assert {row["method"] for row in stages["peers"]} >= {"ar", "hf", "hf-prompt-lookup"}
    assert {row.get("way") for row in stages["shapes"]} >= {"layerskip 4", "hispec 2/4"}
    printed = capsys.readouterr().out
    assert all(f"\n{stage} (" in printed for stage in script.STAGES)


def test_a_stage_ends_in_time(script: Any, capsys: Any) -> None:
    command = ["--tiny", "--device", "cpu", "--only", "kernels", "--stage-s", "1e-9"]
    assert script.main(command) == 0
    printed, said = capsys.readouterr()
    if importlib.util.find_spec("triton") is not None:
        assert said == "kernels: cut off, 1e-09 s are over\n"
        assert printed.count("product") == 1, "a row"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "kernel"], "unknown stage 'kernel'. Known: kernels, ar,"),
        (["--shapes", "7B"], "unknown shape '7B'. Known: tiny, 135M,"),
    ],
)
def test_what_it_does_not_know(script: Any, options: list[str], words: str, capsys: Any) -> None:
    assert script.main(["--tiny", *options]) == 2
    assert words in capsys.readouterr().err
