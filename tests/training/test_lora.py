import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training.exit_setup import make_cache

from hispec.cli import main as hispec
from hispec.errors import HispecError, UsageError
from hispec.loading import load
from hispec.model.adapter import Adapter, merge
from hispec.model.checkpoint import open_checkpoint
from hispec.model.exits import SharedHead
from hispec_training.adapt import LoraRecipe, LoraTrainer
from hispec_training.adapter import LoraShape, Student, add_lora, save_adapter
from hispec_training.checkpoints import CHECKPOINT, learning_rate
from hispec_training.curriculum import drop_rates, dropped_layers, exit_weights, exits_at
from hispec_training.divergence import divergence
from hispec_training.padded import kept_count, text_batches
from hispec_training.quality import agreement, perplexity
from hispec_training.trunk import Trunk

ROOT = Path(__file__).parents[2]
EXITS = (1, 3)
SHAPE = LoraShape(rank=8, deep_rank=2, alpha=1.0)
RECIPE = LoraRecipe(
    exits=EXITS, steps=6, batch_tokens=150, warmup_steps=2, eval_every=3, save_every=2,
    autocast=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tiny_llama):
    return open_checkpoint(tiny_llama)


@pytest.fixture(scope="module")
def cache(checkpoint, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), checkpoint)


def make_student(checkpoint, shape=SHAPE, exits=EXITS):
    return Student(add_lora(checkpoint, exits, shape, torch.float32, seed=0))


def make_trainer(checkpoint, cache, folder, **recipe):
    changed = dataclasses.replace(RECIPE, **recipe)
    return LoraTrainer(make_student(checkpoint), cache, cache, changed, folder)


def updates(trainer):
    pairs = zip(trainer.names, trainer.parameters, strict=True)
    return {name: parameter.detach().clone() for name, parameter in pairs}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# schedules


def test_curricula():
    assert [exits_at(s, 10, (8, 4), "all") for s in (0, 9)] == [[4, 8], [4, 8]]
    assert [exits_at(s, 10, (4, 8, 12), "rotate")[0] for s in range(4)] == [12, 8, 4, 12]
    gradual = [exits_at(s, 12, (4, 8, 12), "gradual") for s in range(12)]
    assert gradual[0] == [12] and gradual[2] == [8, 12] and gradual[4] == [4, 8, 12]
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(gradual))


def test_exit_weights_add_up_and_grow_with_depth():
    assert exit_weights((2, 4), 0.0) == {2: 0.5, 4: 0.5}
    weights = exit_weights((2, 4, 9), 0.1)
    assert sum(weights.values()) == pytest.approx(1)
    assert weights[2] < weights[4] < weights[9]
    assert weights[9] / weights[4] == pytest.approx((1 + 3.6) / (1 + 0.6))


def test_layer_dropout_grows_with_depth_and_is_a_function_of_the_step():
    rates = drop_rates(30, 0.2)
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2)
    assert rates == sorted(rates)
    counts = [0] * 30
    for step in range(2000):
        dropped = dropped_layers(rates, 0, step)
        assert dropped == dropped_layers(rates, 0, step)
        for layer in dropped:
            counts[layer] += 1
    assert counts[0] == 0
    assert abs(counts[-1] / 2000 - 0.2) < 0.05  # 5.6 sigma


def test_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(2e-3, 10, 100, step) for step in range(100)]
    assert rates[0] == pytest.approx(2e-4)
    assert max(rates) == pytest.approx(2e-3)
    assert rates[-1] < 2e-5


# losses


def test_divergence_is_the_kl_and_its_gradient(monkeypatch):
    from hispec_training import divergence as module

    monkeypatch.setattr(module, "chunk_values", lambda device: 75)  # 3 rows at a time
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 16, generator=generator, requires_grad=True)
    x0, rows = torch.randn(10, 16, generator=generator), torch.randn(50, 16, generator=generator)
    got = divergence(x, x0, rows)
    (grad,) = torch.autograd.grad(3 * got, x)
    logs = [(y @ rows.T).log_softmax(-1) for y in (x, x0)]
    want = F.kl_div(logs[0], logs[1], reduction="sum", log_target=True)
    (want_grad,) = torch.autograd.grad(3 * want, x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-5)
    assert divergence(x0, x0, rows).abs() < 1e-5


