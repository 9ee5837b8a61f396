"""``hispec doctor``: what is installed, what would be used and why, whether exits look trained."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from typing import TYPE_CHECKING

from hispec import __version__

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "triton", "peft",
             "accelerate", "datasets")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--model", metavar="M", help="also load this model and try its exits")
    parser.add_argument("--exits", metavar="DIR", help="trained exits (default: those shipped)")
    parser.add_argument("--force-exits", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--force-plan", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="auto", metavar="auto|bf16|fp16|fp32")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    parser.add_argument("--numerics", default="exact", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Prints the report; returns the exit code."""
    _row("hispec", f"{__version__} on Python {platform.python_version()} ({sys.platform})")
    _row("packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))

    import torch

    from hispec.loading import choose_for
    from hispec.model.checkpoint import open_checkpoint
    from hispec.model.device import dtype_name
    from hispec.model.native import native_library
    from hispec.model.store import cache_dir

    config = open_checkpoint(args.model).config if args.model else None
    choice = choose_for(config, args.device, args.dtype)
    _row("device", f"{choice.device.type}, {dtype_name(choice.dtype)} ({choice.reason})")
    if choice.device.type == "cpu":
        _row("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors")
        if config is None:
            _, why = native_library(None, choice.dtype, choice.device)
            _row("passes", f"torch's: {why}" if why else "compiled for this processor")
    else:
        _row("gpu", torch.cuda.get_device_name())
        _row("kernels", kernels(choice.device))
    folder = cache_dir()
    writable = os.access(next(p for p in (folder, *folder.parents) if os.path.exists(p)), os.W_OK)
    _row("cache", f"{folder}{'' if writable else ' (not writable: set HISPEC_HOME)'}")
    return _model_report(args) if args.model else 0


def kernels(device: torch.device) -> str:
    """Returns which kernels run on a GPU, and how they are started."""
    from hispec.model.graphs import Graphs
    from hispec_kernels import gpu

    if why := gpu.why_not(device):
        return f"none: {why}"
    return f"Triton's, {'in CUDA graphs' if Graphs(device).on else 'one by one'}"


def _model_report(args: argparse.Namespace) -> int:
    from hispec.advice import break_even, costs
    from hispec.commands.options import load_model
    from hispec.hierarchy import Hierarchy, Level, eighth_and_quarter
    from hispec.trial import agreement

    lm = load_model(args)
    config, model = lm.model.config, lm.model
    _row("model", f"{lm.checkpoint.path}")
    _row(
        "sizes",
        f"{config.num_layers} layers, hidden {config.hidden_size}, {config.num_heads} heads over "
        f"{config.num_kv_heads}, vocabulary {config.vocab_size}, context {config.max_positions}",
    )
    weights = model.weight_bytes()
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.dtype.itemsize
    per_token += config.hidden_size * model.narrow.state_dtype.itemsize
    _row(
        "memory",
        f"{weights / 2**20:.0f} MiB weights + {per_token / 2**10:.1f} KiB a token of context "
        f"({per_token * config.max_positions / 2**20:.0f} MiB when full)",
    )
    why = model.why_not_native
    _row(
        "passes",
        f"{model.narrow.name}, weights in {model.layout} layout"
        if not why
        else f"torch, operator by operator ({why})",
    )
    least = model.narrow.min_width
    _row("numerics", f"exact: passes of {least} row{'s' * (least > 1)} and more round alike")
    known = lm.exits.exit_layers if lm.exits else eighth_and_quarter(config.num_layers)
    layers = sorted(set(known))
    _row("exits", f"{lm.exits.path}" if lm.exits else "none trained for these weights")
    rates, tokens = agreement(lm, layers)
    for layer in layers:
        single = Hierarchy((Level(layer, 2),))
        needed = break_even(costs(lm, single), single)
        state = "trained" if needed is not None and rates[layer] > needed else "untrained or weak"
        limit = f"{needed:.0%}" if needed is not None else "over 100%"
        _row(
            f"  exit {layer}",
            f"agrees with the target on {rates[layer]:.0%} of {tokens} tokens; drafting alone it "
            f"pays above {limit}: looks {state}",
        )
    return 0


def _row(name: str, text: str) -> None:
    print(f"{name:<10} {text}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"
