"""Matrix products with weights in the layout that whoever multiplies them reads fastest.

    plain     (out, in) rows: CUDA, and the compiled passes in fp32
    tiles     [out / 16][in / 32][16][32]: the compiled passes in bf16, where the processor has AMX
    pairs     [out / 16][in / 2][16][2]: the same, on every other processor
    bytes     the order of pairs, in numbers of 7 bits with a scale a row: there, for weights that
              only draft
    onednn    torch's own order for a CPU: 13 ms instead of 24 for the products of a SmolLM2-135M
              pass in bf16 on two cores

A weight is reordered once and the original dropped. The oneDNN operators are torch-internal
(inductor's freezing uses them), so :func:`onednn_available` asks first.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Layout = Literal["plain", "tiles", "pairs", "bytes", "onednn"]

# The byte of a weight of zero; the others are 1 … 127.
_MIDDLE = 64

# Rows oneDNN's layout is made for. It picks a blocking by it; measured on AVX-512 and AMX, 1 to 8
# make no difference at widths 1 to 16.
_PACK_ROWS = 4


def onednn_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether oneDNN's prepacked products exist for this device and dtype."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (
            dtype == torch.float32
            or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


class Linear:
    """``x Wᵀ + b``, optionally added onto a residual.

    Args:
        weight: (out, in); kept in ``layout`` only.
        bias: (out,) or None.
        layout: see the module's text. Tiles, pairs and bytes are for the compiled passes and cannot
            be called here.

    Attributes:
        rows: out.
        scale: (out padded to 16,) fp32 where the weights are bytes, else None.
    """

    __slots__ = ("bias", "layout", "rows", "scale", "weight")

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, layout: Layout = "plain"
    ) -> None:
        self.bias = bias
        self.layout = layout
        self.rows = weight.shape[0]
        self.scale: Tensor | None = None
        if layout == "onednn":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
        elif layout == "tiles":
            self.weight = to_panels(weight, 32)
        elif layout == "pairs":
            self.weight = to_panels(weight, 2)
        elif layout == "bytes":
            wide = weight.float()
            scale = (wide.abs().amax(1) / (_MIDDLE - 1)).clamp_min(1e-30)  # (out,)
            levels = (wide / scale[:, None]).round() + _MIDDLE
            self.weight = to_panels(levels.to(torch.uint8), 2)
            self.scale = F.pad(scale, (0, -len(scale) % 16))
        else:
            self.weight = weight.contiguous()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns the product for ``x`` (W, in), plus ``residual`` (W, out) if given: (W, out)."""
        if self.layout == "onednn":
            op = torch.ops.mkldnn._linear_pointwise
            if residual is None:
                return op(x, self.weight, self.bias, "none", [], "")
            return op.binary(x, residual, self.weight, self.bias, "add")
        assert self.layout == "plain", "panels are read by the compiled passes alone"
        y = F.linear(x, self.weight, self.bias)
        return y if residual is None else y.add_(residual)

    def take(self, rows: Tensor) -> Tensor:
        """Returns some rows of the weight, (T, in), by number; of plain rows, tiles and pairs."""
        assert self.layout in ("plain", "tiles", "pairs"), "the others are read by products alone"
        if self.layout == "plain":
            return self.weight[rows]
        return self.weight[rows // 16, :, rows % 16].flatten(1)


def to_panels(weight: Tensor, step: int) -> Tensor:
    """Returns an (out, in) weight as (⌈out / 16⌉, in / step, 16, step), missing rows 0."""
    rows, size = weight.shape
    if rows % 16:
        weight = torch.cat([weight, weight.new_zeros(-rows % 16, size)])
    return weight.view(-1, 16, size // step, step).transpose(1, 2).contiguous()