@pytest.mark.parametrize("full, some", [(True, True), (False, True), (False, False)])
def test_a_step_is_the_sum_of_its_losses(checkpoint, cache, tmp_path, full, some):
    """Against a plain loop over texts, exits and positions, with transformers' own head."""
    trainer = make_trainer(checkpoint, cache, tmp_path, keep_fraction=1.0, exit_scale=0.3)
    torch.manual_seed(1)
    for parameter in trainer.parameters:  # away from the start, where the updates are zero
        parameter.data.normal_(std=0.05)
    indices = [0, 1, 2, 3]
    onward = {0, 1, 2, 3} if full else {1, 3} if some else set()
    targets = sum(cache.response_lengths[i] for i in indices)
    kept = sum(cache.lengths[i] for i in onward)
    shares = exit_weights(EXITS, 0.3)
    got, _ = trainer._losses(indices, onward, shares, frozenset(), targets, kept)
    got_grads = torch.autograd.grad(got, trainer.parameters, allow_unused=True)

    model = trainer.student.model
    want = torch.zeros(())
    for i in indices:
        text = cache[i]
        out = model(text.ids.long()[None], output_hidden_states=True)
        for e, share in shares.items():
            h = out.hidden_states[e][0, text.first : text.first + len(text.pick)]
            logs = trainer.student.head @ trainer.student.normed(h)[..., None]
            logs = logs[..., 0].log_softmax(-1)
            for row, z in enumerate(logs):
                soft = text.top_logits[row].softmax(-1)
                loss = -0.5 * z[text.pick[row]] - 0.5 * (soft * z[text.top_ids[row].long()]).sum()
                want = want + share * loss / targets
        if i in onward:
            last = trainer.student.normed(text.states[checkpoint.config.num_layers].float())
            log_p0 = (last @ trainer.student.head.T).log_softmax(-1)
            log_p = out.logits[0].log_softmax(-1)
            kl = (log_p0.exp() * (log_p0 - log_p)).sum()
            want = want + kl * RECIPE.keep / kept
    want_grads = torch.autograd.grad(want, trainer.parameters, allow_unused=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(got_grads, want_grads, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if a is None else a, zero.expand_as(a) if b is None else b, rtol=1e-3, atol=1e-5
        ) if a is not None else None


@pytest.mark.parametrize("length", [1, 40, 300])
def test_short_attention_is_attention(length):
    from hispec_training.short_attention import short_attention

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, length, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, length, 8, generator=generator).requires_grad_() for _ in "kv")
    got, _ = short_attention(None, q, k, v, None)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-4, atol=1e-5)
    weights = torch.randn(got.shape, generator=generator)
    grads = [
        torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (got, want.transpose(1, 2))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# training


def test_fresh_updates_change_nothing(checkpoint):
    student = make_student(checkpoint)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        got = student(ids, (1, 3, 6))
    want = Trunk(checkpoint, torch.float32).states(ids, [20], (1, 3, 6))
    for e in (1, 3, 6):
        torch.testing.assert_close(got[e], want[e], rtol=1e-4, atol=1e-4)


def test_only_updates_move(checkpoint, cache, tmp_path):
    trainer = make_trainer(checkpoint, cache, tmp_path, layer_dropout=0.3, lr=1e-2)
    named = dict(trainer.student.named_parameters())
    frozen = {n: p.detach().clone() for n, p in named.items() if not p.requires_grad}
    assert all("lora_" in name for name in named if name not in frozen)
    ranks = {p.shape[0] for n, p in named.items() if "lora_A" in n and "layers.2." in n}
    deep = {p.shape[0] for n, p in named.items() if "lora_A" in n and "layers.3." in n}
    assert (ranks, deep) == ({8}, {2})
    before = updates(trainer)
    trainer.run()
    assert all(torch.equal(named[name], tensor) for name, tensor in frozen.items())
    after = updates(trainer)
    assert all(not torch.equal(before[n], after[n]) for n in before if "lora_B" in n)


@pytest.mark.parametrize("curriculum", ["all", "rotate", "gradual"])
def test_training_raises_the_exits_and_keeps_the_model(checkpoint, cache, tmp_path, curriculum):
    trainer = make_trainer(
        checkpoint, cache, tmp_path, steps=60, lr=1e-2, curriculum=curriculum, eval_every=30
    )
    trainer._look()
    trainer.run()
    first, last = trainer.history.held_out[0], trainer.history.held_out[-1]
    for e in EXITS:
        assert last[f"top1_{e}"] > first[f"top1_{e}"] + 0.1
    assert first["top1_6"] == 1.0
    assert last["top1_6"] > 0.7
    kls = [row["kl"] for row in trainer.history.losses if "kl" in row]
    assert len(kls) == 60 and kls[0] < 1e-3


def test_stopped_run_resumes_to_the_same_weights(checkpoint, cache, tmp_path):
    whole = make_trainer(checkpoint, cache, tmp_path / "whole", accumulate=2, layer_dropout=0.2)
    whole.run()

    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] == 5:
            raise Stop

    cut = make_trainer(checkpoint, cache, tmp_path / "cut", accumulate=2, layer_dropout=0.2)
    cut.on_step = stop
    with pytest.raises(Stop):
        cut.run()
    again = make_trainer(checkpoint, cache, tmp_path / "cut", accumulate=2, layer_dropout=0.2)
    assert again.resume()
    assert again.step == 4
    again.run()
    assert_same(updates(whole), updates(again))
    assert [r["step"] for r in again.history.losses] == [1, 2, 3, 4, 5, 6]
    other = make_trainer(checkpoint, cache, tmp_path / "cut", accumulate=2, lr=0.5)
    with pytest.raises(HispecError, match="layer_dropout, lr"):
        other.resume()


