"""The pick: which token a level would emit after a position.

    pick(logits, position) = argmax(logits / T + gumbel(seed, position, token))        T = 0: argmax

The noise depends on nothing but seed, position and token, so plain decoding, every exit and the
target add the same, and a seed fixes the text whatever the hierarchy. Ties go to the lowest id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hispec.errors import UsageError
from hispec_kernels import gumbel


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked.

    Attributes:
        temperature: 0 is greedy.
        seed: fixes the noise; only used above temperature 0.
    """

    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be 0 or more, got {self.temperature}.")

    def pick(self, logits: Tensor, first_position: int, ids: Tensor | None = None) -> list[int]:
        """Returns the picks after consecutive positions.

        Args:
            logits: (T, V) or, over a reduced vocabulary, (T, V_r).
            first_position: absolute position of the token that the first row picks.
            ids: (V_r,) full-vocabulary ids of the columns; None where the columns are the ids.
        """
        if self.temperature > 0.0:
            tokens = torch.arange(logits.shape[-1], device=logits.device) if ids is None else ids
            positions = torch.arange(
                first_position, first_position + logits.shape[0], device=logits.device
            )
            noise = gumbel(self.seed, positions[:, None], tokens)  # (T, V)
            logits = logits.float() / self.temperature + noise
        columns = logits.argmax(-1)  # (T,), the lowest of equal columns
        picks = columns if ids is None else ids[columns]
        return picks.tolist()  # sync: the host grows the tree
