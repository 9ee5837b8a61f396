"""The scripts that make prompts: what a model makes up is usable, and sets do not repeat ids."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from helpers.scripts import script
from helpers.tiny_llama import save_tiny_llama

from hispec.model.checkpoint import open_checkpoint
from hispec_training.data import Record, encode_prompt, read_records


def test_a_model_makes_up_prompts(tmp_path: Path, monkeypatch, capsys) -> None:
    model = tmp_path / "model"
    save_tiny_llama(model)
    made = script("self_prompts")
    tokenizer = open_checkpoint(model).tokenizer
    start = made.opening(tokenizer)
    asked = encode_prompt(Record("", "", ({"role": "user", "content": "tea"},)), tokenizer)
    assert asked[: len(start)] == start, "every prompt begins so"
    assert len(start) < len(asked)
    out = tmp_path / "self.jsonl"
    command = ["self_prompts", "--model", str(model), "--count", "40", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--max-tokens", "300", "--rows", "20"])
    made.main()
    assert f"prompts of 40 drawn in {out}" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    texts = [row["messages"][0]["content"] for row in rows]
    assert len(set(texts)) == len(texts) and all(len(text.split()) >= 4 for text in texts)
    if rows:
        assert len(read_records(str(out)).records) == len(rows)


def test_sets_of_tasks_differ(tmp_path: Path, monkeypatch) -> None:
    long = "A sentence about tea, its leaves and its many makers in the hills. " * 12
    dolly = [
        {
            "instruction": f"What about tea number {i}?",
            "context": long if i % 2 else "",
            "category": "closed_qa" if i % 2 else "open_qa",
            "split": "test" if i == 0 else "train",
        }
        for i in range(2100)
    ]
    code = [{"instruction": "Add.", "input": ""}]
    gsm8k = [{"question": f"{i} + 1?"} for i in range(70)]
    files = {"dolly": dolly, "gsm8k": gsm8k, "code": code}
    for name, rows in files.items():
        with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    sentences = [f" This is sentence {i} of a paragraph on how tea is grown ." for i in range(1600)]
    lines = ["".join(sentences[i : i + 8]) for i in range(0, len(sentences), 8)]
    with gzip.open(tmp_path / "wikitext.gz", "wt") as file:
        file.write("\n".join(lines))
    given = [f"--{name}={tmp_path / name}.gz" for name in (*files, "wikitext")]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["training_prompts", *given, "--sets=2", f"--out={out}"])
    script("training_prompts").main()
    ids = [json.loads(line)["id"] for line in (out / "train.jsonl").read_text().splitlines()]
    assert len(set(ids)) == len(ids)
    assert "summary:0" in ids and "summary:1.0" in ids
    kept_out = (out / "heldout.jsonl").read_text().splitlines()
    assert len(kept_out) == 61 and "dolly:0" not in ids
