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
from hispec_training.adapter import add_block_lora
from hispec_training.exit_block import ExitBlock, Norm
from hispec_training.options import check_exits

KINDS = ("shared", "affine", "block", "lora")
CONTEXTS = ("none", "deep")


@dataclass(frozen=True)
class HeadSpec:
    """What one head is made of.

    Attributes:
        exit_layer: e; the head reads the state after ``layers[0:e]``.
        kind: ``shared`` (the model's norm and head as they are, but for the norm's weight),
            ``affine`` (a linear map before them), ``block`` (that and one Llama layer) or ``lora``
            (that and one of the model's own layers with low-rank updates; a tiny file).
        context: ``deep`` if the block's keys and values before the root come from h_L.
        feature: Whether a map of h_L(root - 1) is added to x.
        feature_maps: How many distances from the root have a map of their own; the last serves
            all farther ones.
        rank: Of the updates of kind ``lora``.
        vocab_size: Rows of the head, the most frequent ones; 0 stands for all.
        start_layer: The backbone layer whose weights the block starts from, or keeps; -1 the last.
    """

    exit_layer: int
    kind: str = "block"
    context: str = "deep"
    feature: bool = True
    vocab_size: int = 0
    start_layer: int = -1
    feature_maps: int = 4
    rank: int = 16

    def check(self, num_layers: int) -> None:
        """Raises UsageError if a model of ``num_layers`` cannot carry this head."""
        check_exits([self.exit_layer], num_layers)
        if self.kind not in KINDS or self.context not in CONTEXTS:
            raise UsageError(
                f"A head is one of {', '.join(KINDS)} with context {' or '.join(CONTEXTS)}, got "
                f"{self.kind} with {self.context}."
            )
        if not self.has_block and self.context == "deep":
            raise UsageError(f"Deep context needs a block; a head of kind {self.kind} has none.")
        if self.feature and self.context != "deep":
            raise UsageError("The feature is a final state: it needs deep context.")
        if self.rank < 1:
            raise UsageError(f"A head's rank must be at least 1, got {self.rank}.")

    @property
    def has_block(self) -> bool:
        """Whether a Llama layer is part of the head."""
        return self.kind in ("block", "lora")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


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
        self.block = (
            ExitBlock(config, spec.context, spec.kind == "lora") if spec.has_block else None
        )
        if spec.kind == "lora":
            add_block_lora(self.block, spec.rank)
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
                elif not (name.endswith("_scale") or "lora_" in name):
                    name = name.replace(".base_layer", "")
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
