"""The file of an n-gram store: the columns of :class:`Counts` in the safetensors format.

Opening one maps it, so that a store costs no memory of its own: its pages are the system's cache,
shared by all processes. The header says which tokenizer the ids belong to.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hispec.files import replacing
from hispec.sources.fingerprint import DatabaseError, check
from hispec.sources.ngrams import COLUMNS, DTYPES, Counts, buckets

FORMAT = "hispec-ngrams-1"
_NAMES = {np.dtype(np.uint64): "U64", np.dtype(np.uint32): "U32"}


class Store:
    """A store on disk.

    Args:
        path: the file.
        tokenizer: the fingerprint the store must have; None takes any.

    Attributes:
        counts: the rows, mapped.
        facts: what the header says: ``tokenizer``, ``longest``, ``width``, ``least``,
            ``num_tokens``, ``num_texts``.

    Raises:
        DatabaseError: there is no such file, it is no store, it is truncated, or its tokenizer is
            another one.
    """

    def __init__(self, path: str | Path, tokenizer: str | None = None) -> None:
        self.path = Path(path)
        header, start = _read_header(self.path)
        self.facts: dict[str, str] = header.pop("__metadata__")
        if tokenizer is not None:
            check(self.facts.get("tokenizer"), tokenizer, f"The n-gram store {self.path}")
        size = self.path.stat().st_size
        columns = []
        for name in COLUMNS:
            try:
                low, high = header[name]["data_offsets"]
                (length,) = header[name]["shape"]
                dtype = DTYPES[name]
                right = header[name]["dtype"] == _NAMES[dtype]
                right = right and low >= 0 and low % dtype.itemsize == 0
                right = right and type(length) is int and high - low == length * dtype.itemsize
            except (KeyError, TypeError, ValueError):
                right = False
            if not right or start + high > size:
                raise DatabaseError(_damaged(self.path))
            if length:
                mapped = np.memmap(self.path, dtype, "r", start + low, (length,))
                columns.append(np.asarray(mapped))
            else:
                columns.append(np.empty(0, dtype))
        self.counts = Counts(*columns)
        if not self.counts.whole():
            raise DatabaseError(_damaged(self.path))

    def fact(self, name: str, default: int = 0) -> int:
        """Returns a number of the header.

        Raises:
            DatabaseError: it is none.
        """
        try:
            return int(self.facts.get(name, default))
        except (TypeError, ValueError):
            raise DatabaseError(_damaged(self.path)) from None


class Writer:
    """A store under way: columns grow in files of their own until all are known.

    Args:
        folder: for these files.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = {name: folder / f"{name}.part" for name in COLUMNS}
        self._files: dict[str, BinaryIO] = {}
        for name, path in self._paths.items():
            self._files[name] = open(path, "wb")  # noqa: SIM115  see close()
        self._pairs = 0
        self._files["starts"].write(np.zeros(1, np.uint64).tobytes())

    def add(
        self,
        keys: NDArray[np.uint64],
        starts: NDArray[np.uint64],
        totals: NDArray[np.uint32],
        tokens: NDArray[np.uint32],
        counts: NDArray[np.uint32],
    ) -> None:
        """Appends rows with keys above all before."""
        columns = (keys, starts[1:] + np.uint64(self._pairs), totals, tokens, counts)
        for name, column in zip(COLUMNS, columns, strict=False):
            self._files[name].write(column.data)
        self._pairs += len(tokens)

    def finish(self, path: Path, facts: Mapping[str, str | int]) -> None:
        """``path`` is the store, from one moment to the next."""
        for file in self._files.values():
            file.flush()
        size = self._paths["keys"].stat().st_size
        keys = np.memmap(self._paths["keys"], np.uint64, "r") if size else np.empty(0, np.uint64)
        self._files["buckets"].write(buckets(keys).data)
        header: dict[str, object] = {}
        header["__metadata__"] = {"format": FORMAT} | {k: str(v) for k, v in facts.items()}
        offset = 0
        for name in sorted(COLUMNS, key=lambda name: -DTYPES[name].itemsize):  # stays aligned
            self._files[name].close()
            num_bytes = self._paths[name].stat().st_size
            header[name] = {
                "dtype": _NAMES[DTYPES[name]],
                "shape": [num_bytes // DTYPES[name].itemsize],
                "data_offsets": [offset, offset + num_bytes],
            }
            offset += num_bytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        # A folder is built by one process at a time, and what a killed one left is large.
        with replacing(path, sync=True, alone=True) as temporary, open(temporary, "wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            for name in list(header)[1:]:
                with open(self._paths[name], "rb") as part:
                    shutil.copyfileobj(part, out, 1 << 20)
                self._paths[name].unlink()

    def close(self) -> None:
        """Closes what a failed build left open."""
        for file in self._files.values():
            with suppress(OSError):  # a full disk is known from what was written before
                file.close()


def write(path: Path, counts: Counts, facts: Mapping[str, str | int]) -> None:
    """``path`` is a store of these counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        writer = Writer(Path(folder))
        try:
            writer.add(counts.keys, counts.starts, counts.totals, counts.tokens, counts.counts)
            writer.finish(path, facts)
        finally:
            writer.close()


def _read_header(path: Path) -> tuple[dict, int]:
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if length <= 1 << 20 else b""
    except OSError as error:
        raise DatabaseError(f"Cannot read {path}: {error.strerror or error}.") from error
    try:
        header = json.loads(raw)
        known = header["__metadata__"]["format"] == FORMAT
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise DatabaseError(
            f"{path} is no n-gram store of hispec, or its beginning is damaged. Build one with "
            "hispec ngrams build."
        )
    return header, 8 + length


def _damaged(path: Path) -> str:
    return f"{path} is truncated or damaged. Build it again with hispec ngrams build."
