"""Chats, readers who leave, and exceptions: what happened before never shows but as intended."""

from __future__ import annotations

import gc

import pytest
from helpers.chats import Letters, continues_like_plain
from helpers.failures import Injected, failing_at, interrupted_then_fresh
from helpers.laws import random_prompt
from helpers.lms import chain, plain

from hispec.errors import HispecError
from hispec.hierarchy import Hierarchy
from hispec.sampling import Sampling

HEADS = ("deep reduced", "block", "deep", "affine reduced")
EXITS = {"one": ((2, 5),), "two": ((1, 3), (3, 6)), "three": ((1, 2), (2, 3), (4, 5))}


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("kind", ["torch fp32", "torch bf16", "compiled bf16"])
def test_a_continued_chat_equals_plain_decoding_continued(zoo, kind: str, exits: str) -> None:
    lm = zoo("gqa", kind, HEADS)
    for seed, stop_after in enumerate((1, 4, 9, 60)):  # 60 is the whole turn
        continues_like_plain(
            lm,
            random_prompt(seed, 230 if seed == 2 else 20),
            random_prompt(seed + 50, 12),
            chain(*EXITS[exits]),
            Sampling(1.0, seed),
            20,
            stop_after=stop_after,
        )


@pytest.mark.parametrize("exits", EXITS)
def test_even_where_the_text_goes_on_as_the_model_would_have(zoo, exits: str) -> None:
    # A round commits tokens the reader has not seen yet. If they come next, as a prompt, they are
    # run again as plain decoding would run them: how far a round went must not show.
    lm = zoo("echo")  # rounds go far
    prompt = random_prompt(3, 20)
    text = plain(lm, prompt, 40)
    for stop_after in (2, 3, 4):
        continues_like_plain(
            lm,
            prompt,
            text[stop_after:30],
            chain(*EXITS[exits]),
            Sampling(),
            10,
            stop_after=stop_after,
        )


@pytest.mark.parametrize("exits", EXITS)
def test_a_failure_in_any_pass_leaves_the_model_usable(zoo, exits: str) -> None:
    lm = zoo("gqa", "torch fp32", HEADS)
    prompt, sampling = random_prompt(1, 300), Sampling(1.0, seed=1)
    wanted = plain(lm, prompt, 12, sampling)
    reached = [
        interrupted_then_fresh(lm, prompt, chain(*EXITS[exits]), sampling, wanted, fail_at)
        for fail_at in range(1, 26, 2)
    ]
    assert sum(reached) > 8


@pytest.mark.parametrize("exits", EXITS)
def test_a_chat_goes_on_after_a_failure(zoo, exits: str) -> None:
    lm = zoo("gqa", "torch fp32", HEADS)
    levels = len(EXITS[exits]) + 1
    for fail_at in range(levels + 1, levels + 22, 4):  # the first passes are prefill's
        continues_like_plain(
            lm,
            random_prompt(fail_at, 20),
            random_prompt(fail_at + 50, 7),
            chain(*EXITS[exits]),
            Sampling(1.0, fail_at),
            15,
            fail_at=fail_at,
        )


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt, MemoryError])
def test_errors_in_a_head_are_passed_on_and_forgotten(zoo, error, monkeypatch) -> None:
    lm = zoo("gqa", "torch fp32", HEADS)
    prompt, exits = random_prompt(2, 20), chain((1, 3), (3, 4))
    wanted = lm.generate(prompt, hierarchy=exits, max_new_tokens=20).token_ids
    head = lm.head(3)
    calls = 0

    def best(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return type(head).best(head, *args)

    monkeypatch.setattr(head, "best", best)
    with pytest.raises(error):
        lm.generate(prompt, hierarchy=exits, max_new_tokens=20)
    monkeypatch.undo()
    assert lm.generate(prompt, hierarchy=exits, max_new_tokens=20).token_ids == wanted


def test_hierarchies_may_change_from_call_to_call(zoo) -> None:
    lm = zoo("gqa", "torch fp32", HEADS)
    prompts = [random_prompt(seed, 15 + seed) for seed in range(3)]
    wanted = [plain(lm, prompt, 15) for prompt in prompts]
    for turn, exits in enumerate([*EXITS.values(), (), *EXITS.values()]):
        place = turn % 3
        result = lm.generate(
            prompts[place],
            hierarchy=chain(*exits) if exits else Hierarchy(),
            max_new_tokens=15,
            continued=turn % 2 == 1,
        )
        assert result.token_ids == wanted[place]


# ------------------------------------------------------------------ one cache, many streams


def test_a_stream_left_behind_does_not_touch_the_next(zoo, monkeypatch) -> None:
    lm = zoo("gqa")
    monkeypatch.setattr(lm, "tokenizer", Letters())
    exits, prompts = chain((1, 3), (3, 5)), [random_prompt(1, 20), random_prompt(2, 9)]
    wanted = plain(lm, prompts[1], 30)
    left = iter(lm.stream(prompts[0], hierarchy=exits, max_new_tokens=30))
    next(left)
    stream = lm.stream(prompts[1], hierarchy=exits, max_new_tokens=30)
    pieces = [next(iter(stream)) for _ in range(5)]
    del left  # closes it, in the middle of the other
    gc.collect()
    pieces += list(stream)
    assert stream.result.token_ids == wanted
    assert "".join(pieces) == stream.result.text


def test_going_back_to_a_stream_after_starting_another_is_an_error(zoo, monkeypatch) -> None:
    lm = zoo("gqa")
    monkeypatch.setattr(lm, "tokenizer", Letters())
    first = lm.stream(random_prompt(1, 20), hierarchy="layerskip", max_new_tokens=50)
    next(iter(first))
    second = lm.stream(random_prompt(2, 9), hierarchy="layerskip", max_new_tokens=20)
    next(iter(second))
    with pytest.raises(HispecError, match="another generation was started"):
        list(first)
    list(second)
    assert second.result.token_ids == plain(lm, random_prompt(2, 9), 20)


def test_a_stream_is_walked_once(zoo, monkeypatch) -> None:
    lm = zoo("gqa")
    monkeypatch.setattr(lm, "tokenizer", Letters())
    stream = lm.stream(random_prompt(1, 20), max_new_tokens=10)
    pieces = [next(iter(stream)), *stream]
    assert "".join(pieces) == stream.result.text
    assert stream.result.token_ids == plain(lm, random_prompt(1, 20), 10)
    assert list(stream) == []
    assert stream.result.num_tokens == 10


def test_a_failure_before_the_first_token(zoo) -> None:
    lm = zoo("gqa")
    prompt = random_prompt(4, 600)
    for fail_at in (1, 2, 3):  # chunks of the prompt
        with failing_at(lm, fail_at), pytest.raises(Injected):
            lm.generate(prompt, max_new_tokens=5, hierarchy="ar")
        result = lm.generate(prompt, max_new_tokens=5, hierarchy="ar", continued=True)
        assert result.token_ids == plain(lm, prompt, 5)
