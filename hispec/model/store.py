"""The user's cache folder: where converted models live, and how one gets there whole.

A folder appears under its final name by one rename of a finished temporary folder, so a reader
never sees half a model. A lock file makes a second process wait for the first and then find the
work done. Whatever a killed process left behind is removed by the next one to hold the lock.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hispec.errors import CheckpointError
from hispec.files import FULL


def cache_dir() -> Path:
    """The folder for everything hispec keeps between runs; it need not exist yet.

    ``$HISPEC_HOME`` if set, else ``$XDG_CACHE_HOME/hispec``, else ``~/.cache/hispec``.
    """
    if home := os.environ.get("HISPEC_HOME"):
        return Path(home).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "hispec"


def build_once(
    folder: Path,
    build: Callable[[Path], None],
    *,
    is_whole: Callable[[Path], bool],
    label: str,
) -> Path:
    """``folder`` exists and is whole, built by this process or an earlier one.

    Args:
        folder: Where the result belongs; its parents are created.
        build: Fills an empty folder; runs at most once at a time on this machine.
        is_whole: Whether a finished folder can be used; a damaged one is built again.
        label: What is being built, for messages.

    Raises:
        CheckpointError: If the cache folder cannot be written or has no room.
    """
    if is_whole(folder):
        return folder
    with writing(folder.parent, label), _locked(folder, label):
        if is_whole(folder):  # another process was faster
            return folder
        for torn in folder.parent.glob(f".{folder.name}.*.part"):
            shutil.rmtree(torn, ignore_errors=True)
        temporary = folder.parent / f".{folder.name}.{os.getpid()}.part"
        try:
            temporary.mkdir()
            build(temporary)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def require_space(folder: Path, num_bytes: int, label: str) -> None:
    """The disk of an existing folder has room for ``num_bytes`` more.

    Raises:
        CheckpointError: If it has not.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        raise CheckpointError(
            f"Not enough disk space for {label}: it takes {num_bytes / 1e6:,.0f} MB and {folder} "
            f"has {free_bytes / 1e6:,.0f} MB; free some or set HISPEC_HOME to another disk."
        )


@contextmanager
def writing(folder: Path, label: str) -> Iterator[None]:
    """Inside, ``folder`` exists; trouble with its disk becomes one sentence.

    Raises:
        CheckpointError: If the folder cannot be written or its disk fills up.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in FULL:
            raise CheckpointError(
                f"The disk of {folder} is full, so {label} could not be written: free some space "
                "or set HISPEC_HOME to another disk."
            ) from error
        raise CheckpointError(
            f"The cache folder {folder} cannot be written ({error.strerror or error}): make it "
            "writable or set HISPEC_HOME to a folder of yours."
        ) from error


@contextmanager
def _locked(folder: Path, label: str) -> Iterator[None]:
    """Inside, no other process builds ``folder``. The lock dies with its process."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        print(f"Waiting for another process that works on {label} ...", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
