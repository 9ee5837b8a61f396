"""``hispec export``: the folder works in plain transformers."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.lms import HEAD_KINDS, save_exits
from helpers.tiny_llama import save_tiny_llama

from hispec.cli import main
from hispec.model.checkpoint import open_checkpoint

PROMPT = torch.tensor([[5, 9, 33, 70, 71, 5, 9, 200, 14, 33, 70]])


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_tiny_llama(tmp_path / "model", seed=3)
    checkpoint = open_checkpoint(tmp_path / "model")
    save_exits(tmp_path / "exits", checkpoint, {2: HEAD_KINDS["norm"]})
    (tmp_path / "h.json").write_text('{"levels": [{"exit_layer": 2, "window": 3}]}')
    command = ["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "hub")]
    command += ["--exits", str(tmp_path / "exits"), "--hierarchy", str(tmp_path / "h.json")]
    assert main(command) == 0
    return tmp_path / "hub"


def test_a_model_loaded_from_it_generates_with_hispec(exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    from hispec import hf

    options = {"max_new_tokens": 20, "do_sample": False}
    plain = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    wanted = plain.generate(PROMPT, **options)
    model = AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float32, trust_remote_code=True
    ).eval()
    found = model.generate(PROMPT, **options, return_dict_in_generate=True)
    assert found.sequences.tolist() == wanted.tolist()
    assert found.results[0].hierarchy.exit_layers == (2,)
    assert hf.loaded_lm(model).exits.exit_layers == (2,), "the exits beside the model"
    other = model.generate(PROMPT, **options, hierarchy="ar", return_dict_in_generate=True).results[
        0
    ]
    assert other.hierarchy.name == "ar" and other.layer_visits_per_token == 6


def test_as_a_recipe_for_another_model(exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported.parent / "model", dtype=torch.float32)
    options = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.2}
    wanted = model.generate(PROMPT, **options).tolist()
    recipe = {"custom_generate": str(exported), "trust_remote_code": True}
    assert model.generate(PROMPT, **recipe, **options).tolist() == wanted
    from helpers.tiny_llama import byte_tokenizer

    early = model.generate(
        PROMPT, **recipe, **options, stop_strings=["e"], tokenizer=byte_tokenizer()
    )
    assert early.shape[1] <= len(wanted[0])


def test_what_is_written(exported: Path, tmp_path: Path, capsys) -> None:
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*")}
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "exits/config.json",
    } <= names
    assert "custom_generate" in (exported / "README.md").read_text()
    command = ["export", "--model", str(tmp_path / "model"), "--out"]
    assert main([*command, str(tmp_path / "slim"), "--no-weights"]) == 0
    assert not list((tmp_path / "slim").glob("*.safetensors"))
    assert main([*command, str(exported)]) == 2  # is there already
    assert main([*command, str(tmp_path / "x"), "--hierarchy", "hispek"]) == 2
    assert "hispec" in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.part"))
    assert json.loads((exported / "config.json").read_text())["model_type"] == "llama"


def test_the_folder_one_stands_in(exported: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["export", "--model", str(tmp_path / "model"), "--out", ".", "--no-weights"]) == 0
    assert sorted(file.name for file in Path().iterdir()) == ["README.md", "custom_generate"]
    assert "# here\n" in Path("README.md").read_text()


def test_what_lies_beside_it_stays(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "mine").write_text("kept")
    command = ["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "new")]
    (tmp_path / "exits" / "work").mkdir()  # what hispec train leaves there is no part of exits
    assert main([*command, "--no-weights", "--exits", str(tmp_path / "exits")]) == 0
    assert (tmp_path / "new.part" / "mine").read_text() == "kept"
    names = {file.name for file in (tmp_path / "new" / "exits").iterdir()}
    assert names == {"config.json", "exit_2.safetensors"}


def test_errors_name_what_could_not_be_read_or_written(
    exported: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    command = ["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "new")]
    copyfile, config = shutil.copyfile, tmp_path / "model" / "config.json"

    def unreadable(source: Path, to: Path) -> None:
        if source == config:
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        copyfile(source, to)

    def full(source: Path, to: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(to))

    for copy, words in [
        (unreadable, f"hispec: cannot read {config}: Permission denied.\n"),
        (
            full,
            f"hispec: cannot write {tmp_path / 'new'} (No space left on device): free some room, "
            "or name another place.\n",
        ),
    ]:
        monkeypatch.setattr(shutil, "copyfile", copy)
        assert main(command) == 2
        assert capsys.readouterr().err.endswith(words)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))
    command[-1] = str(config / "new")
    assert main(command) == 2
    assert f"cannot write {config / 'new'} (Not a directory)" in capsys.readouterr().err


def test_in_a_pipeline(exported: Path) -> None:
    from transformers import pipeline

    from hispec import generate_with

    model = str(exported.parent / "model")
    pipe = pipeline("text-generation", model=model, dtype=torch.float32, device="cpu")
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = pipe("the tea", **options)
    call = generate_with(hierarchy="hd")
    assert pipe("the tea", custom_generate=call, **options) == wanted
    assert call.results[0].hierarchy.name == "hd"
