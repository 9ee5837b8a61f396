"""What the compiled library is told of a model: records of ``passes.c``, filled with addresses."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig
from hispec.model.nodes import Nodes
from hispec_kernels import cpu


def shape_of(config: ModelConfig, kv_stride: int) -> cpu.Shape:
    """Returns a model's sizes as ``shape_t``, with a cache's elements from head to head."""
    return cpu.Shape(
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        kv_stride,
        config.rms_norm_eps,
        1.0 / math.sqrt(config.head_dim),
    )


def tree_of(nodes: Nodes) -> cpu.Nodes:
    """Returns a draft tree as ``nodes_t``."""
    return cpu.Nodes(nodes.root, nodes.depths_array.ctypes.data, nodes.paths_array.ctypes.data)


def taps_of(
    targets: Sequence[tuple[int, Tensor]], offset: int
) -> ctypes.Array[ctypes.c_void_p] | None:
    """Returns where states go before each block; behind the last one they are worked on in place.

    Args:
        targets: see :class:`~hispec.model.passes.Lift`.
        offset: bytes to the first row.
    """
    if len(targets) == 1:
        return None
    taps = (ctypes.c_void_p * targets[-1][0])()
    for stop, states in targets[:-1]:
        taps[stop] = states.data_ptr() + offset
    return taps


class Table:
    """Addresses of a cache's layers and of the blocks that use them, as ``layer_t`` wants them."""

    def __init__(self, config: ModelConfig, kv: KVCache) -> None:
        self.shape = shape_of(config, kv.keys[0].stride(0))
        self._places = [
            (k.data_ptr(), v.data_ptr()) for k, v in zip(kv.keys, kv.values, strict=True)
        ]
        self._layers = (cpu.Layer * len(self._places))()
        self._blocks: list[Block | None] = [None] * len(self._places)
        self._kept: list[Tensor] = []

    @property
    def first(self) -> cpu.Layer:
        """The first layer's record."""
        return self._layers[0]

    def layers(self, blocks: Sequence[Block], first: int) -> int:
        """Returns the address of the ``first`` layer's record, filled in for ``blocks``."""
        for index, block in enumerate(blocks, first):
            if self._blocks[index] is not block:
                self._fill(index, block)
        return cpu.address(self._layers, first)

    def _fill(self, index: int, block: Block) -> None:
        def wide(vector: Tensor | None) -> int | None:
            if vector is None:
                return None
            self._kept.append(vector.float().contiguous())
            return self._kept[-1].data_ptr()

        keys, values = self._places[index]
        self._layers[index] = cpu.Layer(
            block.qkv.weight.data_ptr(),
            block.output.weight.data_ptr(),
            block.gate_up.weight.data_ptr(),
            block.down.weight.data_ptr(),
            wide(block.attention_norm),
            wide(block.mlp_norm),
            wide(block.qkv.bias),
            wide(block.output.bias),
            wide(block.gate_up.bias),
            wide(block.down.bias),
            wide(block.qkv.scale),
            wide(block.output.scale),
            wide(block.gate_up.scale),
            wide(block.down.scale),
            keys,
            values,
        )
        self._blocks[index] = block


class Answers(dict[tuple[int, int], tuple[Tensor, Tensor]]):
    """Memory for ids and odds, (W, k) each, by these sizes: the same each time."""

    def __missing__(self, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
        self[sizes] = torch.empty(sizes, dtype=torch.int64), torch.empty(sizes, dtype=torch.float32)
        return self[sizes]
