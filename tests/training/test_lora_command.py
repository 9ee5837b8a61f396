"""``hispec train --mode lora``: from prompts and answers to a measured, merged model."""

import json

import pytest
import torch

from hispec.cli import main as hispec
from hispec.loading import load
from hispec.model.adapter import WEIGHTS
from hispec.model.checkpoint import open_checkpoint
from hispec.model.exits import SharedHead
from hispec.model.tensorfile import TensorFile
from hispec_training.checkpoints import CHECKPOINT


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
    # it goes on from there with another rank
    more = ["--start-from", out, "--rank", "6", "--lr", "1e-9"]
    assert hispec(command(folder, tmp_path / "on", *more)) == 0
    ended, went_on = (TensorFile(f / WEIGHTS) for f in (out, tmp_path / "on"))
    for name in ended.entries:
        old, new = ended.read(name), went_on.read(name)
        assert old.abs().max() > 0
        torch.testing.assert_close(new[: old.shape[0], : old.shape[1]], old, rtol=0.01, atol=1e-5)
    other = make_llama("other", seed=5)
    (other / "data.jsonl").write_text((folder / "data.jsonl").read_text())
    assert hispec(command(other, tmp_path / "no", "--start-from", out)) == 1
    assert "was trained on another base" in capsys.readouterr().err
    assert hispec(command(folder, tmp_path / "no", "--start-from", folder)) == 1
    assert "holds no adapter" in capsys.readouterr().err


def test_a_disk_full_at_the_end_keeps_what_was_trained(make_llama, tmp_path, capsys, monkeypatch):
    folder, out = make_llama(), tmp_path / "out"
    rows = [{"prompt_ids": [i, 5, 9], "response_ids": [3, i, 4, 7]} for i in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def no_room(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("peft.PeftModel.save_pretrained", "hispec.model.adapter.merge",
                 "hispec_training.report.write_report"):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(name, no_room)
            assert hispec(command(folder, out, "--resume")) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"hispec: cannot write {out}") and "No space left" in said
        assert said.endswith("run again with --resume.")
    assert hispec(command(folder, out, "--resume")) == 0
    assert (out / "report" / "curves.png").exists()


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
