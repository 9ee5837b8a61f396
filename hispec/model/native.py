"""The compiled way of running blocks on a CPU: one call for any range of layers.

``hispec_kernels/cpu/passes.c`` does the arithmetic; here are the addresses it works on. Weights and
cache have the model's dtype, states are fp32 between calls, so that stopping at an exit and going
on rounds nothing.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig
from hispec.model.linear import Linear
from hispec.model.passes import Rotary
from hispec.model.store import cache_dir
from hispec_kernels import cpu


def native_library(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[ctypes.CDLL | None, str]:
    """Returns the compiled library for such a model, or None and the reason why not."""
    if device.type != "cpu":
        return None, "the compiled passes are for CPUs"
    if dtype not in (torch.bfloat16, torch.float32):
        return None, f"the compiled passes do not cover {dtype}"
    group = config.num_heads // config.num_kv_heads
    if not cpu.covers(config.hidden_size, config.intermediate_size, config.head_dim, group):
        return None, "the compiled passes cover sizes that are multiples of 32"
    try:
        return _library(), ""
    except cpu.BuildError as error:
        return None, str(error)


@functools.cache
def _library() -> ctypes.CDLL:
    if os.environ.get("HISPEC_NATIVE", "1") == "0":
        raise cpu.BuildError("HISPEC_NATIVE=0")
    return cpu.load_library(cache_dir() / "native")


class NativePasses:
    """Blocks run by the compiled library.

    A row's bits do not depend on its company; ``passes.c`` says why.

    Args:
        config: the model's sizes.
        rotary: its positions.
        dtype: of weights and cache, bf16 or fp32.
        library: from :func:`native_library`.
    """

    state_dtype = torch.float32
    min_width = 1

    def __init__(
        self, config: ModelConfig, rotary: Rotary, dtype: torch.dtype, library: ctypes.CDLL
    ) -> None:
        self._config = config
        self._rotary = rotary
        self._tiles = dtype == torch.bfloat16 and bool(library.bf16_tiles())
        kind = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        self._run = getattr(library, f"run_layers_{kind}")
        self._project = getattr(library, f"project_{kind}")
        self._scratch = torch.empty(0)
        # A cache's layers as the library wants them; the fp32 norms live as long as the table.
        self._tables: weakref.WeakKeyDictionary[KVCache, _Table] = weakref.WeakKeyDictionary()
        self._norms: dict[int, tuple[Tensor, Tensor]] = {}

    def run(
        self, blocks: Sequence[Block], x: Tensor, position: int, kv: KVCache, first: int
    ) -> Tensor:
        """See :class:`~hispec.model.passes.Passes`."""
        return self._call(blocks, x, position, None, kv, first)

    def run_texts(
        self, blocks: Sequence[Block], x: Tensor, positions: Tensor, starts: Tensor, kv: KVCache
    ) -> Tensor:
        """Returns the states after ``blocks`` of one new token of each of several texts.

        Args:
            blocks: all of the cache's layers.
            x: (B, D).
            positions: (B,) int64, each token's place in its text.
            starts: (B,) int64, the cache position at which its text begins, a multiple of 128.
            kv: knows the texts' keys and values at ``starts + 0 … positions - 1``.
        """
        rows = torch.stack([positions, starts * self._config.head_dim], -1).contiguous()
        return self._call(blocks, x, 0, rows.data_ptr(), kv, 0)

    def _call(
        self,
        blocks: Sequence[Block],
        x: Tensor,
        position: int,
        rows: int | None,
        kv: KVCache,
        first: int,
    ) -> Tensor:
        config, width = self._config, x.shape[0]
        table = self._tables.get(kv)
        if table is None:
            table = self._tables.setdefault(kv, _Table(config, kv))
        threads = torch.get_num_threads()
        per_row = (2 * (config.num_heads + config.num_kv_heads)) * config.head_dim
        per_row += config.intermediate_size + threads * config.hidden_size
        scratch = self._room((width + 16) * per_row)
        x = x.to(torch.float32, copy=True).contiguous()  # the library works in place
        self._run(
            table.layers(blocks, first),
            len(blocks),
            table.shape,
            x.data_ptr(),
            width,
            position,
            rows,
            self._rotary.cos.data_ptr(),
            self._rotary.sin.data_ptr(),
            scratch,
            threads,
        )
        return x

    def store(self, projected: Tensor, position: int, kv: KVCache, layer: int) -> None:
        """See :class:`~hispec.model.passes.Passes`."""
        end = position + projected.shape[0]
        keys, values = self._rotary.split_kv(projected, position, self._config.num_kv_heads)
        kv.keys[layer][:, position:end] = keys.transpose(0, 1)
        cells = kv.values[layer]
        if not self._tiles:
            cells[:, position:end] = values.transpose(0, 1)
            return
        heads, length, size = cells.shape
        at = torch.arange(position, end)
        blocks = cells.view(heads, length // 32, size, 32)  # a tile's rows: 32 positions of one d
        blocks[:, at // 32, :, at % 32] = values.to(cells.dtype)  # (T, H_kv, D_h)

    def project(self, linear: Linear, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """See :class:`Passes`; the result is fp32."""
        width, size = x.shape
        rows = linear.rows
        x = x.to(torch.float32).contiguous()
        out = torch.empty(width, rows)
        threads = torch.get_num_threads()
        norm_pointer = None if norm is None else self._wide(norm).data_ptr()
        bias = None if linear.bias is None else self._wide(linear.bias).data_ptr()
        self._project(
            linear.weight.data_ptr(),
            bias,
            rows,
            size,
            norm_pointer,
            self._config.rms_norm_eps,
            x.data_ptr(),
            width,
            out.data_ptr(),
            self._room(threads * (width + 16) * size),
            threads,
        )
        return out

    def _wide(self, vector: Tensor) -> Tensor:
        """The fp32 copy of a small weight, made once."""
        kept = self._norms.get(id(vector))
        if kept is None:
            kept = self._norms[id(vector)] = (vector, vector.float().contiguous())
        return kept[1]

    def _room(self, floats: int) -> int:
        """The address of at least that much scratch memory, aligned to a cache line."""
        if self._scratch.numel() < floats + 16:
            self._scratch = torch.empty(floats + 16)
        address = self._scratch.data_ptr()
        return address + (-address) % 64


class _Table:
    """Addresses of a cache's layers and of the blocks that use them, as ``layer_t`` wants them."""

    def __init__(self, config: ModelConfig, kv: KVCache) -> None:
        keys = kv.keys[0]
        self.shape = cpu.Shape(
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            keys.stride(0),
            config.rms_norm_eps,
            1.0 / math.sqrt(config.head_dim),
        )
        self._places = [
            (k.data_ptr(), v.data_ptr()) for k, v in zip(kv.keys, kv.values, strict=True)
        ]
        self._layers = (cpu.Layer * len(self._places))()
        self._blocks: list[Block | None] = [None] * len(self._places)
        self._kept: list[Tensor] = []

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
            keys,
            values,
        )
        self._blocks[index] = block
