"""hispec: hierarchical self-speculative decoding for Llama models, losslessly.

Importing this package is free: torch and transformers are loaded when a name that needs them is
first used, so that ``hispec --help`` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module it lives in
_LAZY = {
    "load": "hispec.loading",
    "generate": "hispec.generation",
    "stream": "hispec.generation",
    "generate_with": "hispec.hf",
    "Sampling": "hispec.sampling",
    "open_checkpoint": "hispec.model.checkpoint",
    "HispecError": "hispec.errors",
    "UsageError": "hispec.errors",
    "CheckpointError": "hispec.errors",
}

# modules that need no import of their own: ``hispec.hf.generate``
_MODULES = ("hf",)

__all__ = ["__version__", *_LAZY, *_MODULES]

if TYPE_CHECKING:
    from hispec import hf as hf
    from hispec.errors import CheckpointError as CheckpointError
    from hispec.errors import HispecError as HispecError
    from hispec.errors import UsageError as UsageError
    from hispec.generation import generate as generate
    from hispec.generation import stream as stream
    from hispec.hf import generate_with as generate_with
    from hispec.loading import load as load
    from hispec.model.checkpoint import open_checkpoint as open_checkpoint
    from hispec.sampling import Sampling as Sampling


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"hispec.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'hispec' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})
