"""Hierarchical self-speculative decoding, one round at a time.

Levels 0 … K share one cache; K is the target, the levels below are its early exits. Below them may
stand separate models with caches of their own. A round grows one tree below the root, the last
committed token, and ends with one pass of the target over it:

    gather(k)   have level k grow the tree by its window; below all levels, ask the databases
    step(k)     let what is below gather; run level k over all it has not seen; follow its own picks
                through the tree, and add its pick after the last of them

With nothing below, a step is a plain decoding step. So plain decoding is ``step(0)`` of a hierarchy
with one level, Hierarchy Drafting the same with databases, LayerSkip ``step(1)`` of one with two
levels and HiSpec ``step(2)`` of one with three.

A level's *tip* is the last node it stands behind: whatever it picked led there. A strict level
prunes what it would not have picked; a ranking one leaves it standing as a branch, for the levels
above to judge. The target is always strict, and what is left after its step is committed.

Invariants. The tree's tokens follow the committed ones. Every level's tip is an ancestor of the tip
below it. A pass runs only the layers between an exit and the one below, from stored states: no
layer runs twice for a token. Only the target's step commits, and all it commits are its own picks:
what happens below decides how many tokens a round yields, never which.

Where a device computes, the host waits for it only to decide something. A chain's picks decide
nothing until the level above has run over them, so they stay on the device, unread (``hurry``).
"""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np

from hispec.drafter import RANKS, SHOWN, Drafter
from hispec.hierarchy import Hierarchy
from hispec.model.level import Level
from hispec.model.nodes import MAX_WIDTH
from hispec.model.passes import Found
from hispec.picker import Picker
from hispec.tree import Tree, follow
from hispec_kernels import top_k

#: Each row's likeliest ids, best first, and how likely they are.
Ranked = tuple[list[list[int]], list[list[float]]]


@dataclass
class LevelCounts:
    """What one level did, in raw counts.

    Attributes:
        name: ``exit 4``, ``model`` and its folder's name, or ``target``.
        drafted: tokens handed to the level above, on the path it stands behind.
        accepted: of these, the ones the level above would have picked itself.
        passes: how often the level ran.
        layer_visits: (token, layer) pairs run on its account, lifting through lower layers
            included; a separate model's are of its own layers, which may be smaller.
        drafted_at: drafted tokens by their place in the window handed up.
        accepted_at: accepted ones likewise.
        passes_of: passes by the rows they ran: ``passes_of[n]`` of n.
        time_s: wall time of its passes, until the host goes on: what it does not wait for falls to
            the level above.
    """

    name: str
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    layer_visits: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    passes_of: list[int] = field(default_factory=list)
    time_s: float = 0.0

    def ran(self, rows: int, layer_visits: int, time_s: float) -> None:
        """Counts a pass."""
        self.passes += 1
        self.layer_visits += layer_visits
        self.time_s += time_s
        self.passes_of += [0] * (rows + 1 - len(self.passes_of))
        self.passes_of[rows] += 1

    def verdict(self, drafted: int, accepted: int) -> None:
        """Counts what the level above made of a draft: ``accepted`` of ``drafted`` tokens stood."""
        self.drafted += drafted
        self.accepted += accepted
        missing = drafted - len(self.drafted_at)
        self.drafted_at += [0] * missing
        self.accepted_at += [0] * missing
        for place in range(drafted):
            self.drafted_at[place] += 1
            self.accepted_at[place] += place < accepted


@dataclass
class _Level:
    """A level at work: what runs it, its part in the hierarchy, and the node it stands behind."""

    runner: Level
    window: int
    ranks: bool
    adaptive: bool
    counts: LevelCounts
    tip: int = 0


