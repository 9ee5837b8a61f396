"""``hispec doctor``: what it says about kernels and exits."""

from __future__ import annotations

import pytest
import torch

from hispec.cli import main
from hispec.commands.doctor import kernels
from hispec_kernels import gpu


@pytest.mark.parametrize(("layers", "exits"), [(1, [0]), (2, [0, 1]), (3, [1, 2])])
def test_exits_of_models_of_few_layers(make_llama, layers: int, exits: list[int], capsys) -> None:
    folder = make_llama(num_hidden_layers=layers)
    assert main(["doctor", "--model", str(folder), "--device", "cpu", "--dtype", "fp32"]) == 0
    said = [line.split(" agrees")[0] for line in capsys.readouterr().out.splitlines()]
    assert [line.split() for line in said if line.startswith("  exit")] == [
        ["exit", str(exit_layer)] for exit_layer in exits
    ]


def test_how_kernels_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(gpu, "why_not", lambda _: "")
    assert kernels(device) == "Triton's, in CUDA graphs"
    monkeypatch.setenv("HISPEC_GRAPHS", "0")
    assert kernels(device) == "Triton's, one by one"
    monkeypatch.setattr(gpu, "why_not", lambda _: "too old")
    assert kernels(device) == "none: too old"
