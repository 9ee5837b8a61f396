"""Drafting follows the text: measured in passes and their widths, on streams that change."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from helpers.drafting import drafting
from helpers.laws import random_prompt, same_tokens
from helpers.lms import plain

from hispec.drafter import Drafter
from hispec.hierarchy import Hierarchy, Level
from hispec.planner.cost_table import filled
from hispec.planner.prices import Prices
from hispec.sampling import Sampling
from hispec.sources import Candidate, Source
from hispec.sources.context import Context
from hispec.tree import Tree

#: A small model's passes on two cores, by width: with products of matrices, and without.
COSTS = filled({1: 1.0, 4: 1.03, 8: 1.08, 12: 1.2, 16: 1.45, 24: 1.9, 32: 2.4})

STEEP = filled({1: 1.0, 4: 1.3, 8: 1.87, 16: 3.33, 32: 6.0})


class Liar:
    """A source that is sure of itself and always wrong."""

    name = "context"
    priors = (0.6,) * 64

    def __init__(self) -> None:
        self.asked = 0

    def begin(self, tokens) -> None: ...

    def commit(self, tokens) -> None: ...

    def propose(self, path, budget):
        self.asked += 1
        return [Candidate([-2, -3, -4], [0, 0, 0]), Candidate([-5, -6], [1, 1])]

    def observe(self, tokens, top, before=None) -> None: ...

    def end(self) -> None: ...

    def reset(self) -> None: ...


def drafter_of(source: Source, nodes: int, costs: Sequence[float] | None) -> Drafter:
    return Drafter(
        [source], Hierarchy((), "test", (("context", 24),), nodes), costs and Prices(costs, {})
    )


def time_of(
    text: Sequence[int], prompt: int, drafter: Drafter, costs: Sequence[float] = COSTS
) -> float:
    """Decodes a text that is known; returns the time of the passes it took, in plain ones."""
    time, at = 0.0, prompt
    drafter.begin(text[:at])
    while at < len(text):
        tree = Tree(text[at - 1], at - 1)
        drafter.grow(tree, 0, len(text) - at - 1, 31, ())
        node, origins = 0, []
        while (child := tree.child(node, text[at + len(origins)])) is not None:
            node = child
            origins.append(tree.origins[child])
        committed = text[at : at + len(origins) + 1]
        drafter.commit(committed, [*origins, "target"], len(tree))
        time += costs[len(tree)]
        at += len(committed)
    return time


def alternating(seed: int) -> list[int]:
    """Prose without a repetition but for its little words, then copies, by turns."""
    draw = random.Random(seed)
    text: list[int] = []
    for _ in range(6):
        text += [draw.choice((draw.randrange(8), draw.randrange(8, 10**6))) for _ in range(80)]
        start = draw.randrange(len(text) - 60)
        text += text[start : start + 60]
    return text


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("costs", "most"), [(COSTS, 1.0), (STEEP, 0.95)])
def test_a_text_that_alternates_is_followed(seed: int, costs: list[float], most: float) -> None:
    # Against trees of the size that is best for this very text.
    text = alternating(seed)
    sizes = (0, 1, 2, 3, 5, 7, 11, 15, 23)
    fixed = {n: time_of(text, 40, drafter_of(Context(), n, None), costs) for n in sizes}
    adapted = time_of(text, 40, drafter_of(Context(), 24, costs), costs)
    assert adapted < most * min(fixed.values()), (adapted, fixed)


def test_databases_that_know_nothing_cost_next_to_nothing() -> None:
    liar = Liar()
    tokens = 400
    time = time_of(list(range(tokens + 1)), 1, drafter_of(liar, 12, COSTS))
    assert time <= 1.02 * tokens
    assert liar.asked < 0.3 * tokens


def test_sleeping_databases_wake() -> None:
    # A hundred tokens of nothing, and then the same hundred again.
    text = [*range(100), *range(100), *range(100)]
    drafter = drafter_of(Context(), 12, COSTS)
    assert time_of(text, 1, drafter) < 100 + 9 + 200 / 5


def test_useless_exits_are_given_up(zoo) -> None:
    lm = zoo("loud")  # whose exits are hardly ever right
    prompt = random_prompt(3, 20)
    wanted = plain(lm, prompt, 200)
    for level in (Level(2, 4, adaptive=True), Level(2, 4, ranks=True)):
        hierarchy = Hierarchy((level,))
        drafter = Drafter((), hierarchy, Prices(COSTS, {"exit 2": 0.2}))
        with drafting(lm, drafter):
            result = same_tokens(lm, prompt, hierarchy, Sampling(), 200, wanted)
        runs = result.levels[0].passes
        assert result.passes + (0.2 + COSTS[4] - 1) * runs <= 1.02 * 199, runs


def test_windows_end_where_the_exit_is_not_sure(zoo) -> None:
    # Exits that echo the target draft whole windows; the same window is given up where they don't.
    prompt = random_prompt(4, 20)
    lengths = {}
    for name in ("echo", "loud"):
        lm = zoo(name)
        wanted = plain(lm, prompt, 120)
        hierarchy = Hierarchy((Level(2, 6, adaptive=True),))
        with drafting(lm, Drafter((), hierarchy, Prices(COSTS, {"exit 2": 0.1}))):
            result = same_tokens(lm, prompt, hierarchy, Sampling(), 120, wanted)
        lengths[name] = result.committed / result.passes
    assert lengths["echo"] > 4
    assert lengths["loud"] == pytest.approx(1.0, abs=0.1)


def test_what_does_not_adapt_asks_always_and_learns_nothing(zoo) -> None:
    lm = zoo("loud")
    prompt = random_prompt(5, 20)
    wanted = plain(lm, prompt, 100)
    sources, exits = (("context", 8), ("recycle", 8)), (Level(2, 1, ranks=True),)
    for adapts in (True, False):
        hierarchy = Hierarchy(exits, "mine", sources, 3, adaptive=adapts)
        drafter = lm.drafter(hierarchy, learn=False)
        before = [list(chances) for chances in drafter.odds.chances]
        with drafting(lm, drafter):
            result = same_tokens(lm, prompt, hierarchy, Sampling(), 100, wanted)
        assert (drafter.odds.chances == before) == (not adapts)
        assert (result.levels[0].passes >= result.passes - 2) == (not adapts), "it is hardly right"
    rows = result.levels[-1].passes_of
    # The root, three from the databases, and the exit's pick where it is none of them.
    assert sum(rows[4:]) > 0.8 * sum(rows) and len(rows) == 6


def test_chains_that_do_not_adapt_are_strict_ones(zoo) -> None:
    lm, prompt = zoo("loud"), random_prompt(6, 20)
    wanted = plain(lm, prompt, 60)
    passes = []
    for level, adapts in ((Level(2, 4), True), (Level(2, 4, adaptive=True), False)):
        hierarchy = Hierarchy((level,), "mine", adaptive=adapts)
        assert lm.drafter(hierarchy) is None, "nothing to decide"
        result = same_tokens(lm, prompt, hierarchy, Sampling(), 60, wanted)
        passes.append([level.passes_of for level in result.levels])
    assert passes[0] == passes[1]


def test_databases_that_do_not_adapt_never_sleep() -> None:
    liar, hierarchy = Liar(), Hierarchy((), "test", (("context", 24),), 12, adaptive=False)
    time_of(list(range(201)), 1, Drafter([liar], hierarchy))
    assert liar.asked >= 198
