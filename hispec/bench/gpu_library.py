"""Passes that are fast and not exact: torch's products in the place of ours.

On a GPU ``--numerics fast`` runs the kernels of ``exact``: there is no other code to run. So that
what exactness costs can be said, these passes do what a decoder does that promises nothing: cuBLAS
multiplies each pass at its own width, by whichever of its kernels it likes there, and hands on its
results rounded. Norms, rotation, the cache and attention stay ours, and so do the graphs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hispec.bench.methods import Engine, Outcome, Question, Workbench
from hispec.hierarchy import AR
from hispec.model.block import Block
from hispec.model.cache import Cache, KVCache
from hispec.model.config import ModelConfig
from hispec.model.gpu import GpuPasses
from hispec.model.gpu_parts import Span
from hispec.model.graphs import Step
from hispec.model.linear import Linear
from hispec.model.llama import Llama
from hispec.model.nodes import MAX_WIDTH
from hispec.model.passes import Asked, Passes, Rotary
from hispec.model.torch_passes import TorchPasses
from hispec_kernels import swiglu


class LibraryPasses(GpuPasses):
    """:class:`~hispec.model.gpu.GpuPasses` with torch's products.

    Args:
        config: the model's sizes.
        rotary: its positions.
        dtype: of weights and cache.
        device: where they are.
        gate: leave gate, up and SwiGLU to our one kernel: torch takes three.
    """

    def __init__(
        self,
        config: ModelConfig,
        rotary: Rotary,
        dtype: torch.dtype,
        device: torch.device,
        *,
        gate: bool,
    ) -> None:
        super().__init__(config, rotary, dtype, device)
        self.name = "torch.mm, our gate" if gate else "torch.mm"
        self._gate = gate
        self._found: dict[Hashable, Tensor] = {}  # what graphs leave their products in

    @staticmethod
    def tiles(width: int) -> int:
        """The products take rows as they come."""
        return width

    def _run_blocks(
        self, blocks: Sequence[Block], kv: KVCache, first: int, span: Span, whole: bool
    ) -> None:
        """See :class:`~hispec.model.gpu_parts.Parts`; sums into x wait for the norm behind them."""
        from hispec_kernels.gpu.attention import Partials, decode_attention
        from hispec_kernels.gpu.products import gated_product
        from hispec_kernels.gpu.rms_norm import add_rms_norm
        from hispec_kernels.gpu.rope import rope_write

        rows, plan, tree, splits = span.rows, span.plan, span.tree, span.extent(whole)
        config, eps, width = self._config, self._config.rms_norm_eps, span.real
        x, h, queries, mixed = (y[:rows] for y in (self._x, self._h, self._queries, self._mixed))
        cos, sin = self._rotary.cos, self._rotary.sin  # (S, D_h)
        partials = Partials(splits, rows, config.num_heads, config.head_dim, self._device)
        delta: Tensor | None = None
        for layer, block in enumerate(blocks, first):
            keys, values = kv.keys[layer], kv.values[layer]
            add_rms_norm(x, block.attention_norm, eps, width, h, delta)
            rope_write(block.qkv(h), cos, sin, plan, queries, keys, values)
            decode_attention(queries, keys, values, plan, partials, mixed, tree=tree)
            add_rms_norm(x, block.mlp_norm, eps, width, h, block.output(mixed.flatten(1)))
            if self._gate:
                hidden = self._hidden[:rows]
                tile = self._h[: GpuPasses.tiles(rows)]  # our product's rows come in tiles
                gated_product(tile, block.gate_up.weight, width, hidden, block.gate_up.bias)
            else:
                hidden = swiglu(block.gate_up(h))
            delta = block.down(hidden)
        if delta is not None:
            x.add_(delta)

    def project(self, linear: Linear, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """See :class:`~hispec.model.passes.Passes`; at most ``MAX_WIDTH`` rows."""
        from hispec_kernels.gpu.rms_norm import add_rms_norm

        width, size = x.shape
        assert width <= MAX_WIDTH, "prompts are not for these passes"
        self._fill(x, norm is not None)
        key = (linear, norm, width)

        def work(whole: bool) -> None:
            states, h = (y[:width] for y in self._inputs[size])
            if norm is not None:
                add_rms_norm(states, norm, self._config.rms_norm_eps, self._count, h)
            self._found[key] = linear(h)

        self.graphs.run(self._of_heads, [Step(key, work)])
        return self._found[key].to(torch.float32, copy=True)

    def ranking(self, *args: Any, **options: Any) -> tuple[Step, Tensor, Tensor]:
        """See :class:`~hispec.model.gpu_parts.Parts`; however many are asked for, one a row."""
        step, ids, odds = super().ranking(*args, **options)
        return step, ids[:, :1], odds[:, :1]

    def ranks(self, asked: Asked) -> bool:
        """See :class:`~hispec.model.gpu_parts.Parts`; greedy picks alone, one a row."""
        return not asked.odds and asked.seed is None

    def _rank(
        self,
        linear: Linear,
        norm: Tensor,
        span: Span,
        whole: bool,
        k: int,
        warmth: Tensor,
        noise: Tensor | None,
        ids: Tensor | None,
        out: tuple[Tensor, Tensor],
    ) -> None:
        rows = span.rows
        self.norm(norm, span.plan, rows, rows)
        picks = linear(self._h[:rows]).argmax(-1, keepdim=True)
        out[0][:rows, :1] = picks if ids is None else ids[picks]


def fast_passes(model: Llama) -> list[Passes]:
    """Returns the passes beside which a model's exact ones are timed."""
    config, rotary, dtype, device = model.config, model.rotary, model.dtype, model.device
    if isinstance(model.narrow, GpuPasses):
        return [LibraryPasses(config, rotary, dtype, device, gate=gate) for gate in (False, True)]
    return [TorchPasses(config, rotary, dtype, device, exact=False)]


@contextmanager
def decoding_on(model: Llama, passes: Passes) -> Iterator[None]:
    """Inside, the model decodes on these passes."""
    before, model.narrow = model.narrow, passes
    try:
        yield
    finally:
        model.narrow = before


class PlainOn(Engine):
    """Plain decoding on other passes than the model's own; prompts are prefilled as always.

    Args:
        bench: shared with the other methods.
        passes: which.
    """

    def __init__(self, bench: Workbench, passes: Passes) -> None:
        super().__init__(bench, f"ar on {passes.name}", AR, exact=False)
        self.passes = passes

    def _decode(self, question: Question, cache: Cache) -> Outcome:
        with decoding_on(self._bench.lm.model, self.passes):
            return super()._decode(question, cache)
