"""Files of JSON lines: one object a line, gzipped or not, errors with the line's number."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hispec.errors import HispecError, UsageError

_PERHAPS_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # most rows need no closer look


def read_objects(
    path: Path, error: type[HispecError] = UsageError
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number (from 1) and the object of every non-empty line.

    Args:
        path: the file; gzipped if it ends with ``.gz``. A byte order mark is no part of it.
        error: what to raise.

    Raises:
        HispecError: of kind ``error``: the file cannot be read, or a line is no JSON object, or
            has a text that is none.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as reason:
                    raise error(f"{path} line {number} is not JSON: {reason}.") from None
                if not isinstance(row, dict):
                    raise error(
                        f"{path} line {number} should be an object, got {line.strip()[:40]}."
                    )
                if _PERHAPS_HALF.search(line):
                    try:
                        refuse_halves(row)
                    except UsageError as reason:
                        raise error(f"{path} line {number}: {reason}") from None
                yield number, row
    except UnicodeDecodeError:
        raise error(f"{path} is not UTF-8 text after line {number}.") from None
    except (OSError, EOFError, zlib.error) as reason:
        why = getattr(reason, "strerror", None) or reason
        raise error(f"cannot read {path}: {why}.") from None


def refuse_halves(row: Mapping[str, Any]) -> None:
    r"""Raises ``UsageError`` if a text of a row has half of a pair such as ``\ud83d\ude00``.

    JSON can write one alone; it is no character, and neither a tokenizer nor a file takes it.
    """
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UsageError(
            f"a text has {half}, half of a surrogate pair and no character. Write both halves."
        ) from None
