"""Drafts of all kinds, merged into one ranked tree.

Databases propose continuations of the text, exits propose what they find likely after a node. A
round has one trie of proposals, in which equal prefixes share places, and a token's *chance* to be
right, given that what it follows is, weighs the words of all who propose something there
(:mod:`hispec.odds`). A node's *value* is the product of the chances down to it: the chance that the
text gets there, and so the tokens the node is expected to add to the pass. What is proposed is
taken by falling value, and the tree is no wider than it pays: rows must bring more tokens than
their time brings otherwise, at the rate of late (:mod:`hispec.planner.online`).

    Σ value − rate · (cost(width + n) − cost(width))  →  max over n

After each round the committed tokens are walked through everything that was proposed, taken or
not, and the odds count what stood. Nothing proposed is worth a row: then the round is one of plain
decoding. Databases that know nothing for long are asked less often.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from hispec.hierarchy import Hierarchy
from hispec.odds import Odds, Offer
from hispec.planner.online import Worth
from hispec.planner.prices import Prices
from hispec.sources import GRADES, Source
from hispec.tree import Tree

#: An exit's guesses are graded by rank and probability: the classes of each.
RANKS, CLASSES = 3, 16
#: How many of the target's likeliest ids the databases are shown after each node.
SHOWN = 8
#: An exit sees those proposals of the databases that the text gets to with this chance.
LIKELY = 0.1
#: After so many rounds in which the databases knew nothing that stood they are asked less often:
#: proposing takes a few hundredths of a small model's pass.
PATIENCE = 16
#: Rounds until they are asked again, at most.
LONGEST_SLEEP = 8
#: The grade of a strict exit's pick, of which nobody asked how likely it is.
PICK = RANKS * CLASSES
LEVEL_PRIORS = tuple((g % CLASSES + 0.5) / CLASSES if g < PICK else 0.5 for g in range(GRADES))


def _grade(rank: int, chance: float) -> int:
    """Returns the grade of an exit's guess."""
    return rank * CLASSES + min(int(chance * CLASSES), CLASSES - 1)


@dataclass
class SourceCounts:
    """What one database did.

    Attributes:
        name: ``context``, ``history``, ``corpus`` or ``recycle``.
        proposed: its nodes in trees.
        accepted: of these, the ones committed.
        time_s: wall time it took to propose and to learn.
    """

    name: str
    proposed: int = 0
    accepted: int = 0
    time_s: float = 0.0


