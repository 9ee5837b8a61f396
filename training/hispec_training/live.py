"""Texts whose states are computed when they are asked for, on a GPU.

What the trunk says about a token takes kilobytes; a GPU says it again in less time than a disk
takes to hand it over (SmolLM2-135M: three exits and the end are 4 kB a token). So there the trunk
runs once an epoch instead of once, nothing is written, and the disk does not bound the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hispec_training.shard_cache import CachedText
from hispec_training.shards import TOP_K, Example, said_about
from hispec_training.trunk import Trunk

BATCH_TOKENS = 1 << 15  # padded tokens the trunk sees at once


class LiveTexts:
    """Texts and the model that says what there is to say about them.

    Args:
        examples: The texts.
        trunk: The model; texts are on its device.
        layers: Whose states a text has, L among them.
    """

    def __init__(self, examples: Sequence[Example], trunk: Trunk, layers: Sequence[int]) -> None:
        self.examples, self.trunk = list(examples), trunk
        self.layers = sorted(layers)
        self.lengths = [len(example.ids) for example in examples]
        self.response_lengths = [len(x.ids) - x.prompt_length for x in examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> CachedText:
        """Raises IndexError past the last one, which ends an iteration."""
        return self.texts([range(len(self))[index]])[0]

    @torch.no_grad()
    def texts(self, indices: Sequence[int]) -> list[CachedText]:
        """Returns some of them, computed together."""
        group = [self.examples[i] for i in indices]
        said = said_about(self.trunk, group, self.layers, TOP_K, BATCH_TOKENS)
        return [
            CachedText(
                ids=torch.tensor(example.ids, dtype=torch.int32),
                states={e: kept[f"state_{e}"] for e in self.layers},
                first=example.prompt_length - 1,
                pick=kept["pick"],
                top_ids=kept["top_ids"],
                top_logits=kept["top_logits"],
                category=example.category,
            )
            for example, kept in zip(group, said, strict=True)
        ]

    def pick_counts(self, vocab_size: int) -> Tensor:
        """(V,) int64: how often each token occurs in responses: the target's picks, if sampled."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for x in self.examples:
            counts += torch.bincount(torch.tensor(x.ids[x.prompt_length :]), minlength=vocab_size)
        return counts
