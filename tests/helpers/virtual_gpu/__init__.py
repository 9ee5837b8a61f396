"""A GPU that is the host, for finding what only a GPU would say no to.

``HISPEC_VIRTUAL_GPU=1 pytest …`` runs tests on it. Tensors on the wrong device, results read inside
of a capture, memory that nobody has written: what Triton's interpreter lets pass, as it takes all
of the host's tensors alike, fails here as it would on CUDA (``device.cpp``). Kernels are
interpreted, graphs are replayed by doing again what was captured. What it cannot show is time, and
anything of Triton's compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAME = "Virtual GPU"
SOURCE = Path(__file__).with_name("device.cpp")


def why_not() -> str:
    """Returns why there is none here; empty if there can be one."""
    if platform.system() != "Linux":
        return "it is built for Linux"
    if shutil.which("c++") is None:
        return "no C++ compiler"
    if importlib.util.find_spec("triton") is None:
        return "no Triton, whose interpreter runs its kernels"
    if not (_torch() / "lib" / "libtorch_cpu.so").exists():
        return "torch's libraries are not where they should be"
    if any((_torch() / "lib" / f"libtorch_{kind}.so").exists() for kind in ("cuda", "hip")):
        return "this torch knows real GPUs"
    return ""


def _torch() -> Path:
    """Returns torch's folder, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin, "torch is installed"
    return Path(spec.origin).parent


def install(cache: Path) -> None:
    """After the call torch has a CUDA device; called before torch is imported.

    Args:
        cache: a folder that keeps the compiled device.
    """
    if why := why_not():
        raise RuntimeError(f"no virtual GPU here: {why}")
    assert "torch" not in sys.modules, "torch looks for a GPU once, when it is imported"
    os.environ["TRITON_INTERPRET"] = "1"
    root = _torch()
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / name), ctypes.RTLD_GLOBAL)
    # Before torch looks for one, which it does once.
    ctypes.CDLL(str(_built(root, cache)), ctypes.RTLD_GLOBAL)
    _tell_torch()
    _tell_triton()


def _built(root: Path, cache: Path) -> Path:
    """Returns the compiled device."""
    source = SOURCE.read_bytes() + importlib.metadata.version("torch").encode()
    target = cache / f"virtual-gpu-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / target.name
            flags = ["-shared", "-fPIC", "-O0", "-std=c++20", f"-I{root}/include"]
            libraries = [f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
            subprocess.run(["c++", *flags, SOURCE, "-o", made, *libraries], check=True)
            made.replace(target)
    return target


class _Stream:
    """There is but one, and all that is given to it is done at once."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: _Event) -> float:
        return max((other.at - self.at) * 1e3, 1e-3)


class _Graph:
    """Replaying it does nothing, but for those of :class:`hispec.model.graphs.Graphs`."""

    def replay(self) -> None: ...


@contextmanager
def _captured(*_: Any, **__: Any) -> Iterator[None]:
    import torch

    torch.ops.virtual_gpu.capture(True)
    try:
        yield
    finally:
        torch.ops.virtual_gpu.capture(False)


def _tell_torch() -> None:
    """Puts what is written in Python, and asks libraries that are not there, in order."""
    import torch

    cuda: Any = torch.cuda
    nothing = (
        "init _lazy_init set_device synchronize set_stream empty_cache ipc_collect manual_seed "
        "manual_seed_all reset_peak_memory_stats"
    )
    sizes = "memory_allocated max_memory_allocated memory_reserved max_memory_reserved"
    answers = {
        **dict.fromkeys(nothing.split()),
        **dict.fromkeys(sizes.split(), 1 << 20),
        "is_available": True,
        "is_initialized": True,
        "is_current_stream_capturing": False,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "current_stream": _Stream(),
        "default_stream": _Stream(),
        "get_device_capability": (9, 0),
        "get_device_name": NAME,
        "graph_pool_handle": (0, 0),
        "mem_get_info": (6 << 30, 8 << 30),
        "get_device_properties": SimpleNamespace(
            name=NAME,
            major=9,
            minor=0,
            total_memory=8 << 30,
            multi_processor_count=4,
            shared_memory_per_block_optin=227 << 10,
        ),
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    cuda.Stream, cuda.Event, cuda.CUDAGraph, cuda.graph = _Stream, _Event, _Graph, _captured
    torch.Tensor.pin_memory = torch.Tensor.clone

    copied: Any = torch.Tensor.__deepcopy__
    to_host: Any = torch.UntypedStorage.cpu

    def deepcopy(x: Any, memo: dict[int, Any]) -> Any:
        if not x.is_cuda or not x.is_leaf or x.requires_grad:
            return copied(x, memo)
        return memo.setdefault(id(x), x.clone())

    def cpu(storage: Any) -> Any:
        if storage.device.type != "cuda":
            return to_host(storage)
        whole = torch.empty(0, dtype=torch.uint8, device="cuda")
        return whole.set_(storage, 0, (storage.nbytes(),), (1,)).cpu().untyped_storage()

    torch.Tensor.__deepcopy__, torch.UntypedStorage.cpu = deepcopy, cpu
    _replay_ours()


def _replay_ours() -> None:
    """A graph of ours does again what was captured."""
    from hispec.model.graphs import Graphs

    original = Graphs._capture

    def capture(self: Any, work: Any) -> Any:
        graph = original(self, work)
        if isinstance(graph, _Graph):
            graph.replay = lambda: work(True)
        return graph

    Graphs._capture = capture


def _tell_triton() -> None:
    """The interpreter works on the device's memory as it is, and takes no other."""
    import torch
    from triton.runtime.interpreter import GridExecutor, _rewrap_tensor, _unwrap_tensor

    def down(argument: Any) -> Any:
        if not hasattr(argument, "data_ptr"):
            return argument
        plain = _unwrap_tensor(argument)
        if not plain.is_cuda:
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        return _rewrap_tensor(torch.ops.virtual_gpu.host(plain), original_tensor=argument)

    def arguments(self: Any, given: Any, named: Any) -> tuple[list[Any], dict[str, Any]]:
        return [down(x) for x in given], {name: down(x) for name, x in named.items()}

    GridExecutor._init_args_hst = arguments
    GridExecutor._restore_args_dev = lambda self, *_: None
