"""What tests of generating inside transformers have in common."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from hispec.hierarchy import Hierarchy, Level

PROMPT = torch.tensor([[5, 9, 33, 70, 71, 5, 9, 200, 14, 33, 70]])
LAYERSKIP = Hierarchy((Level(2, 3),))
HISPEC = Hierarchy((Level(1, 2), Level(3, 4)))


class Backwards(LogitsProcessor):
    """The user's own: no token that is larger than the last one plus 40."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, last in enumerate(input_ids[:, -1].tolist()):
            scores[row, last + 41 :] = -torch.inf
        return scores
