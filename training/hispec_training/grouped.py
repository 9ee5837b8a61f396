"""Many texts at once on torch's products: rows in groups that share a cache.

The linears see all rows at once; attention, whose cost is the length of a row, sees groups of 16
rows, each with a cache as long as its longest row. Give the prompts sorted by length and a group's
rows are alike. Two more things make this fast on a CPU. The G query heads that share a KV head are
the columns of one small product, (S, D_h) x (D_h, G), so that the cache is read once and nothing is
repeated. And a cache is always contiguous: it grows in buckets of positions by copying, since
oneDNN is three times slower on a strided slice of a larger buffer (2.1 ms against 0.55, 64 rows,
256 positions).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hispec_training.decode import Batch, Request
from hispec_training.shards import cut
from hispec_training.trunk import Trunk

_BUCKET = 64  # positions by which a cache grows
_GROUP = 16  # rows that share a cache
_PROMPT_TOKENS = 4096  # padded tokens of prompts run together; on a GPU more


class _Group:
    """The keys and values of some rows, (rows, H_kv, capacity, D_h) a layer.

    Args:
        trunk: The model.
        rows: How many texts.
    """

    def __init__(self, trunk: Trunk, rows: int) -> None:
        c = trunk.config
        self.rows, self.capacity = rows, 0
        shape = (rows, c.num_kv_heads, 0, c.head_dim)
        self.keys = [trunk.embedding.new_zeros(shape) for _ in range(c.num_layers)]
        self.values = [trunk.embedding.new_zeros(shape) for _ in range(c.num_layers)]

    def reserve(self, positions: int) -> None:
        """The cache holds ``positions`` positions, contiguously, and not many more."""
        size = -(-positions // _BUCKET) * _BUCKET
        if self.capacity - 2 * _BUCKET <= size <= self.capacity:
            return
        more = (0, 0, 0, size - self.capacity)  # negative: cut
        self.keys = [F.pad(k, more).contiguous() for k in self.keys]
        self.values = [F.pad(v, more).contiguous() for v in self.values]
        self.capacity = size

    def keep(self, places: list[int]) -> None:
        """Only these rows are left."""
        index = torch.tensor(places, device=self.keys[0].device)
        self.keys = [k[index] for k in self.keys]
        self.values = [v[index] for v in self.values]
        self.rows = len(places)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, at: Tensor, mask: Tensor):
        """One new token a row, written at ``at`` and attending to all that is not masked.

        Args:
            layer: Which layer's cache.
            q: (rows, H, D_h), already scaled.
            k: (rows, H_kv, D_h).
            v: (rows, H_kv, D_h).
            at: (rows,) position of the new token.
            mask: (rows, 1, 1, capacity), 0 or -inf.

        Returns:
            (rows, H * D_h).
        """
        keys, values = self.keys[layer], self.values[layer]
        rows, kv_heads, size, width = keys.shape
        every = torch.arange(rows, device=at.device)
        keys[every, :, at] = k
        values[every, :, at] = v
        queries = q.reshape(rows * kv_heads, -1, width)  # (rows H_kv, G, D_h)
        scores = torch.bmm(keys.flatten(0, 1), queries.transpose(1, 2))  # (rows H_kv, S, G)
        scores = scores.transpose(1, 2).contiguous().view(rows, kv_heads, -1, size)
        weights = scores.add_(mask).softmax(-1).flatten(0, 1)  # (rows H_kv, G, S)
        return torch.bmm(weights, values.flatten(0, 1)).view(rows, -1)


class TrunkBatch(Batch):
    """The rows in flight, run by a trunk in groups that share a cache; free rows run along.

    Args:
        trunk: The model.
        rows: How many texts advance together.
        positions: The longest text, prompt and answer together.
        layers: Whose states are kept.
    """

    def __init__(self, trunk: Trunk, rows: int, positions: int, layers: Sequence[int] = ()) -> None:
        super().__init__(rows, positions, layers, trunk.config.hidden_size)
        self.trunk = trunk
        # A GPU has room for a few long rows' padding, and none to lose on launching many kernels.
        size = _GROUP if trunk.device.type == "cpu" else rows
        self.groups = [_Group(trunk, min(size, rows - i)) for i in range(0, rows, max(size, 1))]

    def free_rows(self) -> list[int]:
        """Free rows, those beside the longest texts first: long prompts belong together."""
        free = [row for row, index in enumerate(self.request) if index < 0]
        sizes = [g.capacity for g in self.groups for _ in range(g.rows)]
        return sorted(free, key=lambda row: -sizes[row])

    def logits(self, h: Tensor) -> Tensor:
        """Returns (B, V) of final states."""
        return self.trunk.logits(h)

    def admit(self, rows: list[int], indices: list[int], requests: list[Request]) -> Tensor:
        """Runs the prompts and stores their keys and values in ``rows``.

        Returns:
            (len(rows), D), the last token's state before the final norm.
        """
        trunk = self.trunk
        for row, index, request in zip(rows, indices, requests, strict=True):
            self.begin(row, index, request)
        self._reserve()
        places = [(group, place) for group in self.groups for place in range(group.rows)]
        sizes = [len(request.prompt_ids) for request in requests]
        last = trunk.embedding.new_empty(len(rows), trunk.config.hidden_size)
        # One long prompt among short ones would pad them all.
        order = sorted(range(len(rows)), key=lambda i: sizes[i])
        limit = _PROMPT_TOKENS if trunk.device.type == "cpu" else 8 * _PROMPT_TOKENS
        for part in cut(order, sizes, limit):
            width = max(sizes[i] for i in part)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            for line, i in enumerate(part):
                ids[line, : sizes[i]] = torch.tensor(list(requests[i].prompt_ids))

            homes = []  # each group with the lines of this part that it gets, and where
            for group in self.groups:
                mine = [(n, places[rows[i]][1]) for n, i in enumerate(part)
                        if places[rows[i]][0] is group]  # fmt: skip
                if mine:
                    homes.append((group, *torch.tensor(mine, device=trunk.device).T))

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, homes: list = homes) -> Tensor:
                # What lies past a prompt's end is overwritten before it is looked at.
                for group, lines, at in homes:
                    length = min(k.shape[1], group.capacity)
                    group.keys[layer][at, :, :length] = k[lines, :length].transpose(1, 2)
                    group.values[layer][at, :, :length] = v[lines, :length].transpose(1, 2)
                return trunk.attend_causally(layer, q, k, v)

            positions = torch.arange(width, device=trunk.device).expand(len(part), width)
            h = trunk.embedding[ids.to(trunk.device)]  # (B, T, D)
            first = 0
            for stop in self.stops(trunk.config.num_layers):
                h = trunk.run(h, first, stop, positions, attend)
                for line, i in enumerate(part):
                    length = sizes[i]
                    self.keep(stop, [rows[i]] * length, range(length), h[line, :length])
                first = stop
            ends = torch.tensor([sizes[i] - 1 for i in part])
            last[part] = h[torch.arange(len(part)), ends]
        return last

    def step(self) -> Tensor:
        """Runs the last token of every row.

        Returns:
            (rows, D) before the final norm; rubbish in free rows.
        """
        trunk, c = self.trunk, self.trunk.config
        self._reserve()
        positions = torch.tensor(self.lengths, device=trunk.device)
        places = positions.split([group.rows for group in self.groups])
        masks = []
        for group, at in zip(self.groups, places, strict=True):
            hidden = torch.arange(group.capacity, device=trunk.device) > at[:, None]
            mask = trunk.embedding.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            masks.append(mask[:, None, None])  # (rows, 1, 1, S)
        scale = c.head_dim**-0.5
        sizes = [group.rows for group in self.groups]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip((q * scale).split(sizes), k.split(sizes), v.split(sizes), strict=True)
            return torch.cat(
                [
                    group.attend(layer, *part, at, mask)
                    for group, part, at, mask in zip(self.groups, parts, places, masks, strict=True)
                ]
            )

        h = trunk.embedding[torch.tensor(self.last, device=trunk.device)]  # (B, D)
        first, active = 0, self.active_rows()
        for stop in self.stops(c.num_layers):
            h = trunk.run(h, first, stop, positions, attend)
            self.keep(stop, active, [self.lengths[row] for row in active], h[active])
            first = stop
        for row in active:
            self.lengths[row] += 1
        return h

    def drop_free_rows(self) -> None:
        """Forgets the free rows of groups where they are many; for when no more prompts come."""
        kept, groups = [], []
        for start, group in self._parts():
            active = [i for i in range(group.rows) if self.request[start + i] >= 0]
            if not active:
                continue
            if len(active) <= 0.75 * group.rows:
                group.keep(active)
            else:
                active = list(range(group.rows))
            groups.append(group)
            kept += [start + i for i in active]
        if len(kept) == self.rows:
            return
        self.groups = groups
        names = ("request", "last", "lengths", "temperatures", "uniforms", "counts")
        for name in (*names, "_place", "_tops"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in kept])

    def _reserve(self) -> None:
        """Every group has room for one more token in each of its rows."""
        for start, group in self._parts():
            group.reserve(max(self.lengths[start : start + group.rows]) + 1)

    def _parts(self) -> Iterator[tuple[int, _Group]]:
        """Each group with the number of its first row."""
        start = 0
        for group in list(self.groups):
            rows = group.rows  # before the caller changes it
            yield start, group
            start += rows
