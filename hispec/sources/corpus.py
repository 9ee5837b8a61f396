"""The corpus database: what usually follows in a language, a field, a code base.

Built once from any text (``hispec ngrams build``, :mod:`hispec.sources.build`) and mapped, not
loaded. Where REST keeps the corpus and a suffix array to find in it, this keeps the counts of what
followed every suffix of up to five tokens: the long tail that occurred once is left out, and a
lookup touches a page or two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hispec.sources import back_off
from hispec.sources.ngrams import LONGEST
from hispec.sources.source import Candidate
from hispec.sources.store import Store

DEPTH = 8
# How often each kind stood on held-out answers of SmolLM2-135M (scripts/replay_sources.py).
_PRIORS = (
    (0.01, 0.03, 0.03, 0.06, 0.07, 0.13, 0.15, 0.15, 0.19, 0.30, 0.30, 0.30),
    (0.01, 0.03, 0.05, 0.09, 0.13, 0.18, 0.28, 0.28, 0.36, 0.40, 0.56, 0.60),
    (0.01, 0.03, 0.03, 0.07, 0.08, 0.14, 0.28, 0.31, 0.40, 0.42, 0.62, 0.70),
    (0.01, 0.02, 0.06, 0.07, 0.08, 0.12, 0.28, 0.28, 0.30, 0.50, 0.60, 0.62),
    (0.01, 0.01, 0.03, 0.06, 0.06, 0.10, 0.12, 0.30, 0.40, 0.50, 0.50, 0.50),
)


class Corpus:
    """Drafts from a store.

    Args:
        store: the counts.
        vocab_size: ids past it, which a damaged file may hold, are never proposed.

    Attributes:
        name: ``corpus``.
        priors: see :class:`hispec.sources.source.Source`.
    """

    name = "corpus"

    def __init__(self, store: Store, vocab_size: int) -> None:
        self.store = store
        self.priors = back_off.priors(_PRIORS)
        self._rows = back_off.BackOff([store.counts], vocab_size, self.priors, DEPTH)
        self._last: tuple[int, ...] = ()

    def begin(self, tokens: Sequence[int]) -> None:
        """See :class:`Source`."""
        self._last = tuple(tokens[-LONGEST:])

    def commit(self, tokens: Sequence[int]) -> None:
        """See :class:`Source`."""
        self._last = (*self._last, *tokens)[-LONGEST:]

    def propose(self, path: Sequence[int], budget: int) -> list[Candidate]:
        """See :class:`Source`: the likeliest nodes by the counts after the longest known suffix."""
        if budget <= 0:
            return []
        return self._rows.propose((*self._last, *path)[-LONGEST:], budget)

    def observe(
        self, tokens: Sequence[int], top: np.ndarray, before: Sequence[int] | None = None
    ) -> None:
        """A corpus is read only."""

    def end(self) -> None:
        """A corpus is read only."""

    def reset(self) -> None:
        """A corpus is read only."""
