"""The block of an exit head: one Llama layer whose past may be the target's own final states.

Written out instead of taken from transformers because a query's keys come from two places (see
``heads.py``), and in plain products because those have the faster gradients on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hispec.model.config import ModelConfig


class _RmsNorm(torch.autograd.Function):
    """``F.rms_norm`` with a gradient of five passes over x instead of a dozen in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)
        unit = x * scale
        weight = weight.to(x.dtype)
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        grad_weight = (grad * unit).flatten(0, -2).sum(0, dtype=torch.float32)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        grad = grad * weight
        along = (grad * unit).mean(-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).mul_(scale), grad_weight, None


class Norm(nn.Module):
    """Llama's RMS norm: ``x / sqrt(mean(x²) + eps) * weight``, the weight kept in fp32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float().clone())
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D) in x's dtype."""
        return _RmsNorm.apply(x, self.weight, self.eps)


class Attention(nn.Module):
    """The four projections under their HF names; the mixing is `ExitBlock`'s."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=bias)


class Mlp(nn.Module):
    """SwiGLU: ``down(silu(gate x) * up x)``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ExitBlock(nn.Module):
    """One Llama layer whose keys and values may come from the target's own final states.

    Args:
        config: The model's sizes.
        context: ``deep`` for keys and values from final states, else ``none``.
        scaled: Whether what attention and MLP add is multiplied by learned vectors: a block whose
            output projections are not its own to change can begin as an identity all the same.
    """

    def __init__(self, config: ModelConfig, context: str, scaled: bool = False) -> None:
        super().__init__()
        ones, eps = torch.ones(config.hidden_size), config.rms_norm_eps
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.input_layernorm = Norm(ones, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(ones, eps)
        self.mlp = Mlp(config)
        self.attention_scale = nn.Parameter(ones.clone()) if scaled else None
        self.mlp_scale = nn.Parameter(ones.clone()) if scaled else None
        if context == "deep":
            kv_width = config.num_kv_heads * config.head_dim
            self.context_layernorm = Norm(ones, eps)
            self.context_k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
            self.context_v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        deep: Tensor | None,
        positions: Tensor,
        roots: Tensor,
        rope: tuple[Tensor, float],
    ) -> Tensor:
        """The block's output at the queries.

        Args:
            x: (B, Q, D) the queries.
            source: (B, T, D) what keys and values are made of, every position of the texts.
            deep: (B, T, D) final states that add to keys and values before the root, or None.
            positions: (B, Q) int64 of the queries, consecutive; a pad repeats the last.
            roots: (B, Q) int64.
            rope: (D_h / 2,) frequencies, and the factor on cosines and sines.

        Returns:
            (B, Q, D).
        """
        attention, length = self.self_attn, source.shape[1]
        normed, past = self.input_layernorm(x), self.input_layernorm(source)
        query = self._split(attention.q_proj(normed), self.heads)
        key, value = attention.k_proj(past), attention.v_proj(past)  # (B, T, H_kv D_h)
        places = torch.arange(length, device=x.device).expand(len(x), length)
        if deep is None:
            mask = places[:, None, :] <= positions[:, :, None]  # (B, Q, T)
        else:
            # Each position up to the query is met once: as the target left it before the root, as
            # the exit has it from the root on.
            column = positions[:, None, :]
            slots = torch.arange(positions.shape[1], device=x.device)
            # Slots, not positions, tell a pad from the query it repeats.
            near = (column >= roots[:, :, None]) & (slots[:, None] >= slots)
            mask = torch.cat([places[:, None, :] < roots[:, :, None], near], 2)  # (B, Q, T + Q)
            places = torch.cat([places, positions], 1)
            final = self.context_layernorm(deep)
            key = torch.cat([key + self.context_k_proj(final), attention.k_proj(normed)], 1)
            value = torch.cat([value + self.context_v_proj(final), attention.v_proj(normed)], 1)
        query = rotate(query, positions, *rope)
        key = rotate(self._split(key, self.kv_heads), places, *rope)
        value = self._split(value, self.kv_heads)  # (B, H_kv, T [+ Q], D_h)
        mixed = attend(query, key, value, mask[:, None])  # (B, H, Q, D_h)
        mixed = attention.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + (mixed if self.attention_scale is None else mixed * self.attention_scale)
        inner = self.mlp(self.post_attention_layernorm(x))
        return x + (inner if self.mlp_scale is None else inner * self.mlp_scale)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(2, (heads, self.head_dim)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention under a mask, as plain products.

    ``scaled_dot_product_attention`` and its gradient take 2.3 times as long on a CPU (128 ms
    against 56: 16 texts, 130 queries, 386 keys, bf16, one core).

    Args:
        query: (B, H, Q, D_h).
        key: (B, H_kv, S, D_h).
        value: (B, H_kv, S, D_h).
        mask: (B, 1, Q, S) bool.

    Returns:
        (B, H, Q, D_h).
    """
    groups = (key.shape[1], query.shape[1] // key.shape[1])
    bias = torch.zeros(mask.shape, dtype=key.dtype, device=key.device)
    bias.masked_fill_(~mask, -math.inf)
    query = (query * query.shape[-1] ** -0.5).unflatten(1, groups).flatten(2, 3)
    scores = (query @ key.transpose(2, 3)).unflatten(2, (groups[1], -1))  # (B, H_kv, G, Q, S)
    weights = (scores + bias[:, :, None]).softmax(-1).to(value.dtype).flatten(2, 3)
    return (weights @ value).unflatten(2, (groups[1], -1)).flatten(1, 2)


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor, scale: float) -> Tensor:
    """Llama's rotary embedding: halves, not pairs.

    Args:
        x: (B, H, Q, D_h).
        positions: (B, Q).
        frequencies: (D_h / 2,).
        scale: Factor on cosines and sines.
    """
    angles = positions[:, None, :, None] * frequencies  # (B, 1, Q, D_h / 2)
    cos, sin = (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
