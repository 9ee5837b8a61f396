"""Acceptance by edge, origin and place: counts in, rates and intervals out."""

from __future__ import annotations

import json
import random

import pytest

from hispec.planner.acceptance import ACCEPTED, Acceptance, Count, Key, survival, wilson


def test_wilsons_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)
    assert Count(400, 200).interval() == pytest.approx((0.4512, 0.5488), abs=1e-4)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw, hits = random.Random(1), 0
    for _ in range(1000):
        stood = sum(draw.random() < 0.3 for _ in range(60))
        low, high = wilson(stood, 60)
        hits += low <= 0.3 <= high
    assert 925 <= hits <= 975  # 3.6 standard errors around 950


def test_a_place_with_few_observations_leans_on_the_others() -> None:
    table = Acceptance()
    key = Key("exit 4", "target")
    table.add(key, 0, 1000, 400)
    table.add(key, 1, 2, 2)
    first, second, third = table.rates("exit 4", "target", 3)
    assert first == pytest.approx(0.4, abs=0.001)
    assert 0.4 < second < 0.6  # two of two are no proof
    assert third == pytest.approx(second)


def test_an_origin_nobody_saw_has_the_level_s_own_rate() -> None:
    table = Acceptance()
    table.add(Key("exit 8", "target"), 0, 100, 50)
    table.add(Key("exit 8", "target", ACCEPTED, "exit 4"), 0, 1000, 800)
    assert table.rates("exit 8", "target", 1, ACCEPTED, "exit 4")[0] == pytest.approx(0.8, abs=0.01)
    assert table.rates("exit 8", "target", 1, ACCEPTED, "exit 2") == table.rates(
        "exit 8", "target", 1
    )
    assert table.rates("exit 4", "target", 2) == [0.0, 0.0], "an unknown edge never stands"


def test_constant_rates_and_survival() -> None:
    table = Acceptance.constant({("a", "b"): 0.7})
    assert table.rates("a", "b", 5) == pytest.approx([0.7] * 5)
    assert survival([0.5, 0.5, 1.0]) == [0.5, 0.25, 0.25]


def test_how_sure_it_is() -> None:
    table = Acceptance()
    assert table.widest() == 0.5
    table.add(Key("exit 4", "target"), 0, 400, 200)
    low, high = wilson(200, 400)
    assert table.widest() == pytest.approx((high - low) / 2)


def test_it_survives_json() -> None:
    table = Acceptance()
    table.add(Key("exit 4", "target"), 1, 5, 2)
    table.add(Key("exit 8", "target", ACCEPTED, "exit 4"), 0, 3, 1)
    again = Acceptance.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
