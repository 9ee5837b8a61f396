"""Files that are there whole or not at all, and what a disk refuses as one sentence.

A file is written under a hidden name beside its own and gets that by one rename, so a reader finds
what was there before or all that is there now. A file that grows by rows is appended to instead,
and a row that did not fit is taken back.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hispec.errors import HispecError

#: What the system says where there is no room.
FULL = (errno.ENOSPC, errno.EDQUOT)


class WriteError(HispecError):
    """A file could not be written: the disk is full, or its place does not take one."""


def write_whole(path: Path, content: str | bytes, *, sync: bool = False, advice: str = "") -> None:
    """``path`` holds ``content``, text as UTF-8; what goes wrong leaves it as it was.

    Args:
        path: the file; its folder is made if need be.
        content: all of it.
        sync: it is on the disk itself before it gets its name, so that it outlives a power cut.
        advice: what to do if it cannot be written, for the message.

    Raises:
        WriteError: the disk is full, or the folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path, advice), replacing(path, sync=sync) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path, *, sync: bool = False, alone: bool = False) -> Iterator[Path]:
    """Yields an empty file that becomes ``path`` when all went well, and vanishes otherwise.

    It ends up readable as any new file here is, whatever wrote it thinks (safetensors: 0600).

    Args:
        path: the file; its folder is made if need be.
        sync: as in :func:`write_whole`.
        alone: no other process writes this file now, so what a killed one left half done is written
            over; otherwise it stays beside the file, which is a pity where that is large.

    Raises:
        OSError: the disk is full, the folder cannot be written, or a folder or device is there.
    """
    if path.exists() and not path.is_file():  # as root a rename would put it in a device's place
        raise OSError(errno.EINVAL, "it is no plain file")
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = "" if alone else f".{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}{mine}.part")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield temporary
        if temporary.stat().st_mode & 0o777 != mode:
            temporary.chmod(mode)
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # renamed already, or the folder is gone
            temporary.unlink()


def append_whole(path: Path, text: str, *, sync: bool = False) -> None:
    """The file ends with ``text``, as UTF-8; if that fails it ends where it did before.

    Args:
        path: the file; made if it is not there.
        text: whole lines.
        sync: as in :func:`write_whole`.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    left = memoryview(text.encode())
    # Unbuffered: what a buffer holds would be written once more when the file is closed.
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            while left:
                left = left[file.write(left) :]
            if sync:
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(end)
            raise


@contextmanager
def disk_errors(
    what: Path | str, advice: str = "", error: type[HispecError] = WriteError
) -> Iterator[None]:
    """Inside, what a disk refuses raises ``error`` with one sentence.

    Args:
        what: the file, or a phrase that names it, for the message.
        advice: what to do about it; by default to make room, or to name another place.
        error: the exception.

    Raises:
        HispecError: of kind ``error``.
    """
    try:
        yield
    except OSError as reason:
        raise error(unwritable(what, reason, advice)) from reason


def unwritable(what: Path | str, reason: OSError, advice: str = "") -> str:
    """Returns one sentence: what cannot be written, why, and what to do about it."""
    if not advice:
        advice = "name another place"
        if reason.errno in FULL:
            advice = f"free some room, or {advice}"
        elif reason.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = f"make it writable, or {advice}"
    return f"cannot write {what} ({reason.strerror or reason}): {advice}."
