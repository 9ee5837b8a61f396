"""The history database: what the target itself has written before.

A model repeats itself across texts: its phrases, its lists, its ways to open and to close. The
n-grams of its earlier outputs, of outputs only and never of prompts, are counted and kept in one
file per model that every process on the machine shares (:mod:`hispec.sources.history_file`).

Lookups never touch the file. Its counts are held as arrays, 20 MB for a million n-grams, and the
texts that it has not counted yet in a dictionary above them. Both are brought up to date when a
text ends.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hispec.sources import back_off
from hispec.sources.fingerprint import DatabaseError
from hispec.sources.growth import grow
from hispec.sources.history_file import (
    PENDING,
    add_texts,
    generation,
    grown,
    read_counts,
    reading,
    waiting,
)
from hispec.sources.ngrams import LONGEST, Counts, Records, count, keys_of
from hispec.sources.source import Candidate
from hispec.sources.store import Store

DEPTH = 8
# How often each kind stood on held-out answers of SmolLM2-135M (scripts/replay_sources.py).
_PRIORS = (
    (0.01, 0.03, 0.05, 0.09, 0.10, 0.18, 0.21, 0.22, 0.22, 0.37, 0.40, 0.60),
    (0.01, 0.03, 0.05, 0.07, 0.11, 0.16, 0.31, 0.34, 0.27, 0.42, 0.68, 0.76),
    (0.01, 0.03, 0.05, 0.08, 0.13, 0.21, 0.29, 0.36, 0.33, 0.58, 0.66, 0.90),
    (0.01, 0.03, 0.05, 0.07, 0.12, 0.17, 0.32, 0.35, 0.42, 0.55, 0.67, 0.92),
    (0.01, 0.02, 0.06, 0.12, 0.14, 0.23, 0.37, 0.48, 0.53, 0.70, 0.81, 0.97),
)
_NOTHING: back_off.Row = ([], [], 0, 0)


class History:
    """Drafts from earlier outputs and learns from each that ends.

    Args:
        path: the file, created when the first text ends; None keeps nothing.
        tokenizer: fingerprint of the tokenizer.
        vocab_size: ids past it, which a damaged file may hold, are never proposed.
        base: answers counted beforehand; they lie under the file's and are never changed.

    Attributes:
        name: ``history``.
        priors: see :class:`hispec.sources.source.Source`.
        saves: whether finished texts are written to the file.

    Raises:
        DatabaseError: the file is no history, is damaged, or belongs to another tokenizer.
    """

    name = "history"

    def __init__(
        self, path: Path | None, tokenizer: str, vocab_size: int, base: Store | None = None
    ) -> None:
        self.priors = back_off.priors(_PRIORS)
        self.path = path
        self.saves = path is not None
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._base = base.counts if base else None
        self._longest = base.fact("longest", LONGEST) if base else LONGEST  # key that base knows
        self._last: tuple[int, ...] = ()
        self._output: list[int] = []
        self._forget()

    def _forget(self) -> None:
        self._opened = False
        self._counts = Counts.of(Records.none())
        self._generation = -1  # of the counts
        self._recent: dict[int, dict[int, int]] = {}  # key → successor → count
        self._seen = 0  # the last of the file's waiting texts in there
        self._own: list[list[int]] = []  # texts in there that are not in the file
        self._own_tokens = 0
        self._folded = False  # whether the counts hold more than the file's

    def begin(self, tokens: Sequence[int]) -> None:
        """See :class:`Source`. The file is read before the first text."""
        if not self._opened:
            self._opened = True
            if self.path is not None and self.path.exists():
                self._refresh(self.path)
        self._last = tuple(tokens[-LONGEST:])
        self._output = []

    def commit(self, tokens: Sequence[int]) -> None:
        """See :class:`Source`."""
        self._last = (*self._last, *tokens)[-LONGEST:]
        self._output.extend(map(int, tokens))

    def propose(self, path: Sequence[int], budget: int) -> list[Candidate]:
        """See :class:`Source`: the likeliest nodes by the counts after the longest known suffix."""
        if budget <= 0:
            return []
        longest = LONGEST if self._recent or len(self._counts) else self._longest
        suffix = (*self._last, *path)[-longest:]
        return grow(self._successors, suffix, budget, self.priors, DEPTH)

    def observe(
        self, tokens: Sequence[int], top: np.ndarray, before: Sequence[int] | None = None
    ) -> None:
        """Only what was written counts."""

    def end(self) -> None:
        """See :class:`Source`: the output is learned, and saved where that is possible."""
        output, self._output = self._output, []
        if len(output) < 2:
            return
        if self.saves and self.path is not None:
            try:
                add_texts(self.path, self._tokenizer, [output])
                self._refresh(self.path)
                return
            except DatabaseError as error:
                self.saves = False
                print(f"Outputs are not kept beyond this process: {error}", file=sys.stderr)
        self._own.append(output)
        self._own_tokens += len(output)
        self._learn(output)
        if self._own_tokens > PENDING:
            self._fold()

    def reset(self) -> None:
        """See :class:`Source`. From the first reset on nothing is saved."""
        self.saves = False
        if self._folded:
            self._forget()
        for output in self._own:
            self._learn(output, -1)
        self._own, self._own_tokens = [], 0

    def _successors(self, suffix: tuple[int, ...]) -> back_off.Found:
        found = back_off.successors(suffix, self._row)
        if found[0] and max(found[0]) >= self._vocab_size:
            return [], [], ()
        return found

    def _row(self, key: int, most: int) -> back_off.Row | None:
        found = self._counts.row(key, most) if len(self._counts) else None
        if self._base is not None:
            found = _sum(found, self._base.row(key, most), most)
        new = self._recent.get(key)
        if new is None:
            return found
        recent = (list(new), list(new.values()), sum(new.values()), len(new))
        return _sum(found or _NOTHING, recent, most)

    def _learn(self, output: Sequence[int], times: int = 1) -> None:
        for at in range(1, len(output)):
            token = output[at]
            for key in keys_of(output[max(at - LONGEST, 0) : at]):
                row = self._recent.setdefault(key, {})
                row[token] = row.get(token, 0) + times
                if not row[token]:
                    del row[token]
                    if not row:
                        del self._recent[key]

    def _fold(self) -> None:
        """Moves texts that cannot be saved out of the dictionary, which takes too much room."""
        self._counts = Counts.of(grown(self._counts.records(), count(self._own)))
        for output in self._own:
            self._learn(output, -1)
        self._own, self._own_tokens, self._folded = [], 0, True

    def _refresh(self, path: Path) -> None:
        """Takes over what this process and others have written since."""
        with reading(path, self._tokenizer) as file:
            now = generation(file)
            if now != self._generation:
                self._counts = read_counts(file)
                self._recent = {}
                self._generation, self._seen = now, 0
                for output in self._own:
                    self._learn(output)
            for number, tokens in waiting(file, self._seen):
                self._learn(tokens)
                self._seen = number


def _sum(one: back_off.Row | None, other: back_off.Row | None, most: int) -> back_off.Row | None:
    """One row of two; how many different successors it has is known from below only."""
    if one is None or other is None:
        return one or other
    both = dict(zip(one[0], one[1], strict=True))
    for token, times in zip(other[0], other[1], strict=True):
        both[token] = both.get(token, 0) + times
    ranked = sorted(both.items(), key=_falling)[:most]
    tokens, counts = [token for token, _ in ranked], [times for _, times in ranked]
    return tokens, counts, one[2] + other[2], max(one[3], other[3], len(both))


def _falling(pair: tuple[int, int]) -> tuple[int, int]:
    return -pair[1], pair[0]
