"""Which device and dtype a name stands for here, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hispec.errors import HispecError, UsageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Choice(NamedTuple):
    """A device and a dtype, with the reason for each."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def dtype_name(dtype: torch.dtype) -> str:
    """Returns ``bf16``, ``fp16`` or ``fp32``."""
    return next(name for name, value in DTYPES.items() if value is dtype)


def choose(device: str = "auto", dtype: str = "auto") -> Choice:
    """Returns what ``--device`` and ``--dtype`` mean on this machine.

    Raises:
        UsageError: an unknown name, a device that is not there, a dtype it cannot compute in.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}. Use auto, cpu or cuda.")
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"unknown dtype {dtype!r}. Use auto, {', '.join(DTYPES)}.")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        built = "" if torch.version.cuda else " and this torch is built without CUDA"
        raise UsageError(f"no CUDA device is visible{built}. Use --device cpu.")
    if device == "cuda" or (device == "auto" and has_cuda):
        place, where = torch.device("cuda"), "a CUDA device is there"
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        automatic = torch.bfloat16 if native else torch.float16
        why = "bf16 is native" if native else "it has no native bf16"
    else:
        place = torch.device("cpu")
        where = "asked for" if device == "cpu" else "no CUDA device is visible"
        native = cpu_has_bf16()
        automatic = torch.bfloat16 if native else torch.float32
        why = "this CPU multiplies bf16" if native else "this CPU has no bf16 arithmetic"
    if dtype == "auto":
        return Choice(place, automatic, f"{where}; {why}")
    chosen = DTYPES[dtype]
    if chosen is torch.float16 and place.type == "cpu":
        raise UsageError("fp16 needs a CUDA device. Use bf16 or fp32 on a CPU.")
    return Choice(place, chosen, f"{where}; dtype asked for")


def upload(values: np.ndarray, device: torch.device, out: Tensor | None = None) -> Tensor:
    """Returns an array on the device; the host does not wait for work that runs there.

    Args:
        values: the array.
        device: where it goes.
        out: there, of that shape and dtype: what to write it into instead of new memory.
    """
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        # From pageable memory the copy would wait; pinned blocks are kept by torch until it is
        # over.
        tensor = tensor.pin_memory()
    if out is not None:
        return out.copy_(tensor, non_blocking=True)
    return tensor.to(device, non_blocking=True)


def ids_on(device: torch.device, tokens: Sequence[int | Tensor]) -> Tensor:
    """Returns ids on the device, (T,) int64, without looking at those that are there already.

    Args:
        device: where they are wanted.
        tokens: numbers, and behind them () int64 tensors that the device holds.
    """
    count = next((i for i, x in enumerate(tokens) if isinstance(x, Tensor)), len(tokens))
    known = upload(np.array(tokens[:count], np.int64), device) if count else None
    if count == len(tokens):
        return torch.empty(0, dtype=torch.int64, device=device) if known is None else known
    unread = torch.stack([token for token in tokens[count:] if isinstance(token, Tensor)])
    assert count + len(unread) == len(tokens), "numbers come first"
    return unread if known is None else torch.cat([known, unread])


def out_of_memory(error: RuntimeError) -> bool:
    """Returns whether a GPU's memory ran out: the allocator says so, or a library below it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


@contextmanager
def enough_memory(what: str, size: int | None, advice: str) -> Iterator[None]:
    """Inside, running out of a GPU's memory raises ``HispecError`` that says what was needed.

    Args:
        what: is being allocated.
        size: bytes it takes; None where nobody knows.
        advice: what to do about it, a sentence's end.
    """
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        needed = wanted(error) if size is None else f"{size / 2**30:.1f} GiB"
        room = ""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            room = f" and {torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB are free"
        raise HispecError(f"{what} needs {needed}{room}: {advice}.") from None


def wanted(error: RuntimeError) -> str:
    """Returns what an allocator that failed was asked for, as it says so itself."""
    found = re.search(r"Tried to allocate (\d[\d.]* \w+)", str(error))
    return f"{found[1]} more" if found else "more memory than there is"


def cpu_has_bf16() -> bool:
    """Returns whether this CPU has bf16 dot products (AVX-512 BF16 or AMX), not an emulation."""
    if not torch.backends.mkldnn.is_available():
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
