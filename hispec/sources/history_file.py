"""The file of a model's earlier outputs, shared by processes, safe against a kill at any moment.

SQLite, three tables:

    facts     format and tokenizer
    texts     outputs that wait to be counted, one row each
    counts    the columns of :class:`Counts` of all others, in one row

A finished text is one inserted row, so a killed process loses at most that. Now and then the
process that inserts also counts: it adds the waiting texts to the counts and deletes them, in the
same transaction, so that every other process sees it before or after. Where there are too many
counts all are halved: what was seen once long ago is forgotten, and the file stays bounded.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hispec.model.store import cache_dir
from hispec.sources.fingerprint import DatabaseError, check
from hispec.sources.ngrams import COLUMNS, DTYPES, LONGEST, Counts, Records, count, merge

FORMAT = "hispec-history-1"
MAX_RECORDS = 1_000_000  # (suffix, successor, count)
PENDING = 16_384  # tokens that may wait; half a minute's worth, and 4 MB of tables
_PATIENCE_S = 10.0  # for another process that holds the file
_SCHEMA = (
    "create table facts (name text primary key, value text)",
    "create table texts (id integer primary key autoincrement, tokens blob not null)",
    "create table counts (generation integer not null, "
    + ", ".join(f"{name} blob not null" for name in COLUMNS)
    + ")",
)
_ASSIGNED = ", ".join(f"{name} = ?" for name in COLUMNS)


def default_path(model: str) -> Path:
    """Returns where the history of a model is kept, given its weights' fingerprint."""
    return cache_dir() / "history" / f"{model[:32]}.sqlite"


@contextmanager
def reading(path: Path, tokenizer: str | None = None) -> Iterator[sqlite3.Connection]:
    """An open history that nobody changes meanwhile.

    Args:
        path: the file.
        tokenizer: the fingerprint it must have; None takes any.

    Raises:
        DatabaseError: it cannot be read, is no history, or belongs to another tokenizer.
    """
    # Not mode=ro: what a killed writer left half done is undone by the next to open the file, and
    # that is a write. Where the file is write-protected, SQLite only reads by itself.
    with _connected(f"{path.absolute().as_uri()}?mode=rw", path) as file:
        file.execute("begin")
        _check(file, tokenizer, path)
        yield file


@contextmanager
def writing(path: Path, tokenizer: str) -> Iterator[sqlite3.Connection]:
    """Inside is one transaction on a history, created if need be.

    Raises:
        DatabaseError: it cannot be written, is no history, or belongs to another tokenizer.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseError(f"{path} cannot be written ({error.strerror or error}).") from error
    with _connected(f"{path.absolute().as_uri()}?mode=rwc", path) as file:
        file.execute("begin immediate")
        if not file.execute("select 1 from sqlite_master").fetchone():
            _create(file, tokenizer)
        _check(file, tokenizer, path)
        yield file
        file.execute("commit")


@contextmanager
def _connected(uri: str, path: Path) -> Iterator[sqlite3.Connection]:
    """A connection; what was not committed did not happen. SQLite's errors become one sentence."""
    try:
        file = sqlite3.connect(uri, uri=True, timeout=_PATIENCE_S, isolation_level=None)
        try:
            yield file
        finally:
            file.close()
    except sqlite3.OperationalError as error:  # locked, read-only, disk full, no such folder
        raise DatabaseError(f"{path} cannot be used ({error}).") from error
    except sqlite3.DatabaseError as error:
        raise DatabaseError(
            _foreign(path, f"is no history of hispec or damaged ({error})")
        ) from error


def _create(file: sqlite3.Connection, tokenizer: str) -> None:
    for statement in _SCHEMA:
        file.execute(statement)
    facts = {"format": FORMAT, "tokenizer": tokenizer}
    file.executemany("insert into facts values (?, ?)", facts.items())
    empty = _blobs(Records.none())
    file.execute(f"insert into counts values (0{', ?' * len(empty)})", empty)


def _check(file: sqlite3.Connection, tokenizer: str | None, path: Path) -> None:
    tables = {name for (name,) in file.execute("select name from sqlite_master")}
    facts = dict(file.execute("select name, value from facts")) if "facts" in tables else {}
    if facts.get("format") != FORMAT:
        raise DatabaseError(_foreign(path, "is no history of hispec"))
    if tokenizer is not None:
        check(facts.get("tokenizer"), tokenizer, f"The history {path}")


