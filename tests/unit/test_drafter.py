"""Merging what sources propose: one trie, ranked by odds, no wider than it pays."""

from __future__ import annotations

import pytest

from hispec.drafter import Drafter
from hispec.hierarchy import Hierarchy, Level
from hispec.model.nodes import MAX_WIDTH
from hispec.odds import LIKELIEST, PRIOR_WEIGHT, Odds
from hispec.planner.online import FIRST_PASSES, FIRST_RATE, MEMORY
from hispec.planner.prices import Prices
from hispec.sources import Candidate
from hispec.tree import Tree


class Fixed:
    """A source that always proposes the same; its grade is the chance in tenths."""

    priors = tuple(grade / 10 for grade in range(10)) + (0.0,) * 54

    def __init__(self, name: str, *candidates: tuple[list[int], list[int]]) -> None:
        self.name = name
        self.candidates = [Candidate(tokens, grades) for tokens, grades in candidates]
        self.calls: list[tuple] = []

    def begin(self, tokens) -> None:
        self.calls.append(("begin", list(tokens)))

    def commit(self, tokens) -> None:
        self.calls.append(("commit", list(tokens)))

    def propose(self, path, budget):
        self.calls.append(("propose", list(path), budget))
        return self.candidates

    def observe(self, tokens, top) -> None:
        self.calls.append(("observe", list(tokens), top))

    def reset(self) -> None:
        self.calls.append(("reset",))

    def end(self) -> None:
        self.calls.append(("end",))


def drafting(nodes: int = 8, *, branches: bool = True, **budgets: int) -> Hierarchy:
    return Hierarchy((), "test", tuple(budgets.items()), nodes, branches)


def drafter_of(sources, hierarchy: Hierarchy, costs=None, level_costs=None) -> Drafter:
    """A drafter that takes every source at its word."""
    prices = None
    if costs or level_costs:
        prices = Prices(costs or [1.0] * (MAX_WIDTH + 1), level_costs or {})
    return Drafter(sources, hierarchy, prices, Odds(LIKELIEST))


def grown(drafter: Drafter, depth: int = 10, space: int = 31, stops=()) -> Tree:
    tree = Tree(100)
    drafter.grow(tree, 0, depth, space, stops)
    return tree


def shape(tree: Tree) -> set[tuple[int, ...]]:
    return {tuple(tree.path(node)) for node in range(1, len(tree))}


def test_equal_prefixes_share_nodes_and_the_likeliest_path_comes_first() -> None:
    context = Fixed("context", ([1, 2, 3], [8, 8, 8]), ([4], [3]))
    history = Fixed("history", ([1, 2, 5], [6, 6, 6]), ([4, 6], [5, 5]))
    tree = grown(drafter_of([context, history], drafting(context=9, history=9)))
    assert shape(tree) == {(1,), (1, 2), (1, 2, 3), (1, 2, 5), (4,), (4, 6)}
    assert tree.path(3) == [1, 2, 3]  # the main chain is the first nodes
    origins = {tuple(tree.path(n)): tree.origins[n] for n in range(1, len(tree))}
    assert origins[1, 2] == "context"
    assert origins[1, 2, 5] == origins[4,] == "history"  # 0.5 beats context's 0.3


def test_the_most_valuable_nodes_fit_the_budget() -> None:
    source = Fixed("context", ([1, 2, 3], [9, 9, 2]), ([4, 5], [5, 9]), ([6], [1]))

    def shaped(**limits) -> set[tuple[int, ...]]:
        return shape(grown(drafter_of([source], drafting(4, context=9)), **limits))

    # values: 1 0.9, 1 2 0.81, 4 0.5, 4 5 0.45, 1 2 3 0.16, 6 0.1
    assert shaped() == {(1,), (1, 2), (4,), (4, 5)}
    assert shaped(space=2) == {(1,), (1, 2)}
    assert shaped(depth=1) == {(1,), (4,), (6,)}
    assert shaped(stops={1}) == {(1,), (4,), (4, 5), (6,)}
    assert shaped(depth=0) == shaped(space=0) == set()


def test_without_branches_only_the_likeliest_chain_is_drafted() -> None:
    source = Fixed("context", ([1, 2], [7, 9]), ([1, 3], [7, 4]), ([4, 5], [5, 9]))
    drafter = drafter_of([source], drafting(branches=False, context=9))
    assert shape(grown(drafter)) == {(1,), (1, 2)}


def test_a_tree_is_no_wider_than_it_pays() -> None:
    source = Fixed("context", ([1], [9]), ([2], [5]), ([3], [2]))
    flat = [0.0] + [1.0] * 32
    steep = [0.0] + [1.0 + 0.3 * w for w in range(32)]  # a row costs 0.3 passes, 0.45 tokens
    stairs = [0.0, 1.0, 2.0, 2.0, 2.0] + [2.0] * 28  # the first costs too much, together they pay
    assert len(grown(drafter_of([source], drafting(context=9), flat))) == 4
    assert shape(grown(drafter_of([source], drafting(context=9), steep))) == {(1,), (2,)}
    assert FIRST_RATE == 1.5
    assert len(grown(drafter_of([source], drafting(context=9), stairs))) == 4
    wall = [0.0, 1.0, 3.0, 3.0, 3.0] + [3.0] * 28
    assert len(grown(drafter_of([source], drafting(context=9), wall))) == 1


