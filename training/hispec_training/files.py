"""Files that are there whole or not at all, and what the disk says as one sentence."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hispec.errors import HispecError, UsageError


def read_bytes(path: Path) -> bytes:
    """Returns what a file holds, unpacked if its name ends with ``.gz``.

    Raises:
        UsageError: It cannot be read.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(
            f"Cannot read {path}: {getattr(error, 'strerror', None) or error}."
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """``path`` holds ``content``, or what it held before if this is interrupted.

    Raises:
        HispecError: The disk is full or the folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HispecError(f"Cannot write {path}: {error.strerror or error}.") from error


@contextmanager
def saving(out: Path) -> Iterator[None]:
    """Inside, the results of a run whose checkpoint is kept are written.

    Args:
        out: Where they go, for the message.

    Raises:
        HispecError: The disk is full or the folder cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise HispecError(
            f"Cannot write {out} ({getattr(error, 'strerror', None) or error}): what was trained "
            "is kept, so make room and run again with --resume."
        ) from error
