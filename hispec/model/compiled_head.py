"""A trained head whose drafts take one call of the compiled library (``draft.inc.h``).

It does what :class:`~hispec.model.exits.TrainedHead` does step by step, on the same memory: keys
and values, what is known of them, and the root's feature stay the head's own, so that either may go
on from the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hispec.model.cache import Cache
from hispec.model.linear import Linear
from hispec.model.native import NativePasses
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked
from hispec_kernels import cpu

if TYPE_CHECKING:
    from hispec.model.exits import TrainedHead


class CompiledHead:
    """The library's view of a head.

    Args:
        head: the head.
        passes: its model's.
    """

    def __init__(self, head: TrainedHead, passes: NativePasses) -> None:
        self._head = head
        self._passes = passes
        self._kept: list[Tensor] = []  # what the record points to
        width = head.model.config.hidden_size
        shallow, deep = head.context or (None, None)
        self._maps = head.feature.rows // width if head.feature else 0
        self._feature = torch.empty(self._maps, width)
        kv = head.memory() if head.block else None
        self._bytes = head.head.layout == "bytes"
        self._shape = passes.shape(kv)
        self._record = cpu.Head(
            self._weight(head.proj),
            self._weight(shallow),
            self._weight(deep),
            self._weight(head.feature),
            self._weight(head.head),
            *(self._scale(x) for x in (head.proj, shallow, deep, head.feature, head.head)),
            self._wide(head.proj.bias if head.proj else None),
            self._wide(head.context_norm if head.context else None),
            self._wide(head.feature_norm if head.feature else None),
            self._wide(head.norm),
            None if head.vocab_ids is None else head.vocab_ids.data_ptr(),
            self._maps,
            head.head.rows,
            passes.record(head.block, kv) if head.block and kv else cpu.Layer(),
        )

    @staticmethod
    def of(head: TrainedHead) -> CompiledHead | None:
        """Returns the head's compiled form, None where there is none for its weights."""
        passes = head.model.narrow
        if not isinstance(passes, NativePasses):
            return None
        linears = [head.proj, head.feature, *(head.context or ())]
        layouts = {linear.layout for linear in linears if linear}
        layouts |= {head.block.qkv.layout} if head.block else set()
        return CompiledHead(head, passes) if layouts <= {head.head.layout} else None

    def best(
        self, cache: Cache, first: int, nodes: Nodes, asked: Asked
    ) -> tuple[Tensor, Tensor] | None:
        """See :class:`~hispec.model.exits.ExitHead`; None where it takes more than one call."""
        head, root, end = self._head, nodes.root, cache.computed[self._head.exit_layer]
        start = first
        final = root
        if head.block:
            final = head.final if head.context else root
            start = min(max(head.known, root if head.context else 0), first)
        rows, late = end - start, root - final
        if asked.seed is not None or cache.length < root or max(rows, late) > MAX_WIDTH:
            return None
        finals = cache.states[head.model.config.num_layers]
        new_root = bool(self._maps) and head.feature_of[0] != root
        feature = self._feature if new_root else head.feature_of[1]
        place = cpu.Place(
            cache.states[head.exit_layer].data_ptr(),
            finals.data_ptr(),
            feature.data_ptr() if self._maps else None,
            *(root, final, start, first, end, new_root),
        )
        found = self._passes.draft(
            self._record, self._shape, place, nodes, asked, rows=rows, late=late, bytes_=self._bytes
        )
        if self._maps:
            head.feature_of = (root, feature)
        if head.block:
            head.known = end
            head.final = max(head.final, root) if head.context else head.final
        return found

    def _weight(self, linear: Linear | None) -> int | None:
        return None if linear is None else linear.weight.data_ptr()

    def _scale(self, linear: Linear | None) -> int | None:
        return None if linear is None or linear.scale is None else linear.scale.data_ptr()

    def _wide(self, vector: Tensor | None) -> int | None:
        if vector is None:
            return None
        self._kept.append(vector.float().contiguous())
        return self._kept[-1].data_ptr()
