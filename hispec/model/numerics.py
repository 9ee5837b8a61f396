"""The width class: the pass widths at which a row rounds the same, found by trying.

Matrix products choose their kernels by shape. On the CPUs we measured, every width from 2 rows up
gives a row the same bits and only the single row takes another path, so plain decoding pads its one
row to two. That is a property of a library on a machine, not a law: :func:`find_min_width` runs one
block and the head at every width and takes what it sees.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from hispec.errors import HispecError
from hispec.model.llama import Llama
from hispec.model.measured import remembered
from hispec.model.nodes import MAX_WIDTH
from hispec.model.torch_passes import TorchPasses


def find_min_width(model: Llama) -> int:
    """Returns the least width from which on all widths to ``MAX_WIDTH`` agree bit for bit.

    Compares the first block and the vocabulary head on random rows, each width at several places
    among the rows of the widest pass.

    Raises:
        HispecError: not even two neighbouring widths agree, so exact numerics cannot be had here.
    """
    keep, model.narrow.min_width = model.narrow.min_width, 1
    try:
        generator = torch.Generator().manual_seed(0)
        shape = (MAX_WIDTH, model.config.hidden_size)
        rows = torch.randn(shape, generator=generator).to(model.device, model.dtype)
        reference = _results(model, rows, 0)
        agree = 0
        graphs = getattr(model.narrow, "graphs", None)  # they are for what recurs
        for width in range(MAX_WIDTH - 1, 0, -1):
            for first in sorted({0, (MAX_WIDTH - width) // 2, MAX_WIDTH - width}):
                with graphs.kernel_by_kernel() if graphs else nullcontext():
                    found = _results(model, rows[first : first + width], first)
                if any(
                    not torch.equal(a, b[first : first + width])
                    for a, b in zip(found, reference, strict=True)
                ):
                    if agree == 0:
                        raise HispecError(
                            f"no two pass widths round alike for {model.dtype} on "
                            f"{model.device}, so exact numerics are not to be had here: "
                            f"use --numerics fast or another --dtype."
                        )
                    return agree
            agree = width
        return agree
    finally:
        model.narrow.min_width = keep


def _results(model: Llama, rows: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """The states and logits of ``rows`` behind a fixed context, at their own positions."""
    kv = model.new_cache((model.config.num_layers,), 64 + 2 * MAX_WIDTH).kv
    generator = torch.Generator().manual_seed(1)
    for past in (kv.keys[0], kv.values[0]):
        noise = torch.randn(past[:, : 64 + MAX_WIDTH].shape, generator=generator)
        past[:, : 64 + MAX_WIDTH] = noise.to(model.device, model.dtype)
    # Keys of the rows to the left of ours within the wide pass: computed as the wide pass does.
    whole = torch.randn(
        (MAX_WIDTH, model.config.hidden_size), generator=torch.Generator().manual_seed(0)
    ).to(model.device, model.dtype)
    if position:
        model.run_layers(whole, 0, 1, 64, kv)
    states = model.run_layers(rows, 0, 1, 64 + position, kv)
    return states, model.logits(rows)


def settle_width(model: Llama) -> None:
    """After the call every pass of a model rounds alike, whatever its width.

    What :func:`find_min_width` finds is remembered per machine, library, dtype and shape.

    Raises:
        HispecError: that cannot be had here, or not with these passes.
    """
    width = remembered("numerics", model, lambda: find_min_width(model))
    if not isinstance(width, int) or width < 1:
        width = find_min_width(model)
    if width > 1 and not isinstance(model.narrow, TorchPasses):  # they alone pad
        raise HispecError(
            f"{model.narrow.name} passes of fewer than {width} rows round otherwise here than "
            f"wider ones, so exact numerics are not to be had with them: use --numerics fast."
        )
    model.narrow.min_width = width
