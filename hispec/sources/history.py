"""The history database: what the target itself has written before.

A model repeats itself across texts: its phrases, its lists, its ways to open and to close. The
n-grams of its earlier outputs, of outputs only and never of prompts, are counted and kept in one
file per model that every process on the machine shares (:mod:`hispec.sources.history_file`).

Lookups never touch the file. Its counts are held as arrays, 20 MB for a million n-grams, and the
texts that it has not counted yet in smaller ones beside them. All are brought up to date when a
text ends.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hispec.sources import back_off
from hispec.sources.fingerprint import DatabaseError
from hispec.sources.history_file import (
    PENDING,
    add_texts,
    generation,
    grown,
    read_counts,
    reading,
    waiting,
)
from hispec.sources.ngrams import LONGEST, Counts, Records, count, merge
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
#: A table of recent texts is at least so many times as large as the next.
_RATIO = 4


class _Recent:
    """Counts of texts that come one by one: a few tables, each much larger than the next.

    What a text adds is merged into tables of about its size only, so that a record is sorted a few
    times in all.

    Attributes:
        tables: together they count every text once.
    """

    def __init__(self) -> None:
        self._records: list[Records] = []
        self.tables: list[Counts] = []

    def add(self, texts: Sequence[Sequence[int]]) -> None:
        new, kept = count(texts), len(self._records)
        while kept and len(self._records[kept - 1].keys) < _RATIO * len(new.keys):
            kept -= 1
            new = merge([self._records[kept], new])
        table = Counts.of(new)  # an interrupt up to here leaves what was
        self._records[kept:], self.tables[kept:] = [new], [table]


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
        self._waiting = _Recent()  # the file's texts that are not in its counts
        self._seen = 0  # the last of these
        self._folded = False  # whether the counts hold more than the file's
        self._disown()

    def _disown(self) -> None:
        """Forgets the texts that are not in the file, nor in the counts."""
        self._own: list[list[int]] = []
        self._own_tokens = 0
        self._own_recent = _Recent()
        self._look()

    def _look(self) -> None:
        """Lookups find what is known now."""
        own = [self._counts, *self._waiting.tables, *self._own_recent.tables]
        # Of suffixes longer than the delivered counts know there is nothing to be found in them.
        self._known = LONGEST if any(map(len, own)) else self._longest
        base = [self._base] if self._base else []
        self._rows = back_off.BackOff([*base, *own], self._vocab_size, self.priors, DEPTH)

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
        return self._rows.propose((*self._last, *path)[-self._known :], budget)

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
        self._own_recent.add([output])
        if self._own_tokens > PENDING:
            self._fold()
        self._look()

    def reset(self) -> None:
        """See :class:`Source`. From the first reset on nothing is saved."""
        self.saves = False
        if self._folded:
            self._forget()
        elif self._own:
            self._disown()

    def _fold(self) -> None:
        """Moves texts that cannot be saved into the counts: they would take too much room."""
        self._counts = Counts.of(grown(self._counts.records(), count(self._own)))
        self._disown()
        self._folded = True

    def _refresh(self, path: Path) -> None:
        """Takes over what this process and others have written since."""
        with reading(path, self._tokenizer) as file:
            now = generation(file)
            if now != self._generation:
                self._counts = read_counts(file)
                self._waiting = _Recent()
                self._generation, self._seen = now, 0
            new = waiting(file, self._seen)
            if new:
                self._waiting.add([tokens for _, tokens in new])
                self._seen = new[-1][0]
        self._look()
