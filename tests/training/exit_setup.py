"""A tiny model, some texts of it and small heads: what the exit-training tests share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from hispec.model.checkpoint import Checkpoint
from hispec_training.exits import Exits
from hispec_training.heads import HeadSpec
from hispec_training.shard_cache import ShardCache
from hispec_training.shards import Example, build_shards
from hispec_training.trunk import Trunk

EXITS = (1, 2)


def make_examples(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    examples = []
    for i in range(count):
        prompt, response = rng.randint(1, 12), rng.randint(1, 20)
        ids = tuple(rng.randrange(200) for _ in range(prompt + response))
        examples.append(Example(ids, prompt, f"kind{i % 2}"))
    return examples


def make_cache(folder: Path, checkpoint: Checkpoint, count: int = 24, seed: int = 0) -> ShardCache:
    return build_shards(
        folder,
        make_examples(count, seed),
        lambda: Trunk(checkpoint, torch.float32),
        fingerprint=checkpoint.fingerprint,
        layers=[*EXITS, checkpoint.config.num_layers],
        top_k=4,
        shard_tokens=150,
    )


def make_exits(
    checkpoint: Checkpoint,
    cache: ShardCache,
    *,
    layers: Sequence[int] = EXITS,
    **spec: object,
) -> Exits:
    settings = {"kind": "block", "context": "deep", "feature": True, "vocab_size": 100, **spec}
    counts = cache.pick_counts(checkpoint.config.vocab_size)
    specs = [HeadSpec(e, **settings) for e in layers]  # type: ignore[arg-type]
    return Exits(specs, checkpoint, counts, dtype=torch.float32)
