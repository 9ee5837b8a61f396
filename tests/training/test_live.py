"""Texts whose states are computed when asked for: the same ones, and the same exits from them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from training.exit_setup import EXITS, make_cache, make_examples, make_exits

from hispec.cli import main as hispec
from hispec.model.checkpoint import Checkpoint, open_checkpoint
from hispec_training.live import LiveTexts
from hispec_training.loop import Recipe, Trainer
from hispec_training.prepare import recomputes
from hispec_training.trunk import Trunk


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path) -> Checkpoint:
    return open_checkpoint(tiny_llama)


def live(checkpoint: Checkpoint, count: int = 24) -> LiveTexts:
    layers = [0, *EXITS, checkpoint.config.num_layers]
    return LiveTexts(make_examples(count), Trunk(checkpoint, torch.float32), layers)


def test_they_are_what_a_cache_keeps(checkpoint: Checkpoint, tmp_path: Path, monkeypatch) -> None:
    kept, said = make_cache(tmp_path, checkpoint), live(checkpoint)
    assert len(said) == len(kept)
    assert said.lengths == kept.lengths and said.response_lengths == kept.response_lengths
    monkeypatch.setattr("hispec_training.live.BATCH_TOKENS", 40)  # several batches
    order = [5, 3, 17, 0]
    words = checkpoint.tensor("model.embed_tokens.weight")
    for one, other in zip(said.texts(order), kept.texts(order), strict=True):
        assert torch.equal(one.ids, other.ids) and one.first == other.first
        assert torch.equal(one.pick, other.pick) and one.category == other.category
        top_k = other.top_ids.shape[1]
        torch.testing.assert_close(one.top_logits[:, :top_k], other.top_logits)
        for e in (*EXITS, checkpoint.config.num_layers):
            torch.testing.assert_close(one.states[e], other.states[e], rtol=1e-2, atol=1e-2)
        assert torch.equal(one.states[0], words[one.ids.long()].bfloat16())
    assert torch.equal(said[-1].ids, kept[len(kept) - 1].ids)
    with pytest.raises(IndexError):
        said[len(said)]


def test_counts_are_those_of_the_responses(checkpoint: Checkpoint) -> None:
    said = live(checkpoint, 6)
    counts = said.pick_counts(checkpoint.config.vocab_size)
    assert int(counts.sum()) == sum(said.response_lengths)
    token = said.examples[0].ids[-1]
    assert counts[token] == sum(x.ids[x.prompt_length :].count(token) for x in said.examples)


def test_heads_train_on_them_as_on_a_cache(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("hispec_training.live.TOP_K", 4)  # what the small cache keeps
    recipe = Recipe(steps=4, batch_targets=64, warmup_steps=2, save_every=100, autocast=False)
    cache, found = make_cache(tmp_path / "cache", checkpoint), []
    for number, texts in enumerate((cache, live(checkpoint))):
        exits = make_exits(checkpoint, cache)
        history = Trainer(exits, texts, texts, recipe, tmp_path / str(number)).run()
        found.append((dict(exits.named_parameters()), history.held_out[-1]))
    (kept, seen), (computed, looked) = found
    for name, weight in computed.items():
        torch.testing.assert_close(weight, kept[name], rtol=1e-2, atol=2e-3)
    for e in EXITS:
        assert looked[f"top1_{e}"] == pytest.approx(seen[f"top1_{e}"], abs=0.05)


def test_the_command(tiny_llama: Path, tmp_path: Path, capsys) -> None:
    rows = [
        {"prompt_ids": x.ids[: x.prompt_length], "response_ids": x.ids[x.prompt_length :]}
        for x in make_examples(60)
    ]
    data = tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", "--model", str(tiny_llama), "--data", str(data), "--recompute"]
    heads = [*command, "--exits", "0,2", "--head-vocab", "50", "--batch-targets", "64"]
    assert hispec([*heads, "--steps", "5", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "exit_0.safetensors").exists()
    assert not (tmp_path / "out" / "work" / "cache").exists(), "nothing is kept on disk"
    lora = [*command, "--mode", "lora", "--exits", "2", "--rank", "2", "--steps", "2"]
    assert hispec([*lora, "--out", str(tmp_path / "lora")]) == 0
    assert not (tmp_path / "lora" / "work" / "cache").exists()
    capsys.readouterr()
    assert hispec([*heads, "--cache-gb", "1", "--out", str(tmp_path / "no")]) == 2
    assert "drop one" in capsys.readouterr().err


def test_a_gpu_recomputes_unless_a_cache_is_asked_for(monkeypatch) -> None:
    def asked(recompute: bool | None, cache_gb: float | None) -> bool:
        return recomputes(argparse.Namespace(recompute=recompute, cache_gb=cache_gb))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert asked(None, None) and not asked(None, 3.0) and not asked(False, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not asked(None, None) and asked(True, None)
