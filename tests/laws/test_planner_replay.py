"""A replay does what the engine did: on a known answer, without the target."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
from helpers.laws import random_prompt
from helpers.lms import chain

from hispec.hierarchy import AR, Hierarchy, Level
from hispec.planner.acceptance import Acceptance, Key
from hispec.planner.cost_table import LOWEST_STEP
from hispec.planner.costs import cost_table
from hispec.planner.replay import replay
from hispec.planner.shadow import Shadow

COUNT = 90
SOURCES = (("context", 8), ("history", 8))


@pytest.fixture(scope="module")
def known(zoo):
    """A model with two trained heads, a prompt, and what replays of its answer need."""
    lm = zoo("gqa", exits=("deep", "norm"))
    prompt = random_prompt(11, 20)
    answer = lm.generate(prompt, hierarchy=AR, max_new_tokens=COUNT).token_ids
    shadow, acceptance = Shadow(lm, [1, 2], prompt, answer), Acceptance()
    shadow.count(acceptance)
    costs = cost_table(lm.model, {e: lm.head(e) for e in (1, 2)}, 64)
    return lm, prompt, shadow, costs, acceptance


@pytest.mark.parametrize(
    "hierarchy",
    [
        AR,
        chain((1, 1)),
        chain((2, 3)),
        chain((1, 2), (2, 3)),
        Hierarchy((), "trees", SOURCES, 8),
        Hierarchy((), "chains", SOURCES, 8, branches=False),
        Hierarchy((Level(2, 2),), "checked", SOURCES, 4),
    ],
    ids=str,
)
def test_every_pass_is_the_engine_s(known, hierarchy: Hierarchy) -> None:
    lm, prompt, shadow, costs, acceptance = known
    result = lm.generate(prompt, hierarchy=hierarchy, max_new_tokens=COUNT, learn=False)
    done = replay(lm, hierarchy, [shadow], costs, acceptance)
    assert done.tokens == result.committed == COUNT - 1
    assert done.passes["target"] == result.passes
    assert done.seconds > 0 and sum(done.parts.values()) == pytest.approx(done.seconds)
    if len(hierarchy.levels) < 2 and not hierarchy.sources:  # off the path picks are unknown
        assert done.passes == {level.name: level.passes for level in result.levels}
    assert done.proposed == {source.name: source.proposed for source in result.sources} or (
        hierarchy.levels
    )


def test_an_exit_that_ranks_is_about_right(known) -> None:
    lm, prompt, shadow, costs, acceptance = known
    hierarchy = Hierarchy((Level(2, 2, ranks=True),), "ranks", SOURCES, 8)
    result = lm.generate(prompt, hierarchy=hierarchy, max_new_tokens=COUNT, learn=False)
    done = replay(lm, hierarchy, [shadow], costs, acceptance)
    assert done.tokens_per_pass == pytest.approx(result.block_efficiency, rel=0.15)


def test_time_is_that_of_the_passes(known) -> None:
    lm, _, shadow, costs, acceptance = known
    plain = replay(lm, AR, [shadow], costs, acceptance)
    assert plain.latency_s == pytest.approx(costs.plain_s)
    free = replace(costs, step_s=costs.step_s + 1.0)  # a second more for every step
    for hierarchy in (AR, chain((1, 2))):
        before, after = (replay(lm, hierarchy, [shadow], x, acceptance) for x in (costs, free))
        steps = before.passes["target"] + LOWEST_STEP * before.passes.get("exit 1", 0)
        assert after.seconds - before.seconds == pytest.approx(steps)


@pytest.mark.parametrize("hierarchy", [AR, chain((1, 1)), chain((1, 1), (2, 1))], ids=str)
def test_layers_are_called_as_often_as_the_engine_calls_them(known, hierarchy: Hierarchy) -> None:
    lm, prompt, shadow, costs, acceptance = known
    narrow = lm.model.narrow
    with mock.patch.object(narrow, "lift", wraps=narrow.lift) as lift:
        lm.generate(prompt, hierarchy=hierarchy, max_new_tokens=COUNT, learn=False)
    dear = replace(costs, call_s=[1.0 + x for x in costs.call_s], lift_s=costs.lift_s + 1.0)
    before, after = (replay(lm, hierarchy, [shadow], x, acceptance) for x in (costs, dear))
    assert after.seconds - before.seconds == pytest.approx(lift.call_count, rel=0.03)


def test_layers_are_cheaper_where_a_draft_has_just_run_them(known) -> None:
    lm, _, shadow, costs, acceptance = known
    costs = replace(costs, layer_s=[2.0] * len(costs.layer_s))  # seconds, to save one of
    kept = replace(costs, kept_s={"exit 1": 1.0, "exit 2": 1.0})
    for exit_layer, window in ((1, 1), (1, 3), (2, 3)):
        hierarchy = chain((exit_layer, window))
        before = replay(lm, hierarchy, [shadow], replace(costs, kept_s={}), acceptance)
        after = replay(lm, hierarchy, [shadow], kept, acceptance)
        saved = before.seconds - after.seconds
        # Each pass of the exit but a round's first; and its pick's layers, which the target runs.
        # In the last round there is room for fewer drafts, perhaps for none.
        passes = before.passes[f"exit {exit_layer}"]
        assert passes > 2
        assert saved == pytest.approx(exit_layer * passes, abs=exit_layer + 1e-6)


def test_a_head_reads_the_prompt_once_a_text(known) -> None:
    lm, _, shadow, costs, acceptance = known
    free, reading = (replace(costs, prompt_s={"exit 1": each}) for each in (0.0, 1.0))
    for hierarchy, prompts in ((AR, 0), (chain((1, 2)), 2)):
        before, after = (
            replay(lm, hierarchy, [shadow, shadow], x, acceptance) for x in (free, reading)
        )
        assert after.seconds - before.seconds == pytest.approx(prompts * shadow.start)


def test_rates_are_what_the_engine_counts(known) -> None:
    """An exit's acceptance by place, from its shadow, is that of decoding with it."""
    lm, prompt, _, _, acceptance = known
    result = lm.generate(prompt, hierarchy=chain((2, 4)), max_new_tokens=COUNT)
    row = acceptance.counts[Key("exit 2", "target")]
    level = result.levels[0]
    seen = [level.drafted_at[0], *level.accepted_at[:-1]]
    for place, count in enumerate(row[: len(level.accepted_at)]):
        assert abs(count.seen - seen[place]) <= 1, "the last round has less room"
        assert abs(count.stood - level.accepted_at[place]) <= 1


def test_origins_add_up(known) -> None:
    """A token was drafted by the level below or it was not: both counts make the level's own."""
    *_, acceptance = known
    own = acceptance.total(Key("exit 2", "target"))
    parts = [
        acceptance.total(Key("exit 2", "target", origin, "exit 1"))
        for origin in ("accepted", "corrected")
    ]
    assert sum(part.seen for part in parts) == own.seen > 20
    assert sum(part.stood for part in parts) == own.stood
