"""What was measured of this machine, remembered in the user's cache folder.

A value belongs to a processor, a torch, a number of threads, a dtype and a model's sizes. Where the
folder cannot be written it is measured again at the next start.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hispec.model.llama import Llama
from hispec.model.nodes import MAX_WIDTH
from hispec.model.store import cache_dir


def remembered(
    kind: str, model: Llama, measure: Callable[[], Any], detail: str = "", *, anew: bool = False
) -> Any:
    """Returns what ``measure()`` returned here before for such a model, or measures now.

    Args:
        kind: what is measured; the name of a folder.
        model: whose passes it is about.
        measure: returns something JSON holds.
        detail: what else the value belongs to.
        anew: measure now and remember that.
    """
    key = f"{_key(model)}|{detail}" if detail else _key(model)
    path = cache_dir() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not anew:
        try:
            return json.loads(path.read_text())["value"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not measured yet, or damaged: measure
    value = measure()
    _remember(path, {"value": value, "measured_for": key})
    return value


def _key(model: Llama) -> str:
    config = model.config
    device = model.device.type
    parts = (
        metadata.version("hispec"),
        torch.__version__,
        platform.machine(),
        _processor(),
        torch.get_num_threads(),
        type(model.narrow).__name__,
        getattr(model.narrow, "build", ""),
        device if device == "cpu" else torch.cuda.get_device_name(),
        model.dtype,
        "exact" if model.exact else "fast",
        config.num_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.vocab_size,
        MAX_WIDTH,
    )
    return "|".join(map(str, parts))


def _remember(path: Path, record: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(record, file)
        os.replace(temporary, path)
    except OSError:
        pass  # an unwritable cache costs a second at the next start, nothing else


def machine(device: torch.device) -> str:
    """Returns the name of the processor that computes, the GPU's where that is one."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    return _processor().partition(":")[2].strip() or _processor()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "stepping")):
                return line
    except OSError:
        pass
    return platform.processor()
