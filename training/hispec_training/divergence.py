"""KL from the original's next-token distribution to the adapted model's, a chunk of rows at a time.

With logits z of the adapted model and z0 of the original, ``KL(p0 || p) = sum p0 (log p0 - log p)``
and its gradient in z is ``p - p0``. Both distributions share one frozen head, so only the gradient
of the state is needed; it is taken while the logits are there and (rows, vocabulary) never exists
whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hispec_training.losses import chunk_values


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, original: Tensor, rows: Tensor) -> Tensor:
        chunk = max(1, 2 * chunk_values(x.device) // rows.shape[0])
        grad = torch.empty_like(x)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, x.shape[0], chunk):
            part = slice(start, start + chunk)
            log_p = (x[part].to(rows.dtype) @ rows.T).float().log_softmax(-1)  # (n, V)
            log_p0 = (original[part].to(rows.dtype) @ rows.T).float().log_softmax(-1)
            p0 = log_p0.exp()
            total += (p0 * log_p0.sub_(log_p)).sum()
            grad[part] = (log_p.exp_().sub_(p0).to(rows.dtype) @ rows).to(x.dtype)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_total: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_total[0], None, None


def divergence(x: Tensor, original: Tensor, rows: Tensor) -> Tensor:
    """Returns the summed KL, differentiable in x alone.

    Args:
        x: (N, D) normed final states of the adapted model.
        original: (N, D) normed final states of the original.
        rows: (V, D) the frozen head; the products run in its dtype.

    Returns:
        () fp32, nats.
    """
    return _Divergence.apply(x, original, rows)
