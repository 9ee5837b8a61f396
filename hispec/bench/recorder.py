"""A decoder that also writes down where each token came from and which weights were read."""

from __future__ import annotations

from typing import Any

from hispec.engine import Decoder, _Level
from hispec.model.config import ModelConfig
from hispec.model.exits import ExitHead, TrainedHead
from hispec.model.llama import Llama


class Recorder(Decoder):
    """Decodes exactly as ``Decoder`` does; a few list operations a step are all it adds.

    Attributes:
        origins: for each committed token the level or source that put it into the tree.
        bytes_read: weights read by all passes so far.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.origins: list[str] = []
        self.bytes_read = 0

    def commit(self) -> list[int]:
        """See ``Decoder.commit``."""
        self.origins += self.tree.origins[1:]
        return super().commit()

    def pass_over(self, level: _Level, most: int) -> Any:
        """See ``Decoder.pass_over``."""
        self.note_reads(level)
        return super().pass_over(level, most)

    def note_reads(self, level: _Level) -> None:
        """Counts the weights a level's pass is about to read; lifting reads those below too."""
        end, below = len(self.tokens) - 1 + len(self.tree), 0
        runner = level.runner
        model, cache = runner.model, runner.cache
        layer = layer_bytes(model.config, model.dtype.itemsize)
        for boundary in cache.boundaries:
            if cache.computed[boundary] < end:
                self.bytes_read += (boundary - below) * layer
            if boundary == runner.boundary:
                break
            below = boundary
        self.bytes_read += head_bytes(model, runner.head)


def layer_bytes(config: ModelConfig, itemsize: int) -> int:
    """Returns the bytes of one block's matrices."""
    attention = 2 * config.num_heads + 2 * config.num_kv_heads
    size = config.hidden_size * (attention * config.head_dim + 3 * config.intermediate_size)
    return size * itemsize


def head_bytes(model: Llama, head: ExitHead) -> int:
    """Returns the bytes of the matrices a head reads in a pass."""
    config, itemsize = model.config, model.dtype.itemsize
    rows = config.vocab_size if head.vocab_ids is None else len(head.vocab_ids)
    size = rows * config.hidden_size * itemsize
    if isinstance(head, TrainedHead):
        size += config.hidden_size**2 * itemsize if head.proj is not None else 0
        size += layer_bytes(config, itemsize) if head.block is not None else 0
    return size