def test_odds_count_what_stood_of_everything_proposed_kept_or_cut() -> None:
    context = Fixed("context", ([1, 2], [8, 7]), ([3], [2]))
    history = Fixed("history", ([1, 4], [6, 5]))
    drafter = drafter_of([context, history], drafting(1, context=9, history=9))
    tree = grown(drafter)
    assert shape(tree) == {(1,)}
    drafter.commit([1, 2], ["context", "target"], 2)
    odds = drafter.odds
    for name, grade, stood in (
        ("context", 8, 1),
        ("context", 7, 1),
        ("context", 2, 0),
        ("history", 6, 1),
        ("history", 5, 0),
    ):
        expected = (grade / 10 * PRIOR_WEIGHT + stood) / (PRIOR_WEIGHT + 1)
        assert odds.chance(name, grade) == pytest.approx(expected), (name, grade)
    assert drafter.counts["context"].proposed == drafter.counts["context"].accepted == 1
    assert drafter.counts["history"].proposed == 0


def test_what_follows_a_path_is_judged_only_where_the_path_stood() -> None:
    source = Fixed("context", ([5], [4]))
    drafter = drafter_of([source], drafting(context=9))
    tree = Tree(100)
    tip = tree.append(1, 0, "exit 4")
    drafter.grow(tree, tip, 10, 31, ())
    assert source.calls[-1] == ("propose", [1], 9)
    drafter.commit([2], ["target"], 3)
    assert drafter.odds.chance("context", 4) == pytest.approx(0.4)
    tree = Tree(100)
    drafter.grow(tree, tree.append(1, 0), 10, 31, ())
    drafter.commit([1, 5, 6], ["exit 4", "context", "target"], 3)
    assert drafter.odds.chance("context", 4) > 0.4


def test_a_budget_of_zero_turns_a_source_off() -> None:
    on, off = Fixed("context", ([1], [9])), Fixed("history", ([2], [9]))
    drafter = drafter_of([on, off], drafting(context=9, history=0))
    drafter.begin([1])
    assert shape(grown(drafter)) == {(1,)}
    assert off.calls == []
    assert list(drafter.counts) == ["context"]


def test_the_rate_follows_what_passes_yield() -> None:
    source = Fixed("context", ([1], [3]))
    costs = [0.0, 1.0, 1.15] + [1.15] * 30
    drafter = drafter_of([source], drafting(context=9), costs)
    assert len(grown(drafter)) == 2  # 0.3 tokens for 0.15 passes of 1.5 tokens
    for _ in range(int(10 * FIRST_PASSES)):
        drafter.commit([9, 9, 9], ["", "", ""], 1)  # three tokens a pass: rows are worth more
    assert len(grown(drafter)) == 1


@pytest.mark.parametrize(("known", "brought"), [(True, 0.0), (False, 1.0)])
def test_what_the_databases_knew_no_exit_brings(known: bool, brought: float) -> None:
    """An exit that will run is shown the likely proposals alone, and adds the others itself."""
    context = Fixed("context", ([1, 2] if known else [5, 6], [3, 3]))
    hierarchy = Hierarchy((Level(4, 2, ranks=True),), "test", (("context", 9),), 8)
    drafter = drafter_of([context], hierarchy, level_costs={"exit 4": 0.01})
    gain = drafter.odds.gains.by_level["exit 4"]
    gain.chances = gain.brought = 1.0
    tree = Tree(100)
    drafter.grow(tree, 0, 10, 31, (), "exit 4")
    assert len(tree) == 2, "the second token is not likely"
    assert drafter.pays(tree, 0, "exit 4")
    ids, chances = [[1, 7, 8], [2, 7, 8]], [[0.9, 0.05, 0.01]] * 2
    drafter.rank(tree, "exit 4", 0, ids, chances, int(known), 10, 20)
    tokens, origins = ([1, 2, 9], ["context", "exit 4"]) if known else ([1, 9], ["exit 4"])
    drafter.commit(tokens, [*origins, "target"], len(tree))
    assert gain.brought - (1 - 1 / MEMORY) == pytest.approx(brought)


def test_the_first_pass_of_a_text_tells_nothing_about_prices() -> None:
    drafter = drafter_of([], Hierarchy(), [0.0] + [1.0] * MAX_WIDTH, {"exit 2": 0.1})
    for seconds in (5.0, *[0.01] * 500):  # the prompt, and then the passes
        drafter.took("", 1, seconds)
        drafter.took("exit 2", 1, seconds / 10)
    drafter.end()
    assert drafter.worth._level_costs["exit 2"] == pytest.approx(0.1, rel=0.05)