class Decoder:
    """Decodes one sequence with one hierarchy.

    Args:
        levels: what runs the hierarchy's levels, then the target; its cache knows ``tokens[:-1]``
            to all layers, not the last token.
        tokens: committed ids, the prompt's and at least one more; grown in place.
        hierarchy: the levels below the target.
        picker: how every level picks.
        stops: ids after which nothing is worth drafting.
        drafter: merges what databases and ranking exits propose; it has begun with ``tokens``.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        tokens: list[int],
        hierarchy: Hierarchy,
        picker: Picker,
        stops: Container[int] = (),
        drafter: Drafter | None = None,
    ) -> None:
        self.tokens = tokens
        self.picker = picker
        self.stops = stops
        self.drafter = drafter
        self.tree = Tree(tokens[-1], len(tokens) - 1)
        self.room = 0  # tokens still worth drafting in this round
        self.width = 1  # rows of the target's last pass
        self.asked = -1  # the node below which the databases were asked last
        parts = [(x.window, x.ranks, hierarchy.adapts(x), x.name) for x in hierarchy.levels]
        # Where looking at a pick means waiting for a device, the lowest level goes on without,
        # unless its picks decide how.
        self.hurries = drafter is None and levels[0].asynchronous
        self.levels = [
            _Level(runner, window, ranks, adaptive, LevelCounts(name))
            for runner, (window, ranks, adaptive, name) in zip(
                levels, [*parts, (1, False, False, "target")], strict=True
            )
        ]

    def round(self, limit: int) -> list[int]:
        """Returns the tokens one full pass commits, between 1 and ``limit``.

        Args:
            limit: how many more tokens are wanted, ≥ 1.
        """
        self.room = limit - 1  # the pass adds a token of the target's own
        # A separate model's context may be shorter than the target's: the text outgrows it.
        self.levels = [x for x in self.levels if len(self.tokens) <= x.runner.context]
        self.step(len(self.levels) - 1)
        return self.commit()

    def commit(self) -> list[int]:
        """Ends a round: what the target's step has left in the tree is the text's."""
        committed = self.tree.tokens[1:]
        self.tokens += committed
        if self.drafter:
            self.drafter.commit(committed, self.tree.origins[1:], self.width)
        self.tree = Tree(committed[-1], len(self.tokens) - 1)
        self.asked = -1
        for level in self.levels:
            level.tip = 0
        return committed

    def gather(self, k: int) -> None:
        """Level ``k`` grows the tree by its window, unless the text or the room ends before."""
        if k < 0:
            lowest = self.levels[0]
            ranks = lowest.ranks and lowest.adaptive
            self.ask_databases(lowest.counts.name if ranks else "")
            return
        level, tree = self.levels[k], self.tree
        goal = min(tree.nodes.depths[level.tip] + level.window, self.room)
        while (
            tree.nodes.depths[level.tip] < goal
            and tree.tokens[level.tip] not in self.stops
            and len(tree) < MAX_WIDTH
        ):
            if k == 0 and self.hurries:
                self.hurry()
                continue
            before, surplus = level.tip, self.step(k)
            newest = len(tree) - 1
            if surplus and level.tip == newest and tree.nodes.depths[newest] > goal:
                # One token more than asked for, and the only one that would have to be lifted
                # through every layer by itself.
                self.keep(range(newest))
            elif level.tip == before:
                break  # it was not worth running

    def ask_databases(self, level: str = "") -> None:
        """The databases grow the tree below the lowest level's tip, once for each.

        Args:
            level: the name of the level that may rank what they propose.
        """
        tip, tree = self.levels[0].tip, self.tree
        if self.drafter and tip != self.asked and tree.tokens[tip] not in self.stops:
            # Every level adds a pick of its own behind what it checks.
            space = MAX_WIDTH - len(tree) - sum(x.window for x in self.levels[:-1])
            self.drafter.grow(tree, tip, self.room, space, self.stops, level)
        self.asked = tip

    def step(self, k: int) -> bool:
        """Runs level ``k`` once, unless it adapts and is not worth its time.

        Returns whether there were drafts and all on the path below stood, so that its own pick is
        extra.
        """
        level, tree, drafter = self.levels[k], self.tree, self.drafter
        name = level.counts.name
        self.gather(k - 1)
        if level.adaptive and drafter and not drafter.pays(tree, level.tip, name):
            return False
        first = level.tip
        picks, ranked = self.run(level)
        path, token = follow(tree, picks, first, self.stops)
        end = path[-1] if path else first
        chance = ranked[1][end - first][0] if ranked else None
        if k > 0:
            handed = tree.nodes.path(self.levels[k - 1].tip)[tree.nodes.depths[first] + 1 :]
            stood = sum(1 for mine, theirs in zip(path, handed, strict=False) if mine == theirs)
            self.levels[k - 1].counts.verdict(len(handed), stood)
            surplus = 0 < len(handed) == stood
        else:
            surplus = bool(path)
        if not level.ranks or len(tree) == MAX_WIDTH:
            kept = tree.nodes.path(end)
            self.keep(kept)
            end, ranked = len(kept) - 1, None
        if k < len(self.levels) - 1 and tree.nodes.depths[end] == self.room:
            newest, surplus = end, False  # no room for a pick
        elif drafter and ranked:
            space = MAX_WIDTH - len(tree) - sum(x.window for x in self.levels[k:-1])
            newest = drafter.rank(tree, name, first, *ranked, end, self.room, space)
        else:
            value = drafter.picked(tree, end, token, name, chance) if drafter else 0.0
            newest = tree.append(token, end, name, value)
        for other in self.levels[: k + 1]:
            other.tip = newest
        return surplus

    def run(self, level: _Level) -> tuple[Sequence[int], Ranked | None]:
        """Returns the level's picks after its tip and all nodes behind it.

        With them, where the level adapts, its likeliest ids there and their chances.
        """
        started, prepared = time.perf_counter(), level.runner.model.narrow.prepared
        tree, first = self.tree, level.tip
        judges = level is self.levels[-1]
        adapts = level.adaptive and self.drafter is not None
        shows = judges and self.drafter is not None and self.drafter.wants_top
        most = SHOWN if shows else RANKS if level.ranks and adapts else 1
        found, positions, visits = self.pass_over(level, most)
        # The tree grows on the host, which looks once: at unread drafts and at these picks.
        ids = tree.read(found[0] if isinstance(found, tuple) else None)

        def prefix(row: int) -> list[int]:
            return self.text(first + row)

        picks: Sequence[int]
        columns = level.runner.head.vocab_ids
        ranked = None
        if isinstance(found, tuple):  # the head went from states to its best ids
            picks = [row[0] for row in ids]
            ranked = (ids, found[1].tolist()) if adapts else None  # sync: done by now
        elif judges:
            picks = self.picker.picks(found, positions, prefix, columns)
        elif adapts:
            ranked = self.picker.ranked(found, positions, prefix, columns, most)
            picks = [row[0] for row in ranked[0]]
        else:
            picks = self.picker.drafted(found, positions, prefix, columns)
        if judges:
            self.width = len(tree)
        if shows:
            if not isinstance(found, tuple):
                ids = top_k(found, min(SHOWN, found.shape[-1]))[1].tolist()  # sync: picks are here
            self.show(ids)
        usual = level.runner.model.narrow.prepared == prepared
        self.tally(level, len(tree) - first, visits, time.perf_counter() - started, usual)
        return picks, ranked

    def hurry(self) -> None:
        """The lowest level adds its pick behind its tip, unread where a device is left to hold it.

        The host waits once for a window's picks: when the level above has run over them.
        """
        started = time.perf_counter()
        level, tree = self.levels[0], self.tree
        assert level.tip == len(tree) - 1, "without databases and branches a tree is a chain"
        found, positions, visits = self.pass_over(level, 1)
        name = level.counts.name
        if isinstance(found, tuple):
            pick = found[0][0, 0].clone()  # what runs next may write there
            level.tip = tree.append_unread(pick, level.tip, name)
        else:
            columns = level.runner.head.vocab_ids
            # sync: these logits have rules to be picked by, and the host has the rules
            picks = self.picker.drafted(found, positions, lambda _: self.text(level.tip), columns)
            level.tip = tree.append(picks[0], level.tip, name)
        self.tally(level, 1, visits, time.perf_counter() - started, usual=False)

    def pass_over(self, level: _Level, most: int) -> tuple[Found, list[int], int]:
        """Runs a level over all it lacks.

        Args:
            level: one of the hierarchy's.
            most: how many of a row's best ids are of use.

        Returns:
            What it found after its tip and all nodes behind it, the positions of the tokens that
            these rows pick, and the layer visits it took.
        """
        root, tree, first = len(self.tokens) - 1, self.tree, level.tip
        positions = [root + depth + 1 for depth in tree.nodes.depths[first:]]
        asked = self.picker.asked(most, positions, exact=level is self.levels[-1])
        known = self.tokens + tree.known()[1:]
        end = root + len(tree)
        found, visits = level.runner.run(known, root + first, end, tree.nodes, asked)
        return found, positions, visits

    def tally(self, level: _Level, rows: int, visits: int, elapsed: float, usual: bool) -> None:
        """Counts a level's pass over so many nodes: the layer visits and the seconds it took.

        Args:
            level: whose pass it was.
            rows: nodes.
            visits: as in :class:`LevelCounts`.
            elapsed: seconds.
            usual: whether others like it will take as long.
        """
        level.counts.ran(rows, visits, elapsed)
        if not self.drafter or not usual:
            return
        if level is not self.levels[-1]:
            self.drafter.took(level.counts.name, rows, elapsed)
        elif visits == rows * level.runner.boundary:  # no exit has run a part of it
            self.drafter.took("", rows, elapsed)

    def text(self, node: int) -> list[int]:
        """Returns all ids down to a node of the tree."""
        self.tree.read()
        return self.tokens + self.tree.path(node)

    def show(self, top: Sequence[Sequence[int]]) -> None:
        """Lets the databases learn what the target holds likely, after rejected nodes too."""
        assert self.drafter, "somebody wants to know"
        tokens, parents = self.tree.tokens, self.tree.nodes.parents
        before = [self.tokens[-2], *(tokens[parent] for parent in parents[1:])]
        self.drafter.observe(tokens, np.array(top), before)  # (N, SHOWN)

    def keep(self, kept: Sequence[int]) -> None:
        """Rejects all nodes but ``kept``, in the tree and in what every level knows."""
        if len(kept) == len(self.tree):
            return
        for level in self.levels:
            while level.tip not in kept:  # only tips that are about to move can be rejected
                level.tip = self.tree.nodes.parents[level.tip]
            level.tip = kept.index(level.tip)
        self.asked = kept.index(self.asked) if self.asked in kept else -1
        root = len(self.tokens) - 1
        self.tree.keep(kept)
        for level in self.levels:
            level.runner.keep(root, kept)
