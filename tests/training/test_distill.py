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

from hispec.errors import HispecError, UsageError
from hispec.model import native as native_module
from hispec.model.checkpoint import open_checkpoint
from hispec_training import distill
from hispec_training.answers import read_distilled, shards_of
from hispec_training.data import DataError
from hispec_training.decode import BatchDecoder, Request, _argmax
from hispec_training.files import write_atomically
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


def prompts(count, low=1, high=90, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(low, high))] for _ in range(count)]


VARIANTS = {
    "gqa": {},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "wide heads": {"head_dim": 32, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_states_are_those_of_transformers(make_llama, config):
    from transformers import AutoModelForCausalLM

    folder = make_llama(**config)
    trunk = Trunk(open_checkpoint(folder), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = prompts(5)
    lengths = torch.tensor([len(t) for t in texts])
    ids = torch.zeros(5, int(lengths.max()) + 7, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    states = trunk.states(ids, lengths, (6, 0, 2))
    assert sorted(states) == [0, 2, 6]
    captured = []
    model.model.layers[-1].register_forward_hook(lambda m, args, out: captured.append(out))
    for row, text in enumerate(texts):
        got = model(torch.tensor([text]), output_hidden_states=True)
        for e in (0, 2):
            close(states[e][row, : len(text)], got.hidden_states[e][0])
        close(states[6][row, : len(text)], captured[-1][0])  # hidden_states[-1] is after the norm
        close(trunk.logits(states[6][row, : len(text)]), got.logits[0])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_layers_that_do_not_exist_are_refused(checkpoint):
    with pytest.raises(UsageError, match=r"\[0, 6\].*got 7"):
        Trunk(checkpoint, torch.float32).states(torch.zeros(1, 3, dtype=torch.long), [3], (7,))


@torch.no_grad()
def alone(model, request, eos):
    """One row, no cache, no batch: the specification of a greedy or sampled continuation."""
    ids, new = list(request.prompt_ids), []
    generator = torch.Generator().manual_seed(request.seed)
    uniforms = torch.rand(request.max_new_tokens, generator=generator)
    while len(new) < request.max_new_tokens:
        logits = model(torch.tensor([ids + new])).logits[0, -1].float()
        if request.temperature > 0:
            sums = (logits / request.temperature).softmax(-1).cumsum(-1)
            token = int((sums <= uniforms[len(new)] * sums[-1]).sum())
        else:
            token = int(logits.argmax())
        new.append(token)
        if token in eos:
            return new, "eos"
    return new, "length"


def test_company_changes_nothing(checkpoint, reference):
    """37 rows through a batch of 20, greedy and sampled, equal each decoded alone (fp32)."""
    rng = random.Random(1)
    requests = [
        Request(p, rng.choice([1, 20, 90]), rng.choice([0.0, 0.8, 1.5]), seed)
        for seed, p in enumerate(prompts(37))
    ]
    eos = (259, 7, 8, 9)  # common enough to end some rows early
    ended = []
    decoder = BatchDecoder(Trunk(checkpoint, torch.float32), eos, rows=20)
    answers = decoder.decode(requests, lambda answer: ended.append(answer.index))
    assert sorted(ended) == list(range(37))
    finishes = set()
    for request, answer in zip(requests, answers, strict=True):
        ids, finish = alone(reference, request, eos)
        assert (answer.ids, answer.finish) == (ids, finish)
        finishes.add(finish)
    assert finishes == {"eos", "length"}


def test_packed_and_plain_weights_agree(checkpoint):
    requests = [Request(p, 12) for p in prompts(3)]
    both = [
        BatchDecoder(Trunk(checkpoint, torch.float32, pack=pack), (), 3).decode(requests)
        for pack in (True, False)
    ]
    assert [a.ids for a in both[0]] == [a.ids for a in both[1]]


def test_edge_requests(checkpoint):
    decoder = BatchDecoder(Trunk(checkpoint, torch.float32), (), rows=4)
    assert decoder.decode([]) == []
    answers = decoder.decode([Request([5], 0), Request([5], 1)])
    assert [len(a.ids) for a in answers] == [0, 1]


@pytest.mark.parametrize("width", [256, 320, 100])
def test_block_argmax_takes_the_first_of_ties(width):
    logits = torch.randint(0, 4, (50, width), generator=torch.Generator().manual_seed(0)).bfloat16()
    first = [(row == row.max()).nonzero()[0, 0].item() for row in logits]
    assert _argmax(logits).tolist() == first


def test_sampling_follows_the_softmax(checkpoint, reference):
    """Counts of 2,000 first tokens; chi-square over likely tokens, false alarm below 1e-6."""
    n, heat = 2000, 0.7
    prompt = prompts(1, 20, 20)[0]
    decoder = BatchDecoder(Trunk(checkpoint, torch.float32), (), rows=250)
    answers = decoder.decode([Request(prompt, 1, heat, seed) for seed in range(n)])
    counts = torch.bincount(torch.tensor([a.ids[0] for a in answers]), minlength=320).double()
    with torch.no_grad():
        p = (reference(torch.tensor([prompt])).logits[0, -1].double() / heat).softmax(-1)
    likely = p * n >= 10
    expected = torch.cat([p[likely], p[~likely].sum()[None]]) * n
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]])
    square = ((seen - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    # Wilson-Hilferty: chi-square's cube root is nearly normal; 5 sigma is 3e-7
    z = ((square / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    assert degrees > 5
    assert z < 5


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


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "a.jsonl"
    target.write_text("before")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HispecError, match="No space left"):
        write_atomically(target, "after")
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no run of that name"):
        list(read_distilled(tmp_path / "x.jsonl"))
