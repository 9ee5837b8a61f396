"""From cached texts to padded batches of whole texts, for training the backbone.

Everything random is a function of (seed, epoch) or (seed, text), so a resumed run and any number of
processes see the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hispec_training.shard_cache import Texts
from hispec_training.shards import cut


@dataclass(frozen=True)
class TextBatch:
    """Padded texts.

    Attributes:
        ids: (B, T) int64.
        chosen: (B, T) bool, positions with a target.
        pick: (N,) int64 the original's picks there, row by row.
        top_ids: (N, K) int64.
        top_logits: (N, K) fp32.
        kept: (B, T) bool, positions with a divergence.
        final: (M, D) the original's final states there, before the norm.
    """

    ids: Tensor
    chosen: Tensor
    pick: Tensor
    top_ids: Tensor
    top_logits: Tensor
    kept: Tensor
    final: Tensor


def text_batches(cache: Texts, batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Returns a random order of batches of similar length, each at most ``batch_tokens`` padded."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(cache), generator=generator).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), 512):
        window = sorted(order[start : start + 512], key=lambda i: cache.lengths[i])
        batches += cut(window, cache.lengths, batch_tokens)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def kept_count(length: int, fraction: float) -> int:
    """Returns at how many positions of a text the divergence is taken; at least one."""
    return max(1, math.ceil(length * fraction))


def collate(
    cache: Texts,
    indices: Sequence[int],
    final_layer: int,
    onward: Collection[int] = (),
    fraction: float = 1.0,
    seed: int = 0,
) -> TextBatch:
    """Returns the batch of some texts.

    Args:
        cache: Where they lie.
        indices: Which.
        final_layer: L.
        onward: Those of them that have positions with a divergence.
        fraction: Share of positions that have; drawn from (seed, text).
        seed: See there.
    """
    texts = cache.texts(indices)
    shape = (len(texts), max(len(text.ids) for text in texts))
    ids = torch.zeros(shape, dtype=torch.int64)
    chosen, kept = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    final = [texts[0].states[final_layer][:0]]
    for row, (index, text) in enumerate(zip(indices, texts, strict=True)):
        length = len(text.ids)
        ids[row, :length] = text.ids
        chosen[row, text.first : text.first + len(text.pick)] = True
        if index not in onward:
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_033 + index)
        order = torch.randperm(length, generator=generator)
        places = order[: kept_count(length, fraction)].sort().values
        kept[row, places] = True
        final.append(text.states[final_layer][places])
    return TextBatch(
        ids=ids,
        chosen=chosen,
        pick=torch.cat([text.pick for text in texts]).long(),
        top_ids=torch.cat([text.top_ids for text in texts]).long(),
        top_logits=torch.cat([text.top_logits for text in texts]).float(),
        kept=kept,
        final=torch.cat(final),
    )
