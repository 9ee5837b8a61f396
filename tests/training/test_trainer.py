"""The loop that trains exit heads: what moves, what resumes, and how it is counted."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from training.exit_setup import EXITS, make_cache, make_exits

from hispec.errors import HispecError, UsageError
from hispec.model.checkpoint import open_checkpoint
from hispec_training.batches import epoch_batches
from hispec_training.checkpoints import (
    CHECKPOINT,
    TIMED,
    History,
    TimeLimit,
    learning_rate,
    read_checkpoint,
)
from hispec_training.evaluate import ROUND, Tally, _count, evaluate
from hispec_training.heads import HeadSpec
from hispec_training.loop import Recipe, Trainer
from hispec_training.report import draw_curves

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(
    steps=6, batch_targets=64, warmup_steps=2, eval_every=3, save_every=2, autocast=False
)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama):
    return open_checkpoint(tiny_llama)


@pytest.fixture(scope="module")
def cache(checkpoint, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), checkpoint)


def weights(exits):
    return {name: p.detach().clone() for name, p in exits.named_parameters()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_lowers_the_loss_and_moves_every_head_tensor(checkpoint, cache, tmp_path):
    exits = make_exits(checkpoint, cache)
    before = weights(exits)
    recipe = Recipe(**{**vars(RECIPE), "steps": 40, "lr": 3e-3, "save_every": 1000})
    history = Trainer(exits, cache, cache, recipe, tmp_path).run()
    for e in EXITS:
        losses = [row[f"loss_{e}"] for row in history.losses]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(not torch.equal(p, before[name]) for name, p in weights(exits).items())


def test_backbone_and_head_matrix_stay_bit_identical(tiny_llama, cache, tmp_path):
    checkpoint = open_checkpoint(tiny_llama)
    files = {path: path.read_bytes() for path in Path(tiny_llama).glob("*.safetensors")}
    exits = make_exits(checkpoint, cache)
    rows = {name: b.clone() for name, b in exits.named_buffers()}
    Trainer(exits, cache, None, RECIPE, tmp_path).run()
    assert {path: path.read_bytes() for path in files} == files
    assert all(torch.equal(b, rows[name]) for name, b in exits.named_buffers())
    assert all(name.startswith("heads.") for name, _ in exits.named_parameters())
    assert not any(b.requires_grad for b in exits.buffers())


def test_exits_train_side_by_side_as_they_would_alone(checkpoint, cache, tmp_path):
    both = make_exits(checkpoint, cache)
    Trainer(both, cache, None, RECIPE, tmp_path / "both").run()
    alone = make_exits(checkpoint, cache)
    del alone.heads["1"], alone.specs[1]
    Trainer(alone, cache, None, RECIPE, tmp_path / "alone").run()
    for name, p in weights(alone).items():
        torch.testing.assert_close(weights(both)[name], p, rtol=1e-5, atol=1e-6)


def test_accumulated_batches_equal_a_larger_one(checkpoint, cache, tmp_path):
    """The loss is per target of the step, however its texts are cut."""
    count = len(epoch_batches(cache, 64, 0, 0))
    assert count > 2
    runs, made = [], []
    for batch, accumulate in ((10_000, 1), (64, count)):
        exits = make_exits(checkpoint, cache)
        recipe = Recipe(steps=1, batch_targets=batch, accumulate=accumulate, autocast=False)
        runs.append(Trainer(exits, cache, None, recipe, tmp_path).run().losses[0])
        made.append(weights(exits))
    assert runs[0]["targets"] == runs[1]["targets"] == sum(cache.response_lengths)
    assert runs[0]["loss_1"] == pytest.approx(runs[1]["loss_1"], rel=1e-4)
    for name, found in made[0].items():
        torch.testing.assert_close(made[1][name], found, rtol=1e-3, atol=1e-4)


def test_resumed_run_ends_with_the_same_weights(checkpoint, cache, tmp_path):
    straight = make_exits(checkpoint, cache)
    Trainer(straight, cache, cache, RECIPE, tmp_path / "straight").run()

    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        Trainer(
            make_exits(checkpoint, cache), cache, cache, RECIPE, tmp_path / "cut", on_step=kill
        ).run()
    resumed = make_exits(checkpoint, cache)
    trainer = Trainer(resumed, cache, cache, RECIPE, tmp_path / "cut")
    assert trainer.resume() and trainer.step == 4
    history = trainer.run()
    assert_same(weights(resumed), weights(straight))
    assert [row["step"] for row in history.losses] == [1, 2, 3, 4, 5, 6]


def test_another_recipe_does_not_resume(checkpoint, cache, tmp_path):
    Trainer(make_exits(checkpoint, cache), cache, None, RECIPE, tmp_path).run()
    other = Recipe(**{**vars(RECIPE), "lr": 0.5})
    with pytest.raises(HispecError, match="other settings \\(lr\\)"):
        Trainer(make_exits(checkpoint, cache), cache, None, other, tmp_path).resume()


def test_damaged_checkpoint_says_what_to_do(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"PK rubbish")
    with pytest.raises(HispecError, match="delete it and start again"):
        read_checkpoint(tmp_path / CHECKPOINT)


def test_nan_stops_at_its_step_and_keeps_the_last_good_state(checkpoint, cache, tmp_path):
    exits = make_exits(checkpoint, cache)
    trainer = Trainer(exits, cache, None, RECIPE, tmp_path)
    seen = {}

    def poison(row):
        if row["step"] == 3:
            seen.update(weights(exits))
            exits.rows_1.fill_(float("nan"))

    trainer.on_step = poison
    with pytest.raises(HispecError, match="not a number at step 4"):
        trainer.run()
    state = read_checkpoint(tmp_path / CHECKPOINT)
    assert state["step"] == 3
    assert_same({k: v for k, v in state["weights"].items() if k in seen}, seen)


def test_a_gradient_that_is_none_does_too(checkpoint, cache, tmp_path):
    """The loss is still a number at the step whose gradient is not."""
    exits = make_exits(checkpoint, cache)
    before = weights(exits)
    trainer = Trainer(exits, cache, None, RECIPE, tmp_path)
    next(exits.heads["1"].parameters()).register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(HispecError, match="not a number at step 1"):
        trainer.run()
    assert_same(weights(exits), before)
    state = read_checkpoint(tmp_path / CHECKPOINT)
    assert_same({k: v for k, v in state["weights"].items() if k in before}, before)


def test_a_scaler_of_gradients_is_refused(checkpoint, cache, tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = object()
    with pytest.raises(UsageError, match="Leave --mixed_precision at no"):
        Trainer(make_exits(checkpoint, cache), cache, None, RECIPE, tmp_path, accelerator)


def test_full_disk_keeps_the_last_good_checkpoint(checkpoint, cache, tmp_path, monkeypatch):
    trainer = Trainer(make_exits(checkpoint, cache), cache, None, RECIPE, tmp_path)

    def no_room(_):
        raise OSError(28, "No space left on device")

    def fill(row):
        if row["step"] == 3:
            monkeypatch.setattr(os, "fsync", no_room)

    trainer.on_step = fill
    with pytest.raises(HispecError, match=r"step 4 \(No space left.*the one before it is kept"):
        trainer.run()
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / CHECKPOINT)["step"] == 2
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_schedule_rises_and_falls():
    rates = [learning_rate(1.0, 10, 100, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3


def timed(seconds: list[float]) -> History:
    return History(losses=[{"seconds": float(s)} for s in seconds])


def test_minutes_become_steps_once_some_are_timed():
    limit = TimeLimit(2.0)
    steady = [10.0 + i for i in range(TIMED)]  # the first took ten seconds: it compiled
    assert limit.steps(timed(steady[:3]), 500) is None
    assert limit.steps(timed(steady[:4]), 500) == 500, "too early, and not pressing"
    assert limit.steps(timed(steady), 500) == TIMED + int(120 - steady[-1])
    assert limit.steps(timed(steady), 40) == 40
    assert limit.steps(timed([30.0, 60.0, 90.0, 130.0]), 500) == 5, "slow, and over already"
    assert TimeLimit(4.0).steps(timed([30.0, 60.0, 90.0, 120.0]), 500) == 8
    assert TimeLimit(2.0, since=5).steps(timed(steady), 500) is None, "not at that step"


def test_a_run_within_minutes_ends_with_its_schedule(checkpoint, cache, tmp_path):
    recipe = Recipe(**{**vars(RECIPE), "steps": 100_000, "eval_every": 100_000})
    trainer = Trainer(make_exits(checkpoint, cache), cache, None, recipe, tmp_path, minutes=0.05)
    history = trainer.run()
    assert 4 <= len(history.losses) < 10_000 and trainer.recipe.steps == len(history.losses)
    assert history.losses[-1]["lr"] < 0.5 * RECIPE.lr, "the rate has fallen"
    assert history.losses[-1]["seconds"] < 15
    same = Trainer(make_exits(checkpoint, cache), cache, None, recipe, tmp_path, minutes=0.05)
    assert same.resume() and same.recipe.steps == trainer.recipe.steps
    with pytest.raises(HispecError, match="steps"):
        Trainer(make_exits(checkpoint, cache), cache, None, recipe, tmp_path).resume()


def test_runs_are_counted_within_rounds():
    tally = Tally()
    right = torch.tensor([1, 0] + [1, 1, 0, 1, 1, 1, 1, 1] + [1] * 8 + [1, 1]).bool()
    _count(tally, "a", right, shift=2)
    assert tally.runs.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert tally.offset_seen.sum() == 20 and tally.offset_seen[0] == 4
    assert tally.mean_run(4) == 3.0 and tally.top1 == 18 / 20


def test_an_exit_that_is_the_target_is_always_right(checkpoint, cache):
    """The last layer's input through that very layer, all rows: agreement 1."""
    exits = make_exits(checkpoint, cache, vocab_size=0)
    final = checkpoint.config.num_layers
    exits.specs = {final: HeadSpec(final, "shared", "none", False)}
    exits.heads[str(final)] = exits.heads["1"]

    class Norm(torch.nn.Module):
        def forward(self, states, deep, positions, roots):
            norm = exits.heads["1"].norm
            x = states.float().gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
            return norm(x)

    exits.heads[str(final)] = Norm()
    for name in ("rows", "tokens", "row_of"):
        setattr(exits, f"{name}_{final}", getattr(exits, f"{name}_1"))
    (tally,) = evaluate(exits, cache, shifts=range(ROUND), autocast=False).values()
    assert tally.top1 > 0.97  # the cache rounds states to bf16
    assert int(tally.offset_seen.sum()) == ROUND * sum(cache.response_lengths)


def test_curves_are_drawn(checkpoint, cache, tmp_path):
    history = Trainer(make_exits(checkpoint, cache), cache, cache, RECIPE, tmp_path).run()
    draw_curves(tmp_path / "curves.png", history)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
