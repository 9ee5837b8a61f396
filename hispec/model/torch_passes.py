"""Passes operator by operator, on any device.

Rows are consecutive slots of the cache. In a tree (:mod:`hispec.model.nodes`) a branch's slots have
other nodes between them, and attention adds up in the order of its keys: a masked key in between
changes bits. So :class:`TorchPasses`, where exact, lays each branch's keys and values into the
slots that plain decoding would have used, for as long as the branch's rows look at them. Only a
tree's slots move, the past stays where it is; nodes on one branch look together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig
from hispec.model.linear import Linear
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Embedding, Lift, Rotary, Words
from hispec_kernels import compact, decode_attention, rms_norm, rope_write, swiglu
from hispec_kernels.attention import BUCKET, ROWS


class _View(NamedTuple):
    """Rows that look at the same keys, each up to its own position."""

    rows: Tensor | None  # (n,) numbers of the pass's rows; None: all of them
    path: Tensor | None  # (N,) nodes to lay into the tree's slots; None: as they lie
    mask: Tensor  # (R, S)


class _Described(NamedTuple):
    """What all blocks of one pass share."""

    position: int  # slot of the first row
    width: int  # rows, padding included
    root: int  # slot of a tree's first node
    cos: Tensor  # (W, 1, D_h)
    sin: Tensor  # (W, 1, D_h)
    views: list[_View]  # whose rows are all rows, each once
    queries: Tensor  # (H_kv, R, D_h) scratch


class TorchPasses(Embedding):
    """Blocks run operator by operator.

    Exact numerics: a row's result must not depend on which rows it shares a pass with. So passes
    are padded to ``min_width`` rows and attention keeps to fixed shapes
    (:mod:`hispec_kernels.attention`).

    Attributes:
        exact: keep to those shapes.
        min_width: the narrowest pass that rounds like all wider ones; found by trying.
    """

    name = "torch"
    prepared = 0

    def __init__(
        self,
        config: ModelConfig,
        rotary: Rotary,
        dtype: torch.dtype,
        device: torch.device,
        *,
        exact: bool,
    ) -> None:
        super().__init__(device)
        self.config = config
        self._rotary = rotary.to(device)
        self.exact = exact
        self.min_width = 1
        self.asynchronous = device.type != "cpu"
        #: Tells what was found by trying from what was found before on other attention.
        self.build = "" if device.type == "cpu" else "no cuDNN"
        self.state_dtype = dtype
        self.scale = 1.0 / math.sqrt(config.head_dim)
        self.group = config.num_heads // config.num_kv_heads
        self._cos = rotary.cos[:, None].to(device, dtype)  # (S, 1, D_h)
        self._sin = rotary.sin[:, None].to(device, dtype)
        self._corner = self._mask_corner(MAX_WIDTH)

    def run(
        self,
        blocks: Sequence[Block],
        x: Tensor,
        position: int,
        kv: KVCache,
        first: int,
        nodes: Nodes | None = None,
    ) -> Tensor:
        """See :class:`Passes`. Padding lies past the real rows, where nothing is known yet."""
        rows = x.shape[0]
        x = self._pad(x.to(self.state_dtype))
        if nodes is None or nodes.straight(position + rows - nodes.root):
            at = self._describe(position, x.shape[0])
        else:
            at = self._describe_tree(position, rows, x.shape[0], nodes)
        for layer, block in enumerate(blocks, first):
            x = self._run_block(block, x, at, kv.keys[layer], kv.values[layer])
        return x[:rows]

    def lift(self, lift: Lift) -> None:
        """See :class:`Passes`."""
        blocks, source, targets, position, width, kv, first, nodes = lift
        rows = slice(position, position + width)
        x, done = self.embed(*source) if isinstance(source, Words) else source[rows], 0
        for stop, target in targets:
            if stop > done:
                x = self.run(blocks[done:stop], x, position, kv, first + done, nodes)
            target[rows], done = x, stop

    def project(self, linear: Linear, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """See :class:`Passes`."""
        rows = x.shape[0]
        x = self._pad(x.to(self.state_dtype))
        if norm is not None:
            x = rms_norm(x, norm, self.config.rms_norm_eps)
        return linear(x)[:rows]

    def best(
        self, linear: Linear, x: Tensor, norm: Tensor, asked: Asked, ids: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """See :class:`Passes`."""
        return None

    def store(self, projected: Tensor, position: int, kv: KVCache, layer: int) -> None:
        """See :class:`Passes`."""
        end = position + projected.shape[0]
        keys, values = self._rotary.split_kv(projected, position, self.config.num_kv_heads)
        kv.keys[layer][:, position:end] = keys.transpose(0, 1)
        kv.values[layer][:, position:end] = values.transpose(0, 1)

    def move(self, kv: KVCache, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See :class:`Passes`."""
        device = kv.storage.device
        places = (torch.tensor(slots, device=device) for slots in (sources, targets))
        compact(kv.storage, *places)

    def _run_block(
        self, block: Block, x: Tensor, at: _Described, keys: Tensor, values: Tensor
    ) -> Tensor:
        config, eps = self.config, self.config.rms_norm_eps
        end = at.position + at.width
        qkv = block.qkv(rms_norm(x, block.attention_norm, eps))
        rope_write(
            qkv.view(at.width, -1, config.head_dim),
            at.cos,
            at.sin,
            at.queries[:, : at.width * self.group].unflatten(1, (at.width, self.group)),
            keys[:, at.position : end],
            values[:, at.position : end],
        )
        if at.views[0].rows is None:
            mixed = self._attend(at.queries, keys, values, at.views[0].mask, at.width)
        else:
            mixed = self._attend_branches(at, keys, values)
        mixed = mixed.transpose(0, 1).reshape(at.width, -1)  # (W, H D_h)
        x = block.output(mixed, residual=x)  # (W, D)
        hidden = swiglu(block.gate_up(rms_norm(x, block.mlp_norm, eps)))  # (W, I)
        return block.down(hidden, residual=x)  # (W, D)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, rows: int
    ) -> Tensor:
        """Returns (H_kv, rows, G, D_h)."""
        span = mask.shape[1]
        mixed = decode_attention(queries, keys[:, :span], values[:, :span], mask, self.scale)
        return mixed[:, : rows * self.group].unflatten(1, (rows, self.group))

    def _attend_branches(self, at: _Described, keys: Tensor, values: Tensor) -> Tensor:
        """Returns (H_kv, W, G, D_h), each view's keys and values laid out while it looks."""
        tree = slice(at.root, at.position + at.width)
        stored = keys[:, tree].clone(), values[:, tree].clone()  # (H_kv, N, D_h)
        queries = at.queries[:, : at.width * self.group].unflatten(1, (at.width, self.group))
        mixed = torch.zeros_like(queries)
        try:
            for rows, path, mask in at.views:
                assert rows is not None
                for cells, nodes in zip((keys, values), stored, strict=True):
                    branch = nodes if path is None else nodes[:, path]
                    cells[:, at.root : at.root + branch.shape[1]] = branch
                some = queries[:, rows].flatten(1, 2)  # (H_kv, n G, D_h)
                some = F.pad(some, (0, 0, 0, mask.shape[0] - some.shape[1]))
                mixed[:, rows] = self._attend(some, keys, values, mask, len(rows))
        finally:
            keys[:, tree], values[:, tree] = stored
        return mixed

    def _describe(self, position: int, width: int) -> _Described:
        end = position + width
        packed_rows = width * self.group
        if self.exact:
            span = -(-end // BUCKET) * BUCKET
            rows = -(-packed_rows // ROWS) * ROWS
        else:
            span, rows = end, packed_rows
        mask = self._corner.new_zeros(rows, span)
        tail = self._corner if width <= MAX_WIDTH else self._mask_corner(width)
        mask[:, position:] = tail[:rows, : span - position]
        cos, sin = self._cos[position:end], self._sin[position:end]
        return _Described(
            position, width, end, cos, sin, [_View(None, None, mask)], self._scratch(rows)
        )

    def _describe_tree(self, position: int, rows: int, width: int, nodes: Nodes) -> _Described:
        """Describes a pass of ``rows`` rows, padded to ``width``, of which some are on branches."""
        root, end = nodes.root, position + rows
        turns = torch.tensor(nodes.positions(position, end), device=self._cos.device)
        turns = F.pad(turns, (0, width - rows))
        if self.exact:
            views = self._views(position, rows, nodes)
        else:
            views = [_View(None, None, self._tree_mask(position, rows, nodes))]
        scratch = self._scratch(width * self.group)
        return _Described(position, width, root, self._cos[turns], self._sin[turns], views, scratch)

    def _views(self, position: int, rows: int, nodes: Nodes) -> list[_View]:
        """Shares the rows out among as few branches as there are."""
        root, device = nodes.root, self._cos.device
        branches: list[tuple[list[int], list[int]]] = []  # a path from the root and its rows
        for row in reversed(range(rows)):  # children first: a branch begins with its last row
            node = position + row - root
            for path, members in branches:
                if node < 0 or node in path:
                    members.append(row)
                    break
            else:
                branches.append((nodes.path(node), [row]))
        views = []
        for path, members in branches:
            places = torch.tensor(nodes.positions(position, position + rows))[members]  # (n,)
            packed = places.repeat_interleave(self.group)
            packed = F.pad(packed, (0, -len(packed) % ROWS))
            span = -(-(root + len(path)) // BUCKET) * BUCKET
            behind = torch.arange(span) > packed[:, None]
            straight = path[-1] == len(path) - 1
            views.append(
                _View(
                    torch.tensor(members, device=device),
                    None if straight else torch.tensor(path, device=device),
                    _closed(behind, self._corner),
                )
            )
        return views

    def _tree_mask(self, position: int, rows: int, nodes: Nodes) -> Tensor:
        """Returns the mask of a pass whose keys stay where they lie, (rows G, S)."""
        root, end = nodes.root, position + rows
        behind = torch.arange(end) > torch.arange(position, end)[:, None]  # (rows, S)
        for row in range(max(0, root - position), rows):
            behind[row, root:] = True
            behind[row, [root + node for node in nodes.path(position + row - root)]] = False
        return _closed(behind.repeat_interleave(self.group, 0), self._corner)

    def _scratch(self, rows: int) -> Tensor:
        return self._corner.new_zeros(self.config.num_kv_heads, rows, self.config.head_dim)

    def _pad(self, x: Tensor) -> Tensor:
        """Repeats the last row until the width class is reached."""
        missing = self.min_width - x.shape[0] if self.exact else 0
        return x if missing <= 0 else torch.cat([x, x[-1:].expand(missing, -1)])

    def _mask_corner(self, width: int) -> Tensor:
        """The part of a mask that is not zero: row r looks at r // G new positions and its own."""
        device, dtype = self._cos.device, self._cos.dtype
        rows = -(-width * self.group // ROWS) * ROWS
        own = torch.arange(rows, device=device)[:, None] // self.group
        behind = torch.arange(width + BUCKET, device=device)[None] > own
        return torch.zeros(behind.shape, dtype=dtype, device=device).masked_fill_(
            behind, -torch.inf
        )


def _closed(behind: Tensor, like: Tensor) -> Tensor:
    """Returns a mask that is -inf where ``behind`` is true, of ``like``'s dtype and device."""
    mask = torch.zeros(behind.shape, dtype=like.dtype)
    return mask.masked_fill_(behind, -torch.inf).to(like.device)
