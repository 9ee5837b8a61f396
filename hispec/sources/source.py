"""What a draft database is asked and what it answers.

A source proposes continuations of the text from what it has seen before, be it the text itself
(``context``), earlier outputs (``history``), a corpus (``corpus``) or the logits of past passes
(``recycle``). It never runs a model, and nothing it says can change the output: a wrong proposal
costs time, no more. So a source doesn't say how likely a token is. It says what *kind* of guess it
is, as one of 64 grades, and whoever merges the sources counts how often each kind turned out
right.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

GRADES = 64


class Candidate(NamedTuple):
    """One continuation.

    Attributes:
        tokens: ids, the next one first.
        grades: for each, the kind of guess it is, in [0, GRADES).
    """

    tokens: Sequence[int]
    grades: Sequence[int]


class Source(Protocol):
    """A database that drafts.

    Attributes:
        name: ``context``, ``history``, ``corpus`` or ``recycle``.
        priors: (GRADES,) the chance that a token of this grade is right, given that what it follows
            was, to start from before anything was counted.
    """

    name: str

    @property
    def priors(self) -> Sequence[float]:
        """The chances of the grades; see above."""
        ...

    def begin(self, tokens: Sequence[int]) -> None:
        """A new text starts as ``tokens``, the whole prompt."""
        ...

    def commit(self, tokens: Sequence[int]) -> None:
        """The text grew by ``tokens``."""
        ...

    def propose(self, path: Sequence[int], budget: int) -> list[Candidate]:
        """Returns what may come after the text and then ``path``, best first.

        Candidates may share beginnings: they are the paths of a tree of at most about ``budget``
        nodes. A budget of 0 turns the source off.

        Args:
            path: drafted ids behind the text, not committed.
            budget: how many distinct tokens are wanted.
        """
        ...

    def observe(
        self, tokens: Sequence[int], top: np.ndarray, before: Sequence[int] | None = None
    ) -> None:
        """A full pass ran over ``tokens``, rejected ones included.

        Args:
            tokens: T ids.
            top: (T, k) the most likely ids after each, best first.
            before: T ids, the one before each where it is known.
        """
        ...

    def end(self) -> None:
        """The text is over."""
        ...

    def reset(self) -> None:
        """Forgets what was learned since the source was made, so that the next text finds what the
        first one found: benchmarks ask for that.
        """
        ...


def cut(candidates: Sequence[Candidate], priors: Sequence[float], budget: int) -> list[Candidate]:
    """Returns the ``budget`` likeliest tokens of some candidates, as shorter candidates.

    A token's chance is the product of its grades' down to it. Beginnings that candidates share are
    counted for each of them.
    """
    heap = [(-priors[c.grades[0]], i) for i, c in enumerate(candidates) if c.tokens]
    heapq.heapify(heap)
    kept = [0] * len(candidates)
    order: list[int] = []
    while heap and budget > 0:
        chance, i = heap[0]
        budget -= 1
        grades = candidates[i].grades
        at = kept[i] = kept[i] + 1
        if at == 1:
            order.append(i)
        if at < len(grades):
            heapq.heapreplace(heap, (chance * priors[grades[at]], i))
        else:
            heapq.heappop(heap)
    return [
        Candidate(candidates[i].tokens[: kept[i]], candidates[i].grades[: kept[i]]) for i in order
    ]
