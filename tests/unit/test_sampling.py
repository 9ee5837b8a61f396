"""The pick: argmax of logits over temperature plus the position's noise."""

from __future__ import annotations

import math

import pytest
import torch

from hispec.errors import UsageError
from hispec.sampling import Sampling
from hispec_kernels import gumbel


def logits_of(rows: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    return torch.randn((rows, size), generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_greedy_is_argmax() -> None:
    logits = logits_of(5, 1000)
    assert Sampling().pick(logits, 3) == logits.argmax(-1).tolist()
    assert Sampling().pick(logits, 3) == Sampling(0.0, seed=99).pick(logits, 77)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 64, 49152])
def test_ties_go_to_the_lowest_id(size: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(3, size, dtype=dtype)
    logits[1, [size // 2, size - 1]] = 2.5
    logits[2, size - 2 :] = 1.0
    assert Sampling().pick(logits, 0) == [0, size // 2, size - 2]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_one_row_at_a_time(temperature: float) -> None:
    sampling = Sampling(temperature, seed=2**40 + 5)
    logits = logits_of(6, 500)
    wanted = []
    for row in range(6):
        noise = gumbel(2**40 + 5, torch.tensor([[100 + row]]), torch.arange(500))[0]
        wanted.append(int((logits[row] / temperature + noise).argmax()))
    assert sampling.pick(logits, 100) == wanted
    assert sampling.pick(logits[2:4], 102) == wanted[2:4]
    assert sampling.pick(logits, 101) != wanted, "the position does not matter"
    assert Sampling(temperature, seed=5).pick(logits, 100) != wanted, "nor the seed"


def test_a_reduced_vocabulary_gets_the_noise_of_its_full_ids() -> None:
    # So an exit that only knows some tokens picks what the target would among them.
    sampling, logits = Sampling(1.0, seed=1), logits_of(40, 300)
    ids = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:50]
    others = torch.ones(300, dtype=torch.bool)
    others[ids] = False
    wanted = sampling.pick(logits.masked_fill(others, -torch.inf), 9)
    assert sampling.pick(logits[:, ids], 9, ids) == wanted
    assert Sampling().pick(logits[:, ids], 9, ids) == ids[logits[:, ids].argmax(-1)].tolist()


def test_bf16_logits_are_not_sampled_in_bf16() -> None:
    # 0.01 vanishes beside 4 in bf16; with 8 bits of noise, picks would repeat.
    logits = torch.full((1, 2000), 4.0, dtype=torch.bfloat16)
    picks = {Sampling(1.0, seed).pick(logits, 0)[0] for seed in range(200)}
    assert len(picks) > 150


def test_low_temperatures_approach_greedy() -> None:
    logits = logits_of(50, 100)
    assert Sampling(1e-4, seed=3).pick(logits, 0) == Sampling().pick(logits, 0)


@pytest.mark.parametrize("temperature", [-0.1, math.inf, math.nan, -math.inf])
def test_temperatures_that_mean_nothing(temperature: float) -> None:
    with pytest.raises(UsageError, match=f"temperature must be 0 or more, got {temperature}"):
        Sampling(temperature)
