"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from hispec.errors import HispecError


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
