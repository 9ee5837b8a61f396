"""A Llama that runs any range of its layers over new positions of one cache.

    x₀ = embed(tokens);   layer i:  x += o(attention(rope(qkv(norm x))));   x += down(swiglu(gate_up(norm x)))

Between two products there is nothing but the operations of ``hispec_kernels``: no module calls, no
masks rebuilt per layer, no output objects. A pass is described once (positions, mask, rotary rows)
and reused by all its layers.

Exact numerics: a row's result must not depend on which rows it shares a pass with, or plain
decoding and speculation would round differently. Every pass therefore stays inside a *width class*
(:mod:`hispec.model.numerics`) and attention keeps to fixed shapes (:mod:`hispec_kernels.attention`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hispec.model.cache import Cache, KVCache
from hispec.model.checkpoint import Checkpoint
from hispec.model.config import ModelConfig, rope_frequencies
from hispec.model.linear import Linear
from hispec_kernels import decode_attention, rms_norm, rope_write, rotate, swiglu
from hispec_kernels.attention import BUCKET, ROWS

#: Tokens a prefill pass takes, at absolute positions, whatever the hierarchy.
PREFILL_CHUNK = 256
#: The widest pass of a round: the root and the tokens drafted after it.
MAX_WIDTH = 32


class Block:
    """The weights of one transformer block, query/key/value and gate/up fused."""

    __slots__ = ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down")

    def __init__(
        self,
        attention_norm: Tensor,
        qkv: Linear,
        output: Linear,
        mlp_norm: Tensor,
        gate_up: Linear,
        down: Linear,
    ) -> None:
        self.attention_norm = attention_norm  # (D,)
        self.qkv = qkv  # D → (H + 2 H_kv) D_h
        self.output = output  # H D_h → D
        self.mlp_norm = mlp_norm  # (D,)
        self.gate_up = gate_up  # D → 2 I
        self.down = down  # I → D


class Pass(NamedTuple):
    """What all layers of one pass share."""

    position: int  # of the first row
    width: int  # rows, padding included
    cos: Tensor  # (W, 1, D_h)
    sin: Tensor  # (W, 1, D_h), first half negated
    mask: Tensor  # (R, S)
    queries: Tensor  # (H_kv, R, D_h) scratch


class Llama:
    """A loaded Llama: weights in this device's layout and the passes over them.

    Attributes:
        config: its sizes.
        embedding: (V, D).
        blocks: L of them.
        norm: (D,), before the vocabulary head.
        head: D → V.
        exact: keep every pass inside the width class.
        min_width: the narrowest pass that rounds like all wider ones.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        blocks: Sequence[Block],
        norm: Tensor,
        head: Linear,
        *,
        exact: bool = True,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.blocks = list(blocks)
        self.norm = norm
        self.head = head
        self.exact = exact
        self.min_width = 1
        self.dtype = embedding.dtype
        self.device = embedding.device
        self.capacity = -(-(config.max_positions + MAX_WIDTH) // BUCKET) * BUCKET
        self.scale = 1.0 / math.sqrt(config.head_dim)
        self.group = config.num_heads // config.num_kv_heads
        self._cos, self._sin = self._rotary_tables()
        self._corner = self._mask_corner()

    # ------------------------------------------------------------------ loading

    @staticmethod
    def load(
        checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, exact: bool = True
    ) -> Llama:
        """Returns the checkpoint's model in ``dtype`` on ``device``.

        One block is read at a time, so at most one block's weights exist twice.

        Raises:
            CheckpointError: a tensor is missing, damaged, or of another shape than the config says.
        """
        config = checkpoint.config

        def read(name: str) -> Tensor:
            return checkpoint.tensor(name).to(device=device, dtype=dtype)

        embedding = read("model.embed_tokens.weight")
        head_name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        head = Linear(embedding if config.tie_word_embeddings else read(head_name))
        blocks = [read_block(read, f"model.layers.{i}.", config) for i in range(config.num_layers)]
        return Llama(config, embedding, blocks, read("model.norm.weight"), head, exact=exact)

    def new_cache(self, boundaries: Sequence[int]) -> Cache:
        """Returns an empty cache for the model's whole context, states kept at ``boundaries``."""
        return Cache(
            boundaries,
            self.config.num_kv_heads,
            self.config.head_dim,
            self.config.hidden_size,
            self.capacity,
            self.dtype,
            self.device,
        )

    def weight_bytes(self) -> int:
        """Returns the bytes the weights take; embedding and head count apart, as they are stored."""
        config = self.config
        heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
        block = config.hidden_size * (heads + 3 * config.intermediate_size + 2)
        vocabulary = 2 * config.vocab_size * config.hidden_size
        return (config.num_layers * block + vocabulary) * self.dtype.itemsize

    # ------------------------------------------------------------------ passes

    def advance(self, cache: Cache, tokens: Sequence[int], upto: int, boundary: int) -> int:
        """Raises the watermark of ``boundary`` to ``upto``; returns the layer visits it took.

        Positions that lack the state of a lower boundary are lifted through the layers below first.

        Args:
            cache: knows ``tokens[:cache.computed[b]]`` up to each boundary b.
            tokens: ids from position 0 on, at least ``upto`` of them.
            upto: absolute position, exclusive.
            boundary: one of ``cache.boundaries``.
        """
        visits, below = 0, 0
        for level in cache.boundaries:
            start = cache.computed[level]
            if start < upto:
                rows = (
                    self.embed(tokens[start:upto])
                    if below == 0
                    else cache.states[below][start:upto]
                )  # (W, D)
                rows = self.run_layers(rows, below, level, start, cache.kv)
                cache.states[level][start:upto] = rows
                cache.computed[level] = upto
                visits += (upto - start) * (level - below)
            if level == boundary:
                break
            below = level
        return visits

    def prefill(self, cache: Cache, tokens: Sequence[int]) -> int:
        """Runs all layers over the tokens the cache does not know yet; returns the layer visits.

        Chunks end at multiples of ``PREFILL_CHUNK``, so their shapes depend on positions alone.
        """
        visits = 0
        while cache.length < len(tokens):
            end = min(len(tokens), (cache.length // PREFILL_CHUNK + 1) * PREFILL_CHUNK)
            visits += self.advance(cache, tokens, end, cache.boundaries[-1])
        return visits

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Returns (T, D)."""
        return F.embedding(
            torch.tensor(tokens, dtype=torch.int64, device=self.device), self.embedding
        )

    def run_layers(self, x: Tensor, start: int, stop: int, position: int, kv: KVCache) -> Tensor:
        """Returns the states after ``layers[start:stop]``, their keys and values stored.

        Args:
            x: (T, D), states after ``layers[0:start]`` of positions ``position``, ``position + 1``, …
            start: first layer.
            stop: one past the last layer.
            position: absolute position of the first row.
            kv: holds these layers' keys and values for all earlier positions.

        Returns:
            (T, D).
        """
        rows = x.shape[0]
        x = self._pad(x)
        shared = self.describe(position, x.shape[0])
        for layer in range(start, stop):
            x = self.run_block(self.blocks[layer], x, shared, kv.keys[layer], kv.values[layer])
        return x[:rows]

    def run_block(self, block: Block, x: Tensor, at: Pass, keys: Tensor, values: Tensor) -> Tensor:
        """Returns the states after one block.

        Rows of padding write keys and values too, past the real rows, where nothing is known yet.

        Args:
            block: of this model's sizes (one of its own, or an exit's adapter).
            x: (W, D).
            at: from :meth:`describe`, for ``W`` rows.
            keys: (H_kv, S, D_h), this block's.
            values: likewise.
        """
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

    def write_context(self, kv: Tensor, position: int, keys: Tensor, values: Tensor) -> None:
        """After the call ``keys`` and ``values`` hold projected states at ``position`` and on.

        Args:
            kv: (T, 2 H_kv D_h), key heads then value heads, not yet rotated.
            position: absolute position of the first row.
            keys: (H_kv, S, D_h).
            values: likewise.
        """
        config, end = self.config, position + kv.shape[0]
        heads = kv.view(kv.shape[0], -1, config.head_dim)  # (T, 2 H_kv, D_h)
        fresh, carried = heads.split(config.num_kv_heads, dim=1)
        fresh = rotate(fresh, self._cos[position:end], self._sin[position:end])
        keys[:, position:end] = fresh.transpose(0, 1)
        values[:, position:end] = carried.transpose(0, 1)

    def logits(self, x: Tensor) -> Tensor:
        """Returns the vocabulary logits of states after the last layer.

        Args:
            x: (T, D).

        Returns:
            (T, V) in the model's dtype.
        """
        return self.head(rms_norm(self._pad(x), self.norm, self.config.rms_norm_eps))[: x.shape[0]]

    def describe(self, position: int, width: int) -> Pass:
        """Returns what the layers of a pass over ``width`` rows from ``position`` on share."""
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
        return Pass(
            position,
            width,
            self._cos[position:end],
            self._sin[position:end],
            mask,
            mask.new_zeros(config.num_kv_heads, rows, config.head_dim),
        )

    # ------------------------------------------------------------------ tables

    def _pad(self, x: Tensor) -> Tensor:
        """Repeats the last row until the width class is reached."""
        missing = self.min_width - x.shape[0] if self.exact else 0
        return x if missing <= 0 else torch.cat([x, x[-1:].expand(missing, -1)])

    def _rotary_tables(self) -> tuple[Tensor, Tensor]:
        frequencies, factor = rope_frequencies(self.config)
        angles = torch.outer(torch.arange(self.capacity, dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        cos = torch.cat([cos, cos], -1)[:, None].to(self.dtype)  # (S, 1, D_h)
        sin = torch.cat([-sin, sin], -1)[:, None].to(self.dtype)
        return cos.to(self.device), sin.to(self.device)

    def _mask_corner(self, width: int = MAX_WIDTH) -> Tensor:
        """The part of a pass's mask that is not zero: row r may look at r // G new positions and its own."""
        rows = -(-width * self.group // ROWS) * ROWS
        own = torch.arange(rows, device=self.device)[:, None] // self.group
        behind = torch.arange(width + BUCKET, device=self.device)[None] > own
        return torch.zeros(behind.shape, dtype=self.dtype, device=self.device).masked_fill_(
            behind, -torch.inf
        )


def read_block(read, prefix: str, config: ModelConfig) -> Block:  # noqa: ANN001 (a tensor by name)
    """Returns the block whose tensors carry transformers' names under ``prefix``, fused and packed.

    Args:
        read: returns a tensor by name, in the dtype and on the device wanted.
        prefix: such as ``model.layers.3.``.
        config: says which projections have biases.
    """

    def fused(*names: str, bias: bool) -> Linear:
        weight = torch.cat([read(f"{prefix}{name}.weight") for name in names])
        offset = torch.cat([read(f"{prefix}{name}.bias") for name in names]) if bias else None
        return Linear(weight, offset)

    attention, mlp = "self_attn.", "mlp."
    return Block(
        read(f"{prefix}input_layernorm.weight"),
        fused(*(f"{attention}{x}_proj" for x in "qkv"), bias=config.attention_bias),
        fused(f"{attention}o_proj", bias=config.attention_bias),
        read(f"{prefix}post_attention_layernorm.weight"),
        fused(f"{mlp}gate_proj", f"{mlp}up_proj", bias=config.mlp_bias),
        fused(f"{mlp}down_proj", bias=config.mlp_bias),
    )
