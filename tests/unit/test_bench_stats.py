"""The interval: a method equal to plain decoding is not called different, a slower one is."""

from __future__ import annotations

import numpy as np
import pytest

from hispec.bench.stats import Ratio, ratio

PROMPTS, REPEATS = 12, 3


def timings(generator: np.random.Generator, *, factor: float = 1.0, noise: float = 0.03):
    """Times of one arm: prompts differ tenfold, repeats by a few per cent; there are spikes."""
    sizes = np.exp(np.random.default_rng(99).uniform(0, 2.3, PROMPTS))
    times = factor * sizes[:, None] * generator.normal(1, noise, (PROMPTS, REPEATS))
    return (times * np.where(generator.random(times.shape) < 0.02, 2.0, 1.0)).tolist()


def test_the_value_is_the_ratio_of_total_times() -> None:
    found = ratio([[2.0, 2.0], [6.0, 6.0]], [[1.0, 1.0], [3.0, 3.0]])
    assert found == Ratio(2.0, 2.0, 2.0)
    # A single prompt leaves open how far off it is, however often and in however many turns.
    assert ratio([[2.0]], [[1.0]]) == Ratio(2.0, None, None)
    assert ratio([[2.0, 2.2]], [[1.0, 1.1]]) == Ratio(2.0, None, None)
    assert ratio([[2.0], [4.0]], [[1.0], [3.0]], ["a", "a"]) == Ratio(1.5, None, None)
    # One spike among three repeats moves nothing.
    assert ratio([[1.0, 1.0, 9.0]], [[1.0, 1.0, 1.0]]).value == 1.0


def test_plain_decoding_against_itself_is_one() -> None:
    generator = np.random.default_rng(0)
    found = [ratio(timings(generator), timings(generator)) for _ in range(200)]
    # 5 % should miss; 24 or more of 200 would come once in 1e4.
    missed = sum(not (one.low <= 1.0 <= one.high) for one in found)
    assert missed < 24
    assert abs(np.median([one.value for one in found]) - 1) < 0.005


def test_a_planted_slow_down_of_a_tenth_is_detected() -> None:
    generator = np.random.default_rng(1)
    found = [ratio(timings(generator), timings(generator, factor=1.1)) for _ in range(100)]
    assert np.median([one.value for one in found]) == pytest.approx(1 / 1.1, abs=0.005)
    assert sum(one.high < 1.0 for one in found) >= 95


@pytest.mark.parametrize("prompts", [2, 3, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_few_prompts_make_a_cautious_interval(prompts: int, repeats: int) -> None:
    """A method whose speed-up differs from prompt to prompt; their middle is 1."""
    generator = np.random.default_rng(prompts)
    missed = 0
    for _ in range(300):
        base = generator.normal(1, 0.03, (prompts, repeats))
        ours = np.exp(generator.normal(0, 0.2, (prompts, 1))) * base
        found = ratio(base.tolist(), ours.tolist())
        missed += not (found.low <= np.exp(-0.02) <= found.high)
    # 8 % miss; 45 or more of 300 would come once in 1e4. Without the widening 20 to 50 % do.
    assert missed < 45


def test_turns_of_one_conversation_are_one_draw() -> None:
    """Twice the answers of the same prompts make the interval no narrower."""
    generator = np.random.default_rng(4)
    base, ours = timings(generator), timings(generator)
    alone = ratio(base, ours)
    names = list(range(PROMPTS))
    twice = ratio(base + base, ours + ours, names + names)
    assert twice.value == pytest.approx(alone.value)
    assert (twice.low, twice.high) == pytest.approx((alone.low, alone.high))
    apart = ratio(base + base, ours + ours)
    assert apart.high - apart.low < 0.85 * (twice.high - twice.low)


def test_the_same_rows_give_the_same_interval() -> None:
    arms = timings(np.random.default_rng(2)), timings(np.random.default_rng(3))
    assert ratio(*arms) == ratio(*arms)
    assert ratio(*arms, seed=1) != ratio(*arms)


def test_arms_must_have_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="cannot compare 1 answers with 2"):
        ratio([[1.0]], [[1.0], [1.0]])
    with pytest.raises(ValueError, match="cannot compare 0"):
        ratio([], [])
