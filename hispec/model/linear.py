"""Matrix products with weights in the layout this device reads fastest.

On a CPU the weight is reordered once for oneDNN and the original is dropped: 13 ms instead of 24 for
the products of a SmolLM2-135M pass in bf16 on two cores. The two operators are torch-internal
(inductor's freezing uses them), so :func:`packing_available` asks first; without them, and on CUDA,
products are plain ``F.linear``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows the packed layout is made for. oneDNN picks a blocking by it; measured on AVX-512 and AMX,
# 1 to 8 make no difference at widths 1 to 16.
_PACK_ROWS = 4


def packing_available(device: torch.device, dtype: torch.dtype) -> bool:
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
        weight: (out, in). Packed and dropped where packing is available; kept as it is otherwise.
        bias: (out,) or None.
        pack: ask for packing; ignored where it is not available. The compiled passes of
            ``hispec_kernels.cpu`` read plain rows.
    """

    __slots__ = ("weight", "bias", "packed", "_call")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = True) -> None:
        self.packed = pack and packing_available(weight.device, weight.dtype)
        self.bias = bias
        self.weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
            if self.packed
            else weight.contiguous()
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns the product for ``x`` (W, in), plus ``residual`` (W, out) if given: (W, out)."""
        if self.packed:
            op = torch.ops.mkldnn._linear_pointwise
            if residual is None:
                return op(x, self.weight, self.bias, "none", [], "")
            return op.binary(x, residual, self.weight, self.bias, "add")
        y = F.linear(x, self.weight, self.bias)
        return y if residual is None else y.add_(residual)
