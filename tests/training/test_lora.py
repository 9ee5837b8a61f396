"""LoRA training: only the updates move, the exits rise, and a run that stopped goes on the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.exit_setup import make_cache
from training.lora_setup import EXITS, SHAPE, make_student, make_trainer

from hispec.errors import HispecError, UsageError
from hispec.model.checkpoint import open_checkpoint
from hispec_training.adapter import add_lora
from hispec_training.padded import kept_count, text_batches
from hispec_training.trunk import Trunk

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tiny_llama):
    return open_checkpoint(tiny_llama)


@pytest.fixture(scope="module")
def cache(checkpoint, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), checkpoint)


def updates(trainer):
    pairs = zip(trainer.names, trainer.parameters, strict=True)
    return {name: parameter.detach().clone() for name, parameter in pairs}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_layers_outside_the_model_are_refused(checkpoint):
    with pytest.raises(UsageError, match="got 6"):
        add_lora(checkpoint, (2, 6), SHAPE, torch.float32, seed=0)


def test_a_share_of_positions_is_rounded_up() -> None:
    assert kept_count(10, 0.25) == 3
    assert kept_count(8, 0.25) == 2


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
    with pytest.raises(HispecError, match="No space left"):
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
