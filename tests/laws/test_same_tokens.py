"""Same tokens: every hierarchy yields the ids of plain decoding, bit for bit."""

from __future__ import annotations

import random

import pytest
from helpers.laws import random_hierarchy, random_prompt, same_tokens
from helpers.lms import chain, plain

from hispec.sampling import Sampling

SAMPLINGS = {
    "greedy": Sampling(),
    "T=0.7": Sampling(0.7, seed=5),
    "T=1": Sampling(1.0, seed=2**63 - 1),
}
KINDS = ("torch fp32", "torch bf16", "compiled fp32", "compiled bf16", "avx2 fp32", "avx2 bf16")
#: (model, heads of the exits 1, 2, …); without heads the exits share the model's own.
CASES = {
    "shared": ("gqa", ()),
    "stateful heads": ("gqa", ("deep reduced", "block", "deep", "affine reduced", "norm")),
    "tied, MHA, head size 8": ("tied mha", ()),
    "tied, stateful heads": ("tied mha", ("block", "deep", "affine reduced")),
    "biases, one KV head": ("biases", ()),
    "biases, stateful heads": ("biases", ("norm", "deep reduced", "deep", "block")),
    "exits that know nothing": ("loud", ()),
    "exits that echo the target": ("echo", ()),
}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (case, kind)
        for case, (name, _) in CASES.items()
        for kind in KINDS
        # the compiled passes cover multiples of 32
        if name != "tied mha" or kind.startswith("torch")
    ],
)
def test_any_hierarchy(zoo, case: str, kind: str) -> None:
    name, heads = CASES[case]
    lm = zoo(name, kind, heads)
    draw = random.Random(f"{case} {kind}")
    samplings = draw.sample(list(SAMPLINGS.values()), 3)
    # The text crosses from one attention bucket into the next; the last also a prefill chunk.
    for (length, count), sampling in zip(((3, 16), (244, 20), (502, 16)), samplings, strict=True):
        prompt = random_prompt(length, length)
        wanted = plain(lm, prompt, count, sampling)
        for _ in range(2):
            hierarchy = random_hierarchy(draw, lm.model.config.num_layers)
            same_tokens(lm, prompt, hierarchy, sampling, count, wanted)


@pytest.mark.parametrize("case", ["shared", "stateful heads", "biases, stateful heads"])
def test_exits_are_sometimes_right_and_sometimes_not(zoo, case: str) -> None:
    # If not, the law above would be about rounds that only accept or only reject.
    name, heads = CASES[case]
    lm = zoo(name, "torch fp32", heads)
    for exits in (((2, 3),), ((1, 2), (3, 4))):
        lowest = same_tokens(lm, random_prompt(1, 20), chain(*exits), SAMPLINGS["T=1"], 60).levels
        for level in lowest[:-1]:
            assert 0.1 < level.accepted / level.drafted < 0.95, level


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_when_single_rows_are_padded(zoo, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some libraries round narrow passes otherwise; then every pass has at least min_width rows.
    lm = zoo("gqa", f"torch {dtype}")
    monkeypatch.setattr(lm.model.narrow, "min_width", 5)
    for seed in range(6):
        hierarchy = random_hierarchy(random.Random(seed), lm.model.config.num_layers)
        same_tokens(lm, random_prompt(seed, 250), hierarchy, SAMPLINGS["T=1"], 20)


def test_to_the_end_of_the_context(zoo) -> None:
    lm = zoo("tied mha")
    context = lm.model.config.max_positions
    prompt = random_prompt(2, context - 30)
    wanted = plain(lm, prompt, 30)
    for exits in (((1, 4),), ((1, 20),), ((1, 2), (2, 4))):
        result = lm.generate(prompt, hierarchy=chain(*exits), max_new_tokens=500)
        assert result.finish_reason == "length"
        assert result.token_ids == wanted


@pytest.mark.parametrize("exits", [((2, 6),), ((1, 3), (3, 5)), ((1, 1), (2, 2), (4, 3))])
def test_the_end_token_ends_every_hierarchy_alike(
    zoo, exits, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, sampling = zoo("gqa"), Sampling(1.0, seed=3)
    prompt = random_prompt(4, 12)
    wanted = plain(lm, prompt, 40, sampling)
    for end in range(0, 30, 3):  # each of these tokens as the one that ends texts
        first = wanted.index(wanted[end])
        monkeypatch.setattr(lm, "eos", frozenset({wanted[end]}))
        result = lm.generate(prompt, hierarchy=chain(*exits), max_new_tokens=40, sampling=sampling)
        assert result.token_ids == wanted[: first + 1]
        assert result.finish_reason == "eos"


def test_every_limit(zoo) -> None:
    lm = zoo("gqa")
    prompt, exits = random_prompt(5, 9), chain((1, 3), (3, 5))
    wanted = plain(lm, prompt, 25)
    for limit in range(1, 26):
        result = lm.generate(prompt, hierarchy=exits, max_new_tokens=limit)
        assert (result.token_ids, result.finish_reason) == (wanted[:limit], "length")
