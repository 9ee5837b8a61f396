"""A decoder that also writes down where each token came from and which weights were read."""

from __future__ import annotations

from collections.abc import Container, Sequence

from hispec.engine import Decoder, _Level
from hispec.hierarchy import Hierarchy
from hispec.model.cache import Cache
from hispec.model.config import ModelConfig
from hispec.model.exits import ExitHead, TrainedHead
from hispec.model.llama import Llama
from hispec.sampling import Sampling


class Recorder(Decoder):
    """Decodes exactly as ``Decoder`` does; a few list operations a step are all it adds.

    Attributes:
        origins: for each committed token the level whose pick put it into the tree.
        bytes_read: weights read by all passes so far.
    """

    def __init__(
        self,
        model: Llama,
        cache: Cache,
        tokens: list[int],
        hierarchy: Hierarchy,
        heads: Sequence[ExitHead],
        sampling: Sampling,
        stops: Container[int] = (),
    ) -> None:
        super().__init__(model, cache, tokens, hierarchy, heads, sampling, stops)
        self.origins: list[str] = []
        self.bytes_read = 0
        self._nodes: list[str] = []  # the level of each node below the root
        self._layer_bytes = layer_bytes(model.config, model.dtype.itemsize)
        self._head_bytes = {x.boundary: head_bytes(model, x.head) for x in self.levels}

    def round(self, limit: int) -> list[int]:
        """See ``Decoder.round``."""
        self._nodes = []
        committed = super().round(limit)
        self.origins += self._nodes
        return committed

    def step(self, k: int) -> bool:
        """See ``Decoder.step``, which ends with its level's own pick as the newest node."""
        surplus = super().step(k)
        self._nodes.append(self.levels[k].counts.name)
        return surplus

    def keep(self, nodes: int, k: int) -> None:
        """See ``Decoder.keep``."""
        super().keep(nodes, k)
        del self._nodes[nodes - 1 :]

    def run(self, level: _Level) -> list[int]:
        """See ``Decoder.run``; lifting reads the layers below once more."""
        end, below = len(self.tokens) - 1 + len(self.tree), 0
        for boundary in self.cache.boundaries:
            if self.cache.computed[boundary] < end:
                self.bytes_read += (boundary - below) * self._layer_bytes
            if boundary == level.boundary:
                break
            below = boundary
        self.bytes_read += self._head_bytes[level.boundary]
        return super().run(level)


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
