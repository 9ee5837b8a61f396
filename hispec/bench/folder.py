"""A run's folder: what was asked for, what came out, row by row, and going on where it stopped.

    run.json       settings and provenance; settings say whether a run may be continued
    rows.jsonl     one row for each (prompt, turn, method, repeat)
    skipped.jsonl  prompts that did not fit, and why

Rows are appended a block at a time: one prompt, one repeat, all methods. A block that a killed
process left unfinished has no rows, so plain decoding always stands beside what it is compared to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hispec.errors import HispecError, UsageError
from hispec.files import WriteError, append_whole, disk_errors, unwritable, write_whole

FORMAT = "hispec-bench-1"
LOCK = ".lock"
Row = dict[str, Any]


class RunFolder:
    """A folder on disk that holds exactly one run.

    Attributes:
        path: the folder.
        rows: all rows so far.
        skipped: prompts left out, with the reason.
    """

    def __init__(self, path: Path, document: dict[str, Any], *, writing: bool = False) -> None:
        self.path = path
        self.document = document
        row = {"item", "repeat", "method"}
        self.rows: list[Row] = _read(path / "rows.jsonl", row, repair=writing)
        self.skipped: list[Row] = _read(path / "skipped.jsonl", {"item"}, repair=writing)
        self._blocks = {(row["item"], row["repeat"]) for row in self.rows}

    @staticmethod
    @contextmanager
    def create(
        path: Path, settings: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> Iterator[RunFolder]:
        """Inside, no other process writes to the folder.

        It is new or has what an earlier process with the same settings left.

        Raises:
            UsageError: the folder holds another run, or something else, or is being worked on.
            HispecError: it cannot be written to.
        """
        document = {"format": FORMAT, "settings": dict(settings), "provenance": dict(provenance)}
        document = json.loads(json.dumps(document))  # as it will be read back: lists, not tuples
        if _is_taken(path):
            raise UsageError(f"{path} is not empty and holds no run. Give another --out.")
        # Nothing is read before the lock is ours: reading repairs what looks cut short.
        with _locked(path):
            if (path / "run.json").exists():
                found = _document(path)
                differing = _difference(found["settings"], document["settings"])
                if differing:
                    raise UsageError(
                        f"{path} holds another run: its {differing}. Give another --out, or repeat "
                        f"that run's settings to continue it."
                    )
                document = found
            else:
                write_whole(path / "run.json", json.dumps(document, indent=1))
            yield RunFolder(path, document, writing=True)

    @staticmethod
    def open(path: Path) -> RunFolder:
        """Returns an existing run.

        Raises:
            UsageError: there is none in the folder.
        """
        if not (path / "run.json").is_file():
            raise UsageError(f"{path} holds no run: it has no run.json.")
        return RunFolder(path, _document(path))

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for."""
        return self.document["settings"]

    @property
    def provenance(self) -> dict[str, Any]:
        """What it ran on."""
        return self.document["provenance"]

    def append(self, rows: Iterable[Row]) -> None:
        """After the call a block's rows are on disk, all of them.

        Raises:
            WriteError: there is no room; the rows before are as they were.
        """
        rows = list(rows)
        _append(self.path / "rows.jsonl", rows)
        self.rows += rows
        self._blocks |= {(row["item"], row["repeat"]) for row in rows}

    def note(self, notes: Mapping[str, str]) -> None:
        """Stores what a reader should know of each method."""
        self.document["notes"] = dict(notes)
        write_whole(self.path / "run.json", json.dumps(self.document, indent=1))

    def skip(self, row: Row) -> None:
        """Notes a prompt that is left out, once."""
        if row not in self.skipped:
            _append(self.path / "skipped.jsonl", [row])
            self.skipped.append(row)

    def has_block(self, item: str, repeat: int) -> bool:
        """Returns whether a block is done."""
        return (item, repeat) in self._blocks


def _is_taken(path: Path) -> bool:
    """Whether something that is no run is there."""
    if not path.exists() or (path / "run.json").exists():
        return False
    return not path.is_dir() or any(entry.name != LOCK for entry in path.iterdir())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Inside, the folder exists and is ours alone."""
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"another process is working on {path}. Wait for it, or give another --out."
        ) from None
    except OSError as error:
        raise WriteError(unwritable(path, error)) from None
    try:
        yield
    finally:
        lock.release()


def _append(path: Path, rows: list[Row]) -> None:
    advice = f"free some room; the same command with --out {path.parent} goes on after what is done"
    with disk_errors(path, advice):
        append_whole(path, _lines(rows), sync=True)


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read(path: Path, fields: set[str], *, repair: bool) -> list[Row]:
    """The rows of a file, without a block at its end whose writing was cut short.

    Blocks are told apart by ``(item, repeat)`` and their size by ``of``, the rows they have. Only a
    process that is about to append repairs the file: a report may be made of a run under way.
    """
    if not path.exists():
        return []
    rows: list[Row] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise HispecError(f"cannot read {path}: {error.strerror or error}.") from None
    torn = lines.pop() != b""
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not fields <= row.keys():
            raise HispecError(f"{path} line {number} is damaged. Remove the folder.")
        rows.append(row)
    while rows and "of" in rows[-1]:
        last = rows[-1]
        block = [r for r in rows if (r["item"], r["repeat"]) == (last["item"], last["repeat"])]
        if len(block) == last["of"]:
            break
        rows = [r for r in rows if r not in block]
        torn = True
    if torn and repair:
        write_whole(path, _lines(rows))
    return rows


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HispecError(f"{path / 'run.json'} cannot be read: {error}.") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UsageError(f"{path} holds no run of this version of hispec bench.")
    if not all(isinstance(document.get(name), dict) for name in ("settings", "provenance")):
        raise HispecError(f"{path / 'run.json'} is damaged. Remove the folder.")
    return document


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first setting that differs, as a phrase; empty if none does."""
    for key in wanted:
        if found.get(key) != wanted[key]:
            return f"{key.replace('_', ' ')} is {_short(found.get(key))}, not {_short(wanted[key])}"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
