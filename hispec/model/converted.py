"""Converted models in the user's cache, one folder for each GGUF file's digest.

A file is converted when it is first opened. Later its digest alone finds the folder, and the digest
is remembered, so that opening a model again reads neither the GGUF file nor its package.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from hispec.errors import CheckpointError
from hispec.files import WriteError, write_whole
from hispec.model.store import build_once, cache_dir
from hispec.model.tensorfile import TensorFile

# Raised when the conversion changes, so that folders made by an older one are left alone.
CONVERTER_VERSION = 1


def convert_cached(path: Path, *, sha256: str | None = None) -> Path:
    """The folder in the user's cache that holds the converted file, made on first use.

    Args:
        path: The GGUF file.
        sha256: Its known digest; computed (and remembered by path, size and time) when not given.

    Raises:
        CheckpointError: If the file is damaged, not a Llama, or the cache cannot be written.
    """
    from hispec.model.gguf import convert  # imports numpy and gguf only where they are needed

    if sha256 is None:
        sha256 = _remembered_sha256(path)
    return build_once(
        converted_folder(sha256),
        lambda temporary: convert(path, temporary),
        is_whole=is_whole,
        label=f"the converted {path.name}",
    )


def converted_folder(sha256: str) -> Path:
    """Where the conversion of the file with this digest belongs."""
    return cache_dir() / "converted" / f"v{CONVERTER_VERSION}-{sha256[:32]}"


def is_whole(folder: Path) -> bool:
    """Whether a converted folder can be opened: a cheap look that finds a torn one."""
    try:
        json.loads((folder / "config.json").read_bytes())
        if not (folder / "tokenizer.json").read_bytes().rstrip().endswith(b"}"):
            return False
        TensorFile(folder / "model.safetensors")
    except (OSError, ValueError, CheckpointError):
        return False
    return True


def file_sha256(path: Path) -> str:
    """The hex digest of a file.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    return digest.hexdigest()


def _remembered_sha256(path: Path) -> str:
    """The digest of a file, kept under its path, size and time: hashing 5 GB takes seconds."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    key = f"{path.resolve()}|{info.st_size}|{info.st_mtime_ns}"
    note = cache_dir() / "digests" / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        return note.read_text().strip()
    except OSError:
        digest = file_sha256(path)
    with suppress(WriteError):  # only a memory; the conversion reports a cache that is read only
        write_whole(note, digest)
    return digest
