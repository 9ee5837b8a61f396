"""Self-draft and accounting: an exit that equals the target is always right, and counts add up."""

from __future__ import annotations

import random
from unittest import mock

import pytest
from helpers.laws import counts_add_up, random_hierarchy, random_prompt
from helpers.lms import chain

from hispec.drafter import SHOWN
from hispec.hierarchy import Hierarchy
from hispec.picker import Picker
from hispec.sampling import Sampling

SAMPLINGS = (Sampling(), Sampling(0.7, seed=3), Sampling(1.0, seed=4))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ["torch fp32", "torch bf16", "compiled fp32", "compiled bf16"])
def test_an_exit_that_equals_the_target_is_always_accepted(zoo, kind: str, sampling) -> None:
    lm = zoo("echo", kind)
    for exit_layer, window in ((2, 1), (3, 4), (5, 7)):
        rounds = 3
        result = lm.generate(
            random_prompt(window, 20),
            hierarchy=chain((exit_layer, window)),
            max_new_tokens=1 + rounds * (window + 1),
            sampling=sampling,
        )
        draft, target = result.levels
        assert target.passes == rounds
        assert draft.drafted == draft.accepted == draft.passes == rounds * window
        assert draft.drafted_at == draft.accepted_at == [rounds] * window
        assert result.block_efficiency == window + 1


@pytest.mark.parametrize("windows", [(2, 4), (1, 3), (3, 3), (4, 1), (2, 2)])
def test_and_so_is_a_chain_of_them(zoo, windows: tuple[int, int]) -> None:
    # A verified draft brings the verifier's own pick; one that would only exceed the window goes.
    gathered = 0
    while gathered < windows[1]:
        gathered += windows[0] + 1
    drafted = gathered - (gathered > windows[1])
    rounds = 3
    result = zoo("echo").generate(
        random_prompt(1, 20),
        hierarchy=chain((2, windows[0]), (4, windows[1])),
        max_new_tokens=1 + rounds * (drafted + 1),
    )
    assert result.passes == rounds
    assert result.block_efficiency == drafted + 1
    for level in result.levels[:-1]:
        assert level.accepted == level.drafted
    assert result.levels[1].drafted == rounds * drafted


@pytest.mark.parametrize("heads", [(), ("deep reduced", "block", "deep", "affine reduced")])
def test_counts_add_up(zoo, heads) -> None:
    lm = zoo("gqa", "torch fp32", heads)
    draw = random.Random(17)
    accepted = 0
    for seed in range(10):
        result = lm.generate(
            random_prompt(seed, 15),
            hierarchy=random_hierarchy(draw, 6) if seed else Hierarchy(),
            max_new_tokens=draw.randint(1, 40),
            sampling=draw.choice(SAMPLINGS),
        )
        counts_add_up(result)
        accepted += sum(level.accepted for level in result.levels)
    assert accepted > 0


def test_passes_are_counted_by_their_rows(zoo) -> None:
    lm, prompt = zoo("gqa"), random_prompt(2, 20)
    plain = lm.generate(prompt, hierarchy=Hierarchy(), max_new_tokens=30)
    assert plain.levels[0].passes_of == [0, 29]
    trees = Hierarchy((), "trees", (("context", 8), ("recycle", 8)), 3, adaptive=False)
    (target,) = lm.generate(prompt, hierarchy=trees, max_new_tokens=60, learn=False).levels
    rows = sum(rows * count for rows, count in enumerate(target.passes_of))
    assert rows * 6 == target.layer_visits > 60 * 6
    assert len(target.passes_of) <= 1 + 1 + 3, "the root and three nodes"
    draft, target = lm.generate(prompt, hierarchy=chain((2, 2)), max_new_tokens=31).levels
    assert draft.passes_of == [0, draft.passes], "one token after the other"
    assert target.passes_of[3] >= target.passes - 2, "the root and a window of two"


def test_nothing_is_ranked_that_nobody_looks_at(zoo) -> None:
    asked: list[int] = []
    real = Picker.asked

    def recorded(picker: Picker, k: int, *rest, **more):
        asked.append(k)
        return real(picker, k, *rest, **more)

    lm, prompt = zoo("gqa"), random_prompt(2, 20)
    with mock.patch.object(Picker, "asked", recorded):
        for names, most in (((), 1), (("context",), 1), (("context", "recycle"), SHOWN)):
            asked.clear()
            databases = Hierarchy((), "mine", tuple((name, 8) for name in names), 3 * bool(names))
            lm.generate(prompt, hierarchy=databases, max_new_tokens=8, learn=False)
            assert set(asked[1:]) == {most}, names  # prefill is first


def test_counts_of_an_interrupted_text_add_up(zoo) -> None:
    lm = zoo("gqa")
    stream = lm.stream(random_prompt(1, 15), hierarchy=chain((1, 3), (3, 5)), max_new_tokens=50)
    for _ in stream:
        if stream.result.num_tokens >= 8:
            break
    assert stream.result.finish_reason == "interrupted"
    counts_add_up(stream.result)


def test_ratios_of_nothing_are_zero(zoo) -> None:
    result = zoo("gqa").generate([1, 2], max_new_tokens=1, hierarchy="layerskip")
    assert result.passes == result.committed == result.layer_visits == 0
    assert result.block_efficiency == result.layer_visits_per_token == result.tok_per_s == 0
    assert result.num_tokens == 1