def test_a_loss_that_is_no_number_stops_at_a_named_step(checkpoint, cache, tmp_path):
    trainer = make_trainer(checkpoint, cache, tmp_path, save_every=100)
    original, calls = trainer._losses, []

    def poisoned(*args):
        calls.append(None)
        total, counts = original(*args)
        return (total * float("nan"), counts * float("nan")) if len(calls) == 4 else (total, counts)

    trainer._losses = poisoned
    with pytest.raises(HispecError, match="not a number at step 4"):
        trainer.run()
    again = make_trainer(checkpoint, cache, tmp_path)
    assert again.resume() and again.step == 3
    assert_same(updates(trainer), updates(again))
    assert all(p.isfinite().all() for p in again.parameters)


def test_a_full_disk_keeps_the_checkpoint_before(checkpoint, cache, tmp_path, monkeypatch):
    trainer = make_trainer(checkpoint, cache, tmp_path, save_every=2)

    def fill(row):
        if row["step"] == 4:
            monkeypatch.setattr(os, "fsync", full)

    def full(fd):
        raise OSError(28, "No space left on device")

    trainer.on_step = fill
    with pytest.raises(HispecError, match="disk is full"):
        trainer.run()
    monkeypatch.undo()
    again = make_trainer(checkpoint, cache, tmp_path, save_every=2)
    assert again.resume() and again.step == 2


def test_batches_hold_every_text_once_within_the_bound(cache):
    batches = text_batches(cache, 100, seed=0, epoch=1)
    assert sorted(i for batch in batches for i in batch) == list(range(len(cache)))
    assert all(max(cache.lengths[i] for i in b) * len(b) <= 100 or len(b) == 1 for b in batches)
    assert batches != text_batches(cache, 100, seed=0, epoch=2)


@pytest.mark.slow
def test_two_processes_equal_one(tiny_llama, tmp_path):
    """gloo, one thread each, the same global batch."""
    path = os.pathsep.join(str(ROOT / p) for p in ("", "training", "kernels", "tests"))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    script = str(Path(__file__).with_name("two_processes_lora.py"))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29518"]
    found = []
    for number, more in enumerate(([], launcher)):
        folders = [tmp_path / f"{name}{number}" for name in ("cache", "work", "out.pt")]
        command = [sys.executable, *more, script, str(tiny_llama), *map(str, folders)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(folders[-1], weights_only=True))
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-4, atol=1e-4)


# saving, merging, measuring


@pytest.fixture(scope="module")
def adapted(checkpoint, cache, tmp_path_factory):
    """A trained adapter and its merged checkpoint in fp32."""
    folder = tmp_path_factory.mktemp("adapted")
    trainer = make_trainer(checkpoint, cache, folder / "work", steps=30, lr=1e-2)
    trainer.run()
    save_adapter(trainer.student.model, folder / "adapter")
    (folder / "merged").mkdir()
    merge(Adapter.open(folder / "adapter"), checkpoint, folder / "merged")
    return trainer, folder


def test_adapter_loads_through_peft_and_merges_to_the_same_model(checkpoint, adapted):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer, folder = adapted
    base = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == checkpoint.name
    ids = torch.arange(30)[None]
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    with torch.no_grad():
        outs = [m(ids).logits for m in (trainer.student.model, loaded, merged)]
        plain = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)(ids)
    torch.testing.assert_close(outs[1], outs[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[0], outs[2], rtol=0.05, atol=0.05)  # saved in bf16
    assert (outs[2] - plain.logits).abs().max() > 0.1


def test_merged_checkpoint_runs_under_assistant_early_exit(adapted):
    from transformers import AutoModelForCausalLM

    _, folder = adapted
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    ids = torch.arange(5, 15)[None]
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, **settings)
    early = model.generate(ids, assistant_early_exit=3, **settings)
    assert torch.equal(plain, early)


