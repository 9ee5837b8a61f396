"""``hispec distill``: every prompt once, resumed to the same bytes, nothing written over."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training.decode_setup import alone

from hispec.errors import HispecError, UsageError
from hispec.model import native as native_module
from hispec.model.checkpoint import open_checkpoint
from hispec_training import distill
from hispec_training.answers import read_distilled, shards_of
from hispec_training.data import DataError
from hispec_training.decode import Request
from hispec_training.plan import plan_rows
from hispec_training.shard_cache import ShardCache
from hispec_training.shards import build_shards, find_states, read_examples
from hispec_training.trunk import Trunk

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tiny_llama):
    return open_checkpoint(tiny_llama)


@pytest.fixture(scope="module")
def reference(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def arguments(model, prompt_file, out, *more):
    parser = argparse.ArgumentParser()
    distill.add_arguments(parser)
    base = ["--model", model, "--prompts", prompt_file, "--out", out, "--dtype", "fp32"]
    small = ["--max-new-tokens", "24", "--rows", "4", "--shard-rows", "6"]
    return parser.parse_args([str(x) for x in [*base, *small, *more]])


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    rng = random.Random(3)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "one", "hen", "there"]
    rows = [{"instruction": " ".join(rng.choices(words, k=rng.randint(1, 12)))} for _ in range(20)]
    rows.append({"instruction": "x" * 600})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_distill_writes_every_prompt_once(tiny_llama, prompt_file, tmp_path, capsys):
    out = tmp_path / "d.jsonl"
    assert distill.main(arguments(tiny_llama, prompt_file, out)) == 0
    rows = rows_of(out)
    assert sorted(r["id"] for r in rows) == sorted(f"p:{i}" for i in range(1, 21))
    assert "1 prompts: too long, left out" in capsys.readouterr().err
    assert {r["temperature"] for r in rows} == {0.0, 0.7, 1.0}
    for row in rows:
        assert set(row) == {
            "id", "category", "prompt_ids", "response_ids", "temperature", "finish",
        }  # fmt: skip
        assert 1 <= len(row["response_ids"]) <= 24
        assert (row["finish"] == "eos") == (row["response_ids"][-1] == 259)
    made = json.loads(Path(f"{out}.provenance.json").read_text())
    assert made["run"]["model"] == open_checkpoint(tiny_llama).fingerprint
    assert list(read_distilled(out)) == rows
    out.unlink()  # as while it still runs: the shards are there, the file is not
    assert list(read_distilled(out)) == rows


def test_greedy_rows_are_the_targets_own(tiny_llama, prompt_file, tmp_path, reference):
    out = tmp_path / "d.jsonl"
    distill.main(arguments(tiny_llama, prompt_file, out, "--sampled-fraction", 0, "--limit", 3))
    for row in rows_of(out):
        assert row["temperature"] == 0
        ids, finish = alone(reference, Request(row["prompt_ids"], 24), (259,))
        assert (row["response_ids"], row["finish"]) == (ids, finish)


def test_stopped_and_damaged_runs_resume_to_the_same_bytes(tiny_llama, prompt_file, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "d.jsonl"
    distill.main(arguments(tiny_llama, prompt_file, whole))
    distill.main(arguments(tiny_llama, prompt_file, out, "--minutes", 0))
    assert len(rows_of(out)) == 6  # one shard
    shards = shards_of(out)
    first = shards / "shard-00000.jsonl"
    first.write_bytes(first.read_bytes()[:-30])
    (shards / ".shard-00001.jsonl.99.part").write_text("torn")
    with pytest.raises(UsageError, match="--resume"):
        distill.main(arguments(tiny_llama, prompt_file, out))
    with pytest.raises(UsageError, match="max_new_tokens"):
        distill.main(arguments(tiny_llama, prompt_file, out, "--resume", "--max-new-tokens", 5))
    distill.main(arguments(tiny_llama, prompt_file, out, "--resume"))
    assert out.read_bytes() == whole.read_bytes()


def test_killed_runs_resume_to_the_same_bytes(tiny_llama, prompt_file, tmp_path):
    settings = ["--dtype", "bf16", "--max-new-tokens", "60"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "d.jsonl"
    distill.main(arguments(tiny_llama, prompt_file, whole, *settings))
    command = [sys.executable, "-m", "hispec_training.distill", "--model", str(tiny_llama)]
    command += ["--prompts", str(prompt_file), "--out", str(out), "--rows", "4"]
    command += ["--shard-rows", "6", *settings]
    path = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "training"))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    shards = shards_of(out)
    deadline = time.monotonic() + 120
    while not list(shards.glob("shard-*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert not out.exists()
    assert 1 <= len(list(shards.glob("shard-*.jsonl"))) < 4
    distill.main(arguments(tiny_llama, prompt_file, out, "--resume", *settings))
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("layout", ["compiled", "torch"])
def test_states_are_those_of_a_pass_over_the_texts(
    make_llama, prompt_file, tmp_path, layout, monkeypatch
):
    wide = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 2}
    model = make_llama(**wide, num_key_value_heads=1)
    monkeypatch.setenv("HISPEC_NATIVE", "1" if layout == "compiled" else "0")
    native_module._library.cache_clear()
    out = tmp_path / "answers.jsonl"
    distill.main(arguments(model, prompt_file, out, "--states", "1,2", "--dtype", "bf16"))
    native_module._library.cache_clear()
    shards = sorted(shards_of(out).glob("*.safetensors"))
    assert len(shards) == len(list(shards_of(out).glob("*.jsonl"))) > 1
    checkpoint = open_checkpoint(model)
    examples, _ = read_examples([out], 4096)
    last = checkpoint.config.num_layers
    assert find_states(shards, examples, checkpoint.fingerprint, [1, last])
    assert not find_states(shards, examples[1:], checkpoint.fingerprint, [1, last])
    assert not find_states(shards[1:], examples, checkpoint.fingerprint, [1, last])
    assert not find_states(shards, examples, "another", [1, last])
    assert not find_states(shards, examples, checkpoint.fingerprint, [3, last])
    kept = ShardCache(shards)
    wanted = build_shards(
        tmp_path / "again",
        examples,
        lambda: Trunk(checkpoint, torch.float32),
        fingerprint=checkpoint.fingerprint,
        layers=[1, 2, last],
    )
    agreed = []
    for ours, theirs in zip(kept, wanted, strict=True):
        assert ours.ids.equal(theirs.ids)
        assert ours.first == theirs.first
        for e in (1, 2, last):  # what follows the last token was never needed
            one, other = ours.states[e][:-1].float(), theirs.states[e][:-1].float()
            assert (one - other).norm() < 0.02 * other.norm()
        assert ours.top_ids.shape == theirs.top_ids.shape
        torch.testing.assert_close(ours.top_logits, theirs.top_logits, atol=0.05, rtol=0.05)
        agreed.append((ours.pick == theirs.pick).float().mean())
    assert sum(agreed) / len(agreed) > 0.9
    shards[0].write_bytes(b"torn")
    assert not find_states(shards, examples, checkpoint.fingerprint, [1, last])


def test_evaluation_prompts_stay_out(tiny_llama, prompt_file, tmp_path, capsys):
    rows = rows_of(prompt_file)
    kept_out = tmp_path / "eval.jsonl"
    turns = [{"turns": [row["instruction"]]} for row in rows[:5]]
    kept_out.write_text("".join(json.dumps(row) + "\n" for row in turns))
    out = tmp_path / "d.jsonl"
    options = ["--exclude", kept_out, "--max-new-tokens", 1]
    distill.main(arguments(tiny_llama, prompt_file, out, *options))
    made = {row["id"] for row in rows_of(out)}
    assert made.isdisjoint(f"p:{i}" for i in range(1, 6))
    assert "excluded as an evaluation prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-new-tokens", 0], "--max-new-tokens must be at least 1, got 0"),
        (["--sampled-fraction", 2], "--sampled-fraction must lie in"),
        (["--temperatures", 0.7, 0], "--temperatures must be above 0"),
        (["--max-prompt-tokens", 3], "No prompt is left"),
    ],
)
def test_bad_options_are_refused(tiny_llama, prompt_file, tmp_path, options, words):
    with pytest.raises(HispecError, match=words):
        distill.main(arguments(tiny_llama, prompt_file, tmp_path / "d.jsonl", *options))


@pytest.mark.parametrize("option", ["--prompts", "--exclude"])
def test_a_file_that_is_read_is_not_written(tiny_llama, prompt_file, tmp_path, option):
    mine = tmp_path / "p.jsonl"
    mine.write_bytes(b"".join(prompt_file.read_bytes().splitlines(keepends=True)[:9]))
    before = mine.read_bytes()
    (tmp_path / "elsewhere").mkdir()
    again = tmp_path / "elsewhere" / ".." / "p.jsonl"
    prompts_read = prompt_file if option == "--exclude" else again
    more = ["--exclude", again] if option == "--exclude" else []
    with pytest.raises(UsageError, match="give another"):
        distill.main(arguments(tiny_llama, prompts_read, mine, "--resume", *more))
    assert mine.read_bytes() == before


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_file_of_others_is_not_written(tiny_llama, prompt_file, tmp_path, more):
    out = tmp_path / "notes.jsonl"
    out.write_text("mine")
    with pytest.raises(UsageError, match=r"notes.jsonl is there and no run of hispec distill"):
        distill.main(arguments(tiny_llama, prompt_file, out, *more))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.jsonl"]
    assert out.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"run": 5}'])
def test_damaged_provenance_is_one_sentence(tiny_llama, prompt_file, tmp_path, text):
    out = tmp_path / "d.jsonl"
    shards_of(out).mkdir()
    (shards_of(out) / "provenance.json").write_text(text)
    with pytest.raises(UsageError, match=r"provenance.json, which says how d.jsonl was begun, is"):
        distill.main(arguments(tiny_llama, prompt_file, out, "--resume"))


def stop_at(monkeypatch, number):
    """Ctrl-C comes while shard ``number`` (from 0) of the following runs is decoded."""
    done, decode = [], distill.decode_shard

    def decoded(*args):
        if len(done) == number:
            raise KeyboardInterrupt
        done.append(1)
        return decode(*args)

    monkeypatch.setattr(distill, "decode_shard", decoded)


def test_a_run_that_is_stopped_leaves_what_there_is(tiny_llama, prompt_file, tmp_path, monkeypatch):
    out = tmp_path / "d.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 0)
        distill.main(arguments(tiny_llama, prompt_file, out))
    assert not out.exists(), "an empty file is no answers"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 1)
        distill.main(arguments(tiny_llama, prompt_file, out, "--resume"))
    assert len(rows_of(out)) == 6


def test_a_finished_file_survives_without_its_folder(
    tiny_llama, prompt_file, tmp_path, monkeypatch
):
    out = tmp_path / "d.jsonl"
    distill.main(arguments(tiny_llama, prompt_file, out))
    whole = out.read_bytes()
    shutil.rmtree(shards_of(out))  # to make room
    with pytest.raises(UsageError, match=r"d.jsonl holds an earlier run.*--resume"):
        distill.main(arguments(tiny_llama, prompt_file, out))
    with pytest.raises(UsageError, match="max_new_tokens"):
        distill.main(arguments(tiny_llama, prompt_file, out, "--resume", "--max-new-tokens", 5))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 1)
        distill.main(arguments(tiny_llama, prompt_file, out, "--resume"))
    assert out.read_bytes() == whole


def test_plain_text_is_cut_to_a_prefix(checkpoint):
    from hispec_training.data import Record

    records = [Record("a", "c", text="word " * 100)]
    plan = {"seed": 0, "sampled_fraction": 0.0, "temperatures": [1.0], "max_prompt_tokens": 300}
    rows, counts = plan_rows(records, checkpoint.tokenizer, **plan)
    assert len(rows[0].prompt_ids) == 64 and not counts


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no run of that name"):
        list(read_distilled(tmp_path / "x.jsonl"))
