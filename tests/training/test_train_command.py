"""``hispec train``: from prompts to a folder, what it refuses, and what survives a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training.exit_setup import EXITS

from hispec.cli import main as hispec
from hispec.model.checkpoint import open_checkpoint
from hispec.model.exits import Exits as ReadyExits
from hispec_training import trainer
from hispec_training.checkpoints import CHECKPOINT, read_checkpoint
from hispec_training.loop import Recipe

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(
    steps=6, batch_targets=64, warmup_steps=2, eval_every=3, save_every=2, autocast=False
)


def command(folder, out, *more):
    return [
        *("train", "--model", str(folder), "--data", str(folder / "data.jsonl"), "--out", str(out)),
        *("--exits", "1,2", "--steps", "6", "--batch-targets", "64", "--save-every", "1"),
        *("--eval-every", "3", "--head-vocab", "100", *more),
    ]


@pytest.fixture
def distilled(make_llama):
    folder = make_llama()
    from training.exit_setup import make_examples

    rows = [
        {"prompt_ids": e.ids[: e.prompt_length], "response_ids": e.ids[e.prompt_length :]}
        for e in make_examples(60)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("exits", [[1, 2], [0, 2]])  # before the first layer nothing is kept
def test_command_trains_from_prompts_to_a_folder(exits, make_llama, tmp_path, capsys):
    folder = make_llama()
    prompts = [{"text": f"some words to go on from, number {i}"} for i in range(30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    out = tmp_path / "exits"
    more = ["--max-new-tokens", "8", "--exits", ",".join(map(str, exits))]
    assert hispec(command(folder, out, *more)) == 0
    record = json.loads((out / "config.json").read_text())
    assert [entry["exit_layer"] for entry in record["exits"]] == exits
    assert 0 <= record["exits"][0]["acceptance"]["top1"] <= 1
    # What nobody has measured yet runs what costs least, and only while it pays.
    presets = ReadyExits.open(out).best
    assert [level.exit_layer for level in presets["hispec"].levels] == exits
    for name in ("layerskip", "auto"):
        assert [level.exit_layer for level in presets[name].levels] == exits[:1]
        assert presets[name].levels[0].ranks
    assert (out / "report" / "curves.png").exists() and (out / "README.md").exists()
    said = capsys.readouterr()
    assert said.out == ""
    assert "states of 1 shards are there from answering" in said.err
    assert not (out / "work" / "cache").exists()  # no second pass over the texts


def test_a_lora_head_learns_and_resumes(distilled, tmp_path):
    """The model's own layer with low-rank updates: the loss falls, the layer stays."""
    out = tmp_path / "exits"
    lora = ["--head", "lora", "--head-rank", "4", "--lr", "0.01"]
    assert hispec(command(distilled, out, *lora, "--steps", "20")) == 0
    state = read_checkpoint(out / "work" / CHECKPOINT)
    losses = [row["loss_1"] for row in state["history"]["losses"]]
    assert sum(losses[-4:]) < sum(losses[:4])
    base = open_checkpoint(distilled).tensor("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(state["weights"]["heads.1.block.mlp.up_proj.base_layer.weight"], base)
    assert state["weights"]["heads.1.block.mlp.up_proj.lora_B.default.weight"].abs().max() > 0
    assert (out / "exit_1.safetensors").stat().st_size < 80_000
    assert hispec(command(distilled, out, *lora, "--steps", "20", "--resume")) == 0


def test_data_with_answers_needs_no_decoding(make_llama, tmp_path, monkeypatch):
    from hispec_training import distill

    monkeypatch.setattr(distill, "main", lambda args: pytest.fail("the model was asked"))
    folder = make_llama()
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert hispec(command(folder, tmp_path / "exits", "--use-responses")) == 0
    made = [json.loads(x) for x in (tmp_path / "exits/work/tokenized-0.jsonl").open()]
    tokenizer = open_checkpoint(folder).tokenizer
    assert len(made) == 30 and tokenizer.decode(made[7]["response_ids"]) == "It is 7.<|eos|>"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--exits", "9"], "exit_layer must be in"),
        (["--exits", "a,b"], "layers such as 4,8"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--soft", "2"], "--soft must lie in"),
        (["--head", "affine", "--context", "deep"], "Deep context needs a block"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_options_are_one_sentence(distilled, tmp_path, capsys, more, message):
    assert hispec(command(distilled, tmp_path / "out", *more)) in (1, 2)
    assert message in capsys.readouterr().err


def test_an_earlier_run_is_not_overwritten(distilled, tmp_path, capsys):
    assert hispec(command(distilled, tmp_path / "out")) == 0
    assert hispec(command(distilled, tmp_path / "out")) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_model_or_where_it_starts_from_is_not_written_over(distilled, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in distilled.iterdir()}
    copy = tmp_path / "run" / "merged"
    shutil.copytree(distilled, copy)
    (tmp_path / "exits").mkdir()
    start = ["--start-from", str(tmp_path / "exits")]
    for model, out, more, words in [
        (distilled, distilled, [], "is the folder of the model"),
        (distilled, distilled / "x" / "..", [], "is the folder of the model"),
        (distilled, copy, [], "holds a model (model.safetensors)"),
        (copy, copy.parent, ["--mode", "lora"], "is the folder of the model"),
        (distilled, tmp_path / "exits", start, "--start-from and --out are both"),
    ]:
        assert hispec(command(model, out, *more, "--resume")) == 2
        assert words in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in distilled.iterdir()} == before
    assert not list((tmp_path / "exits").iterdir())


@pytest.mark.parametrize(
    "package, more",
    [
        ("accelerate", []),
        ("accelerate", ["--mode", "lora"]),
        ("peft", ["--mode", "lora"]),
        ("peft", ["--head", "lora"]),
        ("matplotlib", []),
    ],
)
def test_a_missing_package_is_one_sentence(distilled, tmp_path, capsys, monkeypatch, package, more):
    monkeypatch.setitem(sys.modules, package, None)
    assert hispec(command(distilled, tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    assert said == f"hispec: training needs the package {package}: pip install 'hispec[train]'.\n"
    assert not (tmp_path / "out").exists()


def test_a_missing_tracker_is_one_sentence(distilled, tmp_path, capsys, monkeypatch):
    """accelerate itself goes on without."""
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    assert hispec(command(distilled, tmp_path / "out", "--report-to", "wandb")) == 2
    said = capsys.readouterr().err.strip()
    assert said == "hispec: --report-to wandb needs the package wandb: pip install wandb."


def test_a_tracker_is_told_every_step(distilled, tmp_path, monkeypatch):
    from accelerate import Accelerator

    told, ended = [], []
    monkeypatch.setattr(trainer, "check_tracker", lambda name: None)

    class Tracker:
        def finish(self):
            ended.append(True)

    def init(self, name, config):
        self.trackers = [Tracker()]
        told.append(config)

    monkeypatch.setattr(Accelerator, "init_trackers", init)
    monkeypatch.setattr(Accelerator, "log", lambda _, row, step: told.append({"step": step, **row}))
    assert hispec(command(distilled, tmp_path / "out", "--report-to", "wandb")) == 0
    recipe, *rows = told
    assert recipe["steps"] == "6"
    assert sum("loss_1" in row for row in rows) == 6 and any("top1_1" in row for row in rows)
    assert ended == [True]


def test_texts_longer_than_the_context_are_cut_and_counted(distilled, make_llama, tmp_path, capsys):
    short = make_llama("short", max_position_embeddings=24)
    shutil.copy(distilled / "data.jsonl", short)
    rows = [json.loads(line) for line in (short / "data.jsonl").read_text().splitlines()]
    sizes = [(len(row["prompt_ids"]), len(row["response_ids"])) for row in rows]
    long = sum(prompt < 24 < prompt + response for prompt, response in sizes)
    assert long > 0
    assert hispec(command(short, tmp_path / "out")) == 0
    assert f"{long} truncated" in capsys.readouterr().err


def test_a_disk_full_at_the_end_keeps_what_was_trained(distilled, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def no_room(*_):
        raise OSError(28, "No space left on device")

    for name in ("export.save_tensors", "report.draw_curves"):
        with monkeypatch.context() as patch:
            patch.setattr(f"hispec_training.{name}", no_room)
            assert hispec(command(distilled, out, "--resume")) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"hispec: cannot write {out} (") and "No space left" in said
        assert said.endswith("run again with --resume.") and not list(out.glob(".*"))
    assert hispec(command(distilled, out, "--resume")) == 0
    assert (out / "report" / "curves.png").exists()


@pytest.mark.slow
def test_killed_command_resumes_to_the_same_exits(distilled, tmp_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    more = ["--steps", "60"]
    assert hispec(command(distilled, straight, *more)) == 0
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'training'}:{ROOT / 'kernels'}")
    # While states are cached, and once steps have been made.
    for number, sign in enumerate(("cache/*", CHECKPOINT)):
        resume = ["--resume"] * number
        process = subprocess.Popen(
            [sys.executable, "-m", "hispec.cli", *command(distilled, cut, *more, *resume)],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not any((cut / "work").glob(sign)) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was still at work"
    assert not (cut / "config.json").exists()
    assert hispec(command(distilled, cut, *more, "--resume")) == 0
    for e in EXITS:
        name = f"exit_{e}.safetensors"
        assert (cut / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.slow
def test_two_processes_equal_one(distilled, tmp_path):
    """gloo, one thread each, the same global batch."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'training'}:{ROOT / 'kernels'}:{ROOT / 'tests'}"
    script = str(Path(__file__).with_name("two_processes.py"))
    both = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launches = {
        "one": ([sys.executable, script], ""),
        "copies": ([*both, "--master-port=29517", script], ""),
        "shards": ([*both, "--master-port=29519", script], "sharded"),
    }
    found = {}
    for name, (launch, way) in launches.items():
        out = tmp_path / f"{name}.pt"
        done = subprocess.run(
            [*launch, str(distilled), str(tmp_path / f"work {name}"), str(out), way],
            env={**environment, "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found[name] = torch.load(out, weights_only=True)
    one = found.pop("one")
    for weights in found.values():
        assert weights.keys() == one.keys()
        for name, wanted in one.items():
            torch.testing.assert_close(weights[name], wanted, rtol=1e-4, atol=1e-4)
