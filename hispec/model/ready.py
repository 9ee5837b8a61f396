"""From a checkpoint to a model that decodes: loaded, its passes chosen and rounding alike."""

from __future__ import annotations

import sys

import torch

from hispec.model.checkpoint import Checkpoint
from hispec.model.device import enough_memory
from hispec.model.linear import Layout
from hispec.model.llama import Llama
from hispec.model.numerics import settle_width


def ready(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    exact: bool = True,
    layout: Layout | None = None,
    context: int | None = None,
) -> Llama:
    """Returns a checkpoint's model; says so on stderr where it runs without a GPU's kernels.

    Args:
        checkpoint: a target or a separate model.
        dtype: of weights and cache.
        device: where they go.
        exact: every pass rounds alike, whatever its width.
        layout: see :meth:`Llama.load`.
        context: likewise.

    Raises:
        HispecError: it does not fit into the GPU's memory, or exact numerics are not to be had.
    """
    with torch.inference_mode():
        model = Llama.load(checkpoint, dtype, device, exact=exact, layout=layout, context=context)
        if line := without_kernels(model, checkpoint.name):
            print(line, file=sys.stderr)
        if exact:
            with enough_memory(f"{checkpoint.name}'s first pass", None, "give a shorter --context"):
                settle_width(model)
    return model


def without_kernels(model: Llama, name: str) -> str:
    """Returns what to say where a GPU's kernels do not run; empty where they do, and on CPUs."""
    if model.device.type == "cpu" or not model.why_not_native:
        return ""
    return (
        f"hispec: no GPU kernels for {name} ({model.why_not_native}); it runs operator by "
        f"operator, which is slower."
    )
