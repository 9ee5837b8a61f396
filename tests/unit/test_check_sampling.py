"""The sampling check on a tiny model: it passes, and it can fail."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from unittest import mock

import pytest
from helpers.lms import HEAD_KINDS, save_exits, save_model

from hispec.model.checkpoint import open_checkpoint
from hispec.picker import Picker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "check_sampling", ROOT / "scripts" / "check_sampling.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, tmp_path: Path):
    save_model(tmp_path / "model", "gqa")
    kinds = {2: HEAD_KINDS["block"], 4: HEAD_KINDS["deep reduced"]}
    save_exits(tmp_path / "exits", open_checkpoint(tmp_path / "model"), kinds)
    rows = [{"id": i, "prompt": "the tea " * (i + 1)} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def check(*options: str) -> tuple[int, list[dict]]:
        code = script.main(
            [
                f"--model={tmp_path / 'model'}",
                f"--exits={tmp_path / 'exits'}",
                f"--prompts={tmp_path / 'prompts.jsonl'}",
                f"--out={tmp_path / 'out.jsonl'}",
                *("--max-new-tokens=8", "--hierarchies=layerskip,hd", *options),
            ]
        )
        rows = (tmp_path / "out.jsonl").read_text().splitlines()
        return code, [json.loads(row) for row in rows]

    return check


def test_all_it_does(run, capsys) -> None:
    code, rows = run("--triples=13", "--agreement=2", "--noises=4", "--speed=1", "--hf=4")
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.count("13 of 13 triples equal") == 2
    kinds = [row["kind"] for row in rows]
    assert kinds.count("triple") == 26 and kinds.count("transformers") == 4
    for row in rows:
        if row["kind"] == "coupling":
            assert 0 <= row["lower"] <= row["upper"] <= 1
            assert row["lower"] - 0.2 < row["agreement"] < row["upper"] + 0.2


def test_it_can_fail(run, capsys) -> None:
    picks = Picker.picks

    def keyed_by_width(self, logits, positions, prefix, ids=None):
        # noise that depends on how much was drafted
        return picks(self, logits, [p + len(positions) for p in positions], prefix, ids)

    with mock.patch.object(Picker, "picks", keyed_by_width):
        # Levels that always draft, whatever passes cost here.
        code, _ = run("--triples=4", "--dtypes=fp32", "--hierarchies=layerskip-paper")
    assert code == 1 and "differs" in capsys.readouterr().out
