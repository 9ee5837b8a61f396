"""Root-mean-square normalisation: ``x / sqrt(mean(x²) + eps) * weight`` (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns ``x`` normalised over its last dimension, in ``x``'s dtype.

    Args:
        x: (..., D). The mean of squares is taken in fp32 whatever the dtype.
        weight: (D,).
        eps: added to the mean of squares.
    """
    if x.dtype == torch.float32 or x.device.type == "cpu":
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