def test_quality_counts_what_a_plain_loop_counts(checkpoint, cache, adapted):
    from transformers import AutoModelForCausalLM

    _, folder = adapted
    found = agreement(Trunk(open_checkpoint(folder / "merged"), torch.float32), cache, EXITS)
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    same = own = total = 0
    with torch.no_grad():
        for i in range(len(cache)):
            text = cache[i]
            out = model(text.ids.long()[None], output_hidden_states=True)
            place = slice(text.first, text.first + len(text.pick))
            picks = out.logits[0, place].argmax(-1)
            h = model.model.norm(out.hidden_states[3][0, place])
            own += int(((h @ model.lm_head.weight.T).argmax(-1) == picks).sum())
            same += int((picks == text.pick).sum())
            total += len(picks)
    table = found.table()
    assert table["positions"] == total
    assert table["greedy_agreement"]["all"] == pytest.approx(same / total, abs=5e-3)
    assert table["exits"]["3"]["all"] == pytest.approx(own / total, abs=5e-3)
    original = agreement(Trunk(checkpoint, torch.float32), cache, EXITS).table()
    assert original["greedy_agreement"]["all"] == 1.0
    assert original["exits"] == original["exits_vs_original"]


def test_perplexity_is_exp_of_the_mean_loss(checkpoint):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    ids = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0))
    windows = ids[:96].view(3, 32)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
        want = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp().item()
    got = perplexity(Trunk(checkpoint, torch.float32), ids.tolist(), window=32)
    assert got == pytest.approx(want, rel=1e-4)


# the command


def command(folder, out, *more):
    base = ["train", "--mode", "lora", "--model", str(folder), "--exits", "1,3"]
    base += ["--data", str(folder / "data.jsonl"), "--out", str(out), "--steps", "4"]
    return [*base, "--rank", "4", "--deep-rank", "2", "--batch-tokens", "256", *map(str, more)]


def test_command_trains_measures_and_merges(make_llama, tmp_path, cache_home, capsys):
    folder, out = make_llama(), tmp_path / "out"
    rows = [
        {"prompt_ids": list(range(i, i + 9)), "response_ids": list(range(3, 15)), "category": "c"}
        for i in range(30)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 40)
    assert hispec(command(folder, out, "--perplexity", tmp_path / "text.txt")) == 0
    assert capsys.readouterr().out == ""
    quality = json.loads((out / "quality.json").read_text())
    before, after = quality["before"], quality["after"]
    assert before["greedy_agreement"]["all"] > 0.9  # bf16 both times, in other batches
    assert set(after["exits"]) == {"1", "3"}
    change = after["perplexity"] / before["perplexity"] - 1
    assert quality["perplexity_change"] == pytest.approx(change, abs=1e-3)
    assert open_checkpoint(out / "merged").config.num_layers == 6
    assert (out / "adapter_model.safetensors").exists()
    # the adapter's folder opens as the merged model, and knows its exits
    assert open_checkpoint(out).fingerprint == open_checkpoint(out / "merged").fingerprint
    lm = load(out, exits=out, dtype="fp32")
    assert lm.exits.exit_layers == (1, 3) and isinstance(lm.head(3), SharedHead)
    assert "perplexity" in (out / "README.md").read_text()
    assert (out / "report" / "curves.png").exists()
    assert (out / "work" / CHECKPOINT).exists()
    assert hispec(command(folder, out)) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--exits", "6"], "exit_layer must be in [0, 5] for this 6-layer model, got 6"),
        (["--exits", "0"], "before the first layer there is nothing to adapt"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--layer-dropout", "1"], "--layer-dropout must lie in"),
        (["--perplexity", "nowhere.txt"], "There is no file nowhere.txt"),
    ],
)
def test_bad_options_are_one_sentence(tiny_llama, tmp_path, capsys, more, message):
    assert hispec(command(tiny_llama, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err


def test_layers_outside_the_model_are_refused(checkpoint):
    with pytest.raises(UsageError, match="got 6"):
        add_lora(checkpoint, (2, 6), SHAPE, torch.float32, seed=0)
    assert kept_count(10, 0.25) == 3
