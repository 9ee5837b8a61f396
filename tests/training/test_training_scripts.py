"""Scripts around training: heads side by side, and an adapter scaled down."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.scripts import script
from training.exit_setup import make_examples

from hispec.cli import main as hispec
from hispec.loading import load
from hispec.model.checkpoint import open_checkpoint


def answers(path: Path, count: int) -> Path:
    rows = [
        {"prompt_ids": e.ids[: e.prompt_length], "response_ids": e.ids[e.prompt_length :]}
        for e in make_examples(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_heads_side_by_side(make_llama, tmp_path: Path, cache_home: Path, capsys) -> None:
    folder, out = make_llama(), tmp_path / "heads"
    given = ["--model", str(folder), "--data", str(answers(tmp_path / "train.jsonl", 40))]
    given += ["--held-out", str(answers(tmp_path / "aside.jsonl", 6)), "--exit", "2"]
    given += ["--heads", "affine", "shared", "--rows", "0", "100", "--minutes", "0.01"]
    compare = script("compare_heads")
    assert compare.main([*given, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "heads.jsonl").read_text().splitlines()]
    assert [(row["head"], row["rows"] == 100) for row in rows] == [
        *(("affine", False), ("affine", True), ("shared", False), ("shared", True))
    ]
    for row in rows:
        assert 0 <= row["top1"] <= 1 and row["draft_ms"] > 0 and 1 <= row["window"] <= 8
        # A draft of no use costs a part of the pass, one that always stands brings all of them.
        assert 0 < row["speedup"] < 1 + row["window"]
        assert row["provenance"]["torch"]
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 4 and table[0].startswith("| head")
    states = (out / "exit2-affine-all-0.01min" / "work" / "cache").resolve()
    assert states == (out / "exit2-shared-100-0.01min" / "work" / "cache").resolve(), (
        "computed once"
    )
    before = {path: path.read_bytes() for path in out.glob("*/exit_*.safetensors")}
    assert compare.main([*given, "--out", str(out)]) == 0
    assert {path: path.read_bytes() for path in before} == before, "what is there stays"
    wrong = [*given[:2], "--data", "nowhere.jsonl", *given[4:], "--out", str(tmp_path / "no")]
    assert compare.main(wrong) == 1 and "nowhere.jsonl" in capsys.readouterr().err


def test_less_of_an_adapter(
    make_llama, tmp_path: Path, cache_home: Path, monkeypatch, capsys
) -> None:
    folder, whole, half = make_llama(), tmp_path / "whole", tmp_path / "half"
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat " * 40)
    train = ["train", "--mode", "lora", "--model", str(folder), "--exits", "3", "--steps", "6"]
    train += ["--data", str(answers(tmp_path / "data.jsonl", 40)), "--batch-tokens", "256"]
    train += ["--held-out", str(answers(tmp_path / "aside.jsonl", 6))]
    train += ["--rank", "4", "--deep-rank", "2", "--lr", "0.01", "--perplexity", str(text)]
    assert hispec([*train, "--out", str(whole)]) == 0
    scale = script("scale_adapter")

    def scaled(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["scale_adapter", *map(str, arguments)])
        return scale.main()

    more = ["--held-out", whole / "work" / "held_out", "--perplexity", text]
    fewer = ["--perplexity-tokens", "100"]
    assert scaled(whole, 0.5, half, *more, *fewer) == 2 and not half.exists(), "not comparable"
    assert "judged on text.txt" in capsys.readouterr().err
    assert scaled(whole, 0.5, half, *more) == 0
    original, full, less = (open_checkpoint(path) for path in (folder, whole, half))
    moved = 0.0
    for name in original.tensors():
        first, last, middle = (x.tensor(name).float() for x in (original, full, less))
        torch.testing.assert_close(middle, (first + last) / 2, rtol=0.02, atol=1e-3)
        moved = max(moved, float((last - first).abs().max()))
    assert moved > 1e-3
    record = json.loads((half / "config.json").read_text())
    assert record["base"]["fingerprint"] == less.fingerprint != full.fingerprint
    assert record["training"]["scaled"] == 0.5
    lm = load(half, exits=half, dtype="fp32")
    assert lm.exits is not None and lm.exits.exit_layers == (3,)
    assert scaled(half, 0.5, tmp_path / "quarter", *more) == 0
    quarter = json.loads((tmp_path / "quarter" / "config.json").read_text())
    assert quarter["training"]["scaled"] == 0.25
    quality, before = (json.loads((x / "quality.json").read_text()) for x in (half, whole))
    assert quality["before"] == before["before"] and quality["after"] != before["after"]
    with pytest.raises(SystemExit):
        scaled(whole, 0.5, half, *more)
    assert scaled(folder, 0.5, tmp_path / "other", *more) == 2
