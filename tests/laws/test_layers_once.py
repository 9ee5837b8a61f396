"""No layer twice: what runs is what the drafted, accepted and rejected tokens imply, exactly."""

from __future__ import annotations

import random

import pytest
from helpers.laws import no_layer_twice, random_hierarchy, random_prompt
from helpers.lms import chain, recording

from hispec.hierarchy import Hierarchy
from hispec.sampling import Sampling


@pytest.mark.parametrize(
    ("name", "heads"), [("gqa", ()), ("gqa", ("deep", "block", "norm")), ("echo", ()), ("loud", ())]
)
def test_visits_are_what_the_counts_imply(zoo, name: str, heads) -> None:
    lm = zoo(name, "torch fp32", heads)
    draw = random.Random(name)
    for seed in range(5):
        hierarchy = random_hierarchy(draw, lm.model.config.num_layers)
        sampling = Sampling(draw.choice((0.0, 0.7, 1.0)), seed)
        result = no_layer_twice(lm, random_prompt(seed, 20), hierarchy, sampling, 30)
        assert result.num_tokens == 30


def test_plain_decoding_visits_every_layer_once_a_token(zoo) -> None:
    lm = zoo("gqa")
    result = no_layer_twice(lm, random_prompt(1, 20), Hierarchy(), Sampling(), 30)
    assert result.layer_visits == 29 * 6  # the first token is prefill's
    assert result.layer_visits_per_token == 6


def test_hispec_by_hand(zoo) -> None:
    # Exits 2 and 4 of 6 that echo the target, windows 2 and 4: root r.
    #   exit 2: r → a, a → b                              2 x 2 layers
    #   exit 4: r, a from 2 to 4, b from 0 to 4 → c       3 x 2 + 2
    #   exit 2: c → d, d → e                              2 x 2
    #   exit 4: c, d from 2 to 4, e from 0 to 4; its pick after e would be one over 4 + 1
    #   target: r a b c d e from 4 to 6 → commits a b c d e and its own pick
    lm = zoo("echo")
    result = no_layer_twice(lm, random_prompt(1, 20), chain((2, 2), (4, 4)), Sampling(), 7)
    assert [level.passes for level in result.levels] == [4, 2, 1]
    assert [level.drafted for level in result.levels] == [4, 5, 0]
    assert [level.layer_visits for level in result.levels] == [4 * 2, 2 * (3 * 2 + 2), 6 * 2]
    assert result.layer_visits == 6 * 6  # nothing was rejected: six tokens through six layers
    assert result.committed == 6


def test_a_rejected_token_costs_what_it_ran(zoo) -> None:
    # Exits of a random model are never right: each round runs one draft for nothing.
    lm = zoo("loud")
    result = no_layer_twice(lm, random_prompt(3, 20), chain((2, 1)), Sampling(), 12)
    assert result.levels[0].accepted == 0, "choose another seed"
    assert result.passes == 11
    # All rounds but the last, which has room for one token only, lift a draft through all layers.
    assert result.layer_visits == 11 * 5 + 10 * 5


def test_the_recorder_sees_a_second_run(zoo) -> None:
    lm = zoo("gqa")
    with recording(lm):
        cache = lm.model.new_cache([6])
        tokens = random_prompt(1, 4)
        lm.model.advance(cache, tokens, 4, 6)
        x = lm.model.embed(tokens[3:])
        with pytest.raises(AssertionError, match="of which 6 were done"):
            lm.model.run_layers(x, 0, 6, 3, cache.kv)
        cache.truncate(3)
        lm.model.advance(cache, tokens, 4, 6)
