"""Picks left on a device: the same tokens and counts as if each had been read at once.

No device is needed: what the compiled passes find is left unread all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.laws import random_prompt
from helpers.lms import chain, separate

from hispec import streaming
from hispec.bench.recorder import Recorder
from hispec.generation import LM
from hispec.hierarchy import Hierarchy, Level
from hispec.model.level import Separate
from hispec.model.passes import Lift, Words
from hispec.result import Result
from hispec.sampling import Sampling

HEADS = ("deep reduced", "block", "deep", "affine reduced")
SAMPLINGS = {
    "greedy": Sampling(),
    "T=0.7": Sampling(0.7, seed=5),
    "penalty": Sampling(repetition_penalty=1.3),
}


@contextmanager
def unread(lm: LM | Separate) -> Iterator[list[int]]:
    """Inside, looking at what the model's passes find is put off; yields how much was, by pass."""
    passes, left = lm.model.narrow, []
    lift = passes.lift

    def lifted(some: Lift) -> None:
        if isinstance(source := some.source, Words):
            left.append(sum(isinstance(token, torch.Tensor) for token in source.ids))
            source = source._replace(ids=[int(token) for token in source.ids])
        lift(some._replace(source=source))

    with mock.patch.multiple(passes, asynchronous=True, lift=lifted):
        yield left


def generate(lm: LM, hierarchy: Hierarchy, sampling: Sampling, count: int = 40) -> Result:
    return lm.generate(
        random_prompt(3, 20), hierarchy=hierarchy, sampling=sampling, max_new_tokens=count
    )


def counts(result: Result) -> list[dict[str, Any]]:
    return [{**vars(level), "time_s": 0.0} for level in result.levels]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("heads", [(), HEADS], ids=["shared", "trained"])
@pytest.mark.parametrize(
    "hierarchy", [chain((1, 3)), chain((2, 1)), chain((1, 2), (3, 4))], ids=lambda x: str(x.levels)
)
def test_tokens_and_counts_are_the_same(zoo, hierarchy, heads, sampling) -> None:
    lm = zoo("gqa", "compiled bf16", heads)
    wanted = generate(lm, hierarchy, sampling)
    with unread(lm) as left:
        found = generate(lm, hierarchy, sampling)
    assert found.token_ids == wanted.token_ids
    assert counts(found) == counts(wanted)
    assert any(left) == (sampling is SAMPLINGS["greedy"]), "noise and rules are the host's here"


def test_below_a_separate_model(zoo) -> None:
    lm = zoo("gqa", "compiled bf16")
    path = separate(lm, "compiled bf16")
    hierarchy = Hierarchy((Level(0, 3, model=path), Level(3, 4)))
    wanted = generate(lm, hierarchy, Sampling())
    one = lm.separate(path)
    with unread(lm), unread(one) as left, mock.patch.object(one, "asynchronous", True):
        found = generate(lm, hierarchy, Sampling())
    assert (found.token_ids, counts(found)) == (wanted.token_ids, counts(wanted))
    assert any(left)


def test_what_is_drafted_behind_the_end_counts_for_nothing(zoo, monkeypatch) -> None:
    lm = zoo("echo", "compiled bf16")  # exits are always right
    text = generate(lm, Hierarchy(), Sampling()).token_ids
    for place in range(2, 12):
        if text[place] in text[:place]:
            continue
        monkeypatch.setattr(lm, "eos", frozenset({text[place]}))
        for hierarchy in (chain((2, 5)), chain((2, 3), (4, 6))):
            wanted = generate(lm, hierarchy, Sampling())
            with unread(lm):
                found = generate(lm, hierarchy, Sampling())
            assert found.token_ids == wanted.token_ids == text[: place + 1]
            assert found.finish_reason == "eos"
            assert found.levels[-2].accepted == wanted.levels[-2].accepted


def test_a_benchmark_counts_the_same_weights(zoo) -> None:
    lm = zoo("gqa", "compiled bf16", HEADS)
    read = []
    for context in (mock.patch.object(lm, "_known", []), unread(lm)):
        made: list[Recorder] = []

        class Noted(Recorder):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                made.append(self)  # noqa: B023

        with context, mock.patch.object(streaming, "Decoder", Noted):
            generate(lm, chain((1, 3)), Sampling())
        read.append(made[0].bytes_read)
    assert read[0] == read[1] > 0
