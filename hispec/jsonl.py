"""Files of JSON lines: one object a line, gzipped or not, errors with the line's number."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hispec.errors import HispecError, UsageError


def read_objects(
    path: Path, error: type[HispecError] = UsageError
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number (from 1) and the object of every non-empty line.

    Args:
        path: the file; gzipped if it ends with ``.gz``.
        error: what to raise.

    Raises:
        HispecError: of kind ``error``: the file cannot be read, or a line is no JSON object.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
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
                yield number, row
    except UnicodeDecodeError:
        raise error(f"{path} is not UTF-8 text after line {number}.") from None
    except (OSError, EOFError, zlib.error) as reason:
        why = getattr(reason, "strerror", None) or reason
        raise error(f"cannot read {path}: {why}.") from None
