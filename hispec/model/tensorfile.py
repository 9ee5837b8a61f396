"""Reading and writing safetensors files one tensor at a time.

The format is eight bytes of header length, a JSON header, then raw little-endian data. Reading it
ourselves instead of mapping the file buys three things. A file that is too short is refused when
it is opened, where a mapping raises SIGBUS in the middle of a copy. A float32 file read for a
bfloat16 run costs the memory of one tensor, where touched pages of a mapping stay resident (+1x
the file). And writing streams: the largest tensor, not the model, has to fit into memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hispec.errors import CheckpointError

# safetensors names; both directions
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file.

    Attributes:
        dtype: The safetensors name, such as ``"BF16"``.
        shape: Sizes, outermost first.
        start: First byte, from the start of the file.
        num_bytes: Length of the data.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class TensorFile:
    """One safetensors file, its header read and checked against its size.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                    raise CheckpointError(_damaged(path, "its header does not fit into the file"))
                raw = file.read(length)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointError(f"Cannot read {path}: {reason}.") from error
        self.entries = _parse_header(path, raw, data_start=8 + length, file_size=size)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in fresh memory, in the dtype it is stored in.

        Raises:
            CheckpointError: If the file has no such tensor, its dtype is one torch models of this
                kind never use, or it ended early.
        """
        dtype, entry = self.dtype(name), self._entry(name)
        data = torch.empty(entry.num_bytes, dtype=torch.uint8)
        if entry.num_bytes:
            try:
                with open(self.path, "rb") as file:
                    file.seek(entry.start)
                    count = file.readinto(data.numpy().data)
            except OSError as error:
                reason = error.strerror or str(error)
                raise CheckpointError(f"Cannot read {name} from {self.path}: {reason}.") from error
            if count != entry.num_bytes:
                raise CheckpointError(_damaged(self.path, f"it ends inside {name}"))
        return data.view(dtype).reshape(entry.shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in.

        Raises:
            CheckpointError: If the file has no such tensor, or its dtype is one torch models of
                this kind never use.
        """
        found = self._entry(name).dtype
        if found not in _DTYPES:
            raise CheckpointError(
                f"Tensor {name} in {self.path} is stored as {found}, which hispec cannot read: "
                "save the model as float32, float16 or bfloat16."
            )
        return _DTYPES[found]

    def sample(self, name: str, chunk_bytes: int = 4096) -> bytes:
        """Bytes from the start, the middle and the end of a tensor; all of it when it is small.

        Raises:
            CheckpointError: If the file has no such tensor or can no longer be read.
        """
        entry = self._entry(name)
        last = max(entry.num_bytes - chunk_bytes, 0)
        try:
            with open(self.path, "rb", buffering=0) as file:
                parts = []
                for offset in sorted({0, last // 2, last}):
                    file.seek(entry.start + offset)
                    parts.append(file.read(min(chunk_bytes, entry.num_bytes - offset)))
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointError(f"Cannot read {name} from {self.path}: {reason}.") from error
        return b"".join(parts)

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise CheckpointError(f"{self.path} has no tensor {name}.")
        return self.entries[name]


def write_tensors(
    path: Path,
    specs: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    produce: Callable[[str], torch.Tensor],
) -> None:
    """The file holds every tensor of ``specs``, each produced just before it was written.

    Args:
        path: The file to create.
        specs: Name, dtype and shape of each tensor, in the order they are produced.
        produce: Returns the contiguous CPU tensor of a name; called once for each.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    specs = list(specs)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in specs:
        num_bytes = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # data starts aligned
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, dtype, shape in specs:
            tensor = produce(name)
            assert tensor.dtype == dtype and tuple(tensor.shape) == shape, name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # a rename must never overtake the data


def _damaged(path: Path, why: str) -> str:
    return f"{path} is truncated or damaged ({why}): download or save it again."


def _parse_header(path: Path, raw: bytes, *, data_start: int, file_size: int) -> dict[str, Entry]:
    try:
        header = json.loads(raw)
        entries = {}
        for name, fields in header.items():
            if name == "__metadata__":
                continue
            start, end = (int(bound) for bound in fields["data_offsets"])
            shape = tuple(int(size) for size in fields["shape"])
            entries[name] = Entry(str(fields["dtype"]), shape, data_start + start, end - start)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(_damaged(path, "its header is not readable")) from error
    for name, entry in entries.items():
        if entry.start < data_start or entry.start + entry.num_bytes > file_size:
            raise CheckpointError(_damaged(path, f"{name} lies beyond its {file_size} bytes"))
        dtype = _DTYPES.get(entry.dtype)
        if dtype is not None and math.prod(entry.shape) * dtype.itemsize != entry.num_bytes:
            raise CheckpointError(_damaged(path, f"{name} has the wrong length"))
    return entries
