"""The k largest logits of each row, in order, with noise or without; and the sum behind odds."""

from __future__ import annotations

import torch
from torch import Tensor

from hispec_kernels import cpu, gpu
from hispec_kernels.noise import noisy


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the largest entries of each row, descending; of equal ones the lowest column first.

    Args:
        logits: (T, V) fp32.
        k: 1 … V.

    Returns:
        values: (T, k) fp32.
        ids: (T, k) int64 columns.
    """
    if logits.is_cuda and 1 < k <= 64 and not gpu.why_not(logits.device):
        from hispec_kernels.gpu.top_k import top_k as on_gpu

        return on_gpu(logits, k)
    library = cpu.in_use(logits)
    if library is None or logits.dtype != torch.float32:
        return _top_k(logits, k)
    rows, size = logits.shape
    assert 1 <= k <= size, "k must be in [1, V]"
    logits = logits.contiguous()
    values, ids = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    scratch = torch.empty(rows * -(-size // 64))
    library.top_k(
        *(logits.data_ptr(), rows, size, k, values.data_ptr(), ids.data_ptr()),
        *(scratch.data_ptr(), torch.get_num_threads()),
    )
    return values, ids


def _top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What :func:`top_k` returns, by torch."""
    if k == 1:
        ids = logits.argmax(-1, keepdim=True)  # the lowest of equal columns
        return logits.gather(-1, ids), ids
    bound = logits.topk(k).values[:, -1:]  # (T, 1)
    # torch's choice among entries equal to the last is arbitrary: take the lowest columns.
    above, equal = logits > bound, logits == bound
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))  # k a row
    ids = chosen.nonzero()[:, 1].view(-1, k)
    values, order = logits.gather(-1, ids).sort(stable=True, dim=-1, descending=True)
    return values, ids.gather(-1, order)


def log_sum_exp(logits: Tensor, temperature: float) -> Tensor:
    """Returns log Σ exp(logits / temperature) of each row, (T, 1): what odds are measured by.

    Args:
        logits: (T, V) fp32.
        temperature: > 0.
    """
    library = cpu.in_use(logits)
    if library is None or logits.dtype != torch.float32:
        return torch.logsumexp(logits / temperature, -1, keepdim=True)
    logits = logits.contiguous()
    out = torch.empty(len(logits), 1)
    library.log_sum_exp(
        logits.data_ptr(), *logits.shape, temperature, out.data_ptr(), torch.get_num_threads()
    )
    return out


def gumbel_top_k(
    logits: Tensor,
    temperature: float,
    seed: int,
    positions: Tensor,
    ids: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Returns each row's k best ids under the noise of :func:`~hispec_kernels.noise.gumbel`.

    The first is a sample of softmax(logits / temperature), the k are one without replacement.

    Args:
        logits: (T, V) fp32.
        temperature: > 0.
        seed: of the noise.
        positions: (T,) int64.
        ids: (V,) or (T, V) int64, the columns' ids; None where the columns are the ids.
        k: 1 … V.

    Returns:
        values: (T, k) fp32, logits / temperature + noise, descending.
        ids: (T, k) int64; of equal values the lowest column first.
    """
    values, columns = top_k(noisy(logits, temperature, seed, positions[:, None], ids), k)
    if ids is None:
        return values, columns
    return values, ids.expand(logits.shape).gather(-1, columns)
