"""Rollback: after appending and truncating, nothing remembers what was dropped."""

from __future__ import annotations

import pytest
from helpers.laws import heads_forget, random_prompt, rollback
from helpers.lms import chain

from hispec.sampling import Sampling

KINDS = ("torch fp32", "torch bf16", "compiled fp32", "compiled bf16", "avx2 fp32", "avx2 bf16")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_cache_forgets_what_was_truncated(zoo, kind: str, seed: int) -> None:
    boundaries = [[6], [2, 6], [1, 2, 4, 6]][seed]
    rollback(zoo("gqa", kind), boundaries, seed)


def test_truncating_is_absolute_and_only_lowers(zoo) -> None:
    model = zoo("gqa").model
    cache = model.new_cache([2, 6])
    tokens = random_prompt(0, 20)
    model.advance(cache, tokens, 20, 2)
    model.advance(cache, tokens, 12, 6)
    cache.truncate(15)
    assert cache.computed == {2: 15, 6: 12}
    cache.truncate(30)
    assert cache.computed == {2: 15, 6: 12}
    cache.truncate(3)
    assert cache.computed == {2: 3, 6: 3}
    assert cache.length == 3


HEADS = ("deep reduced", "block", "deep", "affine reduced")


@pytest.mark.parametrize("kind", ["torch fp32", "compiled fp32"])
@pytest.mark.parametrize("exits", [((1, 4),), ((2, 5),), ((1, 2), (3, 4)), ((2, 3), (4, 3))])
def test_heads_forget_rejected_drafts(zoo, kind: str, exits) -> None:
    lm = zoo("gqa", kind, HEADS)
    for sampling in (Sampling(), Sampling(1.0, seed=1)):
        assert heads_forget(lm, random_prompt(7, 30), chain(*exits), sampling, 24) > 20


def test_a_head_catches_up_on_a_prompt_longer_than_a_chunk(zoo) -> None:
    lm = zoo("gqa", "torch fp32", HEADS)
    for exit_layer in (1, 2, 3):
        assert heads_forget(lm, random_prompt(8, 700), chain((exit_layer, 3)), Sampling(), 6)
