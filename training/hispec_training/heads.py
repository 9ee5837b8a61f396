"""Exit heads: what turns an exit's hidden state into a guess at the target's pick.

    x(t)   = proj h_e(t) [+ F_{t - root} rms(h_L(root - 1))]   h_e after layers[0:e], before norms
    x      = block(x)                                         one Llama layer of its own, optional
    logits = rms(x, norm) @ lm_head[vocab_ids].T              the model's own head, never trained

The block may look at *deep* context. When the engine drafts, every position before the root has
already been through the whole target, so the target's final state h_L is known there; only the
root and the tokens drafted after it have nothing but h_e. So at p < root the block's keys are

    k(p) = k_proj rms(proj h_e(p), input_layernorm) + context_k_proj rms(h_L(p), context_layernorm)

(values alike), and from the root on they are the usual ones of x: a shallow exit reads what the
full model made of the text. Added, not replaced: with context projections that start at zero the
head starts as one without deep context, where replaced ones unlearn the block first (0.197
against 0.224 after 120 steps). What h_L(root - 1) adds to x depends on how far the root is, so the
first few distances have maps of their own: with least-squares maps alone they are worth 0.027 of
agreement right after the root. A training pass draws random roots, so that all distances from the
root are met.

Only the head's own tensors are parameters; the backbone is read, never touched. The names of the
parameters are the names of the tensors in the saved file (``export.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hispec.errors import UsageError
from hispec.model.checkpoint import Checkpoint
from hispec.model.config import ModelConfig, rope_frequencies

KINDS = ("shared", "affine", "block")
CONTEXTS = ("none", "deep")


@dataclass(frozen=True)
class HeadSpec:
    """What one head is made of.

    Attributes:
        exit_layer: e; the head reads the state after ``layers[0:e]``.
        kind: ``shared`` (the model's norm and head as they are, but for the norm's weight),
            ``affine`` (a linear map before them) or ``block`` (that and one Llama layer).
        context: ``deep`` if the block's keys and values before the root come from h_L.
        feature: Whether a map of h_L(root - 1) is added to x.
        feature_maps: How many distances from the root have a map of their own; the last serves
            all farther ones.
        vocab_size: Rows of the head, the most frequent ones; 0 stands for all.
        start_layer: The backbone layer whose weights the block starts from; -1 the last.
    """

    exit_layer: int
    kind: str = "block"
    context: str = "deep"
    feature: bool = True
    vocab_size: int = 0
    start_layer: int = -1
    feature_maps: int = 4

    def check(self, num_layers: int) -> None:
        """Raises UsageError if a model of ``num_layers`` cannot carry this head."""
        if not 1 <= self.exit_layer < num_layers:
            raise UsageError(
                f"exit_layer must be in [1, {num_layers - 1}] for this {num_layers}-layer model, "
                f"got {self.exit_layer}."
            )
        if self.kind not in KINDS or self.context not in CONTEXTS:
            raise UsageError(
                f"A head is one of {', '.join(KINDS)} with context {' or '.join(CONTEXTS)}, got "
                f"{self.kind} with {self.context}."
            )
        if self.kind != "block" and self.context == "deep":
            raise UsageError(f"Deep context needs a block; a head of kind {self.kind} has none.")
        if self.feature and self.context != "deep":
            raise UsageError("The feature is a final state: it needs deep context.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


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
    """One Llama layer whose keys and values may come from the target's own final states."""

    def __init__(self, config: ModelConfig, context: str) -> None:
        super().__init__()
        ones, eps = torch.ones(config.hidden_size), config.rms_norm_eps
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.input_layernorm = Norm(ones, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(ones, eps)
        self.mlp = Mlp(config)
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
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(2, (heads, self.head_dim)).transpose(1, 2)


class ExitHead(nn.Module):
    """One exit's head, up to and including the norm; the rows of lm_head are the caller's."""

    def __init__(self, spec: HeadSpec, config: ModelConfig) -> None:
        super().__init__()
        spec.check(config.num_layers)
        self.spec = spec
        width = config.hidden_size
        if spec.kind != "shared":
            self.proj = nn.Linear(width, width)
            # A few dimensions of a residual stream are fifty times as large as the others. Adam's
            # steps are alike for all weights, so without this it is those few it learns from.
            self.register_buffer("input_scale", torch.ones(width))
        if spec.feature:
            self.feature_layernorm = Norm(torch.ones(width), config.rms_norm_eps)
            self.feature_proj = nn.Linear(width, spec.feature_maps * width, bias=False)
        self.block = ExitBlock(config, spec.context) if spec.kind == "block" else None
        self.dropout = 0.0  # of final states, while training; not part of what a head is
        self.norm = Norm(torch.ones(width), config.rms_norm_eps)
        frequencies, self.rope_scale = rope_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @torch.no_grad()
    def start_from(self, checkpoint: Checkpoint) -> ExitHead:
        """The head holds its starting values: identity maps and one of the model's own layers."""
        if self.spec.kind != "shared":
            nn.init.eye_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)
        if self.spec.feature:
            nn.init.zeros_(self.feature_proj.weight)
        self.norm.weight.copy_(checkpoint.tensor("model.norm.weight"))
        if self.block is not None:
            layer = self.spec.start_layer % checkpoint.config.num_layers
            for name, parameter in self.block.named_parameters():
                if name.startswith("context_"):  # starts as a head without deep context
                    parameter.fill_(1.0 if "norm" in name else 0.0)
                    continue
                parameter.copy_(checkpoint.tensor(f"model.layers.{layer}.{name}"))
        return self

    @torch.no_grad()
    def set_input_scale(self, scale: Tensor) -> None:
        """The projection reads states divided by ``scale`` (D,) and still computes what it did."""
        self.proj.weight.mul_(scale / self.input_scale)
        self.input_scale.copy_(scale)

    def forward(
        self, states: Tensor, deep: Tensor | None, positions: Tensor, roots: Tensor
    ) -> Tensor:
        """The normed state that the rows of lm_head are applied to.

        Args:
            states: (B, T, D) h_e of whole sequences, from position 0.
            deep: (B, T, D) h_L of the same positions; unused where the head has no use for it.
            positions: (B, Q) int64 the queries, each row consecutive; a pad repeats a position.
            roots: (B, Q) int64 the root of each query's round, not before ``positions[:, 0]`` and
                not after the query.

        Returns:
            (B, Q, D).
        """
        spec = self.spec
        if not torch.is_autocast_enabled(states.device.type):
            states = states.to(self.norm.weight.dtype)
            deep = None if deep is None else deep.to(states.dtype)
        if spec.kind == "shared":
            return self.norm(gather(states, positions))
        states = states / self.input_scale.to(states.dtype)
        if self.block is None:
            x = self.proj(gather(states, positions))  # (B, Q, D)
        else:
            source = self.proj(states)  # (B, T, D)
            x = gather(source, positions)
        if spec.feature:
            assert deep is not None
            last = self.feature_layernorm(gather(deep, (roots - 1).clamp_min(0)))
            last = F.dropout(last, self.dropout, self.training)
            x = x + self._feature(last, positions - roots)
        if self.block is not None:
            deep = deep if spec.context == "deep" else None
            if deep is not None:
                deep = F.dropout(deep, self.dropout, self.training)
            x = self.block(x, source, deep, positions, roots, (self.frequencies, self.rope_scale))
        return self.norm(x)

    def _feature(self, last: Tensor, offsets: Tensor) -> Tensor:
        """(B, Q, D) normed states before the roots, each through its offset's map."""
        maps = self.feature_proj.weight.chunk(self.spec.feature_maps)
        which = offsets.clamp_max(len(maps) - 1)
        if len(maps) == 1:
            return F.linear(last, maps[0])
        added = torch.zeros_like(last)
        for j, weight in enumerate(maps):
            rows = which == j
            added[rows] = F.linear(last[rows], weight).to(added.dtype)
        return added


def gather(states: Tensor, positions: Tensor) -> Tensor:
    """(B, T, D) at (B, Q) positions → (B, Q, D)."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


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


def frequent_tokens(counts: Tensor, vocab_size: int, always: Iterable[int] = ()) -> Tensor:
    """The most frequent token ids, most frequent first (FR-Spec, arXiv 2502.14856).

    Args:
        counts: (V,) how often the target picked each token.
        vocab_size: How many to keep; 0 for all, in their own order.
        always: Kept whatever their count, such as the end of the text.

    Returns:
        (vocab_size,) int32.
    """
    if not 0 < vocab_size < counts.numel():
        return torch.arange(counts.numel(), dtype=torch.int32)
    counts = counts.double().clone()
    for token in always:
        counts[token] = math.inf
    # Ties by id, so that the same counts always give the same vocabulary.
    return counts.sort(descending=True, stable=True).indices[:vocab_size].int()


def build_heads(specs: Sequence[HeadSpec], checkpoint: Checkpoint) -> nn.ModuleDict:
    """Fresh heads by exit layer (as text), each at its starting values."""
    return nn.ModuleDict(
        {str(s.exit_layer): ExitHead(s, checkpoint.config).start_from(checkpoint) for s in specs}
    )