class Drafter:
    """Merges one text's drafts.

    Args:
        sources: the databases, in the order they are asked.
        hierarchy: their budgets, and how wide and how branched their tree may be.
        prices: what passes cost; without them rows and exits cost nothing.
        odds: what to start from; by default the sources' own priors.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        hierarchy: Hierarchy,
        prices: Prices | None = None,
        odds: Odds | None = None,
    ) -> None:
        budgets = dict(hierarchy.sources)
        self._nodes = hierarchy.nodes
        self._branches = hierarchy.branches
        self._learns = hierarchy.adaptive
        self._lowest = hierarchy.levels[0].name if hierarchy.levels else ""
        self.odds = odds or Odds()
        self._sources = [
            (x, budgets[x.name], self.odds.start(x.name, x.priors))
            for x in sources
            if budgets.get(x.name, 0) > 0
        ]
        for level in hierarchy.levels:
            self.odds.start(level.name, LEVEL_PRIORS)
        self._prices = prices
        self._met: set[str] = set()  # levels whose first pass of this text is over
        levels, starts = (prices.levels, prices.starts) if prices else ({}, {})
        self.worth = Worth(prices.costs if prices else None, levels, self.odds.gains, starts)
        self.counts = {x.name: SourceCounts(x.name) for x, _, _ in self._sources}
        self.wants_top = any(x.name == "recycle" for x, _, _ in self._sources)
        self._top = Offer()  # this round's proposals below the root
        self._asks = -1, False  # the node below which an exit was considered, and whether it runs
        self._alone: set[int] = set()  # offers that the databases' own tree would have held
        self._misses = 0  # rounds in a row in which the databases knew nothing that stood
        self._sleep = 0  # rounds for which they are not asked
        self._awake = False  # whether they were asked in this one

    def begin(self, tokens: Sequence[int]) -> None:
        """Starts a text: the prompt and the one token that prefill has picked."""
        self.odds.begin()
        for source, _, _ in self._sources:
            source.begin(tokens[:-1])
            source.commit(tokens[-1:])

    # ------------------------------------------------------------------ databases

    def grow(
        self,
        tree: Tree,
        tip: int,
        depth: int,
        space: int,
        stops: Container[int],
        level: str = "",
    ) -> None:
        """Adds the databases' most promising continuations below a node of the tree.

        Args:
            tree: grows by at most the hierarchy's ``nodes``.
            tip: the node they follow.
            depth: no node may lie deeper.
            space: nodes the tree has room for.
            stops: ids after which nothing is worth drafting.
            level: an exit that may rank what grows. If it will, only the likeliest grow at first:
                of the rest it knows better.
        """
        longest = depth - tree.nodes.depths[tip]
        space = min(space, self._nodes)
        if longest < 1 or space < 1 or not self._sources or self._sleep:
            return
        self._awake = True
        path = tree.path(tip)
        place = self._place(path)
        self._ask(place, path, longest, stops)
        value = tree.values[tip]
        heirs = self._heirs(place)
        least = 0.0
        if level:
            covered = value * sum(offer.chance for offer in heirs)
            self._asks = tip, self.worth.pays(level, max(value - covered, 0.0), len(tree))
            least = LIKELY if self._asks[1] else 0.0
        seeds = [
            (value * offer.chance, offer) for offer in heirs if tree.child(tip, offer.token) is None
        ]
        chosen, alone = self._choose(seeds, space, len(tree), least)
        if tip == 0:
            self._alone = alone
        self._graft(tree, tip, place, chosen)

    def _place(self, path: Sequence[int]) -> Offer:
        """Returns where a path leads."""
        place = self._top
        for token in path:
            place = place.child(token)
        return place

    def _ask(self, place: Offer, path: list[int], longest: int, stops: Container[int]) -> None:
        """Lays down everything the sources propose after ``path``."""
        for source, budget, number in self._sources:
            started = time.perf_counter()
            words = self.odds.logits[number]
            for tokens, grades in source.propose(path, budget):
                at = place
                for token, grade in zip(tokens[:longest], grades, strict=False):
                    at = at.claim(int(token), number, grade, words[grade])
                    if token in stops:
                        break
            self.counts[source.name].time_s += time.perf_counter() - started

    def observe(self, tokens: Sequence[int], top: np.ndarray, before: Sequence[int]) -> None:
        """Shows the sources a full pass.

        Args:
            tokens: N ids that ran, the tree's in order.
            top: (N, k) int, the target's likeliest next ids after each.
            before: N ids, the one before each.
        """
        for source, _, _ in self._sources:
            started = time.perf_counter()
            source.observe(tokens, top, before)
            self.counts[source.name].time_s += time.perf_counter() - started

    # ------------------------------------------------------------------ exits

    def pays(self, tree: Tree, tip: int, level: str) -> bool:
        """Returns whether running an exit is expected to bring more than its time is worth.

        What it finds below ``tip`` counts as far as nobody has proposed it yet.
        """
        (asked, answer), self._asks = self._asks, (-1, False)
        if asked == tip:
            return answer
        value = tree.values[tip]
        covered = sum(
            tree.values[node]
            for node in range(tip + 1, len(tree))
            if tree.nodes.parents[node] == tip
        )
        return self.worth.pays(level, max(value - covered, 0.0), len(tree))

    def picked(
        self, tree: Tree, end: int, token: int, level: str, chance: float | None = None
    ) -> float:
        """Returns the value of a strict exit's pick after the node ``end``.

        Args:
            tree: what was drafted.
            end: a node.
            token: the pick.
            level: the exit's name.
            chance: how likely the exit finds it, if it was asked.
        """
        number = self.odds.numbers.get(level)
        if number is None:
            return 0.0  # the target's own pick: nothing grows below it
        place = self._place(tree.path(end))
        grade = PICK if chance is None else _grade(0, chance)
        offer = place.claim(token, number, grade, self.odds.logits[number][grade])
        self.odds.weigh(place)
        return tree.values[end] * offer.chance

    def rank(
        self,
        tree: Tree,
        level: str,
        first: int,
        ids: Sequence[Sequence[int]],
        chances: Sequence[Sequence[float]],
        end: int,
        depth: int,
        space: int,
    ) -> int:
        """Adds what an exit finds likely after its nodes; returns the node of its pick.

        Args:
            tree: grows by the pick, and by as many other nodes as pay.
            level: the exit's name.
            first: the node of the first row.
            ids: for each row, the exit's likeliest ids, its pick first.
            chances: how likely it finds them.
            end: the node after which the exit's pick is the next on its own path.
            depth: no other node may lie deeper.
            space: nodes the tree has room for.
        """
        number = self.odds.numbers[level]
        words = self.odds.logits[number]
        parents, values = tree.nodes.parents, tree.values
        places: list[Offer] = []
        seeds = []
        for node, tokens, likely in zip(range(first, len(tree)), ids, chances, strict=True):
            place = self._place(tree.path(node))
            if place.mask and node > first:  # what the exit says may have changed its value
                values[node] = values[parents[node]] * place.chance
            places.append(place)
            for rank, (token, chance) in enumerate(zip(tokens[:RANKS], likely, strict=False)):
                grade = _grade(rank, chance)
                place.claim(token, number, grade, words[grade])
            self.odds.weigh(place)
            if tree.nodes.depths[node] < depth and self._branches:
                seeds += [
                    (values[node] * offer.chance, offer)
                    for offer in place.children.values()
                    if offer.mask and tree.child(node, offer.token) is None
                ]
        pick = places[end - first].children[ids[end - first][0]]
        newest = tree.append(pick.token, end, level, values[end] * pick.chance)
        rest = [seed for seed in seeds if seed[1] is not pick]
        chosen, _ = self._choose(rest, space - 1, len(tree))
        for node, place in enumerate(places, first):
            self._graft(tree, node, place, chosen)
        return newest

    # ------------------------------------------------------------------ the tree

    def _choose(
        self, seeds: Iterable[tuple[float, Offer]], space: int, width: int, least: float = 0.0
    ) -> tuple[set[int], set[int]]:
        """Returns the ids of the offers worth their rows, of ``seeds`` (value, offer) and below.

        Args:
            seeds: offers whose parents are in the tree.
            space: the most there may be.
            width: rows that are there.
            least: the least value.

        Returns:
            Those of at least that value, and all.
        """
        order = count()
        heap = [(-value, next(order), offer) for value, offer in seeds]
        heapq.heapify(heap)
        chosen: list[int] = []
        gain, best, kept, likely = 0.0, 0.0, 0, 0
        price = self.worth.prices(width)
        while heap and len(chosen) < space:
            value, _, offer = heapq.heappop(heap)
            chosen.append(id(offer))
            gain -= value
            net = gain - price(len(chosen))
            if net > best:
                best, kept = net, len(chosen)
                if -value >= least:
                    likely = kept
            if offer.children:
                for heir in self._heirs(offer):
                    heapq.heappush(heap, (value * heir.chance, next(order), heir))
        return set(chosen[:likely]), set(chosen[:kept])

    def _heirs(self, place: Offer) -> list[Offer]:
        """Returns what is proposed after a place, weighed; the likeliest alone in chains."""
        if not place.voices:
            return []
        self.odds.weigh(place)
        heirs = [offer for offer in place.children.values() if offer.mask]
        return heirs if self._branches else [max(heirs, key=lambda offer: offer.chance)]

    def _graft(self, tree: Tree, parent: int, place: Offer, chosen: set[int]) -> None:
        """Appends the chosen offers below ``parent``, the likeliest path first."""
        if not chosen:
            return
        heirs = [offer for offer in place.children.values() if id(offer) in chosen]
        heirs.sort(key=lambda offer: -offer.chance)
        for offer in heirs:
            name = self.odds.names[offer.origin]
            node = tree.append(offer.token, parent, name, tree.values[parent] * offer.chance)
            if name in self.counts:
                self.counts[name].proposed += 1
            if offer.children:
                self._graft(tree, node, offer, chosen)

    # ------------------------------------------------------------------ learning

    def commit(self, tokens: Sequence[int], origins: Sequence[str], width: int) -> None:
        """Ends a round.

        Args:
            tokens: what was committed.
            origins: who drafted each, as in :class:`~hispec.tree.Tree`.
            width: rows of the target's pass.
        """
        place, known, alone = self._top, False, 0
        for depth, token in enumerate(tokens, 1):
            if place.voices and self._learns:
                self.odds.learn(place, token)
            if token not in place.children:
                break
            place = place.children[token]
            known = known or bool(place.mask)
            if alone == depth - 1 and id(place) in self._alone:
                alone = depth
        if self._sleep:
            self._sleep -= 1
        elif self._awake and self._learns:
            self._misses = 0 if known else self._misses + 1
            self._sleep = min(max(self._misses - PATIENCE, 0), LONGEST_SLEEP)
        self._awake = False
        for origin in origins:
            if origin in self.counts:
                self.counts[origin].accepted += 1
        self.worth.passed(origins, width, self._lowest, alone, 1 + len(self._alone))
        self._top, self._alone = Offer(), set()
        for source, _, _ in self._sources:
            started = time.perf_counter()
            source.commit(tokens)
            self.counts[source.name].time_s += time.perf_counter() - started

    def took(self, level: str, rows: int, seconds: float) -> None:
        """Counts what a pass took: an exit's, or the target's where ``level`` is empty."""
        if self._prices is None or level not in self._met:
            self._met.add(level)  # the first one of a text catches up on the prompt
        elif level:
            self._prices.level_took(level, seconds)
        else:
            self._prices.took(rows, seconds)

    def end(self) -> None:
        """The text is over."""
        if self._prices:
            self._prices.refine()
        for source, _, _ in self._sources:
            source.end()
