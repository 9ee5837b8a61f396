"""Counts of what followed the last 1, 2, … tokens, as sorted arrays.

A row is known by its *key*, a 64-bit hash of the tokens before, so that keys of every length lie in
one sorted array: looking one up is a bucket by its first bits and a bisection of what is left. The
hash runs from the newest token backwards, so the keys of all lengths of one suffix are the steps of
one computation. Two suffixes share a key with a chance of 2⁻⁶⁴ a pair, and then a draft is wrong.

    records   key, successor, count        sorted by key, then successor; what is added and merged
    Counts    key → successors, counts     the likeliest first; what is asked

A row keeps its likeliest successors only. What it dropped stays in its total, so that shares remain
right, and in its records under the successor ``REST``, so that rows can be merged again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LONGEST = 5  # tokens in a key
WIDTH = 8  # successors kept of a row
REST = 0xFFFF_FFFF  # stands for the successors that were dropped
_FACTOR = 0x9E37_79B9_7F4A_7C15  # 2⁶⁴ / golden ratio
_MASK = (1 << 64) - 1
_BUCKET_ROWS = 8  # rows that a bucket holds on average
_MAX_BITS = 24


def keys_of(suffix: Sequence[int]) -> list[int]:
    """Returns the keys of the last 1, 2, … ``len(suffix)`` tokens."""
    keys = []
    key = 0
    for token in reversed(suffix):
        key = ((key ^ (token + 1)) * _FACTOR) & _MASK
        key ^= key >> 32
        keys.append(key)
    return keys


class Records(NamedTuple):
    """(key, successor, count), sorted by key and successor, none twice.

    Attributes:
        keys: (R,) uint64.
        tokens: (R,) uint32.
        counts: (R,) uint32.
    """

    keys: NDArray[np.uint64]
    tokens: NDArray[np.uint32]
    counts: NDArray[np.uint32]

    @staticmethod
    def none() -> Records:
        """No records."""
        return Records(np.empty(0, np.uint64), np.empty(0, np.uint32), np.empty(0, np.uint32))


def count(texts: Iterable[Sequence[int]], longest: int = LONGEST) -> Records:
    """Returns how often each token followed each of the 1 … ``longest`` tokens before it.

    Args:
        texts: ids; nothing is counted across two texts.
        longest: tokens in the longest key.
    """
    return merge(list(count_each(texts, longest)))


def count_each(texts: Iterable[Sequence[int]], longest: int) -> Iterator[Records]:
    """Yields :func:`count` for the keys of 1, 2, … tokens."""
    arrays = [np.asarray(text, np.uint64) for text in texts]
    if not arrays:
        return
    ids = np.concatenate(arrays)
    before = np.concatenate([np.arange(len(a)) for a in arrays])  # tokens of the same text
    key = np.zeros(len(ids), np.uint64)  # of the tokens before each
    for length in range(1, longest + 1):
        key[length:] ^= ids[: max(len(ids) - length, 0)] + np.uint64(1)
        key *= np.uint64(_FACTOR)
        key ^= key >> np.uint64(32)
        whole = np.flatnonzero(before >= length)
        yield _summed(key[whole], ids[whole].astype(np.uint32), None)


def merge(parts: Sequence[Records]) -> Records:
    """Returns the records of all parts, counts of equal ones added."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Records.none()
    return _summed(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _summed(
    keys: NDArray[np.uint64], tokens: NDArray[np.uint32], counts: NDArray[np.uint32] | None
) -> Records:
    """Sorted, equal (key, token) once; no counts mean 1 each.

    Two sorts of 64-bit integers, which numpy vectorises, instead of one by two columns: keys become
    their rank, which leaves half of the word for the token.
    """
    if not len(keys):
        return Records.none()
    order = np.argsort(keys)
    keys = keys[order]
    first = np.empty(len(keys), bool)
    first[0] = True
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    packed = (np.cumsum(first, dtype=np.uint64) - np.uint64(1)) << np.uint64(32)
    packed |= tokens[order]
    distinct = keys[first]
    if counts is None:
        packed.sort()
        sums = None
    else:
        again = np.argsort(packed)
        packed = packed[again]
        sums = counts[order][again].astype(np.uint64)
    new = np.empty(len(packed), bool)
    new[0] = True
    np.not_equal(packed[1:], packed[:-1], out=new[1:])
    at = np.flatnonzero(new)
    if sums is None:
        total = np.diff(at, append=len(packed))
    else:
        total = np.minimum(np.add.reduceat(sums, at), _MAX_COUNT)
    packed = packed[at]
    return Records(
        distinct[packed >> np.uint64(32)],
        (packed & np.uint64(REST)).astype(np.uint32),
        total.astype(np.uint32),
    )


_MAX_COUNT = np.uint64(0xFFFF_FFFF)


class Counts:
    """Rows of successors by key; the columns may be mapped from a file.

    Args:
        keys: (K,) uint64, ascending.
        starts: (K + 1,) uint64: row i is ``tokens[starts[i] : starts[i + 1]]``.
        totals: (K,) uint32: how often the key was followed by anything.
        tokens: (M,) uint32 successors, in each row the most frequent first, then the lowest id.
        counts: (M,) uint32.
        buckets: (2^b + 1,) uint64: the first row whose key has at least these first b bits.

    Attributes:
        shift: 64 − b.
    """

    def __init__(self, *columns: NDArray) -> None:
        self.keys, self.starts, self.totals, self.tokens, self.counts, self.buckets = columns
        # Items of a memoryview cost a third of a numpy scalar, and no copy.
        self._views = [np.asarray(column).data for column in columns]
        self.shift = 65 - (len(self.buckets) - 1).bit_length()

    def __len__(self) -> int:
        return len(self.tokens)

    def whole(self) -> bool:
        """Returns whether the columns' lengths fit each other; a damaged file's may not."""
        return bool(
            len(self.starts) == len(self.keys) + 1 == len(self.totals) + 1
            and self.starts[-1] == len(self.tokens) == len(self.counts)
            and len(self.buckets) > 2
            and self.buckets[-1] == len(self.keys)
        )

    def row(self, key: int, most: int = WIDTH) -> tuple[list[int], list[int], int, int] | None:
        """Returns a key's likeliest successors, their counts, its total and how many there are.

        None where the key is unknown.
        """
        keys, starts, totals, tokens, counts, buckets = self._views
        bucket = key >> self.shift
        high = min(buckets[bucket + 1], len(keys))
        at = bisect_left(keys, key, min(buckets[bucket], high), high)
        if at == high or keys[at] != key:
            return None
        low, high = starts[at], starts[at + 1]
        if not low < high <= len(tokens):
            return None  # a damaged file's
        part = slice(low, min(high, low + most))
        return tokens[part].tolist(), counts[part].tolist(), totals[at], high - low

    def records(self, first: int = 0, end: int | None = None) -> Records:
        """Returns the records that :meth:`of` makes the rows ``first`` … ``end`` − 1 from."""
        end = len(self.keys) if end is None else end
        starts = self.starts[first : end + 1]
        keys, totals = self.keys[first:end], self.totals[first:end]
        part = slice(int(starts[0]), int(starts[-1]))
        tokens, counts = self.tokens[part], self.counts[part]
        sizes = np.diff(starts).astype(np.int64)
        sums = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        left = totals - np.diff(sums[(starts - starts[0]).astype(np.int64)])
        rest = np.flatnonzero(left > 0)
        return _summed(
            np.concatenate([np.repeat(keys, sizes), keys[rest]]),
            np.concatenate([tokens, np.full(len(rest), REST, np.uint32)]),
            np.concatenate([counts, left[rest].astype(np.uint32)]),
        )

    @staticmethod
    def of(records: Records, *, least: int = 1, width: int = WIDTH) -> Counts:
        """Returns rows of the ``width`` most frequent successors that were seen ``least`` times."""
        columns = rows(records, least=least, width=width)
        return Counts(*columns, buckets(columns[0]))


COLUMNS = ("keys", "starts", "totals", "tokens", "counts", "buckets")
_TYPES = (np.uint64, np.uint64, np.uint32, np.uint32, np.uint32, np.uint64)
DTYPES = {name: np.dtype(kind) for name, kind in zip(COLUMNS, _TYPES, strict=True)}


def rows(
    records: Records, *, least: int, width: int
) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
    """Returns the columns of :class:`Counts` up to ``counts``; rows that keep nothing are left out.

    Args:
        records: whole rows.
        least: successors seen less often are dropped.
        width: successors kept of a row.
    """
    if not len(records.keys):
        return _columns(np.empty(0), np.zeros(1), np.empty(0), np.empty(0), np.empty(0))
    first = np.empty(len(records.keys), bool)
    first[0] = True
    np.not_equal(records.keys[1:], records.keys[:-1], out=first[1:])
    at = np.flatnonzero(first)
    totals = np.minimum(np.add.reduceat(records.counts.astype(np.uint64), at), _MAX_COUNT)
    keys = records.keys[at]
    group = np.cumsum(first, dtype=np.uint64) - np.uint64(1)
    kept = (records.counts >= least) & (records.tokens != REST)
    group, tokens, counts = group[kept], records.tokens[kept], records.counts[kept]
    # By row, then falling count; stable, so the lowest id first among equals.
    order = np.argsort((group << np.uint64(32)) | (_MAX_COUNT - counts), kind="stable")
    group, tokens, counts = group[order].astype(np.int64), tokens[order], counts[order]
    sizes = np.bincount(group, minlength=len(keys))
    rank = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    best = rank < width
    sizes = np.minimum(sizes, width)
    filled = sizes > 0
    starts = np.concatenate([[0], np.cumsum(sizes[filled])])
    return _columns(keys[filled], starts, totals[filled], tokens[best], counts[best])


def _columns(*arrays: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
    made = (a.astype(DTYPES[n], copy=False) for n, a in zip(COLUMNS, arrays, strict=False))
    keys, starts, totals, tokens, counts = made
    return keys, starts, totals, tokens, counts


def buckets(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns the column of :class:`Counts`: about ``_BUCKET_ROWS`` rows to a bucket."""
    bits = min(max((len(keys) // _BUCKET_ROWS).bit_length(), 1), _MAX_BITS)
    bounds = np.arange(1 << bits, dtype=np.uint64) << np.uint64(64 - bits)
    found = np.searchsorted(keys, bounds)
    return np.concatenate([found, [len(keys)]]).astype(np.uint64)
