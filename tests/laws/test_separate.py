"""Separate models as levels: the same laws as for exits, with a cache of their own."""

from __future__ import annotations

import random
from unittest import mock

import pytest
from helpers.chats import continues_like_plain
from helpers.drafting import Oracle, drafting, ranking
from helpers.failures import failing_at, interrupted_then_fresh
from helpers.laws import (
    counts_add_up,
    no_layer_twice,
    random_hierarchy,
    random_prompt,
    same_tokens,
    separate_forgets,
)
from helpers.lms import chain, over, plain, recording_separate, save_model, separate

from hispec.hierarchy import HD, Hierarchy
from hispec.sampling import Sampling

KINDS = ("torch fp32", "torch bf16", "compiled fp32", "compiled bf16")
SAMPLINGS = (Sampling(), Sampling(0.7, seed=5), Sampling(1.0, seed=2**63 - 1))
HEADS = ("deep reduced", "block", "deep", "affine reduced")


# ------------------------------------------------------------------ same tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "heads"), [("gqa", ()), ("gqa", HEADS), ("biases", ())])
def test_same_tokens_over_a_separate_model(zoo, name: str, heads, kind: str) -> None:
    lm = zoo(name, kind, heads)
    path = separate(lm, kind)
    draw = random.Random(f"{name} {kind}")
    accepted = 0
    # The text crosses from one attention bucket into the next; the last also a prefill chunk.
    for (length, count), sampling in zip(((3, 16), (244, 20), (502, 16)), SAMPLINGS, strict=True):
        prompt = random_prompt(length, length)
        wanted = plain(lm, prompt, count, sampling)
        for _ in range(3):
            hierarchy = random_hierarchy(draw, lm.model.config.num_layers, model=path)
            result = same_tokens(lm, prompt, hierarchy, sampling, count, wanted)
            assert result.levels[0].name.startswith("model ")
            accepted += result.levels[0].accepted
    assert accepted > 20


@pytest.mark.parametrize("kind", KINDS)
def test_trees_and_databases_below_it(zoo, kind: str) -> None:
    lm = zoo("gqa", kind, HEADS)
    path = separate(lm, kind)
    draw = random.Random(kind)
    branched = accepted = 0
    for seed, (length, count) in enumerate(((3, 24), (20, 40), (244, 30), (502, 30))):
        sampling = Sampling() if seed % 2 else Sampling(0.8, seed)
        prompt = random_prompt(length, length)
        wanted = plain(lm, prompt, count, sampling)
        for _ in range(2):
            hierarchy = ranking(random_hierarchy(draw, 6, model=path), draw)
            with drafting(lm, Oracle(prompt, wanted, seed)) as oracle:
                same_tokens(lm, prompt, hierarchy, sampling, count, wanted)
            branched += oracle.branched
            accepted += oracle.counts["oracle"].accepted
    assert branched > 10
    assert accepted > 30


def test_the_real_databases_below_it(zoo) -> None:
    lm = zoo("gqa")
    path = separate(lm, "torch fp32")
    prompt = random_prompt(1, 12) * 3
    for ranks, sampling in ((False, Sampling()), (True, Sampling()), (True, SAMPLINGS[1])):
        wanted = plain(lm, prompt, 40, sampling)
        for below in (HD, Hierarchy()):
            hierarchy = over(below, path, 3, ranks=ranks)
            same_tokens(lm, prompt, hierarchy, sampling, 40, wanted)


def test_a_model_of_another_shape(zoo, tmp_path) -> None:
    lm = zoo("gqa")
    other = str(save_model(tmp_path / "other", "tied mha"))
    for seed in range(3):
        hierarchy = over(chain((2, 3), (4, 4)), other, 2)
        same_tokens(lm, random_prompt(seed, 250), hierarchy, Sampling(1.0, seed), 20)


def test_two_of_them(zoo, tmp_path) -> None:
    lm = zoo("gqa")
    path = separate(lm, "torch fp32", 2), separate(lm, "torch fp32", 4)
    for exits in ((), ((3, 2),)):
        hierarchy = over(over(chain(*exits), path[1], 3), path[0], 2)
        result = no_layer_twice(lm, random_prompt(1, 40), hierarchy, Sampling(1.0, 3), 40)
        counts_add_up(result)
        assert all(level.accepted for level in result.levels[:-1])


