"""Running blocks over new rows of a cache.

    run(blocks, x, position, kv)      states after the blocks, their keys and values stored
    project(linear, x, norm)          a product, after RMSNorm where a norm is given

:class:`TorchPasses` does it operator by operator, on any device. :mod:`hispec.model.native` has the
same face and one compiled call for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig, rope_frequencies
from hispec.model.linear import Linear
from hispec_kernels import decode_attention, rms_norm, rope_write, rotate, swiglu
from hispec_kernels.attention import BUCKET, ROWS

#: The widest pass of a round: the root and the tokens drafted after it.
MAX_WIDTH = 32


class Passes(Protocol):
    """What a model asks of a way to run its blocks.

    Attributes:
        state_dtype: dtype of hidden states between calls.
        min_width: the narrowest pass that rounds like all wider ones.
    """

    state_dtype: torch.dtype
    min_width: int

    def run(
        self, blocks: Sequence[Block], x: Tensor, position: int, kv: KVCache, first: int
    ) -> Tensor:
        """Returns the states after ``blocks``: (W, D) from (W, D).

        Args:
            blocks: consecutive ones; block i stores its keys and values in ``kv``'s layer
                ``first + i``.
            x: states of positions ``position``, ``position + 1``, …
            position: absolute position of the first row.
            kv: knows these layers' keys and values of all earlier positions.
            first: the first block's layer in ``kv``.
        """
        ...

    def store(self, projected: Tensor, position: int, kv: KVCache, layer: int) -> None:
        """After the call ``kv``'s layer holds projected states from ``position`` on.

        Args:
            projected: (T, 2 H_kv D_h), keys then values, not yet rotated.
            position: absolute position of the first row.
            kv: the cache.
            layer: which of its layers.
        """
        ...

    def project(self, linear: Linear, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """Returns ``linear(rms_norm(x, norm))``, or ``linear(x)`` without a norm: (W, out)."""
        ...


class Rotary:
    """Cosines and signed sines of every position, (S, D_h) fp32: sin's first half is negated."""

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        frequencies, factor = rope_frequencies(config)
        angles = torch.outer(torch.arange(capacity, dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self.cos = torch.cat([cos, cos], -1)
        self.sin = torch.cat([-sin, sin], -1)

    def split_kv(self, kv: Tensor, position: int, heads: int) -> tuple[Tensor, Tensor]:
        """Returns rotated keys and values from a projection of states at ``position`` and on.

        Args:
            kv: (T, 2 H_kv D_h), key heads then value heads, not yet rotated.
            position: absolute position of the first row.
            heads: H_kv.

        Returns:
            Keys in fp32 and values, (T, H_kv, D_h) each.
        """
        end = position + kv.shape[0]
        keys, values = kv.unflatten(1, (2 * heads, -1)).split(heads, dim=1)
        cos = self.cos[position:end, None].to(kv.device)
        sin = self.sin[position:end, None].to(kv.device)
        return rotate(keys.float(), cos, sin), values


class _Described(NamedTuple):
    """What all blocks of one pass share."""

    position: int  # of the first row
    width: int  # rows, padding included
    cos: Tensor  # (W, 1, D_h)
    sin: Tensor  # (W, 1, D_h)
    mask: Tensor  # (R, S)
    queries: Tensor  # (H_kv, R, D_h) scratch


class TorchPasses:
    """Blocks run operator by operator.

    Exact numerics: a row's result must not depend on which rows it shares a pass with. So passes
    are padded to ``min_width`` rows and attention keeps to fixed shapes
    (:mod:`hispec_kernels.attention`).

    Attributes:
        exact: keep to those shapes.
        min_width: the narrowest pass that rounds like all wider ones; found by trying.
    """

    def __init__(
        self,
        config: ModelConfig,
        rotary: Rotary,
        dtype: torch.dtype,
        device: torch.device,
        *,
        exact: bool,
    ) -> None:
        self.config = config
        self._rotary = rotary
        self.exact = exact
        self.min_width = 1
        self.state_dtype = dtype
        self.scale = 1.0 / math.sqrt(config.head_dim)
        self.group = config.num_heads // config.num_kv_heads
        self._cos = rotary.cos[:, None].to(device, dtype)  # (S, 1, D_h)
        self._sin = rotary.sin[:, None].to(device, dtype)
        self._corner = self._mask_corner(MAX_WIDTH)

    def run(
        self, blocks: Sequence[Block], x: Tensor, position: int, kv: KVCache, first: int
    ) -> Tensor:
        """See :class:`Passes`. Padding lies past the real rows, where nothing is known yet."""
        rows = x.shape[0]
        x = self._pad(x.to(self.state_dtype))
        at = self._describe(position, x.shape[0])
        for layer, block in enumerate(blocks, first):
            x = self._run_block(block, x, at, kv.keys[layer], kv.values[layer])
        return x[:rows]

    def project(self, linear: Linear, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """See :class:`Passes`."""
        rows = x.shape[0]
        x = self._pad(x.to(self.state_dtype))
        if norm is not None:
            x = rms_norm(x, norm, self.config.rms_norm_eps)
        return linear(x)[:rows]

    def store(self, projected: Tensor, position: int, kv: KVCache, layer: int) -> None:
        """See :class:`Passes`."""
        end = position + projected.shape[0]
        keys, values = self._rotary.split_kv(projected, position, self.config.num_kv_heads)
        kv.keys[layer][:, position:end] = keys.transpose(0, 1)
        kv.values[layer][:, position:end] = values.transpose(0, 1)

    def _run_block(
        self, block: Block, x: Tensor, at: _Described, keys: Tensor, values: Tensor
    ) -> Tensor:
        config, eps = self.config, self.config.rms_norm_eps
        end, span = at.position + at.width, at.mask.shape[1]
        packed_rows = at.width * self.group
        qkv = block.qkv(rms_norm(x, block.attention_norm, eps))
        rope_write(
            qkv.view(at.width, -1, config.head_dim),
            at.cos,
            at.sin,
            at.queries[:, :packed_rows].unflatten(1, (at.width, self.group)),
            keys[:, at.position : end],
            values[:, at.position : end],
        )
        mixed = decode_attention(
            at.queries, keys[:, :span], values[:, :span], at.mask, self.scale
        )  # (H_kv, R, D_h)
        mixed = mixed[:, :packed_rows].unflatten(1, (at.width, self.group)).transpose(0, 1)
        x = block.output(mixed.reshape(at.width, -1), residual=x)  # (W, D)
        hidden = swiglu(block.gate_up(rms_norm(x, block.mlp_norm, eps)))  # (W, I)
        return block.down(hidden, residual=x)  # (W, D)

    def _describe(self, position: int, width: int) -> _Described:
        end = position + width
        packed_rows = width * self.group
        if self.exact:
            span = -(-end // BUCKET) * BUCKET
            rows = -(-packed_rows // ROWS) * ROWS
        else:
            span, rows = end, packed_rows
        mask = self._corner.new_zeros(rows, span)
        tail = self._corner if width <= MAX_WIDTH else self._mask_corner(width)
        mask[:, position:] = tail[:rows, : span - position]
        config = self.config
        return _Described(
            position,
            width,
            self._cos[position:end],
            self._sin[position:end],
            mask,
            mask.new_zeros(config.num_kv_heads, rows, config.head_dim),
        )

    def _pad(self, x: Tensor) -> Tensor:
        """Repeats the last row until the width class is reached."""
        missing = self.min_width - x.shape[0] if self.exact else 0
        return x if missing <= 0 else torch.cat([x, x[-1:].expand(missing, -1)])

    def _mask_corner(self, width: int) -> Tensor:
        """The part of a mask that is not zero: row r looks at r // G new positions and its own."""
        device, dtype = self._cos.device, self._cos.dtype
        rows = -(-width * self.group // ROWS) * ROWS
        own = torch.arange(rows, device=device)[:, None] // self.group
        behind = torch.arange(width + BUCKET, device=device)[None] > own
        return torch.zeros(behind.shape, dtype=dtype, device=device).masked_fill_(
            behind, -torch.inf
        )
