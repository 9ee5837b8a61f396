"""Reading text, or a model's answers, piece by piece for the n-gram databases.

    .jsonl, .jsonl.gz     a row's text, or its answer where answers are wanted
    any other file        plain text, gzipped or not
    no such file          a datasets id, streamed

A row's text is its ``text`` or ``content``, or all its messages. Its answer is ``response_ids``
(what ``hispec distill`` writes), ``token_ids`` (``hispec generate --json``), ``output_ids``,
``response``, ``completion``, ``answer``, ``output``, or the assistant's messages. Where ``hispec
generate --prompts`` wrote several answers (``turns``, ``samples``), each is a text of its own; rows
that hold an ``error`` instead are counted and left out.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hispec.errors import UsageError
from hispec.jsonl import read_objects
from hispec.sources.ngrams import REST

PIECE_CHARS = 8_000  # of plain text, cut at the end of a line
_IDS = ("response_ids", "token_ids", "output_ids")
_ANSWERS = ("response", "completion", "answer", "output")
_TEXTS = ("text", "content")
_SEVERAL = ("turns", "samples")


class Texts:
    """The texts of some files or data sets, one after the other.

    Args:
        sources: files or ``datasets`` ids.
        answers: whether only answers are wanted.
        split: which split of a ``datasets`` id.

    Attributes:
        part: how much of everything was read, 0 … 1; None where nobody knows.
        num_errors: rows so far that hold an error and no text.

    Raises:
        UsageError: a file that does not exist.
    """

    def __init__(self, sources: list[str], *, answers: bool, split: str = "train") -> None:
        self._sources = sources
        self._answers = answers
        self._split = split
        self.part: float | None = 0.0
        self.num_errors = 0
        self._paths = [Path(source).expanduser() for source in sources]
        for source, path in zip(sources, self._paths, strict=True):
            if not path.exists() and (path.suffix or path.is_absolute() or source.count("/") > 1):
                raise UsageError(f"there is no file {source}. Check the path.")
            if path.is_dir():
                raise UsageError(f"{source} is a folder. Give its files.")

    def identity(self) -> list[list[Any]]:
        """Returns what tells these sources from others: names, sizes and times."""
        found: list[list[Any]] = []
        for source, path in zip(self._sources, self._paths, strict=True):
            if path.exists():
                facts = path.stat()
                found.append([str(path.absolute()), facts.st_size, facts.st_mtime_ns])
            else:
                found.append([source, self._split])
        return [*found, ["answers" if self._answers else "texts"]]

    def __iter__(self) -> Iterator[str | list[int]]:
        self.num_errors = 0
        sizes = [path.stat().st_size if path.exists() else 0 for path in self._paths]
        if not all(sizes):
            self.part = None
        before, total = 0, sum(sizes)
        for source, path, size in zip(self._sources, self._paths, sizes, strict=True):
            if not path.exists():
                yield from self._hub(source)
                continue
            for text, part in self._rows(path) if _is_jsonl(path) else _pieces(path):
                if self.part is not None:
                    self.part = (before + size * part) / total
                yield text
            before += size

    def _rows(self, path: Path) -> Iterator[tuple[str | list[int], float]]:
        lines = _count_lines(path)
        for number, row in read_objects(path):
            try:
                texts = self._of(row)
            except UsageError as error:
                raise UsageError(f"{path} line {number}: {error}") from None
            if texts is None and "error" not in row:
                names = (*_IDS, *_ANSWERS) if self._answers else _TEXTS
                wanted = [*names, "messages", *_SEVERAL]
                raise UsageError(f"{path} line {number} has none of {', '.join(wanted)}.")
            self.num_errors += texts is None
            for text in texts or ():
                yield text, number / lines

    def _of(self, row: Mapping[str, Any]) -> list[str | list[int]] | None:
        """Returns a row's texts that are not empty; None where it has nothing to read.

        Raises:
            UsageError: what should be ids or messages is something else.
        """
        read = _answer if self._answers else _text
        found = [read(row)]
        for name in _SEVERAL if found == [None] else ():
            several = row.get(name)
            if isinstance(several, list) and all(isinstance(part, dict) for part in several):
                found = [read(part) for part in several]
        return None if None in found else [text for text in found if text]

    def _hub(self, source: str) -> Iterator[str | list[int]]:
        try:
            import datasets
        except ImportError:
            raise UsageError(
                f"there is no file {source}, and reading it as a data set's id needs the package "
                "datasets: pip install 'hispec[bench]'."
            ) from None
        try:
            table = datasets.load_dataset(source, split=self._split, streaming=True)
        except Exception as error:  # datasets raises many kinds, down to bare ones
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"there is no file {source}, and no data set of that id could be loaded: {reason}"
            ) from None
        for number, row in enumerate(table, 1):
            try:
                yield from self._of(row) or ()
            except UsageError as error:
                raise UsageError(f"{source} row {number}: {error}") from None


def _is_jsonl(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def _count_lines(path: Path) -> int:
    with _reading(path), gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        return sum(1 for _ in file)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Inside, a file that cannot be read, or not to its end, raises ``UsageError``."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}."
        ) from None


def _pieces(path: Path) -> Iterator[tuple[str, float]]:
    """Plain text in pieces, and how much of the file was read."""
    held: list[str] = []
    size = 0
    try:
        with _reading(path), open(path, "rb") as raw:
            packed = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            for line in io.TextIOWrapper(packed, encoding="utf-8-sig"):
                held.append(line)
                size += len(line)
                if size >= PIECE_CHARS:
                    yield "".join(held), raw.tell() / path.stat().st_size
                    held, size = [], 0
        if "".join(held).strip():
            yield "".join(held), 1.0
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text. Convert it first.") from None


def _answer(row: Mapping[str, Any]) -> str | list[int] | None:
    for name in _IDS:
        if isinstance(row.get(name), list):
            return _ids(name, row[name])
    for name in _ANSWERS:
        if isinstance(row.get(name), str):
            return row[name]
    if isinstance(row.get("messages"), list):
        return _said(row["messages"], "assistant")
    return None


def _text(row: Mapping[str, Any]) -> str | None:
    for name in _TEXTS:
        if isinstance(row.get(name), str):
            return row[name]
    if isinstance(row.get("messages"), list):
        return _said(row["messages"])
    return None


def _ids(name: str, found: list[Any]) -> list[int]:
    for token in found:
        if type(token) is not int or not 0 <= token < REST:  # a bool is an int to isinstance
            raise UsageError(f"{name} should be token ids, got {str(token)[:40]!r} among them.")
    return found


def _said(messages: list[Any], role: str | None = None) -> str:
    """Returns what was said in a chat, by one role or by all."""
    for message in messages:
        if not isinstance(message, dict):
            raise UsageError(f"messages should be objects, got {str(message)[:40]!r} among them.")
    wanted = [message for message in messages if role is None or message.get("role") == role]
    return "\n".join(str(message.get("content") or "") for message in wanted)
