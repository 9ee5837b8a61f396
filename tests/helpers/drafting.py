"""Drafter made for tests: they know the answer and mix it with nonsense, so trees get deep."""

from __future__ import annotations

import random
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from hispec.drafter import SourceCounts
from hispec.generation import LM
from hispec.hierarchy import Hierarchy
from hispec.tree import Tree


class Oracle:
    """Stands in for ``Drafter``: grows random trees in which the answer occurs ever so often.

    Args:
        prompt: the text's beginning.
        answer: what plain decoding says after it.
        seed: of the draws.
        truth: chance of a node's next token to be the answer's.
    """

    wants_top = True

    def __init__(
        self, prompt: Sequence[int], answer: Sequence[int], seed: int, truth: float = 0.6
    ) -> None:
        self._draw = random.Random(seed)
        self._text = [*prompt, *answer]
        self._known = 0
        self._truth = truth
        self.counts = {"oracle": SourceCounts("oracle")}
        self.seen: list[tuple[list[int], Any, list[int]]] = []
        self.committed: list[list[int]] = []
        self.branched = 0

    def begin(self, tokens: Sequence[int]) -> None:
        self._known = len(tokens)

    def grow(
        self,
        tree: Tree,
        tip: int,
        depth: int,
        space: int,
        stops: Container[int],
        level: str = "",
    ) -> None:
        draw, first = self._draw, len(tree)
        below = [tip]
        for _ in range(draw.randrange(min(space, 12) + 1) if space > 0 else 0):
            parent = draw.choice(below[-3:]) if draw.random() < 0.8 else draw.choice(below)
            if tree.nodes.depths[parent] >= depth or tree.tokens[parent] in stops:
                continue
            place = self._known + tree.nodes.depths[parent]
            right = self._text[place] if place < len(self._text) else 0
            token = right if draw.random() < self._truth else draw.randrange(256)
            if tree.child(parent, token) is None:
                below.append(tree.append(token, parent, "oracle"))
        self.counts["oracle"].proposed += len(tree) - first
        self.branched += not tree.nodes.chain()

    def took(self, level: str, rows: int, seconds: float) -> None: ...

    def pays(self, tree: Tree, tip: int, level: str) -> bool:
        return self._draw.random() < 0.8

    def picked(self, tree: Tree, end: int, token: int, level: str, chance=None) -> float:
        return 0.5

    def rank(self, tree, level, first, ids, chances, end, depth, space) -> int:
        """The pick, and some of what the exit found likely elsewhere."""
        assert len(ids) == len(chances) == len(tree) - first
        newest = tree.append(ids[end - first][0], end, level, 0.5)
        for node, tokens in zip(range(first, newest), ids, strict=True):
            for token in tokens:
                room = tree.nodes.depths[node] < depth and space > 1
                if room and tree.child(node, token) is None and self._draw.random() < 0.3:
                    tree.append(token, node, level, 0.5)
                    space -= 1
        return newest

    def observe(self, tokens, top, before) -> None:
        self.seen.append((list(tokens), top, list(before)))

    def commit(self, tokens: Sequence[int], origins: Sequence[str], width: int) -> None:
        assert len(tokens) == len(origins)
        expected = self._text[self._known : self._known + len(tokens)]
        assert tokens == expected, (self._known, len(self._text))
        self._known += len(tokens)
        self.counts["oracle"].accepted += sum(origin == "oracle" for origin in origins)
        self.committed.append(list(tokens))

    def end(self) -> None:
        """Nothing is learnt."""


def ranking(hierarchy: Hierarchy, draw: random.Random) -> Hierarchy:
    """Returns the hierarchy with some of its levels ranking, some strict ones adapting."""
    levels = tuple(
        replace(level, ranks=draw.random() < 0.6, adaptive=draw.random() < 0.5)
        for level in hierarchy.levels
    )
    return replace(hierarchy, levels=levels)


@contextmanager
def drafting(lm: LM, databases: Oracle) -> Iterator[Oracle]:
    """Inside, every generation has these databases below its levels."""
    with mock.patch.object(lm, "drafter", lambda hierarchy, **options: databases):
        yield databases
