"""Hierarchical self-speculative decoding, one round at a time.

Levels 0 … K share one cache; K is the target, the levels below are its early exits. A round grows
one tree below the root, the last committed token, and ends with one pass of the target over it:

    gather(k)   have level k grow the tree by its window
    step(k)     let the levels below gather; run level k over all it has not checked; keep what it
                would have picked itself, and add its own next pick

With nothing below, a step is a plain decoding step. So plain decoding is ``step(0)`` of a hierarchy
with one level, LayerSkip is ``step(1)`` of one with two and HiSpec ``step(2)`` of one with three.

Invariants. The tree's tokens follow the committed ones; ``checked`` counts the leading nodes a
level stands behind and never rises from a level to the one above. A pass runs only the layers
between a level and the one below, from stored states: no layer runs twice for a token. Only the
target's step commits, and all it commits are its own picks: what the levels below do decides how
many tokens a round yields, never which.
"""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from hispec.hierarchy import Hierarchy
from hispec.model.cache import Cache
from hispec.model.exits import ExitHead
from hispec.model.llama import Llama
from hispec.sampling import Sampling
from hispec.tree import Tree, follow


@dataclass
class LevelCounts:
    """What one level did, in raw counts.

    Attributes:
        name: ``exit 4`` or ``target``.
        drafted: tokens handed to the level above.
        accepted: of these, the ones it would have picked itself.
        passes: how often the level ran.
        layer_visits: (token, layer) pairs run on its account, lifting through lower layers
            included.
        drafted_at: drafted tokens by their place in the window handed up.
        accepted_at: accepted ones likewise.
        time_s: wall time of its passes.
    """

    name: str
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    layer_visits: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    time_s: float = 0.0

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
    """A level at work: its boundary in the cache, its head, and the nodes it stands behind."""

    boundary: int
    head: ExitHead
    window: int
    counts: LevelCounts
    checked: int = 1


class Decoder:
    """Decodes one sequence with one hierarchy.

    Args:
        model: the target.
        cache: with a boundary at every exit and at L; knows ``tokens[:-1]`` to all layers, not the
            last token.
        tokens: committed ids, the prompt's and at least one more; grown in place.
        hierarchy: the levels below the target.
        heads: an exit head for each of them, then the target's.
        sampling: how every level picks.
        stops: ids after which nothing is worth drafting.
    """

    def __init__(
        self,
        model: Llama,
        cache: Cache,
        tokens: list[int],
        hierarchy: Hierarchy,
        heads: Sequence[ExitHead],
        sampling: Sampling,
        stops: Container[int] = (),
    ) -> None:
        self.model = model
        self.cache = cache
        self.tokens = tokens
        self.sampling = sampling
        self.stops = stops
        self.tree = Tree(tokens[-1])
        self.room = 0  # tokens still worth drafting in this round
        names = [f"exit {e}" for e in hierarchy.exit_layers] + ["target"]
        boundaries = [*hierarchy.exit_layers, model.config.num_layers]
        windows = [level.window for level in hierarchy.levels] + [1]
        self.levels = [
            _Level(boundary, head, window, LevelCounts(name))
            for boundary, head, window, name in zip(boundaries, heads, windows, names, strict=True)
        ]

    def round(self, limit: int) -> list[int]:
        """Returns the tokens one full pass commits, between 1 and ``limit``.

        Args:
            limit: how many more tokens are wanted, ≥ 1.
        """
        self.room = limit - 1  # the pass adds a token of the target's own
        self.step(len(self.levels) - 1)
        committed = self.tree.tokens[1:]
        self.tokens += committed
        self.tree = Tree(committed[-1])
        for level in self.levels:
            level.checked = 1
        return committed

    def gather(self, k: int) -> None:
        """Level ``k`` grows the tree by its window, unless the text or the room ends before."""
        goal = min(len(self.tree) + self.levels[k].window, 1 + self.room)
        while len(self.tree) < goal and self.tree.tokens[-1] not in self.stops:
            surplus = self.step(k)
            if surplus and len(self.tree) > goal:
                # One token more than asked for, and the only one that would have to be lifted
                # through every layer by itself.
                self.keep(len(self.tree) - 1, k)

    def step(self, k: int) -> bool:
        """Runs level ``k`` once.

        Returns whether there were drafts and all stood, so that its own pick is extra.
        """
        if k > 0:
            self.gather(k - 1)
        level, tree = self.levels[k], self.tree
        picks = self.run(level)
        path, token = follow(tree, picks, level.checked - 1)
        drafted, accepted = len(tree) - level.checked, len(path)
        if k > 0:
            self.levels[k - 1].counts.verdict(drafted, accepted)
        if accepted < drafted:
            self.keep(level.checked + accepted, k)
        tree.append(token)
        for other in self.levels[: k + 1]:
            other.checked = len(tree)
        return accepted == drafted > 0

    def run(self, level: _Level) -> list[int]:
        """Returns the level's picks after its last checked node and all nodes behind it."""
        started = time.perf_counter()
        root = len(self.tokens) - 1
        first, end = root + level.checked - 1, root + len(self.tree)
        known = self.tokens + self.tree.tokens[1:]
        visits = self.model.advance(self.cache, known, end, level.boundary)
        logits = level.head.logits(self.cache, first, root)  # (T, V)
        picks = self.sampling.pick(logits, first + 1, level.head.vocab_ids)
        level.counts.passes += 1
        level.counts.layer_visits += visits
        level.counts.time_s += time.perf_counter() - started
        return picks

    def keep(self, nodes: int, k: int) -> None:
        """Rejects all nodes from ``nodes`` on, in the tree, the cache and the heads."""
        self.tree.truncate(nodes)
        length = len(self.tokens) - 1 + nodes
        self.cache.truncate(length)
        for level in self.levels:
            level.head.truncate(length)
        for other in self.levels[: k + 1]:
            other.checked = min(other.checked, nodes)
