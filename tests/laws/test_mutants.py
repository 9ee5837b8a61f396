"""The peers' bugs, put back in one at a time: a law must fail for each.

Each mutant names the law that catches it; the same law, called the same way, holds without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from helpers.chats import continues_like_plain
from helpers.laws import (
    heads_forget,
    no_layer_twice,
    random_prompt,
    rollback,
    same_tokens,
    separate_forgets,
)
from helpers.lms import chain, over, plain, separate

from hispec.engine import Decoder
from hispec.generation import LM
from hispec.model.cache import Cache
from hispec.model.exits import TrainedHead
from hispec.model.level import Separate
from hispec.model.torch_passes import TorchPasses
from hispec.picker import Picker
from hispec.sampling import Sampling
from hispec.streaming import Stream

HEADS = ("deep reduced", "block", "deep", "affine reduced")
EXITS = ((1, 3), (3, 5))


# ------------------------------------------------------------------ laws, each with its arguments


def law_same_tokens(lm: LM) -> None:
    for seed in range(3):
        same_tokens(lm, random_prompt(seed, 20), chain(*EXITS), Sampling(1.0, seed), 30)


def law_rollback(lm: LM) -> None:
    for seed in range(3):
        rollback(lm, [1, 3, 6], seed)


def law_heads_forget(lm: LM) -> None:
    # Exit 2's head has a block without deep context: what it wrote stays until it writes again.
    for seed in range(3):
        heads_forget(lm, random_prompt(seed, 30), chain((2, 3)), Sampling(1.0, seed), 40)


def law_separate_forgets(lm: LM) -> None:
    for seed in range(3):
        hierarchy = over(chain((3, 4)), separate(lm, "torch fp32"), 3)
        separate_forgets(lm, random_prompt(seed, 30), hierarchy, Sampling(1.0, seed), 40)


def law_no_layer_twice(lm: LM) -> None:
    no_layer_twice(lm, random_prompt(7, 30), chain(*EXITS), Sampling(1.0, 3), 30)


def law_chat(lm: LM) -> None:
    prompt = random_prompt(3, 20)
    text = plain(lm, prompt, 40)
    for stop_after in (2, 3, 4, 5, 6):
        more = text[stop_after:30]
        continues_like_plain(lm, prompt, more, chain(*EXITS), Sampling(), 5, stop_after=stop_after)


# ------------------------------------------------------------------ mutants


@contextmanager
def drops_the_first_token() -> Iterator[None]:
    """litgpt: the token that prefill picks is never handed out."""
    tokens = Stream._tokens

    def mutant(self: Stream) -> Iterator[int]:
        source = tokens(self)
        next(source)
        return source

    with mock.patch.object(Stream, "_tokens", mutant):
        yield


@contextmanager
def truncates_without_effect() -> Iterator[None]:
    """Rejected positions stay known."""
    with (
        mock.patch.object(Cache, "truncate", lambda self, length: None),
        mock.patch.object(Cache, "keep", lambda self, root, kept: None),
    ):
        yield


@contextmanager
def trims_without_write() -> Iterator[None]:
    """mlx-lm's concatenating cache: what is written after a trim lands behind what was trimmed."""
    run = TorchPasses.run

    def mutant(self, blocks, x, position, kv, first, nodes=None):
        seen = kv.__dict__.setdefault("seen", {})
        old = {}
        for layer in range(first, first + len(blocks)):
            known = slice(position, max(position, seen.get(layer, 0)))
            old[layer] = known, kv.keys[layer][:, known].clone(), kv.values[layer][:, known].clone()
            seen[layer] = max(seen.get(layer, 0), position + x.shape[0])
        x = run(self, blocks, x, position, kv, first, nodes)
        for layer, (known, keys, values) in old.items():
            kv.keys[layer][:, known], kv.values[layer][:, known] = keys, values
        return x

    with mock.patch.object(TorchPasses, "run", mutant):
        yield


@contextmanager
def has_no_finally() -> Iterator[None]:
    """transformers' early exit: what a reader leaves unfinished stays as it is."""
    with mock.patch.object(Stream, "_settle", lambda self: None):
        yield


