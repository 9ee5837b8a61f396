"""Noise, exit heads and the k largest on the GPU, against their references."""

from __future__ import annotations

import pytest
import torch
from helpers.gpu_rows import (
    DEVICE,
    DTYPES,
    bad,
    count,
    noise,
    rows_for,
)
from torch import Tensor

from hispec_kernels import exit_head as reference_head
from hispec_kernels.gpu.exit_head import best
from hispec_kernels.gpu.noise import noisy
from hispec_kernels.gpu.top_k import top_k
from hispec_kernels.noise import noisy as reference_noisy
from hispec_kernels.noise import seeded_state
from hispec_kernels.top_k import top_k as reference_top_k


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.mark.parametrize(
    ("seed", "rows", "size"),
    [(0, 3, 1), (2**31, 1, 1000), (2**32 - 1, 16, 50), (2**63 + 12345, 3, 1025), (-1, 3, 7)],
)
def test_noise(seed: int, rows: int, size: int) -> None:
    positions = torch.tensor([0, 5, 131071, *range(100, 113)], device=DEVICE)[-rows:]
    logits = 3 * noise(rows, size)
    each = torch.randperm(rows * size).view(rows, -1)
    for ids in (None, torch.randperm(size).to(DEVICE) * 40, each):
        ids = None if ids is None else ids.to(DEVICE)
        found = noisy(logits, 0.7, seed, positions, ids)
        wanted = reference_noisy(logits.cpu(), 0.7, seed, positions.cpu()[:, None], _cpu(ids))
        # Noise reaches 17; a wrong integer would be off by about 1.
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-6, atol=2e-5)


def _cpu(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.cpu()


@pytest.mark.parametrize(
    ("width", "vocab", "k", "seed"),
    [
        *((1, 129, 1, None), (3, 7, 3, 99), (16, 259, 3, 99), (17, 131, 8, None)),
        *((1, 515, 2, 99), (3, 259, 8, None), (16, 129, 16, None), (17, 131, 3, 99)),
    ],
)
def test_exit_head(width: int, vocab: int, k: int, seed: int | None, dtype: torch.dtype) -> None:
    rows, size = rows_for(width), 48
    x, w = bad(rows, size, dtype=dtype), noise(vocab, size, dtype=dtype, seed=1)
    x[:width] = noise(width, size, dtype=dtype)
    ids = torch.randperm(5 * vocab, generator=torch.Generator().manual_seed(3))[:vocab].to(DEVICE)
    positions = torch.arange(40, 40 + rows, device=DEVICE)
    temperature = torch.tensor([0.6], device=DEVICE)
    logits = x[:width].float() @ w.float().T
    for table in (None, ids):
        sampling = None
        if seed is not None:
            sampling = torch.cat([torch.tensor([seeded_state(seed)], device=DEVICE), positions])
        found, odds = best(x, w, count(width), k, temperature, sampling, table)
        wanted, chances = reference_head.best(logits, k, 0.6, seed, positions[:width], table)
        assert torch.equal(found[:width], wanted)
        torch.testing.assert_close(odds[:width], chances, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("seed", [None, 99])
def test_exit_head_whose_last_piece_is_nearly_empty(seed: int | None) -> None:
    x, w = bad(16, 48, dtype=torch.float32), noise(129, 48, dtype=torch.float32, seed=1)
    x[:2] = noise(2, 48, dtype=torch.float32)
    w[128] = x[0]  # the best of row 0, alone in its piece
    temperature, positions = torch.tensor([0.6], device=DEVICE), torch.arange(16, device=DEVICE)
    sampling = None
    if seed is not None:
        sampling = torch.cat([torch.tensor([seeded_state(seed)], device=DEVICE), positions])
    found, odds = best(x, w, count(2), 4, temperature, sampling)
    logits = x[:2] @ w.T
    wanted, chances = reference_head.best(logits, 4, 0.6, seed, positions[:2], None)
    assert found[0, 0] == 128 and torch.equal(found[:2], wanted)
    torch.testing.assert_close(odds[:2], chances, rtol=1e-3, atol=1e-6)


def test_exit_head_of_what_is_no_number_names_ids_that_exist() -> None:
    x, w = bad(16, 48, dtype=torch.float32), noise(300, 48, dtype=torch.float32, seed=1)
    x[:2] = noise(2, 48, dtype=torch.float32)
    x[1, 5] = float("nan")
    table = torch.arange(700, 1000, device=DEVICE)
    found, odds = best(x, w, count(2), 3, torch.ones(1, device=DEVICE), ids=table)
    assert ((found[:2] >= 700) & (found[:2] < 1000)).all()
    wanted, chances = reference_head.best(x[:1] @ w.T, 3, 1.0, None, torch.zeros(1), table)
    assert torch.equal(found[:1], wanted)
    torch.testing.assert_close(odds[:1], chances, rtol=1e-3, atol=1e-6)
    assert (odds[1] == 0).all()


@pytest.mark.parametrize("size", [50, 9001])
def test_top_k_of_what_is_no_number_names_columns_that_exist(size: int) -> None:
    _, columns = top_k(torch.full((2, size), float("nan"), device=DEVICE), 3)
    assert ((columns >= 0) & (columns < size)).all()


@pytest.mark.parametrize(
    ("rows", "size", "k"), [(1, 1, 1), (3, 50, 8), (2, 5000, 3), (1, 9001, 8), (16, 70, 64)]
)
def test_top_k(rows: int, size: int, k: int) -> None:
    logits = noise(rows, size).mul(4).round()  # many equal ones
    for found, wanted in zip(top_k(logits, k), reference_top_k(logits.cpu(), k), strict=True):
        assert torch.equal(found.cpu(), wanted)
