"""The loss of an exit head: cross-entropy against the target's pick and its top tokens.

Both are one formula. With a sparse target s (a few ids with weights, ``m = Σ s``) the loss of a
row is ``m · logsumexp(z) − Σ s_i z_i`` over the head's logits z, and its gradient is
``m · softmax(z) − s``. The rows of lm_head are frozen, so only the gradient of the state is
needed: it is computed while the logits are there, a chunk of rows at a time, and (rows,
vocabulary) never exists whole. Tokens outside a reduced vocabulary carry no weight: no answer of
the head would be right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def chunk_values(device: torch.device) -> int:
    """Logits to hold at once.

    On a CPU 8 MB in fp32, near its caches: a sixth faster than 32 MB. On a GPU 256 MB: there
    launching what works on a chunk is what takes time.
    """
    return 1 << 21 if device.type == "cpu" else 1 << 26


class _SparseCrossEntropy(torch.autograd.Function):
    """Sum over rows of ``m · logsumexp(z) − Σ s_i z_i``, and each row's best id."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, ids: Tensor, weights: Tensor, need_grad: bool
    ) -> tuple[Tensor, Tensor]:
        chunk = max(1, chunk_values(x.device) // rows.shape[0])
        grad = torch.empty_like(x) if need_grad else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        best = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
        for start in range(0, x.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (x[part].to(rows.dtype) @ rows.T).float()  # (n, V)
            wanted, sparse = ids[part].clamp_min(0), weights[part] * (ids[part] >= 0)
            mass = sparse.sum(-1, keepdim=True)
            picked = logits.gather(1, wanted)
            highest = logits.amax(-1, keepdim=True)
            if grad is None:
                best[part] = logits.argmax(-1)
            else:  # argmax costs as much as the exponentials: only say whether ids[:, 0] won
                best[part] = torch.where(picked[:, 0] >= highest[:, 0], ids[part][:, 0], -1)
            sums = logits.sub_(highest).exp_().sum(-1, keepdim=True)
            total += (mass * (sums.log() + highest)).sum() - (sparse * picked).sum()
            if grad is not None:
                logits.mul_(mass / sums).scatter_add_(1, wanted, -sparse)
                grad[part] = (logits.to(rows.dtype) @ rows).to(x.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(best)
        return total, best

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_total, None, None, None, None


def sparse_cross_entropy(
    x: Tensor, rows: Tensor, ids: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The summed loss, differentiable in x alone, and each row's pick.

    Args:
        x: (N, D) normed states.
        rows: (V', D) rows of lm_head, frozen; the products run in their dtype.
        ids: (N, K) int64 row numbers of the wanted tokens; -1 for one that has no row.
        weights: (N, K) fp32 ≥ 0, how much each is wanted. An id may repeat; weights add up.

    Returns:
        () fp32 sum over rows, and (N,) int64 row number of each row's largest logit; where a
        gradient is wanted, ``ids[:, 0]`` where that is it (ties included) and -1 where it is not.
    """
    need_grad = torch.is_grad_enabled() and x.requires_grad
    return _SparseCrossEntropy.apply(x, rows, ids, weights, need_grad)


def sparse_targets(
    pick: Tensor, top_ids: Tensor, top_logits: Tensor, row_of: Tensor, soft: float
) -> tuple[Tensor, Tensor]:
    """Row numbers and weights of what a head should answer.

    ``(1 − soft)`` on the target's pick, ``soft`` spread as the target's distribution over those of
    its top tokens the head has rows for (the KL term, up to a constant). A position whose pick has
    no row weighs nothing.

    Args:
        pick: (N,) int64 token ids.
        top_ids: (N, K) int64 token ids, best first.
        top_logits: (N, K) the target's logits there.
        row_of: (V,) int64 row of each token, -1 without.
        soft: Weight of the distribution, in [0, 1].

    Returns:
        (N, 1 + K) int64 row numbers, (N, 1 + K) fp32 weights.
    """
    rows = row_of[torch.cat([pick[:, None], top_ids], 1)]  # (N, 1 + K)
    known = (rows >= 0).float()
    shares = torch.softmax(top_logits.float(), -1) * known[:, 1:]
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(1e-9)
    weights = torch.cat([torch.full_like(shares[:, :1], 1.0 - soft), soft * shares], 1)
    return rows, weights * known[:, :1]
