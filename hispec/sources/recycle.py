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

import ctypes
from collections.abc import Sequence
from ctypes import CDLL

import numpy as np

from hispec.sources.growth import Grower, grow
from hispec.sources.source import GRADES, Candidate
from hispec_kernels import cpu

WIDTH = 8  # successors kept of a token
PAIRS = 32_768  # rows of the table of pairs: 1.3 MB
WAYS = 4  # a pair is in one of so many rows, which it shares with others: the oldest goes
ROWS = 32  # tokens that are observed in one call
DEPTH = 6
_FACTOR = 0x9E37_79B9_7F4A_7C15  # 2⁶⁴ / golden ratio
_MASK = (1 << 64) - 1

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
        self._library: CDLL | None = None  # until it has the addresses of what is made here
        self._singles = np.full((self._vocab_size, WIDTH), -1, np.int32)
        self._pairs = np.full((PAIRS, WIDTH), -1, np.int32)
        self._owners = np.full(PAIRS, -1, np.int64)  # before · V + token, by row of _pairs
        self._turns = np.zeros(PAIRS // WAYS, np.uint8)  # the row of each WAYS that goes next
        library = cpu.in_use()
        if library:
            self._grower = Grower(library.grow_recycled, self.priors, DEPTH)
            tables = (self._singles, self._pairs, self._owners, self._turns)
            addresses = (table.ctypes.data for table in tables)
            self._compiled = cpu.Recycled(*addresses, self._vocab_size, len(self._turns))
            # Its arguments: the likeliest ids after a token, the token, and the one before.
            self._shown = np.empty((ROWS, WIDTH + 2), np.int64)
            self._address = self._shown.ctypes.data
        self._library = library

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
        if self._library and budget <= Grower.MOST:
            return self._grower.grow(self._compiled, suffix, budget)
        return grow(self._successors, suffix, budget, self.priors, DEPTH)

    def _successors(
        self, suffix: tuple[int, ...]
    ) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
        token = suffix[-1]
        last = (token,)
        if len(suffix) > 1:
            row = self._row(suffix[-2] * self._vocab_size + token)[1]
            if row >= 0:
                return _known(self._pairs[row]), _RANKS[_PAIR], last
        return _known(self._singles[token]), _RANKS[_SINGLE], last

    def _row(self, pair: int) -> tuple[int, int]:
        """Returns which WAYS rows a pair may be in, by number, and its row, −1 if there is none."""
        number = ((pair * _FACTOR & _MASK) >> 32) % len(self._turns)
        owners = self._owners[number * WAYS : (number + 1) * WAYS].tolist()
        return number, number * WAYS + owners.index(pair) if pair in owners else -1

    def observe(
        self, tokens: Sequence[int], top: np.ndarray, before: Sequence[int] | None = None
    ) -> None:
        """See :class:`Source`; columns past WIDTH are left out. The last of equal ids stays."""
        assert len(top) == len(tokens), "a row of ids for each token"
        if self._library:
            for first in range(0, len(tokens), ROWS):
                part = slice(first, first + ROWS)
                self._keep(tokens[part], top[part], None if before is None else before[part])
            return
        rows = top[:, :WIDTH]
        if rows.shape[1] < WIDTH:
            rows = np.pad(rows, ((0, 0), (0, WIDTH - rows.shape[1])), constant_values=-1)
        for token, row in zip(tokens, rows, strict=True):
            self._singles[token] = row
        if before is None:
            return
        for first, token, row in zip(before, tokens, rows, strict=True):
            pair = first * self._vocab_size + token
            number, at = self._row(pair)
            if at < 0:
                turn = int(self._turns[number])
                self._turns[number] = (turn + 1) % WAYS
                at = number * WAYS + turn
                self._owners[at] = pair
            self._pairs[at] = row

    def _keep(self, tokens: Sequence[int], top: np.ndarray, before: Sequence[int] | None) -> None:
        """:meth:`observe` for at most ROWS tokens, by the compiled library."""
        assert self._library, "there is one to do it"
        count, width = len(tokens), min(top.shape[1], WIDTH)
        self._shown[:count, :width] = top[:, :width]
        self._shown[:count, WIDTH] = tokens
        if before is not None:
            self._shown[:count, WIDTH + 1] = before
        self._library.keep_recycled(
            ctypes.byref(self._compiled), self._address, count, width, before is not None
        )

    def end(self) -> None:
        """What was observed stays."""


def _known(row: np.ndarray) -> list[int]:
    """A row without what fills it up."""
    ids = row.tolist()
    return ids[: ids.index(-1)] if ids[-1] < 0 else ids
