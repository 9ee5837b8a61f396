"""Matrix products with weights in the layout that whoever multiplies them reads fastest.

    plain     (out, in) rows: CUDA, and the compiled passes in fp32
    tiles     [out / 16][in / 32][16][32]: the compiled passes in bf16, where the processor has AMX
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

Layout = Literal["plain", "tiles", "onednn"]

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
        layout: see the module's text. Tiles are for the compiled passes and cannot be called here.

    Attributes:
        rows: out.
    """

    __slots__ = ("bias", "layout", "rows", "weight")

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, layout: Layout = "plain"
    ) -> None:
        self.bias = bias
        self.layout = layout
        self.rows = weight.shape[0]
        if layout == "onednn":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
        elif layout == "tiles":
            self.weight = to_tiles(weight)
        else:
            self.weight = weight.contiguous()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns the product for ``x`` (W, in), plus ``residual`` (W, out) if given: (W, out)."""
        if self.layout == "onednn":
            op = torch.ops.mkldnn._linear_pointwise
            if residual is None:
                return op(x, self.weight, self.bias, "none", [], "")
            return op.binary(x, residual, self.weight, self.bias, "add")
        assert self.layout == "plain", "tiles are read by the compiled passes alone"
        y = F.linear(x, self.weight, self.bias)
        return y if residual is None else y.add_(residual)

    def take(self, rows: Tensor) -> Tensor:
        """Returns some rows of the weight, (T, in), by number; not for oneDNN's layout."""
        assert self.layout != "onednn", "oneDNN's order is its own"
        if self.layout == "plain":
            return self.weight[rows]
        return self.weight[rows // 16, :, rows % 16].flatten(1)


def to_tiles(weight: Tensor) -> Tensor:
    """Returns an (out, in) weight as (⌈out / 16⌉, in / 32, 16, 32), missing rows 0."""
    rows, size = weight.shape
    if rows % 16:
        weight = torch.cat([weight, weight.new_zeros(-rows % 16, size)])
    return weight.view(-1, 16, size // 32, 32).transpose(1, 2).contiguous()
