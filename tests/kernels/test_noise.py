"""The noise is uniform, Gumbel, uncorrelated, and makes argmax a sample of the softmax.

Everything is seeded, so a test passes or fails for good; the odds stated are those of a seed chosen
at random, 1e-6 or less a test.
"""

from __future__ import annotations

import math

import pytest
import torch

from hispec_kernels import gumbel
from hispec_kernels.noise import hash32

Z = 5.2  # a normal variable is further out with odds 2e-7 (two-sided)


def bits(seed: int, positions: range, tokens: range) -> torch.Tensor:
    return hash32(seed, torch.tensor(positions)[:, None], torch.tensor(tokens))


def chi_square_z(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Wilson and Hilferty's normal variable for a chi-square statistic."""
    k = counts.numel() - 1
    chi = float(((counts - expected) ** 2 / expected).sum())
    return ((chi / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


def murmur_like(seed: int, position: int, token: int) -> int:
    """The module's formula in Python integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    state = mix(mix(seed % 2**32) + (seed >> 32) % 2**32 & 0xFFFFFFFF)
    row = mix(state + position & 0xFFFFFFFF)
    return mix(row ^ mix(token * 0x9E3779B9 + 0x7F4A7C15 & 0xFFFFFFFF))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 + 12345, -1])
def test_the_hash_is_its_formula(seed: int) -> None:
    positions, tokens = [0, 1, 5, 8191, 131071], [0, 1, 2, 49151, 128255]
    found = hash32(seed, torch.tensor(positions)[:, None], torch.tensor(tokens))
    assert found.tolist() == [[murmur_like(seed, p, t) for t in tokens] for p in positions]


def test_it_is_a_pure_function_of_seed_position_and_token() -> None:
    whole = gumbel(7, torch.arange(40)[:, None], torch.arange(500))
    ids = torch.tensor([499, 3, 3, 250])
    part = gumbel(7, torch.tensor([[39], [0], [12]]), ids)
    assert torch.equal(part, whole[[39, 0, 12]][:, ids])
    for other in (6, 7 + 2**32, -7):
        assert (
            gumbel(other, torch.arange(40)[:, None], torch.arange(500)) != whole
        ).float().mean() > 0.99


def test_every_bit_is_fair() -> None:
    # 32 bits x 2^20 draws; a bit's mean is normal with deviation 2^-11
    draws = bits(3, range(1024), range(1024))
    assert int(draws.min()) >= 0
    assert int(draws.max()) < 2**32
    for place in range(32):
        mean = float((draws >> place & 1).double().mean())
        assert abs(mean - 0.5) * 2**11 < Z, place


@pytest.mark.parametrize("along", ["tokens", "positions", "seeds"])
def test_uniform(along: str) -> None:
    """Chi-square over 1,024 cells of 2^17 draws along one axis and few along the others."""
    if along == "tokens":
        draws = bits(11, range(4), range(2**15))
    elif along == "positions":
        draws = bits(11, range(2**15), range(100, 104))
    else:
        draws = torch.stack([bits(seed, range(8), range(8)) for seed in range(2**11)])
    counts = torch.bincount((draws >> 22).flatten(), minlength=1024).double()
    assert chi_square_z(counts, torch.full_like(counts, draws.numel() / 1024)) < Z


def test_gumbel_moments() -> None:
    """Mean γ, variance π²/6, skewness 1.1395 of 2^20 draws; deviations from the sixth moment."""
    g = gumbel(5, torch.arange(64)[:, None], torch.arange(2**14)).double().flatten()
    n = g.numel()
    assert g.isfinite().all()
    assert -2.9 < float(g.min()) < -2
    assert 10 < float(g.max()) < 16.7
    mean, var = float(g.mean()), float(g.var())
    assert abs(mean - 0.5772156649) < Z * math.sqrt(math.pi**2 / 6 / n)
    # kurtosis of a Gumbel is 5.4, so var(s²) = σ⁴ (5.4 - 1) / n
    assert abs(var - math.pi**2 / 6) < Z * math.pi**2 / 6 * math.sqrt(4.4 / n)
    # the distribution function, at its sixteenths
    for part in range(1, 16):
        below = float((g < -math.log(-math.log(part / 16))).double().mean())
        assert abs(below - part / 16) < Z * math.sqrt(part / 16 * (1 - part / 16) / n)


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (1, -1), (1, 1), (2, 0), (64, 0), (0, 64)])
def test_neighbours_do_not_correlate(shift: tuple[int, int]) -> None:
    down, right = shift
    g = gumbel(9, torch.arange(600)[:, None], torch.arange(600)).double()
    a = g[: 600 - down, max(0, -right) : 600 - max(0, right)]
    b = g[down:, max(0, right) : 600 + min(0, right)]
    assert abs(correlation(a, b)) * math.sqrt(a.numel()) < Z


@pytest.mark.parametrize("other", [10, 9 + 2**32, 8, 2**31 + 9])
def test_seeds_do_not_correlate(other: int) -> None:
    positions, tokens = torch.arange(600)[:, None], torch.arange(600)
    a, b = gumbel(9, positions, tokens).double(), gumbel(other, positions, tokens).double()
    assert abs(correlation(a, b)) * math.sqrt(a.numel()) < Z
    # nor is one the other, a position later
    assert abs(correlation(a[1:], b[:-1])) * math.sqrt(a[1:].numel()) < Z


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.pow(2).mean() * b.pow(2).mean()).sqrt())


@pytest.mark.parametrize("seed", [0, 123456789])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0])
def test_argmax_samples_the_softmax(seed: int, sharpness: float) -> None:
    """100,000 picks over 50 tokens against the softmax; cells below 10 expected are pooled."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * sharpness
    picks = (logits + gumbel(seed, torch.arange(100_000)[:, None], torch.arange(50))).argmax(-1)
    expected = logits.double().softmax(0) * 100_000
    counts = torch.bincount(picks, minlength=50).double()
    large = expected >= 10
    if not large.all():
        counts = torch.cat([counts[large], counts[~large].sum()[None]])
        expected = torch.cat([expected[large], expected[~large].sum()[None]])
    assert chi_square_z(counts, expected) < Z


def test_a_pick_does_not_foretell_the_next() -> None:
    """Pairs of picks at neighbouring positions, 20 x 20 cells of 200,000."""
    picks = gumbel(2, torch.arange(200_000)[:, None], torch.arange(20)).argmax(-1)
    pairs = torch.bincount(picks[:-1] * 20 + picks[1:], minlength=400).double()
    assert chi_square_z(pairs, torch.full_like(pairs, 199_999 / 400)) < Z


def test_coupled_picks_agree_as_often_as_promised() -> None:
    """Two levels that add the same noise agree with odds between (1 - TV) / (1 + TV) and 1 - TV."""
    draw = torch.Generator().manual_seed(4)
    p = torch.randn(30, generator=draw)
    q = p + 0.5 * torch.randn(30, generator=draw)
    tv = float((p.double().softmax(0) - q.double().softmax(0)).abs().sum() / 2)
    noise = gumbel(8, torch.arange(100_000)[:, None], torch.arange(30))
    agree = float(((p + noise).argmax(-1) == (q + noise).argmax(-1)).double().mean())
    slack = Z * math.sqrt(0.25 / 100_000)
    assert (1 - tv) / (1 + tv) - slack < agree < 1 - tv + slack
    assert 0.1 < tv < 0.5


def test_no_pair_of_tokens_is_favoured() -> None:
    """Of two tokens with equal logits each wins half of the positions.

    2,000 pairs over 4,096 positions; the largest of 2,000 |z| exceeds 6 once in 250,000 runs. And
    their sum of squares is χ² with 2,000 degrees of freedom: beyond 6 standard deviations likewise.
    """
    draw = torch.Generator().manual_seed(4)
    pairs = torch.randint(49152, (2000, 2), generator=draw)
    pairs[:1000, 1] = pairs[:1000, 0] + 1  # neighbours, and some far apart
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    positions = torch.arange(4096)[:, None]
    wins = (gumbel(17, positions, pairs[:, 0]) > gumbel(17, positions, pairs[:, 1])).sum(0)
    z = (wins.double() - 2048) / 32
    assert z.abs().max() < 6
    chi, n = float((z**2).sum()), len(pairs)
    assert abs(chi - n) < 6 * (2 * n) ** 0.5
