"""What graphs of a GPU's passes are made of: rows, layers from boundary to boundary, heads.

A part (:class:`~hispec.model.graphs.Step`) starts kernels on buffers that never move. What it is
told of a pass (:mod:`hispec.model.sender`) is the device's to read, so that a captured part runs at
any place and on any tree. Parts put together are one graph: a level's layers and its head.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig
from hispec.model.graphs import Graphs, Step
from hispec.model.linear import Linear
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Lift, Rotary, Words
from hispec.model.sender import Message, Sender

#: Graphs by what shapes them; None where the kernels are built and nothing is captured yet.
Known = dict[Hashable, "torch.cuda.CUDAGraph | None"]
#: Ids that a row's head ranks at most.
MOST_RANKED = 16
#: Splits of the least length bucket: 512 positions.
_LEAST_SPLITS = 4


class Span(NamedTuple):
    """The rows of a pass, as its kernels take them.

    Attributes:
        plan: tells the device of them; see :mod:`hispec_kernels.gpu.plan`.
        width: W.
        rows: of the buffers, whole tiles.
        needed: splits of the cache up to the last row's position.
        splits: of its bucket.
        tree: whether the plan holds one.
    """

    plan: Tensor
    width: int
    rows: int
    needed: int
    splits: int
    tree: bool

    @property
    def real(self) -> Tensor:
        """W as the device reads it, (1,) int32."""
        return self.plan[1:2]

    @property
    def shape(self) -> tuple[int, int, bool]:
        """What a graph is captured for."""
        return self.rows, self.splits, self.tree

    def started(self, whole: bool) -> int:
        """Rows to start programs for: the bucket's, or this time's."""
        return self.rows if whole else self.width

    def extent(self, whole: bool) -> int:
        """Splits likewise."""
        return self.splits if whole else self.needed


class Parts:
    """The buffers of a model's passes, and the parts that work on them.

    Args:
        config: the model's sizes.
        rotary: its positions.
        dtype: of weights and cache.
        device: where everything is.
    """

    def __init__(
        self, config: ModelConfig, rotary: Rotary, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        self._rotary = rotary.to(device)
        self._dtype = dtype
        self._device = device
        self.graphs = Graphs(device)
        self._of_cache: weakref.WeakKeyDictionary[KVCache, Known] = weakref.WeakKeyDictionary()
        self._of_heads: Known = {}
        self._send = Sender(device)

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
        self._best: dict[int, tuple[Tensor, Tensor]] = {}  # by k: ids and their odds

    def message(self) -> Message:
        """Returns an empty message to the next graph."""
        return Message(self._send)

    def perform(self, message: Message, steps: Sequence[Step], kv: KVCache | None = None) -> None:
        """Sends a message and runs the steps that read it, in one graph.

        Args:
            message: what they are told.
            steps: in order.
            kv: the cache on which they work, with which the graph goes; None if on none.
        """
        message.send()
        known = self._of_heads if kv is None else self._of_cache.setdefault(kv, {})
        self.graphs.run(known, steps)

    def span(
        self,
        message: Message,
        position: int,
        width: int,
        kv: KVCache | None = None,
        nodes: Nodes | None = None,
        words: Words | None = None,
    ) -> Span:
        """Adds rows to a message; returns what is to be known of them.

        Args:
            message: to the graph they are in.
            position: slot of the first.
            width: how many, at most ``MAX_WIDTH``.
            kv: the cache their attention reads, if any does.
            nodes: the round's tree.
            words: their tokens.
        """
        assert width <= MAX_WIDTH, "a narrow pass takes MAX_WIDTH rows"
        plan = message.plan(position, width, nodes, words)
        tree = nodes is not None and not nodes.straight(position + width - nodes.root)
        needed = -(-(position + width) // 128) if kv else 0
        splits = min(_bucket(needed), kv.keys[0].shape[1] // 128) if kv else 0
        return Span(plan, width, self.tiles(width), needed, splits, tree)

    def lifting(self, message: Message, lift: Lift) -> Step:
        """Returns a lift as a part of a graph; see :class:`~hispec.model.passes.Lift`."""
        from hispec_kernels.gpu.rows import embed_rows, load_rows, store_rows

        blocks, source, targets, position, width, kv, first, nodes = lift
        words = source if isinstance(source, Words) else None
        span = self.span(message, position, width, kv, nodes, words)
        x, plan = self._x[: span.rows], span.plan

        def work(whole: bool) -> None:
            started, done = span.started(whole), 0
            if words:
                embed_rows(words.linear.weight, plan, x, rows=started)
            elif isinstance(source, Tensor):
                load_rows(source, plan, x, rows=started)
            for stop, target in targets:
                if part := blocks[done:stop]:
                    self._run_blocks(part, kv, first + done, span, whole)
                store_rows(x, plan, target, rows=started)
                done = stop

        # Boundaries' states live as long as their cache.
        start = words.linear.weight if words else source
        places = tuple((stop, y.data_ptr()) for stop, y in targets)
        origin = start.data_ptr() if isinstance(start, Tensor) else None
        return Step((*blocks[:1], first, len(blocks), *span.shape, origin, places), work)

    def blocks(self, blocks: Sequence[Block], kv: KVCache, first: int, span: Span) -> Step:
        """Returns the running of blocks, over what the states' buffer holds, as a part of a graph.

        Args:
            blocks: consecutive ones.
            kv: knows their keys and values of all earlier slots.
            first: the first block's layer in ``kv``.
            span: the rows.
        """
        return Step(
            (*blocks[:1], first, len(blocks), *span.shape, kv.storage.data_ptr()),
            lambda whole: self._run_blocks(blocks, kv, first, span, whole),
        )

    def _run_blocks(
        self, blocks: Sequence[Block], kv: KVCache, first: int, span: Span, whole: bool
    ) -> None:
        """Starts the kernels of a pass over what the buffers hold.

        Args:
            blocks: consecutive ones.
            kv: knows their keys and values of all earlier slots.
            first: the first block's layer in ``kv``.
            span: the rows.
            whole: whether to start as many programs as its whole bucket needs.
        """
        from hispec_kernels.gpu.attention import Partials, decode_attention
        from hispec_kernels.gpu.products import gated_product, product
        from hispec_kernels.gpu.rms_norm import add_rms_norm
        from hispec_kernels.gpu.rope import rope_write

        config, eps, rows = self._config, self._config.rms_norm_eps, span.rows
        plan, width, started, tree = span.plan, span.real, span.started(whole), span.tree
        x, h, delta, qkv = (y[:rows] for y in (self._x, self._h, self._delta, self._qkv))
        queries, mixed, hidden = (y[:rows] for y in (self._queries, self._mixed, self._hidden))
        cos, sin = self._rotary.cos, self._rotary.sin  # (S, D_h)
        extent = span.extent(whole)
        partials = Partials(extent, rows, config.num_heads, config.head_dim, self._device)
        for layer, block in enumerate(blocks, first):
            keys, values = kv.keys[layer], kv.values[layer]
            add_rms_norm(x, block.attention_norm, eps, width, h, rows=started)
            product(h, block.qkv.weight, width, qkv, block.qkv.bias)
            rope_write(qkv, cos, sin, plan, queries, keys, values, rows=started)
            decode_attention(queries, keys, values, plan, partials, mixed, tree=tree, rows=started)
            product(mixed.flatten(1), block.output.weight, width, delta, block.output.bias)
            add_rms_norm(x, block.mlp_norm, eps, width, h, delta, rows=started)
            gated_product(h, block.gate_up.weight, width, hidden, block.gate_up.bias)
            product(hidden, block.down.weight, width, x, block.down.bias, residual=x)

    @staticmethod
    def tiles(width: int) -> int:
        """Returns how many rows of the buffers a pass of ``width`` takes: whole tiles."""
        return 16 if width <= 16 else MAX_WIDTH

    def load(
        self, states: Tensor, plan: Tensor, rows: int, started: int, linear: Linear | None = None
    ) -> Tensor:
        """Starts what puts a plan's rows into the states' buffer, mapped if there is a map.

        Args:
            states: (S, D), by slot.
            plan: of the rows.
            rows: of the buffers.
            started: rows to start programs for.
            linear: D → D.

        Returns:
            The buffer, (rows, D) fp32.
        """
        from hispec_kernels.gpu.rows import load_rows

        x = self._x[:rows]
        load_rows(states, plan, self._h[:rows] if linear else x, rows=started)
        if linear:
            self.product(linear, plan, rows, x)
        return x

    def norm(self, weight: Tensor, plan: Tensor, rows: int, started: int) -> None:
        """Starts the norm of the states' buffer; :meth:`product` takes it."""
        from hispec_kernels.gpu.rms_norm import add_rms_norm

        x, h = self._x[:rows], self._h[:rows]
        add_rms_norm(x, weight, self._config.rms_norm_eps, plan[1:2], h, rows=started)

    def product(
        self, linear: Linear, plan: Tensor, rows: int, out: Tensor, residual: Tensor | None = None
    ) -> None:
        """Starts a product of what is normed; ``out`` is (R, N), R at least the plan's width."""
        from hispec_kernels.gpu.products import product

        product(self._h[:rows], linear.weight, plan[1:2], out, linear.bias, residual)

    def write(self, projected: Tensor, plan: Tensor, kv: KVCache, started: int) -> None:
        """Starts the writing of a plan's keys and values, which are not yet rotated.

        Args:
            projected: (rows, 2 H_kv D_h) fp32.
            plan: of the rows.
            kv: a cache of one layer.
            started: rows to start programs for.
        """
        from hispec_kernels.gpu.rope import rope_write

        cos, sin = self._rotary.cos, self._rotary.sin
        nobody = self._queries[: len(projected), :0]
        rope_write(projected, cos, sin, plan, nobody, kv.keys[0], kv.values[0], rows=started)

    def ranks(self, asked: Asked) -> bool:
        """Returns whether :meth:`ranking` does what is asked."""
        return asked.k <= MOST_RANKED

    def ranking(
        self,
        message: Message,
        span: Span,
        linear: Linear,
        norm: Tensor,
        asked: Asked,
        ids: Tensor | None,
        skipped: int = 0,
    ) -> tuple[Step, Tensor, Tensor]:
        """Returns, as a part of a graph, a head over what the states' buffer holds.

        Args:
            message: to the graph.
            span: the rows.
            linear: the vocabulary head.
            norm: (D,), before it.
            asked: what of it, about all rows but those that are skipped.
            ids: (V_r,) the columns' ids, or None where they are the columns.
            skipped: rows in front.

        Returns:
            The step, and where ids and odds will be, which hold until anything else is run.
        """
        k, seed = asked.k, asked.seed
        sampling, warmth = message.ranking(asked, skipped)
        if k not in self._best:
            ids_of = torch.zeros(MAX_WIDTH, k, dtype=torch.int64, device=self._device)
            self._best[k] = ids_of, torch.zeros(MAX_WIDTH, k, device=self._device)
        room = self._best[k]
        noise = None if seed is None else sampling[: 1 + span.rows]

        def work(whole: bool) -> None:
            self._rank(linear, norm, span, whole, k, warmth, noise, ids, room)

        found, odds = (y[skipped : span.width] for y in room)
        return Step((linear, norm, ids, span.rows, k, seed is not None), work), found, odds

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
        from hispec_kernels.gpu.exit_head import best

        started, h = span.started(whole), self._h[: span.rows]
        self.norm(norm, span.plan, span.rows, started)
        best(h, linear.weight, span.real, k, warmth, noise, ids, rows=started, out=out)


def _bucket(splits: int) -> int:
    """The length bucket that holds so many splits."""
    return max(_LEAST_SPLITS, 1 << math.ceil(math.log2(splits)))
