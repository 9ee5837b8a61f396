"""Checkpoints of tests: variants of the tiny Llama, and the one sentence that refuses a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from hispec.errors import CheckpointError
from hispec.model.checkpoint import open_checkpoint

VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "mha": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 32},
    "sharded": {"shard_bytes": 60_000},
}


def refusal(model: Path | str) -> str:
    """The one sentence with which a model is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?")), message
    return message
