"""The gate of Llama's MLP: ``silu(gate) * up`` (Shazeer 2020, GLU Variants Improve Transformer)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """Returns ``silu(gate) * up``.

    Args:
        gate_up: (..., 2 I), the gate's half first, as one fused projection leaves it.

    Returns:
        (..., I) in the same dtype.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
