"""top_k and the compiled noise against torch and fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.builds import skip_or_fail
from torch import Tensor

from hispec.model.store import cache_dir
from hispec_kernels import cpu, gumbel, gumbel_top_k, noisy, top_k
from hispec_kernels.noise import hash32


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.in_use()
    library = None
    if request.param == "compiled":
        try:
            library = cpu.load_library(cache_dir() / "native")
        except cpu.BuildError as error:
            skip_or_fail(str(error))
    cpu.use(library)
    yield request.param
    cpu.use(before)


def by_sorting(row: Tensor, k: int) -> list[tuple[float, int]]:
    """(-value, column) of the k largest, by Python's sort."""
    return sorted((-value, column) for column, value in enumerate(row.tolist()))[:k]


@pytest.mark.parametrize("size", [1, 2, 15, 16, 63, 64, 65, 1000, 4099])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_the_largest_in_order_ties_to_the_lowest_column(rows: int, size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    kinds = [
        torch.randn(rows, size, generator=draw),
        torch.randint(-2, 3, (rows, size), generator=draw).float(),  # ties everywhere
        torch.zeros(rows, size),
        torch.arange(size).float().expand(rows, size) / 7,
        torch.randn(rows, size, generator=draw).masked_fill(
            torch.rand(rows, size, generator=draw) < 0.9, -torch.inf
        ),
    ]
    for logits in kinds:
        for k in {1, min(2, size), min(8, size), min(64, size), size}:
            values, ids = top_k(logits, k)
            assert values.dtype == torch.float32
            assert ids.dtype == torch.int64
            for row in range(rows):
                wanted = by_sorting(logits[row], k)
                assert ids[row].tolist() == [column for _, column in wanted]
                assert torch.equal(values[row], logits[row][ids[row]])


def test_rows_of_a_larger_tensor() -> None:
    whole = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    values, ids = top_k(whole[::2, 7:], 5)
    wanted, columns = top_k(whole[::2, 7:].clone(), 5)
    assert torch.equal(values, wanted)
    assert torch.equal(ids, columns)


def test_noise_equals_fp64_on_the_same_bits() -> None:
    positions, tokens = torch.arange(37)[:, None] * 977, torch.arange(3001) * 13
    bits = hash32(2**40 + 5, positions, tokens)
    uniform = ((bits >> 9).double() + 0.5) * 2.0**-23
    wanted = -(-uniform.log()).log()
    found = gumbel(2**40 + 5, positions, tokens)
    assert found.dtype == torch.float32
    # The inner logarithm's rounding is all there is where the outer one is near 0.
    assert torch.allclose(found.double(), wanted, rtol=3e-7, atol=3e-7)


def test_the_noise_of_a_token_does_not_depend_on_company() -> None:
    whole = gumbel(9, torch.arange(20)[:, None], torch.arange(1000))
    for first, count in ((0, 1), (3, 15), (16, 17), (500, 499)):
        tokens = torch.arange(first, first + count)
        for position in (0, 7, 19):
            part = gumbel(9, torch.tensor([position]), tokens)
            assert torch.equal(part, whole[position, first : first + count])
    picked = torch.randint(0, 1000, (20, 33), generator=torch.Generator().manual_seed(1))
    part = gumbel(9, torch.arange(20)[:, None], picked)
    assert torch.equal(part, whole.gather(-1, picked))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("reduced", [False, True])
def test_the_best_under_noise_are_those_of_the_sum(temperature: float, reduced: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(7, 801, generator=draw)
    positions = torch.arange(50, 57)
    ids = torch.randperm(5000, generator=draw)[:801].sort().values if reduced else None
    tokens = torch.arange(801) if ids is None else ids
    sums = logits / temperature + gumbel(11, positions[:, None], tokens)
    assert torch.equal(noisy(logits, temperature, 11, positions[:, None], ids), sums)
    values, found = gumbel_top_k(logits, temperature, 11, positions, ids, 9)
    wanted, columns = top_k(sums, 9)
    assert torch.equal(values, wanted)
    assert torch.equal(found, tokens[columns])
    for row in range(7):  # alone, and by one row's own ids
        alone = gumbel_top_k(
            logits[row : row + 1], temperature, 11, positions[row : row + 1], ids, 9
        )
        assert torch.equal(alone[1][0], found[row])