def test_every_limit_and_every_end(zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, sampling = zoo("gqa"), Sampling(1.0, seed=3)
    hierarchy = over(chain((3, 5)), separate(lm, "torch fp32"), 3)
    prompt = random_prompt(5, 9)
    wanted = plain(lm, prompt, 25, sampling)
    for limit in range(1, 26):
        same_tokens(lm, prompt, hierarchy, sampling, limit, wanted[:limit])
    for token in wanted[::3]:
        monkeypatch.setattr(lm, "eos", frozenset({token}))
        result = lm.generate(prompt, hierarchy=hierarchy, max_new_tokens=25, sampling=sampling)
        assert result.token_ids == wanted[: wanted.index(token) + 1]


# ------------------------------------------------------------------ what it knows


@pytest.mark.parametrize("kind", KINDS)
def test_it_forgets_what_was_rejected(zoo, kind: str) -> None:
    lm = zoo("gqa", kind)
    path = separate(lm, kind)
    draw = random.Random(kind)
    for seed in range(4):
        prompt, sampling = random_prompt(seed, 40), Sampling(1.0, seed)
        wanted = plain(lm, prompt, 40, sampling)
        hierarchy = random_hierarchy(draw, 6, model=path)
        assert separate_forgets(lm, prompt, hierarchy, sampling, 30) > 10
        with drafting(lm, Oracle(prompt, wanted, seed)):  # trees, whose branches move
            assert separate_forgets(lm, prompt, ranking(hierarchy, draw), sampling, 40) > 10


def test_it_catches_up_on_what_was_committed_without_it(zoo) -> None:
    # A ranking level is asked only where it pays: here hardly ever, and the text goes on.
    lm = zoo("gqa")
    hierarchy = over(Hierarchy(), separate(lm, "torch fp32"), 2, ranks=True)
    prompt = random_prompt(3, 300)
    wanted = plain(lm, prompt, 120)
    asked = 0

    def pays(*_) -> bool:
        nonlocal asked
        asked += 1
        return asked % 50 == 49

    oracle = Oracle(prompt, wanted, 1, truth=0.2)
    with drafting(lm, oracle), mock.patch.object(oracle, "pays", pays):
        assert separate_forgets(lm, prompt, hierarchy, Sampling(), 120) >= 2


@pytest.mark.parametrize("seed", range(4))
def test_no_layer_runs_twice_in_either_model(zoo, seed: int) -> None:
    lm = zoo("gqa", "torch fp32", HEADS)
    path = separate(lm, "torch fp32")
    draw = random.Random(seed)
    for _ in range(3):
        hierarchy = random_hierarchy(draw, 6, model=path)
        counts_add_up(no_layer_twice(lm, random_prompt(seed, 20), hierarchy, SAMPLINGS[1], 30))


# ------------------------------------------------------------------ self-draft


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_itself_is_always_accepted(zoo, kind: str, sampling) -> None:
    lm = zoo("gqa", kind)
    path = separate(lm, kind, layers=6)
    assert path == str(lm.checkpoint.path)
    for window in (1, 4, 7):
        rounds = 3
        result = lm.generate(
            random_prompt(window, 20),
            hierarchy=over(Hierarchy(), path, window),
            max_new_tokens=1 + rounds * (window + 1),
            sampling=sampling,
        )
        draft, target = result.levels
        assert target.passes == rounds
        assert draft.drafted == draft.accepted == draft.passes == rounds * window
        assert result.block_efficiency == window + 1
        # It runs all it drafts but each round's last token, and later what was committed without.
        assert draft.layer_visits == 6 * (rounds * (window + 1) - 1)
        assert target.layer_visits == 6 * rounds * (window + 1)


def test_also_in_a_chat(zoo) -> None:
    lm = zoo("gqa", "torch bf16")
    hierarchy = over(Hierarchy(), separate(lm, "torch bf16", layers=6), 3)
    text = random_prompt(1, 40)
    for turn in range(3):
        result = lm.generate(text, hierarchy=hierarchy, max_new_tokens=13, continued=True)
        assert result.block_efficiency == 4
        assert (result.num_cached_tokens > 0) == (turn > 0)
        text += [*result.token_ids, *random_prompt(turn, 7)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_cut_drafts_what_the_exit_drafts(zoo, kind: str, sampling) -> None:
    lm = zoo("gqa", kind)
    path = separate(lm, kind, layers=2)
    counts = []
    for hierarchy in (over(Hierarchy(), path, 3), chain((2, 3))):
        draft, target = same_tokens(lm, random_prompt(2, 30), hierarchy, sampling, 40).levels
        counts.append((draft.drafted_at, draft.accepted_at, draft.passes, target.passes))
    assert counts[0] == counts[1]
    assert 0 < sum(counts[0][1]) < sum(counts[0][0])


# ------------------------------------------------------------------ chats, failures, samples


@pytest.mark.parametrize("kind", ["torch fp32", "torch bf16", "compiled bf16"])
@pytest.mark.parametrize("exits", [(), ((3, 6),)])
def test_a_continued_chat_equals_plain_decoding_continued(zoo, kind: str, exits) -> None:
    lm = zoo("gqa", kind, HEADS)
    hierarchy = over(chain(*exits), separate(lm, kind), 3)
    for seed, stop_after in enumerate((1, 4, 9, 60)):  # 60 is the whole turn
        continues_like_plain(
            lm,
            random_prompt(seed, 230 if seed == 2 else 20),
            random_prompt(seed + 50, 12),
            hierarchy,
            Sampling(1.0, seed),
            20,
            stop_after=stop_after,
        )


def test_a_failure_in_any_pass_leaves_both_models_usable(zoo) -> None:
    lm = zoo("gqa", "torch fp32", HEADS)
    hierarchy = over(chain((3, 6)), separate(lm, "torch fp32"), 3)
    prompt, sampling = random_prompt(1, 300), Sampling(1.0, seed=1)
    wanted = plain(lm, prompt, 12, sampling)
    reached = [
        interrupted_then_fresh(lm, prompt, hierarchy, sampling, wanted, fail_at)
        for fail_at in range(1, 26, 2)
    ]
    assert sum(reached) > 8
    for fail_at in range(5, 26, 4):  # the first passes are prefill's
        continues_like_plain(
            lm, prompt, random_prompt(fail_at, 7), hierarchy, sampling, 15, fail_at=fail_at
        )
    with failing_at(lm, 10**9):
        assert separate_forgets(lm, prompt, hierarchy, sampling, 12) > 0


def test_hierarchies_may_change_from_turn_to_turn(zoo) -> None:
    # A model that sat a turn out knows a beginning of the text.
    lm = zoo("gqa")
    path = separate(lm, "torch fp32")
    text = random_prompt(4, 30)
    for turn in range(6):
        wanted = plain(lm, text, 12)
        hierarchy = over(chain((2, 2)), path, 3) if turn % 2 == 0 else chain((2, 3))
        result = lm.generate(text, hierarchy=hierarchy, max_new_tokens=12, continued=turn % 3 > 0)
        assert result.token_ids == wanted
        text += [*wanted, *random_prompt(turn, 5)]


def test_samples_are_the_texts_of_their_seeds(zoo) -> None:
    lm, prompt = zoo("gqa"), random_prompt(3, 300)
    path = separate(lm, "torch fp32")
    options = {"hierarchy": over(chain((3, 4)), path, 2), "temperature": 1.0, "max_new_tokens": 20}
    with recording_separate(lm, path) as recorder:
        samples = lm.samples(prompt, 3, seed=8, **options)
    assert [at for _, _, at, _ in recorder.passes if at < len(prompt)] == [0, 256], "it ran twice"
    for sample in samples:
        alone = lm.generate(prompt, seed=sample.seed, **options)
        assert alone.token_ids == sample.token_ids
        assert alone.levels[0].accepted == sample.levels[0].accepted


# ------------------------------------------------------------------ its context


def test_a_text_outgrows_its_context(zoo) -> None:
    lm = zoo("gqa")
    path = separate(lm, "torch fp32", layers=3, context=64)
    hierarchy = over(chain((3, 4)), path, 3)
    for length in (30, 63, 64):
        prompt = random_prompt(length, length)
        result = same_tokens(lm, prompt, hierarchy, Sampling(1.0, length), 50)
        assert (result.levels[0].passes > 0) == (length < 64)
        assert result.levels[1].passes > 0, "the exit goes on without it"
    # and what was dropped is no hindrance to the next text
    assert same_tokens(lm, random_prompt(1, 10), hierarchy, Sampling(), 20).levels[0].accepted