@contextmanager
def keys_noise_by_draft_length() -> Iterator[None]:
    """The noise is drawn as tokens are drafted, so it depends on how many there were."""
    picks = Picker.picks

    def mutant(self: Picker, logits, positions, prefix, ids=None):
        late = [position + len(positions) for position in positions]
        return picks(self, logits, late, prefix, ids)

    with mock.patch.object(Picker, "picks", mutant):
        yield


@contextmanager
def keeps_stale_states() -> Iterator[None]:
    """After a rejection an exit's state of the rejected token passes for that of the correction."""

    keep = Cache.keep

    def truncate(self: Cache, length: int) -> None:
        for boundary in self.boundaries[1:]:
            self.computed[boundary] = min(self.computed[boundary], length)

    def keep_but_one(self: Cache, root: int, kept: Sequence[int]) -> None:
        exit_layer = self.boundaries[0]
        known = self.computed[exit_layer]
        keep(self, root, kept)
        if known > self.computed[exit_layer]:
            self.computed[exit_layer] += 1  # the correction comes there

    with (
        mock.patch.object(Cache, "truncate", truncate),
        mock.patch.object(Cache, "keep", keep_but_one),
    ):
        yield


@contextmanager
def heads_remember_rejected_drafts() -> Iterator[None]:
    """A head's own keys and values are not truncated with the cache."""
    with mock.patch.object(TrainedHead, "truncate", lambda self, length: None):
        yield


@contextmanager
def separate_models_remember_rejected_drafts() -> Iterator[None]:
    """A draft model's cache is cropped to the number of tokens that stood, not to those it ran."""

    def keep(self: Separate, root: int, kept: Sequence[int]) -> None:
        self.cache.truncate(root + len(kept) + 1)

    with mock.patch.object(Separate, "keep", keep):
        yield


@contextmanager
def recomputes_when_verifying() -> Iterator[None]:
    """transformers' early exit: the target runs the exit's layers again."""
    run = Decoder.run

    def mutant(self: Decoder, level):
        if level is self.levels[-1]:
            root = len(self.tokens) - 1
            level.runner.cache.truncate(root)
        return run(self, level)

    with mock.patch.object(Decoder, "run", mutant):
        yield


@contextmanager
def accepts_the_first_draft_unseen() -> Iterator[None]:
    """A verifier off by one: what it compares is the pick one node too late."""
    run = Decoder.run

    def mutant(self: Decoder, level):
        picks, ranked = run(self, level)
        picks = list(picks)
        return (picks[:1] + picks[:-1] if len(picks) > 1 else picks), ranked

    with mock.patch.object(Decoder, "run", mutant):
        yield


MUTANTS: list[tuple[Callable, Callable[[LM], None]]] = [
    (drops_the_first_token, law_same_tokens),
    (truncates_without_effect, law_same_tokens),
    (truncates_without_effect, law_rollback),
    (trims_without_write, law_same_tokens),
    (trims_without_write, law_rollback),
    (has_no_finally, law_chat),
    (keys_noise_by_draft_length, law_same_tokens),
    (keeps_stale_states, law_same_tokens),
    (keeps_stale_states, law_rollback),
    (heads_remember_rejected_drafts, law_heads_forget),
    (separate_models_remember_rejected_drafts, law_separate_forgets),
    (recomputes_when_verifying, law_no_layer_twice),
    (accepts_the_first_draft_unseen, law_same_tokens),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=lambda item: item.__name__)
def test_a_law_catches(zoo, mutant: Callable, law: Callable[[LM], None]) -> None:
    lm = zoo("gqa", "torch fp32", HEADS)
    with mutant(), pytest.raises(AssertionError):
        law(lm)
    lm._cache = None  # whatever the mutant left there
    lm._heads.clear()
    lm._separate.clear()


@pytest.mark.parametrize("law", sorted({law for _, law in MUTANTS}, key=lambda law: law.__name__))
def test_without_mutants_the_laws_hold(zoo, law: Callable[[LM], None]) -> None:
    law(zoo("gqa", "torch fp32", HEADS))


def test_the_mutants_do_not_stay(zoo) -> None:
    assert Cache.truncate.__name__ == "truncate"
    with torch.inference_mode():
        law_same_tokens(zoo("gqa", "torch fp32", HEADS))
