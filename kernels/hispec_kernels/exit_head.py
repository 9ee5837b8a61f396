"""An exit's head to its end: the ids best under the noise, and how likely they are without."""

from __future__ import annotations

import torch
from torch import Tensor

from hispec_kernels.noise import noisy
from hispec_kernels.top_k import top_k


def best(
    logits: Tensor,
    k: int,
    temperature: float = 1.0,
    seed: int | None = None,
    positions: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the k best ids of each row and their odds.

    Args:
        logits: (T, V) fp32.
        k: 1 … V.
        temperature: > 0; divides the logits.
        seed: of the noise; None ranks without.
        positions: (T,) int64, where each row's token will stand; only read with a seed.
        ids: (V,) int64, the columns' ids; None where the columns are the ids.

    Returns:
        ids: (T, k) int64, best first; of equal scores the lowest column first.
        odds: (T, k) fp32, softmax(logits / temperature) there.
    """
    scores = logits
    if seed is not None:
        assert positions is not None, "noise is a function of the position"
        scores = noisy(logits, temperature, seed, positions[:, None], ids)
    columns = top_k(scores, k)[1]
    scaled = logits / temperature
    odds = (scaled.gather(-1, columns) - torch.logsumexp(scaled, -1, keepdim=True)).exp()
    return (columns if ids is None else ids[columns]), odds
