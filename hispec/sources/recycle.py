"""Recycled logits: what the target itself held likely after a token, the last times it saw it.

Every full pass computes logits at every node of its tree, rejected ones included, and uses one pick
of each. Their runners-up are kept here: a table from a token to the ids that were likeliest after
it when it was last seen (Token Recycling, arXiv 2408.08696), and a smaller one from the last *two*
tokens, which knows less often and better. The newest row replaces the old one. The next tree is
grown from the tables, so the flushed end of a rejected tree comes back by itself where it still
fits.

Both outlive a text: they know the model, not the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hispec.sources.growth import grow
from hispec.sources.source import GRADES, Candidate

WIDTH = 8  # successors kept of a token
PAIRS = 32_768  # rows of the table of pairs: 1 MB, and about 4 MB for finding them
DEPTH = 6

# Grades: the table, times the rank in it.
_PAIR, _SINGLE = range(2)
_RANKS = [tuple(range(kind * WIDTH, (kind + 1) * WIDTH)) for kind in range(2)]
# How often each kind stood on held-out answers of SmolLM2-135M (scripts/replay_sources.py).
_PRIORS = {
    _PAIR: (0.69, 0.10, 0.04, 0.02, 0.01, 0.01, 0.01, 0.01),
    _SINGLE: (0.28, 0.11, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01),
}


class Recycle:
    """Drafts from the logits of past passes.

    Args:
        vocab_size: V.

    Attributes:
        name: ``recycle``.
        priors: see :class:`hispec.sources.source.Source`.
    """

    name = "recycle"

    def __init__(self, vocab_size: int) -> None:
        self.priors = [0.02] * GRADES
        for kind, chances in _PRIORS.items():
            self.priors[kind * WIDTH : (kind + 1) * WIDTH] = chances
        self._vocab_size = vocab_size
        self._last: tuple[int, ...] = ()  # at most two ids
        self.reset()

    def reset(self) -> None:
        """Forgets every observation."""
        self._singles = np.full((self._vocab_size, WIDTH), -1, np.int32)
        self._pairs = np.full((PAIRS, WIDTH), -1, np.int32)
        self._slots: dict[int, int] = {}  # before · V + token → row of _pairs
        self._owners = [-1] * PAIRS  # and back
        self._next_slot = 0

    def begin(self, tokens: Sequence[int]) -> None:
        """See :class:`Source`."""
        self._last = tuple(tokens[-2:])

    def commit(self, tokens: Sequence[int]) -> None:
        """See :class:`Source`."""
        self._last = (*self._last, *tokens)[-2:]

    def propose(self, path: Sequence[int], budget: int) -> list[Candidate]:
        """See :class:`Source`: the likeliest nodes below the last token."""
        suffix = (*self._last, *path)[-2:]
        if budget <= 0 or not suffix:
            return []
        return grow(self._successors, suffix, budget, self.priors, DEPTH)

    def _successors(
        self, suffix: tuple[int, ...]
    ) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
        token = suffix[-1]
        last = (token,)
        if len(suffix) > 1:
            slot = self._slots.get(suffix[-2] * self._vocab_size + token)
            if slot is not None:
                return _known(self._pairs[slot]), _RANKS[_PAIR], last
        return _known(self._singles[token]), _RANKS[_SINGLE], last

    def observe(
        self, tokens: Sequence[int], top: np.ndarray, before: Sequence[int] | None = None
    ) -> None:
        """See :class:`Source`; columns past WIDTH are not looked at."""
        rows = top[:, :WIDTH]
        if rows.shape[1] < WIDTH:
            rows = np.pad(rows, ((0, 0), (0, WIDTH - rows.shape[1])), constant_values=-1)
        self._singles[np.asarray(tokens)] = rows  # of equal tokens the last one stays
        if before is None:
            return
        slots = []
        for first, token in zip(before, tokens, strict=True):
            key = first * self._vocab_size + token
            slot = self._slots.get(key)
            if slot is None:
                slot = self._next_slot
                self._next_slot = (slot + 1) % PAIRS
                self._slots.pop(self._owners[slot], None)
                self._slots[key] = slot
                self._owners[slot] = key
            slots.append(slot)
        self._pairs[slots] = rows

    def end(self) -> None:
        """What was observed stays."""


def _known(row: np.ndarray) -> list[int]:
    """A row without what fills it up."""
    ids = row.tolist()
    return ids[: ids.index(-1)] if ids[-1] < 0 else ids
