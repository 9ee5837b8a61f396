"""What was measured of this machine, remembered in the user's cache folder.

A value belongs to a processor, a torch, a number of threads, a dtype and a model's sizes. Where the
folder cannot be written it is measured again at the next start.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hispec.files import WriteError, write_whole
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
    with suppress(WriteError):  # a cache that is read only costs a second at the next start
        write_whole(path, json.dumps({"value": value, "measured_for": key}))
    return value


def _key(model: Llama) -> str:
    config = model.config
    device = model.device.type
    parts = (
        _version(),
        torch.__version__,
        platform.machine(),
        cpu_name(),
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


def machine(device: torch.device) -> str:
    """Returns the name of the processor that computes, the GPU's where that is one."""
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


@functools.cache
def cpu_name() -> str:
    """Returns the processor's name and numbers: to a virtual machine all EPYCs have one name."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    name = fields.get("model name") or platform.processor() or platform.machine()
    kinds = {"family": "cpu family", "model": "model", "part": "CPU part"}
    numbers = [f"{kind} {fields[key]}" for kind, key in kinds.items() if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


@functools.cache
def _version() -> str:
    return metadata.version("hispec")
