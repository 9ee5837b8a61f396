"""A trained head whose drafts take one call of the compiled library (``draft.inc.h``).

It does what :class:`~hispec.model.exits.TrainedHead` does step by step, on the same memory: keys
and values, what is known of them, and the root's feature stay the head's own, so that either may go
on from the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hispec.model.cache import Cache
from hispec.model.linear import Linear
from hispec.model.native import NativePasses
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Lift
from hispec_kernels import cpu

if TYPE_CHECKING:
    from hispec.model.exits import TrainedHead


class Lack(NamedTuple):
    """What a trained head has not seen of a text, and what it is asked about.

    Attributes:
        root: slot of the round's root: states before it are final.
        final: slots of which it has the final states' keys and values.
        start: the first slot whose row its block has to run, or that is asked about.
        end: past the last one.
        new_root: whether it still lacks the feature that a new root brings.
    """

    root: int
    final: int
    start: int
    end: int
    new_root: bool

    def made_good(self, head: TrainedHead, feature: Tensor) -> None:
        """Notes that the head has seen it, and the feature."""
        if head.feature:
            head.feature_of = (self.root, feature)
        if head.block:
            head.known = self.end
            head.final = max(head.final, self.root) if head.context else head.final


def lacking(head: TrainedHead, cache: Cache, first: int, nodes: Nodes) -> Lack | None:
    """Returns what a head lacks; None where that is more than a narrow pass takes."""
    root, end = nodes.root, cache.computed[head.exit_layer]
    start, final = first, root
    if head.block:
        final = head.final if head.context else root
        start = min(max(head.known, root if head.context else 0), first)
    if cache.length < root or max(end - start, root - final) > MAX_WIDTH:
        return None
    return Lack(root, final, start, end, head.feature is not None and head.feature_of[0] != root)


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
        self, cache: Cache, first: int, nodes: Nodes, asked: Asked, lifts: Sequence[Lift]
    ) -> tuple[Tensor, Tensor] | None:
        """See :class:`~hispec.model.exits.ExitHead`; None where it takes more than one call.

        Then nothing has been run.
        """
        head = self._head
        lack = lacking(head, cache, first, nodes)
        if asked.seed is not None or lack is None:
            return None
        head.model.run(lifts)
        root, final, start, end, new_root = lack
        rows, late = end - start, root - final
        finals = cache.states[head.model.config.num_layers]
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
        lack.made_good(head, feature)
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
