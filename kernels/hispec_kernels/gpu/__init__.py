"""The same operations as Triton kernels, one a file; each states which reference it must equal.

Importing this package loads nothing; its modules load Triton. On a machine without a GPU they run
in Triton's interpreter, where ``TRITON_INTERPRET=1`` is set before the first of them is imported.

Exactness. A row of a pass must get the same bits whatever rows it shares the pass with, so nothing
that shapes arithmetic depends on how many rows are real: products take rows in tiles of 16, a
whole row's sum over K in one order; attention takes keys by the *position* they stand at, in fixed
splits of 128 merged in order. The number of rows only decides how many tiles and programs run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from importlib import metadata
from pathlib import Path

import torch

#: The least compute capability: bf16 and asynchronous copies came with it (A100).
LEAST_CAPABILITY = (8, 0)
#: The most query heads that may share a KV head: they fill one tile of rows.
MAX_GROUP = 16
#: The widest head, in bytes: keys and values of 128 positions lie in shared memory together.
MAX_HEAD_BYTES = 512
#: The largest hidden size: a row is normalised by one program.
MAX_HIDDEN = 32768
#: The largest vocabulary: a row's candidates are ranked by one program.
MAX_VOCABULARY = 1 << 20


@functools.cache
def why_not(device: torch.device) -> str:
    """Returns why the kernels cannot run on this device; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < LEAST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return f"{name} has compute capability {major}.{minor}; the kernels need 8.0"
        return _trial(device)
    import triton

    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return ""
    return f"the kernels run on CUDA devices, and this is {device.type}"


def _trial(device: torch.device) -> str:
    """Returns why the smallest kernel cannot be built and run here; empty if it can."""
    from hispec_kernels.gpu.noise import noisy

    try:
        position = torch.zeros(1, dtype=torch.int64, device=device)
        noisy(torch.zeros(1, 1, device=device), 1.0, 0, position)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, no Python.h, no libcuda.so: each of another kind
        return no_build(error)
    return ""


@functools.cache
def build() -> str:
    """Returns what tells these kernels, and Triton's code for them, from others."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"triton {metadata.version('triton')} {digest.hexdigest()[:12]}"


def no_build(error: Exception) -> str:
    """Returns the reason that a failed build is, in one line."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"Triton cannot build the kernels here: {reason}"


def uncovered(
    hidden: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int, dtype: torch.dtype
) -> str:
    """Returns what about a model's sizes the kernels do not cover; empty if they cover it.

    Args:
        hidden: D.
        heads: H.
        kv_heads: H_kv.
        head_dim: D_h.
        vocabulary: V.
        dtype: of weights and cache.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels do not cover {dtype}"
    if head_dim % 2 or head_dim * dtype.itemsize > MAX_HEAD_BYTES:
        most = MAX_HEAD_BYTES // dtype.itemsize
        return f"the kernels cover even head sizes up to {most} in this dtype, not {head_dim}"
    if heads // kv_heads > MAX_GROUP:
        return f"the kernels cover {MAX_GROUP} query heads a KV head, not {heads // kv_heads}"
    if hidden > MAX_HIDDEN:
        return f"the kernels cover hidden sizes up to {MAX_HIDDEN}, not {hidden}"
    if vocabulary > MAX_VOCABULARY:
        return f"the kernels cover vocabularies up to {MAX_VOCABULARY}, not {vocabulary}"
    return ""
