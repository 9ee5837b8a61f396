"""Rollback: after appending and truncating, nothing remembers what was dropped."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import pytest
import torch
from helpers.laws import heads_forget, random_prompt, rollback, same_tokens
from helpers.lms import chain, plain

from hispec.hierarchy import Hierarchy
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


@pytest.mark.parametrize("kind", ["torch fp32", "torch bf16", "compiled fp32", "compiled bf16"])
@pytest.mark.parametrize("exits", [((0, 4),), ((0, 2), (2, 4)), ((0, 1), (1, 2), (3, 3))])
def test_an_exit_may_stand_before_the_first_layer(zoo, kind: str, exits) -> None:
    """Its head sees embeddings and, being deep, the target's final states."""
    lm = zoo("gqa", kind, HEADS, 0)
    prompt = random_prompt(9, 30)
    for sampling in (Sampling(), Sampling(1.0, seed=3)):
        wanted = plain(lm, prompt, 24, sampling)
        result = same_tokens(lm, prompt, chain(*exits), sampling, 24, wanted)
        assert result.levels[0].name == "exit 0" and result.levels[0].layer_visits == 0
        assert result.levels[0].drafted > 0
        if kind.endswith("fp32"):
            assert heads_forget(lm, prompt, chain(*exits), sampling, 24) > 20


@pytest.mark.parametrize("kind", ["compiled fp32", "compiled bf16"])
@pytest.mark.parametrize("exits", [((0, 4),), ((1, 3),), ((0, 2), (2, 4)), ((1, 2), (3, 3))])
def test_a_head_in_one_call_is_the_head_step_by_step(zoo, kind: str, exits) -> None:
    """Each call is compared with a fresh head's steps, which ask for logits."""
    lm = zoo("gqa", kind, HEADS, exits[0][0])
    prompt, compared, bf16 = random_prompt(11, 40), 0, kind.endswith("bf16")

    def checked(head):
        original = head.best

        def best(cache, first, nodes, asked, lifts=()):
            nonlocal compared
            found = original(cache, first, nodes, asked, lifts)
            assert isinstance(found, tuple)
            found = found[0].clone(), found[1].clone()  # they hold until the next call
            fresh = lm.exits.head(head.exit_layer, lm.model, lm.checkpoint)
            steps = fresh.model.narrow.best(
                fresh.head, fresh._last(cache, first, nodes), fresh.norm, asked, fresh.vocab_ids
            )
            assert torch.equal(found[0], steps[0])
            # Up to rounding: a fresh head takes the prompt in wider passes.
            torch.testing.assert_close(found[1], steps[1], rtol=1e-2 if bf16 else 1e-4, atol=0)
            compared += 1
            return found

        return mock.patch.object(head, "best", best)

    hierarchy = chain(*exits)
    ranking = Hierarchy(tuple(replace(level, ranks=True) for level in hierarchy.levels))
    with ExitStack() as stack:
        for exit_layer in hierarchy.exit_layers:
            stack.enter_context(checked(lm.head(exit_layer)))
        for some in (hierarchy, ranking):
            lm.generate(prompt, hierarchy=some, max_new_tokens=40)
    assert compared > 40
