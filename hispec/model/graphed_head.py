"""A level's whole pass for a GPU: its layers and its head, one CUDA graph.

    lifts              states from the boundary below to this one
    context            keys and values of positions that have become final
    feature            what a new root brings
    enter, block       the head's own block over the rows it has not seen
    norm, vocabulary   to the best ids

It does what :class:`~hispec.model.exits.TrainedHead` does step by step, on the same memory, so that
either may go on from the other. What a head lacks is left out: the model's own has the last alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hispec.model.cache import Cache
from hispec.model.compiled_head import lacking
from hispec.model.gpu import GpuPasses
from hispec.model.gpu_parts import Span
from hispec.model.graphs import Step
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Lift
from hispec.model.sender import PASSES, Message

if TYPE_CHECKING:
    from hispec.model.exits import TrainedHead


class GraphedHead:
    """A head as a part of graphs, on whatever passes its model has when it is asked.

    Args:
        head: the head; with no weights of its own, the model's.
    """

    def __init__(self, head: Any) -> None:
        self._head: TrainedHead = head
        self._feature: Tensor | None = None  # (1, K D)
        self._kv: Tensor | None = None  # (MAX_WIDTH, 2 H_kv D_h)

    def best(
        self, cache: Cache, first: int, nodes: Nodes, asked: Asked, lifts: Sequence[Lift]
    ) -> tuple[Tensor, Tensor] | None:
        """See :class:`~hispec.model.exits.ExitHead`; None where it is not for one graph.

        Then nothing has been run.
        """
        head, passes = self._head, self._head.model.narrow
        if not isinstance(passes, GpuPasses) or not passes.ranks(asked) or len(lifts) >= PASSES:
            return None
        lack = lacking(head, cache, first, nodes)
        if lack is None:
            return None
        root, final, start, end, new_root = lack
        message = passes.message()
        steps = [passes.lifting(message, lift) for lift in lifts]
        if root > final:
            steps.append(self._read(passes, message, cache, final, root))
        if new_root:
            steps.append(self._receive(passes, message, cache, root))
        feature = self._received(new_root)
        own = head.memory() if head.block else None
        span = passes.span(message, start, end - start, own, nodes)
        steps.append(self._enter(passes, span, cache, feature))
        if head.block and own:
            steps.append(passes.blocks([head.block], own, 0, span))
        ranking, ids, odds = passes.ranking(
            message, span, head.head, head.norm, asked, head.vocab_ids, first - start
        )
        passes.perform(message, [*steps, ranking], cache.kv)
        lack.made_good(head, feature if feature is not None else ids)
        return ids, odds

    def _read(
        self, passes: GpuPasses, message: Message, cache: Cache, start: int, end: int
    ) -> Step:
        """Keys and values of final states; see ``TrainedHead._write_context``."""
        head, config = self._head, self._head.model.config
        assert head.context and head.block
        shallow, deep = (cache.states[e] for e in (head.exit_layer, config.num_layers))
        width, kv = end - start, head.memory()
        if self._kv is None:
            size = 2 * config.num_kv_heads * config.head_dim
            self._kv = torch.zeros(MAX_WIDTH, size, device=deep.device)
        out, room, block, context = message.rows(start, width), self._kv, head.block, head.context

        def work(whole: bool) -> None:
            rows = passes.tiles(width)
            started, projected = rows if whole else width, room[:rows]
            passes.load(shallow, out, rows, started, head.proj)
            passes.norm(block.attention_norm, out, rows, started)
            passes.product(context[0], out, rows, projected)
            passes.load(deep, out, rows, started)
            passes.norm(head.context_norm, out, rows, started)
            passes.product(context[1], out, rows, projected, projected)
            passes.write(projected, out, kv, started)

        key = (self, "context", passes.tiles(width), shallow.data_ptr(), deep.data_ptr())
        return Step(key, work)

    def _receive(self, passes: GpuPasses, message: Message, cache: Cache, root: int) -> Step:
        """The root's feature; see ``TrainedHead._receive``."""
        head, deep = self._head, cache.states[self._head.model.config.num_layers]
        feature, plan, room = head.feature, message.rows(root - 1, 1), self._room()
        assert feature

        def work(whole: bool) -> None:
            rows = passes.tiles(1)
            passes.load(deep, plan, rows, 1)
            passes.norm(head.feature_norm, plan, rows, 1)
            passes.product(feature, plan, rows, room)

        return Step((self, "feature", deep.data_ptr()), work)

    def _received(self, new_root: bool) -> Tensor | None:
        """The feature, (K, D), where it is or will be; None where there is none."""
        head = self._head
        if head.feature is None:
            return None
        ours = self._room().view(-1, head.model.config.hidden_size)
        if not new_root and head.feature_of[1].data_ptr() != ours.data_ptr():
            ours.copy_(head.feature_of[1])  # received step by step
        return ours

    def _room(self) -> Tensor:
        if self._feature is None:
            assert self._head.feature
            self._feature = torch.zeros(1, self._head.feature.rows, device=self._head.norm.device)
        return self._feature

    def _enter(self, passes: GpuPasses, span: Span, cache: Cache, feature: Tensor | None) -> Step:
        """The block's input; see ``TrainedHead._enter``."""
        from hispec_kernels.gpu.rows import add_features

        head, states = self._head, cache.states[self._head.exit_layer]

        def work(whole: bool) -> None:
            started = span.started(whole)
            x = passes.load(states, span.plan, span.rows, started, head.proj)
            if feature is not None:
                add_features(x, feature, span.plan, rows=started)

        received = None if feature is None else feature.data_ptr()
        return Step((head.proj, received, span.rows, states.data_ptr()), work)
