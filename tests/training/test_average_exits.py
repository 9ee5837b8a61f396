"""The mean of two trainings of the same exits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers.scripts import script
from safetensors.torch import load_file, save_file


def average(*folders: Path) -> int:
    sys.argv = ["average_exits", *map(str, folders)]
    return script("average_exits").main()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    before, after = tmp_path / "before", tmp_path / "after"
    for folder, value in ((before, 1.0), (after, 2.0)):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
        tensors = {"w": torch.full((2, 3), value).bfloat16(), "ids": torch.arange(4) * int(value)}
        save_file(tensors, folder / "exit_0.safetensors", {"format": "pt"})
    save_file({"w": torch.ones(2)}, before / "exit_4.safetensors")
    return before, after, tmp_path / "out"


def test_weights_are_halfway_and_columns_as_before(folders, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    before, _, out = folders
    assert average(*folders) == 0
    found = load_file(out / "exit_0.safetensors")
    assert found["w"].dtype == torch.bfloat16 and found["w"].eq(1.5).all()
    assert found["ids"].tolist() == [0, 1, 2, 3]
    assert (out / "exit_4.safetensors").read_bytes() == (before / "exit_4.safetensors").read_bytes()
    assert (out / "config.json").read_text() == "before"


def test_exits_of_another_shape_and_a_folder_that_is_there_are_refused(
    folders, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    _, after, out = folders
    save_file({"w": torch.ones(5)}, after / "exit_0.safetensors")
    for words in ("not trained from these", "name a new folder"):
        with pytest.raises(SystemExit):
            average(*folders)
        assert words in capsys.readouterr().err
        assert words == "name a new folder" or not out.exists()
        out.mkdir(exist_ok=True)