def _foreign(path: Path, what: str) -> str:
    return f"{path} {what}. Delete it to start a new one."


def tokenizer_of(file: sqlite3.Connection) -> str:
    """Returns the fingerprint an open history was made with."""
    return str(_row(file, "select value from facts where name = 'tokenizer'")[0])


def generation(file: sqlite3.Connection) -> int:
    """Returns a number that changes whenever texts move into the counts."""
    return int(_row(file, "select generation from counts")[0])


def read_counts(file: sqlite3.Connection) -> Counts:
    """Returns the counts, without the texts that wait."""
    blobs = _row(file, f"select {', '.join(COLUMNS)} from counts")
    counts = Counts(*(_array(b, DTYPES[n]) for n, b in zip(COLUMNS, blobs, strict=True)))
    if not counts.whole():
        raise sqlite3.DatabaseError("its columns do not fit each other")
    return counts


def waiting(file: sqlite3.Connection, seen: int = 0) -> list[tuple[int, list[int]]]:
    """Returns the texts not counted yet, numbered, past the number ``seen``."""
    found = file.execute("select id, tokens from texts where id > ? order by id", (seen,))
    return [(number, _array(tokens, np.uint32).tolist()) for number, tokens in found]


def _row(file: sqlite3.Connection, query: str) -> Sequence[Any]:
    found = file.execute(query).fetchone()
    if found is None:
        raise sqlite3.DatabaseError("a row is missing")
    return found


def _array(blob: Any, dtype: DTypeLike) -> NDArray:
    try:
        return np.frombuffer(blob, dtype)
    except (TypeError, ValueError) as error:
        raise sqlite3.DatabaseError("an array is cut short") from error


def add_texts(path: Path, tokenizer: str, outputs: Sequence[Sequence[int]]) -> None:
    """Adds outputs; counts what waits when it is much.

    Raises:
        DatabaseError: see :func:`writing`.
    """
    blobs = [(np.asarray(output, np.uint32).tobytes(),) for output in outputs]
    with writing(path, tokenizer) as file:
        file.executemany("insert into texts (tokens) values (?)", blobs)
        (num_bytes,) = file.execute("select total(length(tokens)) from texts").fetchone()
        if num_bytes > PENDING * 4:
            _count(file, Records.none())


def add_records(path: Path, tokenizer: str, records: Records) -> None:
    """Adds counts, such as another history's.

    Raises:
        DatabaseError: see :func:`writing`.
    """
    with writing(path, tokenizer) as file:
        _count(file, records)


def replace_records(path: Path, tokenizer: str, parts: Sequence[Records]) -> None:
    """The history holds the counts of all parts and nothing else, from one moment to the next.

    Raises:
        DatabaseError: see :func:`writing`.
    """
    with writing(path, tokenizer) as file:
        file.execute("delete from texts")
        file.execute(f"update counts set {_ASSIGNED}", _blobs(Records.none()))
        for records in parts:
            _count(file, records)


def records_of(file: sqlite3.Connection) -> Records:
    """Returns all an open history knows, the texts that wait included."""
    texts = [tokens for _, tokens in waiting(file)]
    return merge([read_counts(file).records(), count(texts, LONGEST)])


def _count(file: sqlite3.Connection, more: Records) -> None:
    """Moves the texts that wait, and ``more``, into the counts."""
    texts = [tokens for _, tokens in waiting(file)]
    records = grown(read_counts(file).records(), merge([count(texts, LONGEST), more]))
    file.execute(f"update counts set generation = generation + 1, {_ASSIGNED}", _blobs(records))
    file.execute("delete from texts")


def _blobs(records: Records) -> list[bytes]:
    counts = Counts.of(records)
    return [getattr(counts, name).tobytes() for name in COLUMNS]


def grown(old: Records, new: Records, most: int = MAX_RECORDS) -> Records:
    """Returns both together, at most ``most`` of them.

    The old counts are halved until there is room, so that what was seen once, long ago, goes first;
    if that is not enough, the new ones too.
    """
    while len(old.keys) + len(new.keys) > most and (len(old.keys) or len(new.keys) > most):
        old = _halved(old)
        new = new if len(new.keys) <= most else _halved(new)
    return merge([old, new])


def _halved(records: Records) -> Records:
    counts = records.counts >> np.uint32(1)
    kept = counts > 0
    return Records(records.keys[kept], records.tokens[kept], counts[kept])
