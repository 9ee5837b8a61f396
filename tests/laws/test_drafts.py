"""Trees drafted by databases and ranked by exits change how fast a text comes, never the text."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers.drafting import Oracle, drafting, ranking
from helpers.laws import random_hierarchy, random_prompt, same_tokens
from helpers.lms import plain, recording

from hispec.hierarchy import HD, SOURCES, Hierarchy, Level
from hispec.sampling import Sampling

KINDS = ("torch fp32", "torch bf16", "compiled fp32", "compiled bf16")
CASES = {
    "shared": ("gqa", ()),
    "stateful heads": ("gqa", ("deep reduced", "block", "deep", "affine reduced", "norm")),
    "tied, MHA, head size 8": ("tied mha", ()),
    "biases, stateful heads": ("biases", ("norm", "deep reduced", "deep", "block")),
    "exits that echo the target": ("echo", ()),
}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (case, kind)
        for case, (name, _) in CASES.items()
        for kind in KINDS
        if name != "tied mha" or kind.startswith("torch")
    ],
)
def test_same_tokens_below_any_hierarchy(zoo, case: str, kind: str) -> None:
    name, heads = CASES[case]
    lm = zoo(name, kind, heads)
    draw = random.Random(f"{case} {kind}")
    branched = accepted = 0
    for seed, (length, count) in enumerate(((3, 24), (20, 40), (244, 30), (502, 30))):
        sampling = Sampling() if seed % 2 else Sampling(0.8, seed)
        prompt = random_prompt(length, length)
        wanted = plain(lm, prompt, count, sampling)
        hierarchies = [Hierarchy(), random_hierarchy(draw, lm.model.config.num_layers)]
        for hierarchy in hierarchies:
            with drafting(lm, Oracle(prompt, wanted, seed)) as oracle:
                ranked = ranking(hierarchy, draw)
                result = same_tokens(lm, prompt, ranked, sampling, count, wanted)
            branched += oracle.branched
            accepted += oracle.counts["oracle"].accepted
            assert sum(map(len, oracle.committed)) == count - 1 == result.committed
            assert len(oracle.committed) == result.passes
    assert branched > 10
    assert accepted > 30


@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_runs_twice_for_a_node(zoo, kind: str) -> None:
    lm = zoo("gqa", kind, ("deep", "block", "norm"))
    draw = random.Random(kind)
    for seed in range(6):
        prompt = random_prompt(seed, 30)
        wanted = plain(lm, prompt, 40)
        hierarchy = ranking(random_hierarchy(draw, 6), draw) if seed else Hierarchy()
        with recording(lm) as recorder, drafting(lm, Oracle(prompt, wanted, seed)):
            result = lm.generate(prompt, hierarchy=hierarchy, max_new_tokens=40)
        assert result.token_ids == wanted
        assert result.layer_visits == recorder.visits - len(prompt) * 6


def test_databases_see_what_the_target_thinks_after_every_node(zoo) -> None:
    lm = zoo("gqa")
    prompt = random_prompt(5, 20)
    wanted = plain(lm, prompt, 30)
    with drafting(lm, Oracle(prompt, wanted, 5)) as oracle:
        lm.generate(prompt, max_new_tokens=30)
    text, root = [*prompt, *wanted], len(prompt)
    for (tokens, top, before), committed in zip(oracle.seen, oracle.committed, strict=True):
        assert isinstance(top, np.ndarray)
        assert len(tokens) == len(top) == len(before)
        assert (before[0], tokens[0], int(top[0, 0])) == tuple(text[root - 1 : root + 2])
        root += len(committed)
    # A node's row is what the model says after its own path, rejected or not.
    tokens, top, before = oracle.seen[0]
    with torch.inference_mode():
        for node in range(1, len(tokens)):
            if before[node] == tokens[0]:  # a child of the root
                path = [*prompt, wanted[0], tokens[node]]
                assert int(top[node, 0]) == plain(lm, path, 1)[0]


def test_a_rank_leaves_what_a_veto_prunes(zoo) -> None:
    # An exit that knows nothing vetoes the oracle's good drafts; ranking lets them stand.
    lm = zoo("loud")
    prompt = random_prompt(3, 20)
    wanted = plain(lm, prompt, 40)
    passes = {}
    for ranks in (False, True):
        hierarchy = Hierarchy((Level(2, 1, ranks),))
        with drafting(lm, Oracle(prompt, wanted, 1, truth=0.9)):
            passes[ranks] = same_tokens(lm, prompt, hierarchy, Sampling(), 40, wanted).passes
    assert passes[True] < passes[False] - 5


def test_stop_tokens_end_drafts(zoo) -> None:
    lm = zoo("gqa")
    prompt = random_prompt(7, 20)
    wanted = plain(lm, prompt, 30)
    lm.eos = frozenset({wanted[17]})
    try:
        with drafting(lm, Oracle(prompt, wanted, 2)):
            result = lm.generate(prompt, max_new_tokens=30)
    finally:
        lm.eos = frozenset()
    assert result.token_ids == wanted[: wanted.index(wanted[17]) + 1]
    assert result.finish_reason == "eos"


def test_the_real_databases_speed_up_a_text_that_repeats_itself(zoo) -> None:
    lm = zoo("gqa")
    prompt = random_prompt(1, 12) * 3
    wanted = plain(lm, prompt, 120)
    first = same_tokens(lm, prompt, HD, Sampling(), 120, wanted)
    assert {source.name for source in first.sources} <= set(SOURCES)
    assert first.passes < 119
    assert sum(source.accepted for source in first.sources) == first.committed - first.passes
    # What was learnt helps the second time, unless it must not be.
    drawn = Sampling(1.0, 5)  # repeats nothing within itself
    said = plain(lm, prompt, 120, drawn)
    once, again = (same_tokens(lm, prompt, HD, drawn, 120, said).passes for _ in range(2))
    assert again < 0.8 * once
    fresh = [lm.generate(prompt, hierarchy=HD, max_new_tokens=120, learn=False) for _ in range(2)]
    assert fresh[0].passes == fresh[1].passes
    assert [x.token_ids for x in fresh] == [wanted, wanted]
