"""The backbone in plain batches: the training side's frozen forward.

The engine decodes one sequence as fast as it can; training wants throughput over many. So this is
the same Llama with a batch dimension, query/key/value and gate/up fused, and on a CPU the weights
packed for oneDNN: the packed product takes 0.26 ms where ``F.linear`` takes 0.47 (64 rows, the
gate/up of SmolLM2-135M, bf16 AMX, one core).

Nothing here has gradients. One method, ``run``, walks the layers; how a layer attends is the
caller's function, so that full sequences (here) and batched decoding (``decode.py``) share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hispec.errors import UsageError
from hispec.model.checkpoint import Checkpoint
from hispec.model.config import ModelConfig, rope_frequencies
from hispec.model.device import choose, cpu_has_bf16

# (layer, queries (…, H, D_h), keys (…, H_kv, D_h), values (…, H_kv, D_h)) -> (…, H * D_h)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class _Linear:
    """A product with a fixed weight, packed for oneDNN where that exists and pays.

    Attributes:
        weight: (out, in), packed or plain.
        bias: (out,) or None.
        packed: Whether ``weight`` is in oneDNN's own layout.
    """

    weight: Tensor
    bias: Tensor | None
    packed: bool

    def __call__(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


@dataclass
class _Layer:
    input_norm: Tensor
    qkv: _Linear
    out: _Linear
    post_norm: Tensor
    gate_up: _Linear
    down: _Linear


def fast_dtype(device: str = "auto") -> torch.dtype:
    """Returns bf16 where the device multiplies it, fp32 elsewhere.

    Args:
        device: ``cpu``, ``cuda``, or ``auto`` for the one that training takes.
    """
    return torch.bfloat16 if choose(device).dtype is torch.bfloat16 else torch.float32


class Trunk:
    """A frozen Llama over batches; activations in ``dtype``, norms inside in fp32.

    Args:
        checkpoint: The opened model.
        dtype: Of weights and activations; None for the device's fastest, see `fast_dtype`.
        device: Where to compute.
        pack: Pack weights for oneDNN (CPU only); None packs wherever it can.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        pack: bool | None = None,
    ) -> None:
        self.config: ModelConfig = checkpoint.config
        self.device = torch.device(device)
        dtype = self.dtype = dtype or fast_dtype(self.device.type)
        can_pack = self.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        can_pack &= dtype == torch.float32 or cpu_has_bf16()
        self._pack = can_pack if pack is None else pack and can_pack
        c = self.config

        def read(name: str) -> Tensor:
            return checkpoint.tensor(name).to(device=self.device, dtype=dtype)

        def linear(prefix: str, *names: str) -> _Linear:
            weight = torch.cat([read(f"{prefix}.{n}.weight") for n in names])
            biased = f"{prefix}.{names[0]}.bias" in checkpoint
            bias = torch.cat([read(f"{prefix}.{n}.bias") for n in names]) if biased else None
            return self._linear(weight, bias)

        self.layers = [
            _Layer(
                input_norm=read(f"model.layers.{i}.input_layernorm.weight"),
                qkv=linear(f"model.layers.{i}.self_attn", "q_proj", "k_proj", "v_proj"),
                out=linear(f"model.layers.{i}.self_attn", "o_proj"),
                post_norm=read(f"model.layers.{i}.post_attention_layernorm.weight"),
                gate_up=linear(f"model.layers.{i}.mlp", "gate_proj", "up_proj"),
                down=linear(f"model.layers.{i}.mlp", "down_proj"),
            )
            for i in range(c.num_layers)
        ]
        self.embedding = read("model.embed_tokens.weight")  # (V, D)
        self.norm = read("model.norm.weight")
        head = self.embedding if c.tie_word_embeddings else read("lm_head.weight")
        self.head = self._linear(head, None)
        frequencies, factor = rope_frequencies(c)
        self._frequencies = frequencies.to(self.device)
        self._rope_factor = factor
        self._cos = self._sin = torch.empty(0, c.head_dim, device=self.device)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> _Linear:
        if self._pack:
            return _Linear(torch.ops.mkldnn._reorder_linear_weight(weight, 64), bias, True)
        return _Linear(weight, bias, False)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the cosines and sines of ``positions``.

        Args:
            positions: (...) integers.

        Returns:
            Two tensors (..., 1, D_h) in ``dtype``; the sine's first half is negated, so that
            rotating is ``x * cos + roll(x, D_h / 2) * sin``.
        """
        needed = int(positions.max()) + 1 if positions.numel() else 0
        if needed > len(self._cos):
            size = max(1024, 1 << (needed - 1).bit_length())
            angles = torch.arange(size, device=self.device).float()[:, None] * self._frequencies
            cos, sin = angles.cos() * self._rope_factor, angles.sin() * self._rope_factor
            self._cos = torch.cat([cos, cos], -1).to(self.dtype)  # (size, D_h)
            self._sin = torch.cat([-sin, sin], -1).to(self.dtype)
        return self._cos[positions].unsqueeze(-2), self._sin[positions].unsqueeze(-2)

    def run(self, h: Tensor, start: int, stop: int, positions: Tensor, attend: Attend) -> Tensor:
        """Returns the residual stream after ``layers[start:stop]``.

        Args:
            h: (..., D) before layer ``start``.
            start: First layer to run.
            stop: One past the last.
            positions: (...) of each token in its own text.
            attend: What a layer attends with.

        Returns:
            (..., D).
        """
        c = self.config
        cos, sin = self.rope(positions)
        eps, half = c.rms_norm_eps, c.head_dim // 2
        turned = c.num_heads + c.num_kv_heads
        for index in range(start, stop):
            layer = self.layers[index]
            x = F.rms_norm(h, (c.hidden_size,), layer.input_norm, eps)
            heads = layer.qkv(x).unflatten(-1, (-1, c.head_dim))  # (..., H + 2 H_kv, D_h)
            qk, v = heads[..., :turned, :], heads[..., turned:, :]
            qk = torch.addcmul(qk * cos, qk.roll(half, -1), sin)
            q, k = qk[..., : c.num_heads, :], qk[..., c.num_heads :, :]
            h = h + layer.out(attend(index, q, k, v))  # (..., D)
            x = F.rms_norm(h, (c.hidden_size,), layer.post_norm, eps)
            gate, up = layer.gate_up(x).chunk(2, -1)  # (..., F) each
            h = h + layer.down(F.silu(gate).mul_(up))
        return h

    @torch.no_grad()
    def states(
        self, ids: Tensor, lengths: Tensor | Sequence[int], layers: Sequence[int]
    ) -> dict[int, Tensor]:
        """Returns the residual stream after ``layers[0:e]`` for each e asked for.

        Rows are padded on the right: no real token sees a padded one, what lies past a row's
        length is meaningless.

        Args:
            ids: (B, T) token ids, any valid id as padding.
            lengths: (B,) real tokens of each row; they trim the work, not the shapes.
            layers: Exits in [0, num_layers]; ``num_layers`` is the stream before the final norm.

        Returns:
            Exit layer -> (B, T, D) in ``dtype``.

        Raises:
            UsageError: A layer this model does not have.
        """
        c = self.config
        if bad := [e for e in layers if not 0 <= e <= c.num_layers]:
            raise UsageError(
                f"layers must lie in [0, {c.num_layers}] for this {c.num_layers}-layer model, "
                f"got {bad[0]}."
            )
        batch, width = ids.shape
        used = min(width, int(torch.as_tensor(lengths).max())) if batch else width
        ids = ids[:, :used].to(self.device)
        positions = torch.arange(used, device=self.device).expand(batch, used)
        h = self.embedding[ids]  # (B, T, D)
        states, start = {}, 0
        for stop in sorted(set(layers)):
            h = self.run(h, start, stop, positions, self.attend_causally)
            states[stop] = F.pad(h, (0, 0, 0, width - used)) if used < width else h
            start = stop
        return states

    @torch.no_grad()
    def logits(self, h: Tensor) -> Tensor:
        """Returns the full head on states before the final norm.

        Args:
            h: (..., D).

        Returns:
            (..., V) in ``dtype``.
        """
        c = self.config
        return self.head(F.rms_norm(h, (c.hidden_size,), self.norm, c.rms_norm_eps))

    def attend_causally(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention over whole right-padded rows: (B, T, H, D_h) -> (B, T, H D_h)."""
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(-2)
