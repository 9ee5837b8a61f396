"""What ``hispec train`` reads: which answers are taken as they are, and which are made."""

import argparse
import gzip
import json

import pytest
import torch

from hispec.errors import HispecError, UsageError
from hispec.model.checkpoint import open_checkpoint
from hispec_training import distill, prepare, trainer
from hispec_training.answers import shards_of


@pytest.fixture
def folder(tmp_path):
    """With 20 prompts."""
    write_prompts(tmp_path / "data.jsonl", range(20))
    return tmp_path


@pytest.fixture
def decoded(monkeypatch):
    """Sizes of the shards that the model is asked for, of at most 8 rows."""
    asked, real, decode = [], distill.main, distill.decode_shard

    def small_shards(args, **more):
        args.shard_rows = 8
        return real(args, **more)

    def noted(decoder, rows, *more):
        asked.append(len(rows))
        return decode(decoder, rows, *more)

    monkeypatch.setattr(distill, "main", small_shards)
    monkeypatch.setattr(distill, "decode_shard", noted)
    return asked


def write_prompts(path, numbers):
    rows = [{"text": f"some words to go on from, number {i}"} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepared(model, folder, *more):
    """How many texts there are to train on and to measure on."""
    parser = argparse.ArgumentParser()
    trainer.add_arguments(parser)
    base = ["--model", model, "--data", folder / "data.jsonl", "--out", folder / "out"]
    given = [*base, "--max-new-tokens", "3", "--no-recompute", *more]
    args = parser.parse_args([str(x) for x in given])
    checkpoint = open_checkpoint(model)
    layers = [1, checkpoint.config.num_layers]
    cache, held_out = prepare.prepare(args, checkpoint, layers, args.out / "work", loud=False)
    return len(cache), len(held_out)


def test_a_run_that_was_stopped_is_not_taken_for_a_finished_one(
    tiny_llama, folder, decoded, monkeypatch
):
    noted = distill.decode_shard

    def stop_at_the_second(*args):
        if decoded:
            raise KeyboardInterrupt
        return noted(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill, "decode_shard", stop_at_the_second)
        prepared(tiny_llama, folder)
    assert not list((folder / "out" / "work").glob("distilled-*.jsonl"))
    assert prepared(tiny_llama, folder) == (19, 1)
    assert decoded == [8, 8, 4], "the first shard was there"
    assert prepared(tiny_llama, folder) == (19, 1)
    assert decoded == [8, 8, 4]


def test_a_run_that_its_time_ended_is_finished(tiny_llama, folder, decoded):
    assert prepared(tiny_llama, folder, "--distill-minutes", 0) == (7, 1)
    assert prepared(tiny_llama, folder, "--distill-minutes", 0) == (7, 1)
    assert decoded == [8]


def test_answers_to_other_prompts_are_not_taken(tiny_llama, make_llama, folder, decoded):
    assert prepared(tiny_llama, folder) == (19, 1)
    write_prompts(folder / "data.jsonl", range(50, 62))
    assert prepared(tiny_llama, folder) == (11, 1)
    assert decoded == [8, 8, 4, 8, 4]
    for more in (["--max-new-tokens", "4"], ["--seed", "7"]):
        prepared(tiny_llama, folder, *more)
    prepared(make_llama("other", seed=5), folder)
    assert decoded[5:] == [8, 4] * 3
    write_prompts(folder / "data.jsonl", range(20))
    assert prepared(tiny_llama, folder) == (19, 1)
    assert len(decoded) == 11, "those to the first prompts are still there"


def test_files_are_looked_at_before_the_model_is_asked(tiny_llama, folder, decoded):
    data, typo = folder / "data.jsonl", folder / "typo.jsonl"
    with pytest.raises(UsageError, match=f"Cannot read {typo}: No such file"):
        prepared(tiny_llama, folder, "--held-out", typo)
    with pytest.raises(UsageError, match="a row needs prompt_ids"):
        prepared(tiny_llama, folder, "--held-out", data)
    with pytest.raises(HispecError, match=f"There is no file {typo}"):
        prepared(tiny_llama, folder, "--data", data, typo)
    typo.touch()
    with pytest.raises(HispecError, match="is empty"):
        prepared(tiny_llama, folder, "--data", data, typo)
    assert not decoded


def test_packed_answers_are_trained_on(tiny_llama, folder, decoded):
    rows = [{"prompt_ids": [5, 9, i], "response_ids": [7, i]} for i in range(30)]
    packed = folder / "answers.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    held_out = ["--data", packed, "--held-out", packed]
    assert prepared(tiny_llama, folder, *held_out) == (30, 30)
    assert not decoded


def test_a_gpu_goes_on_with_as_many_rows(tiny_llama, folder, monkeypatch):
    """Free memory is another when a run goes on, and shards of another size are another run."""
    asked = []

    def noted(args, **_):
        asked.append((args.rows, args.shard_rows))
        shards_of(args.out).mkdir(parents=True, exist_ok=True)
        stamp = {"run": {"rows": args.rows}}
        (shards_of(args.out) / "provenance.json").write_text(json.dumps(stamp))

    free = iter([2 << 20, 20 << 30])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 80 << 30))
    monkeypatch.setattr(distill, "main", noted)
    for _ in range(2):
        with pytest.raises(UsageError, match="Cannot read"):  # no answers came
            prepared(tiny_llama, folder)
    assert asked == [(8, 64)] * 2
