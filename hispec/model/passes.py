"""Running blocks over new rows of a cache.

    run(blocks, x, position, kv)      states after the blocks, their keys and values stored
    lift(lift)                        the same from one boundary's states to those of others above
    project(linear, x, norm)          a product, after RMSNorm where a norm is given
    move(kv, sources, targets)        a tree's kept nodes take the slots of those that go

:mod:`hispec.model.torch_passes` does it operator by operator, on any device,
:mod:`hispec.model.native` in one compiled call for all layers on a CPU, :mod:`hispec.model.gpu` in
one graph of Triton kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig, rope_frequencies
from hispec.model.device import ids_on
from hispec.model.linear import Linear
from hispec.model.nodes import Nodes
from hispec_kernels import rotate

#: Logits, or the best ids and their odds.
Found = Tensor | tuple[Tensor, Tensor]
#: An id; or () int64 on a device that has picked it, where the host has not looked at it yet.
Token = int | Tensor


class Asked(NamedTuple):
    """What is asked of a head whose logits nobody else has to see.

    Attributes:
        k: how many of the best ids.
        temperature: divides the logits.
        seed: of the noise that ranks them; None is without.
        positions: where each row's token will stand.
        odds: whether their odds are wanted; otherwise they are left at anything.
    """

    k: int
    temperature: float
    seed: int | None
    positions: Sequence[int]
    odds: bool = True


class Words(NamedTuple):
    """Where no layer has run yet there are tokens in the place of states.

    Attributes:
        linear: whose weight's rows are the embeddings, (V, D).
        ids: a row's each.
    """

    linear: Linear
    ids: Sequence[Token]


class Lift(NamedTuple):
    """Blocks to run over some rows, from one boundary's states to those of others above it.

    Attributes:
        blocks: consecutive ones; block i stores its keys and values in ``kv``'s layer
            ``first + i``.
        source: (S, D) states by slot, of the dtype that the cache keeps them in; or the rows'
            tokens.
        targets: pairs of n, ascending to all, and states likewise: where those after
            ``blocks[:n]`` go. One of them may be ``source``; n may be 0 for the embeddings.
        position: slot of the first row.
        width: W.
        kv: knows these layers' keys and values of all earlier slots.
        first: the first block's layer in ``kv``.
        nodes: the tree in the slots from its root on; without one, slots are positions.
    """

    blocks: Sequence[Block]
    source: Tensor | Words
    targets: Sequence[tuple[int, Tensor]]
    position: int
    width: int
    kv: KVCache
    first: int
    nodes: Nodes | None = None


class Passes(Protocol):
    """What a model asks of a way to run its blocks.

    Attributes:
        name: of the way: ``torch``, ``compiled`` or ``triton``.
        state_dtype: dtype of hidden states between calls.
        min_width: the narrowest pass that rounds like all wider ones.
        asynchronous: whether calls return before their work is done, so that looking at a result
            is what takes time.
    """

    name: str
    state_dtype: torch.dtype
    min_width: int
    asynchronous: bool

    @property
    def prepared(self) -> int:
        """How often a call has first built what later ones find."""
        ...

    def run(
        self,
        blocks: Sequence[Block],
        x: Tensor,
        position: int,
        kv: KVCache,
        first: int,
        nodes: Nodes | None = None,
    ) -> Tensor:
        """Returns the states after ``blocks``: (W, D) from (W, D).

        Args:
            blocks: consecutive ones; block i stores its keys and values in ``kv``'s layer
                ``first + i``.
            x: states of the slots ``position``, ``position + 1``, …
            position: slot of the first row.
            kv: knows these layers' keys and values of all earlier slots.
            first: the first block's layer in ``kv``.
            nodes: the tree in the slots from its root on; without one, slots are positions.
        """
        ...

    def lift(self, lift: Lift) -> None:
        """Does what :meth:`run` does, from one boundary's states to those of others above it."""
        ...

    def embed(self, linear: Linear, tokens: Sequence[Token]) -> Tensor:
        """Returns the rows of an embedding, (T, D), for that many ids."""
        ...

    def move(self, kv: KVCache, sources: Sequence[int], targets: Sequence[int]) -> None:
        """After the call slot ``targets[i]`` of every layer holds what ``sources[i]`` held.

        Args:
            kv: the cache.
            sources: slots.
            targets: as many, ``MAX_WIDTH`` at most, none of them twice; may overlap with
                ``sources``.
        """
        ...

    def store(self, projected: Tensor, position: int, kv: KVCache, layer: int) -> None:
        """After the call ``kv``'s layer holds projected states from ``position`` on.

        Args:
            projected: (T, 2 H_kv D_h), keys then values, not yet rotated.
            position: absolute position of the first row.
            kv: the cache.
            layer: which of its layers.
        """
        ...

    def project(self, linear: Linear, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """Returns ``linear(rms_norm(x, norm))``, or ``linear(x)`` without a norm: (W, out)."""
        ...

    def best(
        self, linear: Linear, x: Tensor, norm: Tensor, asked: Asked, ids: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Returns each row's best ids and their odds, best first, without showing the logits.

        Args:
            linear: the vocabulary head, without a bias.
            x: (W, D), at most ``MAX_WIDTH`` rows.
            norm: (D,).
            asked: how many, and what ranks them.
            ids: (V_r,) the columns' ids, or None where they are the columns.

        Returns:
            ids (W, k) int64 and odds (W, k) fp32, which hold until anything else is run; None where
            this is not done in one step.
        """
        ...


class Embedding:
    """Embedding by torch, for ways of running blocks that leave it at that."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def embed(self, linear: Linear, tokens: Sequence[Token]) -> Tensor:
        """See :class:`Passes`."""
        return linear.take(ids_on(self._device, tokens))


class Rotary:
    """Cosines and signed sines of every position, (S, D_h) fp32: sin's first half is negated."""

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        frequencies, factor = rope_frequencies(config)
        angles = torch.outer(torch.arange(capacity, dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self.cos = torch.cat([cos, cos], -1)
        self.sin = torch.cat([-sin, sin], -1)

    def to(self, device: torch.device) -> Rotary:
        """Returns the same on a device."""
        moved = copy.copy(self)
        moved.cos, moved.sin = self.cos.to(device), self.sin.to(device)
        return moved

    def split_kv(self, kv: Tensor, position: int, heads: int) -> tuple[Tensor, Tensor]:
        """Returns rotated keys and values from a projection of states at ``position`` and on.

        Args:
            kv: (T, 2 H_kv D_h), key heads then value heads, not yet rotated; on this device.
            position: absolute position of the first row.
            heads: H_kv.

        Returns:
            Keys in fp32 and values, (T, H_kv, D_h) each.
        """
        end = position + kv.shape[0]
        keys, values = kv.unflatten(1, (2 * heads, -1)).split(heads, dim=1)
        cos, sin = self.cos[position:end, None], self.sin[position:end, None]
        return rotate(keys.float(), cos, sin), values
