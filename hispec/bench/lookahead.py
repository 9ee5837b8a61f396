"""Lookahead decoding (Fu et al., 2024, arXiv 2402.02057) on our engine.

One pass does two things at once. The *lookahead branch* keeps a window of guesses, N − 1 rows of W
columns, each row one Jacobi step younger than the one above; the model's picks after the youngest
row are the next row, and every column read downwards is an N-gram for the pool. The *verification
branch* checks up to G N-grams of the pool that start with the last committed token.

    row 0   root  a₁  a₂  a₃      a chain; its first column is the last committed token
    row 1   b₀    b₁  b₂  b₃      below their column: bⱼ sees the root, a₁ … aⱼ and nothing else
    row 2   c₀    c₁  c₂  c₃      cⱼ sees the same and bⱼ

That is the paper's two-dimensional attention pattern, and it is a tree: row 0 is a path, every
column hangs below its head. So both branches are nodes of one draft tree, and the walk that
verifies is the engine's. Two things differ from the paper, both to the method's advantage: equal
prefixes share a node, and guesses of the window that happen to be right are accepted as well.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Container, Sequence
from typing import Any

from hispec.bench.recorder import Recorder
from hispec.drafter import SourceCounts
from hispec.engine import _Level
from hispec.tree import Tree

#: The paper takes W = G = 15, N = 5 for 7B models on an A100, 120 rows a pass. Ours has 32, of
#: which the two branches take (W + G)(N − 1) at most: with W = G, all of them at N = 5.
WINDOW, NGRAM, GUESSES = 4, 5, 4
NOTE = (
    f"W={WINDOW}, N={NGRAM}, G={GUESSES}: the paper's N and W=G, as many as a pass of 32 rows "
    f"holds; n-grams of the prompt in the pool"
)


class Pool:
    """N-grams by their first token; the most recent ``guesses`` of each."""

    def __init__(self, guesses: int) -> None:
        self._guesses = guesses
        self._found: dict[int, OrderedDict[tuple[int, ...], None]] = {}

    def add(self, ngram: Sequence[int]) -> None:
        """Makes an N-gram the most recent of its first token."""
        found = self._found.setdefault(ngram[0], OrderedDict())
        rest = tuple(ngram[1:])
        found.pop(rest, None)
        found[rest] = None
        if len(found) > self._guesses:
            found.popitem(last=False)

    def after(self, token: int) -> list[tuple[int, ...]]:
        """Returns what followed ``token``, the most recent first."""
        return list(reversed(self._found.get(token, ())))


class Lookahead:
    """What drafts for the engine in a :class:`~hispec.drafter.Drafter`'s place.

    Args:
        tokens: the prompt and its first answer token: fill the pool and the first row.
        window: W, columns.
        ngram: N, tokens of an N-gram, at least 3.
        guesses: G, N-grams verified a pass.
    """

    wants_top = False

    def __init__(
        self,
        tokens: Sequence[int],
        window: int = WINDOW,
        ngram: int = NGRAM,
        guesses: int = GUESSES,
    ) -> None:
        self.counts = {name: SourceCounts(name) for name in ("pool", "window")}
        self._ngram = ngram
        self._pool = Pool(guesses)
        for start in range(len(tokens) - ngram + 1):
            self._pool.add(tokens[start : start + ngram])
        draw = random.Random(0)  # the paper's random guesses; the same for every run
        # Filling the other rows takes N − 2 passes, and each moves the window on by a column.
        guessed = [draw.choice(tokens) for _ in range(window + ngram - 3)]
        self._rows = [[tokens[-1], *guessed]]
        self._youngest: list[int] = []  # nodes of the last row, if the tree has them

    def grow(
        self,
        tree: Tree,
        tip: int,
        depth: int,
        space: int,
        stops: Container[int],
        level: str = "",
    ) -> None:
        """Adds both branches below the root."""
        started = time.perf_counter()
        last = len(tree) + space
        for rest in self._pool.after(tree.tokens[0]):
            node = tip
            for token in rest[:depth]:
                node = self._graft(tree, node, token, "pool", last)
                if node < 0 or token in stops:
                    break
        self.counts["pool"].time_s += time.perf_counter() - started
        self._youngest = []
        columns = len(self._rows[0])
        # Closer to the end than the window reaches, what it finds would come too late.
        if depth >= columns - 1 + len(self._rows) - 1:
            self._youngest = self._branch(tree, last)
        self.counts["window"].time_s += time.perf_counter() - started

    def _branch(self, tree: Tree, last: int) -> list[int]:
        """Adds the lookahead branch; returns the nodes of its youngest row, none if cut short."""
        heads = [0]
        for token in self._rows[0][1:]:
            heads.append(self._graft(tree, heads[-1], token, "window", last))
        nodes = heads
        for row in self._rows[1:]:
            nodes = [
                self._graft(tree, node, token, "window", last)
                for node, token in zip(nodes, row, strict=True)
            ]
        return nodes if min(nodes) >= 0 else []

    def _graft(self, tree: Tree, parent: int, token: int, origin: str, last: int) -> int:
        """Returns the child of a node, new or not; −1 where the tree is full."""
        if parent < 0:
            return -1
        node = tree.child(parent, token)
        if node is None:
            if len(tree) >= last:
                return -1
            node = tree.append(token, parent, origin)
            self.counts[origin].proposed += 1
        return node

    def saw(self, picks: Sequence[int]) -> None:
        """Takes the target's picks after every node: those after the youngest row are the next."""
        if not self._youngest:
            return
        started = time.perf_counter()
        newest = [picks[node] for node in self._youngest]
        rows = [*self._rows, newest]
        if len(rows) == self._ngram:
            for column in zip(*rows, strict=True):
                self._pool.add(column)
            self._rows = rows[1:]
        else:
            self._rows = [row[1:] for row in rows]
        self._youngest = []
        self.counts["window"].time_s += time.perf_counter() - started

    def took(self, level: str, rows: int, seconds: float) -> None:
        """The window is what it is, whatever passes cost."""

    def picked(
        self, tree: Tree, end: int, token: int, level: str, chance: float | None = None
    ) -> float:
        """The target's pick needs no value: nothing is ranked."""
        return 0.0

    def commit(self, tokens: Sequence[int], origins: Sequence[str], width: int) -> None:
        """Ends a round: the window's first column is the last committed token."""
        self._rows[0][0] = tokens[-1]
        for origin in origins:
            if origin in self.counts:
                self.counts[origin].accepted += 1


class LookaheadDecoder(Recorder):
    """The engine, its target's picks shown to the window."""

    def run(self, level: _Level) -> Any:
        """See ``Decoder.run``."""
        picks, ranked = super().run(level)
        if isinstance(self.drafter, Lookahead):
            self.drafter.saw(picks)
        return picks, ranked
