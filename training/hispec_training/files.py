"""Reading and writing files of training: tensors whole or not at all, and what goes wrong."""

from __future__ import annotations

import errno
import gzip
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hispec.errors import HispecError, UsageError
from hispec.files import disk_errors, replacing

#: What to do where the results of a run cannot be written.
RESUME = "what was trained is kept, so make room and run again with --resume"


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


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, sync: bool = False
) -> None:
    """``path`` holds the tensors, or what it held before if this is interrupted.

    Args:
        path: A safetensors file; nobody else writes it now.
        tensors: By name.
        metadata: For its header.
        sync: As in `hispec.files.write_whole`.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    with replacing(path, sync=sync, alone=True) as temporary:
        try:
            save_file(dict(tensors), temporary, dict(metadata))
        except SafetensorError as error:  # a full disk is one of its own kinds
            number = re.search(r"os error (\d+)", str(error))
            full = "No space" in str(error)
            code = int(number[1]) if number else errno.ENOSPC if full else errno.EIO
            raise OSError(code, str(error), str(path)) from error


@contextmanager
def saving(out: Path) -> Iterator[None]:
    """Inside, the results of a run whose checkpoint is kept are written.

    Args:
        out: Where they go, for the message.

    Raises:
        HispecError: The disk is full or the folder cannot be written.
    """
    try:
        with disk_errors(out, RESUME):
            yield
    except SafetensorError as error:  # peft's
        raise HispecError(f"cannot write {out} ({error}): {RESUME}.") from error
