"""Running blocks on a GPU: Triton kernels, one CUDA graph for a level's whole pass.

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
embeddings below them all, together with the head that reads them
(:mod:`hispec.model.graphed_head`). Their parts are in :mod:`hispec.model.gpu_parts`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig
from hispec.model.device import out_of_memory, upload
from hispec.model.gpu_parts import Parts
from hispec.model.graphs import Graphs, Step
from hispec.model.linear import Linear
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Embedding, Lift, Rotary, Words
from hispec.model.torch_passes import TorchPasses
from hispec_kernels import gpu

#: How far a row's states after a block may be from those that torch finds, relative to their size.
#: Torch's are rounded after every operation, and in fp32 multiplied in TF32 where that is allowed.
TOLERANCE = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 1e-1}


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
        wrong = passes.probe(block, head)
    except Exception as error:  # no compiler, too little shared memory, …
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        return None, gpu.no_build(error)
    return (None, wrong) if wrong else (passes, "")


class GpuPasses(Embedding, Parts):
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
        Embedding.__init__(self, device)
        Parts.__init__(self, config, rotary, dtype, device)
        self.build = gpu.build()
        # Products by themselves may be of other sizes: an input and its norm for each.
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}
        self._outputs: dict[int, Tensor] = {}
        self._count = torch.ones(1, dtype=torch.int32, device=device)
        self._counted = 1

    @property
    def prepared(self) -> int:
        """See :class:`~hispec.model.passes.Passes`."""
        return self.graphs.prepared

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
        message = self.message()
        span = self.span(message, position, len(x), kv, nodes)
        self.perform(message, [self.blocks(blocks, kv, first, span)], kv)
        return self._x[: len(x)].clone()

    def lift(self, lift: Lift) -> None:
        """See :class:`~hispec.model.passes.Passes`; the graph itself embeds and moves states."""
        message = self.message()
        self.perform(message, [self.lifting(message, lift)], lift.kv)

    def probe(self, block: Block, head: Linear) -> str:
        """Builds the kernels and runs them: one row, a tree, two tiles of rows, a head.

        Returns:
            What is wrong with their results; empty as a rule.
        """
        config = self._config
        kv = KVCache(1, config.num_kv_heads, config.head_dim, 512, self._dtype, self._device)
        if wrong := self._compare(block, kv):
            return wrong
        states = torch.zeros(2, config.hidden_size, device=self._device)
        self.lift(Lift([block], states, [(1, states)], 0, 1, kv, 0))
        self.lift(Lift([block], Words(block.qkv, [0]), [(0, states)], 0, 1, kv, 0))
        self._probe_heads(kv, states)
        self.move(kv, [2], [1])
        norm = block.attention_norm
        self.project(head, states, norm)
        for seed in (None, 0):
            self.best(head, states, norm, Asked(1, 1.0, seed, [0, 0]), None)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.graphs = Graphs(self._device)  # with a pool of its own: these graphs are gone
        return ""

    def _compare(self, block: Block, kv: KVCache) -> str:
        """Returns what is wrong with a block's states behind a past of two splits.

        A compiler, a driver or a GPU that nobody has tried yet must not be told by its texts.
        """
        config, past = self._config, 130
        plain = TorchPasses(config, self._rotary, self._dtype, self._device, exact=False)
        # Large biases make scores in which either's rounding decides.
        qkv = Linear(block.qkv.weight)
        parts = qkv, block.output, block.mlp_norm, block.gate_up, block.down
        block = Block(block.attention_norm, *parts)
        draw = torch.Generator().manual_seed(0)
        # Small, so that the states after the block are what it has added.
        rows = 0.02 * torch.randn(17, config.hidden_size, generator=draw).to(self._device)
        shape = kv.storage[..., :past, :].shape
        kv.storage[..., :past, :] = torch.randn(shape, generator=draw).to(self._device)
        tree = Nodes.line(past, 2)
        tree.append(0)
        for x, nodes in ((rows[:1], None), (rows[:3], tree), (rows, None)):
            wanted = plain.run([block], x.to(self._dtype), past, kv, 0, nodes).float()
            first = self.run([block], x, past, kv, 0, nodes)
            error = ((first - wanted).norm(dim=1) / wanted.norm(dim=1)).max()
            if wanted.isfinite().all() and not error <= TOLERANCE[self._dtype]:
                return f"the kernels' results are not torch's here: {float(error):.1g} off"
            bits = first.view(torch.int32)
            again = [self.run([block], x, past, kv, 0, nodes) for _ in range(2 * self.graphs.on)]
            if not all(torch.equal(bits, found.view(torch.int32)) for found in again):
                return "CUDA graphs give other results here than the kernels in them"
        return ""

    def _probe_heads(self, kv: KVCache, states: Tensor) -> None:
        """What trained heads need besides."""
        from hispec_kernels.gpu.rows import add_features, load_rows

        message, rows = self.message(), self.tiles(1)
        plan = message.plan(0, 1)
        message.send()
        load_rows(states, plan, self._h[:rows], rows=1)
        add_features(self._x[:rows], states, plan, rows=1)
        size = 2 * self._config.num_kv_heads * self._config.head_dim
        self.write(torch.zeros(rows, size, device=self._device), plan, kv, 1)

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

        count = len(sources)
        moves = np.zeros((3, MAX_WIDTH), np.int64)  # rows lie alike however many slots move
        moves[0, 0], moves[1, :count], moves[2, :count] = count, sources, targets
        told = upload(moves, self._device)
        compact(kv.storage, told[1], told[2], told[0])

    # ------------------------------------------------------------------ products

    def project(self, linear: Linear, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """See :class:`~hispec.model.passes.Passes`; the result is fp32."""
        if len(x) > MAX_WIDTH:
            return torch.cat([self.project(linear, part, norm) for part in x.split(MAX_WIDTH)])
        width, size = x.shape
        rows = self.tiles(width)
        self._fill(x, norm is not None)
        if linear.rows not in self._outputs:
            self._outputs[linear.rows] = torch.zeros(MAX_WIDTH, linear.rows, device=self._device)
        out = self._outputs[linear.rows]

        def work(whole: bool) -> None:
            self._project(linear, norm, size, rows, rows if whole else width, out[:rows])

        # Weights are kept by their graphs' keys.
        self.graphs.run(self._of_heads, [Step((linear, norm, rows), work)])
        return out[:width].clone()

    def best(
        self, linear: Linear, x: Tensor, norm: Tensor, asked: Asked, ids: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """See :class:`~hispec.model.passes.Passes` and :func:`hispec_kernels.exit_head.best`."""
        if not self.ranks(asked):
            return None
        self._x[: len(x)].copy_(x)
        message = self.message()
        span = self.span(message, 0, len(x))
        ranking, found, odds = self.ranking(message, span, linear, norm, asked, ids)
        self.perform(message, [ranking])
        return found, odds

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
