"""Chances from counts, and what several sources' words are worth together."""

from __future__ import annotations

import random

import pytest

from hispec.odds import KNOWN, LIKELIEST, PRIOR_WEIGHT, Mixture, Odds, Offer, Weights

SOURCES = ("context", "history")
EQUAL = Mixture(0.0, 0.5, {"history": Weights(0.5, 0.0, 0.0)}, 0.05)


def odds_of(*chances: float, mixture: Mixture | None = None) -> Odds:
    """Odds of as many sources, each with one grade of such a chance."""
    odds = Odds(mixture) if mixture else Odds()
    for name, chance in zip(SOURCES, chances, strict=False):
        odds.start(name, (chance,))
    return odds


def place_of(odds: Odds, *tokens: int) -> Offer:
    """A place after which each source proposes its token."""
    place = Offer()
    for source, token in enumerate(tokens):
        place.claim(token, source, 0, odds.logits[source][0])
    odds.weigh(place)
    return place


def test_counts_converge_to_the_frequency() -> None:
    draw = random.Random(1)
    odds = odds_of(0.9)
    for _ in range(2000):
        odds.learn(place_of(odds, 5), 5 if draw.random() < 0.25 else 6)
    assert odds.chance("context", 0) == pytest.approx(0.25, abs=0.04)
    assert place_of(odds, 5).children[5].chance == pytest.approx(0.25, abs=0.06)


def test_the_best_word_counts_where_nothing_is_mixed() -> None:
    odds = odds_of(0.3, 0.6, mixture=LIKELIEST)
    both = place_of(odds, 5, 5).children[5]
    assert both.chance == pytest.approx(0.6)
    assert odds.names[both.origin] == "history"
    assert place_of(odds, 5, 6).children[5].chance == pytest.approx(0.3)


def test_agreement_speaks_for_a_token_and_contradiction_against() -> None:
    odds = odds_of(0.5, 0.5)
    alone = place_of(odds, 5).children[5].chance
    contested = place_of(odds, 5, 6)
    assert place_of(odds, 5, 5).children[5].chance > alone > contested.children[5].chance
    assert sum(offer.chance for offer in contested.children.values()) <= 1.0


def test_weights_learn_whom_to_believe() -> None:
    # Both are right half of the time, but never the second where the first says something else.
    draw = random.Random(2)
    odds = odds_of(0.5, 0.5, mixture=EQUAL)
    for _ in range(600):
        agree = draw.random() < 0.5
        odds.learn(place_of(odds, 5, 5 if agree else 6), 5 if draw.random() < 0.9 else 7)
    contested = place_of(odds, 5, 6)
    assert contested.children[5].chance > 0.75
    assert contested.children[6].chance < 0.15


def test_a_first_word_counts_once() -> None:
    odds = odds_of(0.5, mixture=LIKELIEST)
    place = place_of(odds, 5)
    place.claim(5, 0, 0, 0.0)
    odds.learn(place, 5)
    assert odds.chance("context", 0) == pytest.approx((0.5 * PRIOR_WEIGHT + 1) / (PRIOR_WEIGHT + 1))


def test_a_text_does_not_decide_for_the_next_but_many_do() -> None:
    odds = odds_of(0.5)
    for text in range(40):
        odds.begin()
        before = odds.chance("context", 0)
        if text == 1:
            assert before == pytest.approx(0.5 * KNOWN / (KNOWN + 100))
        for _ in range(100):
            odds.learn(place_of(odds, 5), 6)
        assert odds.chance("context", 0) < 0.5 * before
    assert before < 0.05
