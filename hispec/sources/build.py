"""Building an n-gram store from more text than fits into memory.

A million tokens at a time are counted and written as sorted *runs*, one for each length of key. At
the end the runs are merged by ranges of keys: keys are hashes, so equal ranges hold equally many,
and a range is small enough to be sorted at once. Memory is that of one run or one range, about
300 MB, whatever the size of the text. An interrupted build goes on after the last whole run.

Cost, 50 M tokens of text: 3 GB of runs, and a store of 8 bytes a successor and 24 a key. Counts are
exact. For 10¹⁰ tokens the runs would take 700 GB and 10,000 files to a range: merge every 100 runs
into one first (same code, same memory), and drop what occurred once in each such hundred, which is
four fifths of the records and, as expected counts go, a tenth of the kept rows' mass. The store
then holds some 10⁹ successors in 30 GB, and a lookup still touches one bucket and one row: two
pages.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hispec.files import disk_errors, replacing
from hispec.sources.fingerprint import DatabaseError
from hispec.sources.ngrams import LONGEST, WIDTH, Records, count_each, merge, rows
from hispec.sources.store import Store, Writer

RUN_TOKENS = 1 << 20
RANGE_RECORDS = 1 << 22
_disk_errors = partial(disk_errors, error=DatabaseError)


class Builder:
    """A store under way.

    Args:
        out: the file it becomes; what is written before lies in a hidden folder beside it.
        plan: what it is made from and how. A build with the same plan is gone on with, another one
            thrown away.
        longest: tokens in the longest key.

    Attributes:
        num_texts: texts in whole runs; the caller goes on after these.
        num_tokens: tokens in them.

    Raises:
        DatabaseError: another process builds the same file, or the disk is full or cannot be
            written: now, in ``add`` or in ``finish``.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any], longest: int) -> None:
        from filelock import FileLock, Timeout

        self._out = out
        self._longest = longest
        self._folder = out.parent / f".{out.name}.build"
        self._lock = FileLock(self._folder / "lock")
        with _disk_errors(out):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0.5)
            except Timeout:
                raise DatabaseError(
                    f"Another process is building {out}. Wait for it, or give another --out."
                ) from None
        self._runs: list[str] = []
        self._waiting: list[Sequence[int]] = []
        self._waiting_tokens = 0
        self.num_texts = self.num_tokens = 0
        with _disk_errors(out):
            self._resume(dict(plan) | {"longest": longest, "run": RUN_TOKENS})

    def _resume(self, plan: dict[str, Any]) -> None:
        """Finds whole runs of the same plan, and clears everything else."""
        journal = self._folder / "journal.json"
        try:
            found = json.loads(journal.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        self._plan = json.loads(json.dumps(plan))
        if found.get("plan") == self._plan:
            self._runs = found["runs"]
            self.num_texts, self.num_tokens = found["num_texts"], found["num_tokens"]
        for path in self._folder.iterdir():
            if (
                path.name not in ("lock", journal.name)
                and path.name.split(".")[0] not in self._runs
            ):
                path.unlink()

    def add(self, texts: Sequence[Sequence[int]]) -> None:
        """Counts texts; a run is written when there are enough tokens.

        Args:
            texts: ids; nothing is counted across two texts.
        """
        self._waiting.extend(texts)
        self._waiting_tokens += sum(map(len, texts))
        if self._waiting_tokens >= RUN_TOKENS:
            with _disk_errors(self._out):
                self._write_run()

    def _write_run(self) -> None:
        if not self._waiting:
            return
        name = f"run-{len(self._runs):05}"
        for length, records in enumerate(count_each(self._waiting, self._longest), 1):
            for column in Records._fields:
                # Not tofile(), whose error does not say that the disk is full.
                (self._folder / f"{name}.{length}.{column}").write_bytes(
                    getattr(records, column).data
                )
        self._runs.append(name)
        self.num_texts += len(self._waiting)
        self.num_tokens += self._waiting_tokens
        self._waiting, self._waiting_tokens = [], 0
        journal = {
            "plan": self._plan,
            "runs": self._runs,
            "num_texts": self.num_texts,
            "num_tokens": self.num_tokens,
        }
        with replacing(self._folder / "journal.json", alone=True) as temporary:
            temporary.write_text(json.dumps(journal), encoding="utf-8")

    def finish(self, facts: Mapping[str, str | int], *, least: int, width: int) -> None:
        """The store is there, and nothing else.

        Args:
            facts: for its header, beside what is known here.
            least: successors seen less often are dropped.
            width: successors kept of a row.

        Raises:
            DatabaseError: there was no text.
        """
        with _disk_errors(self._out):
            self._finish(facts, least=least, width=width)

    def _finish(self, facts: Mapping[str, str | int], *, least: int, width: int) -> None:
        self._write_run()
        if not self.num_tokens:
            self.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise DatabaseError("there is no text to count. Give files that have some.")
        runs = [
            self._folder / f"{name}.{length}"
            for name in self._runs
            for length in range(1, self._longest + 1)
        ]
        sizes = [Path(f"{run}.tokens").stat().st_size // 4 for run in runs]
        parts = max(sum(sizes) // RANGE_RECORDS, 1)
        bounds = [(part << 64) // parts for part in range(1, parts)]
        cuts = [
            _cuts(np.memmap(f"{run}.keys", np.uint64, "r"), bounds) if size else [0] * (parts + 1)
            for run, size in zip(runs, sizes, strict=True)
        ]
        writer = Writer(self._folder)
        try:
            for part in range(parts):
                slices = [
                    _read(run, at[part], at[part + 1]) for run, at in zip(runs, cuts, strict=True)
                ]
                writer.add(*rows(merge(slices), least=least, width=width))
            known = {
                "num_texts": self.num_texts,
                "num_tokens": self.num_tokens,
                "longest": self._longest,
                "least": least,
                "width": width,
            }
            writer.finish(self._out, {**known, **facts})
        finally:
            writer.close()
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Lets another process build the same file."""
        self._lock.release()


def _read(run: Path, first: int, end: int) -> Records:
    """Some records of a run. Read, not mapped: mapped pages would pile up with the runs."""

    def column(name: str, kind: type) -> NDArray:
        at = first * np.dtype(kind).itemsize
        return np.fromfile(f"{run}.{name}", kind, end - first, offset=at)

    return Records(
        column("keys", np.uint64), column("tokens", np.uint32), column("counts", np.uint32)
    )


def merge_stores(stores: Sequence[Store], out: Path) -> None:
    """``out`` is a store with the counts of all, which have the same tokenizer.

    What a store dropped stays dropped, so the sum of two stores is not quite the store of both
    texts: a successor that was too rare in each may not have been in both.

    Raises:
        DatabaseError: the disk is full or cannot be written.
    """
    with _disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    width = max(store.fact("width", WIDTH) for store in stores)
    parts = max(sum(len(store.counts) for store in stores) // RANGE_RECORDS, 1)
    bounds = [(part << 64) // parts for part in range(1, parts)]
    cuts = [_cuts(store.counts.keys, bounds) for store in stores]
    with (
        _disk_errors(out),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder,
    ):
        writer = Writer(Path(folder))
        try:
            for part in range(parts):
                slices = [
                    store.counts.records(at[part], at[part + 1])
                    for store, at in zip(stores, cuts, strict=True)
                ]
                writer.add(*rows(merge(slices), least=1, width=width))
            facts: dict[str, str | int] = {
                "tokenizer": stores[0].facts.get("tokenizer", ""),
                "kind": stores[0].facts.get("kind", "corpus"),
                "longest": max(store.fact("longest", LONGEST) for store in stores),
                "least": min(store.fact("least", 1) for store in stores),
                "width": width,
            }
            for name in ("num_texts", "num_tokens"):
                facts[name] = sum(store.fact(name) for store in stores)
            writer.finish(out, facts)
        finally:
            writer.close()


def _cuts(keys: NDArray[np.uint64], bounds: Sequence[int]) -> list[int]:
    return [0, *np.searchsorted(keys, np.array(bounds, np.uint64)).tolist(), len(keys)]
