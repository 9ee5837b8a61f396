"""What a number was measured on: machine, library versions, commit, threads, load."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hispec import __version__
from hispec.generation import LM
from hispec.model.device import dtype_name
from hispec.model.measured import cpu_name


def collect(lm: LM) -> dict[str, Any]:
    """Returns the record that stands beside a run's rows."""
    import transformers

    model, config = lm.model, lm.model.config
    itemsize = model.dtype.itemsize
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(["hispec", *sys.argv[1:]]),
        "hispec": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "load_average": _load(),
        "memory_gb": _memory_gb(),
        "model": lm.checkpoint.name,
        "fingerprint": lm.checkpoint.fingerprint,
        "exits": str(lm.exits.path) if lm.exits else None,
        "dtype": dtype_name(model.dtype),
        "device": model.device.type,
        "layers": config.num_layers,
        "passes": model.narrow.name,
        "why_not_compiled": model.why_not_native,
        "weight_bytes": model.weight_bytes(),
        "kv_bytes_per_token": 2
        * config.num_layers
        * config.num_kv_heads
        * config.head_dim
        * itemsize,
        "read_gb_per_s": read_bandwidth(model.device),
    }
    if model.device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(model.device)
        record["cuda"] = torch.version.cuda
    return record


def read_bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Returns GB/s at which this device reads memory: the best of five sums over a large array."""
    data = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        data.sum()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return (megabytes << 20) / best / 1e9


def memory_in_use(device: torch.device) -> int:
    """Returns the bytes in use: on a GPU the peak since it was last reset, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (OSError, ValueError):
        return None


def _commit() -> str | None:
    """The commit of the source tree, ``+`` where it has changes; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:
        return None
