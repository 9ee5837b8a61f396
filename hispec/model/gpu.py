"""Running blocks on a GPU: Triton kernels, one CUDA graph for any range of layers.

    x ← states                             (R, D) fp32, R = 16 or 32, of which W rows are real
    each block:
        h = rms x                                        rounded to the model's dtype
        q, cache ← rope(h W_qkvᵀ)                         into the rows' own slots
        a = attention(q, cache)                          by position, in splits of 128
        δ = a W_oᵀ;  x += δ;  h = rms x
        x += (silu(h W_gateᵀ) · h W_upᵀ) W_downᵀ

A row's bits do not depend on its company: :mod:`hispec_kernels.gpu` says why. States are fp32
between calls, so that stopping at an exit and going on rounds nothing.

Graphs are captured for a cache, a range of layers, a width bucket (16 or 32 rows), a length bucket
(a power of two of splits), for chains or trees, and the boundaries they lift states between, the
embeddings below them all; see :mod:`hispec.model.graphs`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig
from hispec.model.device import out_of_memory, upload
from hispec.model.graphs import Graphs
from hispec.model.linear import Linear
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Embedding, Rotary, Words
from hispec.model.sender import Sender
from hispec_kernels import gpu

_Known = dict[Hashable, "torch.cuda.CUDAGraph | None"]
#: Splits of the least length bucket: 512 positions.
_LEAST_SPLITS = 4


def gpu_passes(
    config: ModelConfig,
    rotary: Rotary,
    dtype: torch.dtype,
    device: torch.device,
    block: Block,
    head: Linear,
) -> tuple[GpuPasses | None, str]:
    """Returns the kernels' passes for such a model, or None and the reason why not.

    Args:
        config: the model's sizes.
        rotary: its positions.
        dtype: of weights and cache.
        device: where they are.
        block: one of the model's, on which the kernels are tried.
        head: the model's, likewise.
    """
    why = gpu.why_not(device) or gpu.uncovered(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.vocab_size,
        dtype,
    )
    if why:
        return None, why
    passes = GpuPasses(config, rotary, dtype, device)
    try:
        passes.probe(block, head)
    except Exception as error:  # no compiler, too little shared memory, …
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        return None, gpu.no_build(error)
    return passes, ""


class GpuPasses(Embedding):
    """Blocks run by Triton kernels.

    Args:
        config: the model's sizes; :func:`hispec_kernels.gpu.uncovered` has nothing against them.
        rotary: its positions.
        dtype: of weights and cache.
        device: a CUDA device, or a CPU in Triton's interpreter.
    """

    name = "triton"
    state_dtype = torch.float32
    min_width = 1
    asynchronous = True

    def __init__(
        self, config: ModelConfig, rotary: Rotary, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(device)
        self.build = gpu.build()
        self._config = config
        self._rotary = rotary.to(device)
        self._dtype = dtype
        self.graphs = Graphs(device)
        self._of_cache: weakref.WeakKeyDictionary[KVCache, _Known] = weakref.WeakKeyDictionary()
        self._of_heads: _Known = {}
        self._send = Sender(device)
        self._plan = self._send.told
        self._width = self._plan[1:2]

        def room(size: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(MAX_WIDTH, size, dtype=kind, device=device)

        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        wide = torch.float32
        self._x = room(config.hidden_size, wide)
        self._delta = room(config.hidden_size, wide)
        self._h = room(config.hidden_size)
        self._qkv = room((heads + 2 * kv_heads) * size, wide)
        self._queries = room(heads * size).view(MAX_WIDTH, heads, size)
        self._mixed = room(heads * size).view(MAX_WIDTH, heads, size)
        self._hidden = room(config.intermediate_size)
        # Products by themselves may be of other sizes: an input and its norm for each.
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}
        self._outputs: dict[int, Tensor] = {}
        self._best: dict[Hashable, tuple[Tensor, Tensor]] = {}  # what graphs leave their ids in
        self._sampling = torch.zeros(1 + MAX_WIDTH, dtype=torch.int64, device=device)
        self._temperature = torch.ones(1, device=device)
        self._count = torch.ones(1, dtype=torch.int32, device=device)
        self._counted = 1

    # ------------------------------------------------------------------ blocks

    def run(
        self,
        blocks: Sequence[Block],
        x: Tensor,
        position: int,
        kv: KVCache,
        first: int,
        nodes: Nodes | None = None,
    ) -> Tensor:
        """See :class:`~hispec.model.passes.Passes`; at most ``MAX_WIDTH`` rows."""
        self._x[: len(x)].copy_(x)
        self._pass(blocks, position, len(x), kv, first, nodes)
        return self._x[: len(x)].clone()

    def lift(
        self,
        blocks: Sequence[Block],
        source: Tensor | Words,
        targets: Sequence[tuple[int, Tensor]],
        position: int,
        width: int,
        kv: KVCache,
        first: int,
        nodes: Nodes | None = None,
    ) -> None:
        """See :class:`~hispec.model.passes.Passes`; the graph itself embeds and moves states."""
        self._pass(blocks, position, width, kv, first, nodes, source, targets)

    def _pass(
        self,
        blocks: Sequence[Block],
        position: int,
        width: int,
        kv: KVCache,
        first: int,
        nodes: Nodes | None,
        source: Tensor | Words | None = None,
        targets: Sequence[tuple[int, Tensor]] = (),
    ) -> None:
        """Runs blocks over the rows of ``x``, or from one boundary's states to others'."""
        from hispec_kernels.gpu.rows import embed_rows, load_rows, store_rows

        tree = nodes is not None and not nodes.straight(position + width - nodes.root)
        words = source if isinstance(source, Words) else None
        self._send.plan(position, width, nodes if tree else None, words)
        rows = self._rows(width)
        needed = -(-(position + width) // 128)
        splits = min(_bucket(needed), kv.keys[0].shape[1] // 128)

        x, plan = self._x[:rows], self._plan

        def work(whole: bool) -> None:
            started = rows if whole else width
            extent = splits if whole else needed
            if words:
                embed_rows(words.linear.weight, plan, x, rows=started)
            elif isinstance(source, Tensor):
                load_rows(source, plan, x, rows=started)
            done = 0
            for stop, target in targets or [(len(blocks), x)]:
                if part := blocks[done:stop]:
                    self._run_blocks(part, kv, first + done, rows, started, extent, tree)
                if target is not x:
                    store_rows(x, plan, target, rows=started)
                done = stop

        # Boundaries' states live as long as their cache.
        start = words.linear.weight if words else source
        places = tuple((stop, y.data_ptr()) for stop, y in targets)
        origin = start.data_ptr() if isinstance(start, Tensor) else None
        known = self._of_cache.setdefault(kv, {})
        key = (*blocks[:1], first, len(blocks), rows, splits, tree, origin, places)
        self.graphs.run(known, key, work)

    def _run_blocks(
        self,
        blocks: Sequence[Block],
        kv: KVCache,
        first: int,
        rows: int,
        started: int,
        splits: int,
        tree: bool,
    ) -> None:
        """Starts the kernels of a pass over what the buffers hold.

        Args:
            blocks: see :meth:`run`.
            kv: likewise.
            first: likewise.
            rows: of the buffers; see :meth:`_rows`.
            started: rows for which programs are started, at least the plan's width.
            splits: of the cache's positions, at least to the last row's.
            tree: whether the plan holds one.
        """
        from hispec_kernels.gpu.attention import Partials, decode_attention
        from hispec_kernels.gpu.products import gated_product, product
        from hispec_kernels.gpu.rms_norm import add_rms_norm
        from hispec_kernels.gpu.rope import rope_write

        config, eps, width = self._config, self._config.rms_norm_eps, self._width
        x, h, delta, qkv = (y[:rows] for y in (self._x, self._h, self._delta, self._qkv))
        queries, mixed, hidden = (y[:rows] for y in (self._queries, self._mixed, self._hidden))
        cos, sin = self._rotary.cos, self._rotary.sin  # (S, D_h)
        partials = Partials(splits, rows, config.num_heads, config.head_dim, self._device)
        for layer, block in enumerate(blocks, first):
            keys, values = kv.keys[layer], kv.values[layer]
            add_rms_norm(x, block.attention_norm, eps, width, h, rows=started)
            product(h, block.qkv.weight, width, qkv, block.qkv.bias)
            rope_write(qkv, cos, sin, self._plan, queries, keys, values, rows=started)
            decode_attention(
                queries, keys, values, self._plan, partials, mixed, tree=tree, rows=started
            )
            product(mixed.flatten(1), block.output.weight, width, delta, block.output.bias)
            add_rms_norm(x, block.mlp_norm, eps, width, h, delta, rows=started)
            gated_product(h, block.gate_up.weight, width, hidden, block.gate_up.bias)
            product(hidden, block.down.weight, width, x, block.down.bias, residual=x)

    @staticmethod
    def _rows(width: int) -> int:
        """Returns how many rows of the buffers a pass of ``width`` takes: whole tiles."""
        return 16 if width <= 16 else MAX_WIDTH

    def probe(self, block: Block, head: Linear) -> None:
        """Builds the kernels and runs them once: one row of zeros, a tree, two tiles, a head."""
        config = self._config
        kv = KVCache(1, config.num_kv_heads, config.head_dim, 512, self._dtype, self._device)
        nodes = Nodes.line(0, 2)
        nodes.append(0)
        self.run([block], self._x[:1], 0, kv, 0)
        self.run([block], self._x[:3], 0, kv, 0, nodes)
        self.run([block], self._x[:17], 0, kv, 0)
        states = torch.zeros(2, config.hidden_size, device=self._device)
        self.lift([block], states, [(1, states)], 0, 1, kv, 0)
        self.lift([block], Words(block.qkv, [0]), [(0, states)], 0, 1, kv, 0)
        self.move(kv, [2], [1])
        norm = block.attention_norm
        self.project(head, states, norm)
        for seed in (None, 0):
            self.best(head, states, norm, Asked(1, 1.0, seed, [0, 0]), None)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @property
    def captured(self) -> int:
        """Graphs there are: of caches that still live, and of heads."""
        known = (*self._of_cache.values(), self._of_heads)
        return sum(graph is not None for graphs in known for graph in graphs.values())

    # ------------------------------------------------------------------ the cache

    def store(self, projected: Tensor, position: int, kv: KVCache, layer: int) -> None:
        """See :class:`~hispec.model.passes.Passes`."""
        end = position + projected.shape[0]
        keys, values = self._rotary.split_kv(projected, position, self._config.num_kv_heads)
        kv.keys[layer][:, position:end] = keys.transpose(0, 1).to(self._dtype)
        kv.values[layer][:, position:end] = values.transpose(0, 1).to(self._dtype)

    def move(self, kv: KVCache, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See :class:`~hispec.model.passes.Passes`; each target lies below its source, in order."""
        from hispec_kernels.gpu.compact import compact

        moves = upload(np.array([[len(sources)] * len(sources), sources, targets]), self._device)
        compact(kv.storage, moves[1], moves[2], moves[0])

    # ------------------------------------------------------------------ products

    def project(self, linear: Linear, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """See :class:`~hispec.model.passes.Passes`; the result is fp32."""
        if len(x) > MAX_WIDTH:
            return torch.cat([self.project(linear, part, norm) for part in x.split(MAX_WIDTH)])
        width, size = x.shape
        rows = self._rows(width)
        self._fill(x, norm is not None)
        if linear.rows not in self._outputs:
            self._outputs[linear.rows] = torch.zeros(MAX_WIDTH, linear.rows, device=self._device)
        out = self._outputs[linear.rows]
        known, key = self._of_heads, (linear, norm, rows)  # kept, as graphs read their weights

        def work(whole: bool) -> None:
            self._project(linear, norm, size, rows, rows if whole else width, out[:rows])

        self.graphs.run(known, key, work)
        return out[:width].clone()

    def best(
        self, linear: Linear, x: Tensor, norm: Tensor, asked: Asked, ids: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """See :class:`~hispec.model.passes.Passes` and :func:`hispec_kernels.exit_head.best`."""
        from hispec_kernels.noise import seeded_state

        k, temperature, seed, positions, _ = asked
        width, size = x.shape
        rows = self._rows(width)
        self._fill(x, True)
        self._temperature.fill_(temperature)
        if seed is not None:
            noise = np.array([seeded_state(seed), *positions], np.int64)
            upload(noise, self._device, self._sampling[: 1 + width])
        key = (linear, norm, ids, rows, k, seed is not None)
        latest: list[tuple[Tensor, Tensor]] = []

        def work(whole: bool) -> None:
            started = rows if whole else width
            latest[:] = [self._rank(linear, norm, size, rows, started, k, seed, ids)]
            if whole:  # a graph will leave its ids there whenever it is replayed
                self._best[key] = latest[0]

        self.graphs.run(self._of_heads, key, work)
        found, odds = latest[0] if latest else self._best[key]
        return found[:width], odds[:width]

    def _rank(
        self,
        linear: Linear,
        norm: Tensor,
        size: int,
        rows: int,
        started: int,
        k: int,
        seed: int | None,
        ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        from hispec_kernels.gpu.exit_head import best
        from hispec_kernels.gpu.rms_norm import add_rms_norm

        x, h = (y[:rows] for y in self._inputs[size])
        add_rms_norm(x, norm, self._config.rms_norm_eps, self._count, h, rows=started)
        sampling = None if seed is None else self._sampling[: 1 + rows]
        warmth = self._temperature
        return best(h, linear.weight, self._count, k, warmth, sampling, ids, rows=started)

    def _fill(self, x: Tensor, normed: bool) -> None:
        """Puts rows where products by themselves read them, and says how many there are."""
        width, size = x.shape
        if size not in self._inputs:
            self._inputs[size] = (
                torch.zeros(MAX_WIDTH, size, device=self._device),
                torch.zeros(MAX_WIDTH, size, dtype=self._dtype, device=self._device),
            )
        self._inputs[size][not normed][:width].copy_(x)
        if self._counted != width:
            self._count.fill_(width)
            self._counted = width

    def _project(
        self, linear: Linear, norm: Tensor | None, size: int, rows: int, started: int, out: Tensor
    ) -> None:
        from hispec_kernels.gpu.products import product
        from hispec_kernels.gpu.rms_norm import add_rms_norm

        x, h = (y[:rows] for y in self._inputs[size])
        if norm is not None:
            eps = self._config.rms_norm_eps
            add_rms_norm(x, norm, eps, self._count, h, rows=started)
        product(h, linear.weight, self._count, out, linear.bias)


def _bucket(splits: int) -> int:
    """The length bucket that holds so many splits."""
    return max(_LEAST_SPLITS, 1 << math.ceil(math.log2(splits)))
