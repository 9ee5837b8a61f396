"""Many texts at once: batched decoding in which a finished row makes room for the next prompt.

The linears see all rows at once; attention, whose cost is the length of a row, sees groups of 16
rows, each with a cache as long as its longest row. Give the prompts sorted by length and a group's
rows are alike. Two more things make this fast on a CPU. The G query heads that share a KV head are
the columns of one small product, (S, D_h) x (D_h, G), so that the cache is read once and nothing is
repeated. And a cache is always contiguous: it grows in buckets of positions by copying, since
oneDNN is three times slower on a strided slice of a larger buffer (2.1 ms against 0.55, 64 rows,
256 positions).

A row's sampled tokens come from its own seeded numbers, so they do not depend on its company
other than through rounding. In fp32 the text of a row is that of decoding it alone; in bf16 the
same *list* of requests gives the same texts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hispec.model.llama import Llama
from hispec_training.trunk import Trunk

_BUCKET = 64  # positions by which a cache grows
_GROUP = 16  # rows that share a cache


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Attributes:
        prompt_ids: At least one token.
        max_new_tokens: At most so many are added.
        temperature: 0 picks the most likely token.
        seed: Of this row's own random numbers.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Answer:
    """What a request became.

    Attributes:
        index: The request's place in the list.
        ids: The new tokens, the ending one included.
        finish: ``"eos"`` or ``"length"``.
    """

    index: int
    ids: list[int] = field(default_factory=list)
    finish: str = "length"


class BatchDecoder:
    """Continues lists of requests on a trunk.

    Args:
        model: A trunk, or a model whose compiled passes take rows of several texts.
        eos_token_ids: Tokens that end a text.
        rows: How many texts advance together.
    """

    def __init__(self, model: Trunk | Llama, eos_token_ids: Sequence[int], rows: int = 64) -> None:
        self.model = model
        self.eos = frozenset(eos_token_ids)
        self.rows = rows

    @torch.no_grad()
    def decode(
        self, requests: Sequence[Request], done: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Returns the answers in the order of the requests.

        Args:
            requests: What to continue; sort by length for speed.
            done: Called with each answer as it ends, for progress.
        """
        answers = [Answer(i) for i in range(len(requests))]
        for rows in self._waves(requests, answers):
            for row in rows:
                if done is not None:
                    done(answers[row])
        return answers

    def _waves(self, requests: Sequence[Request], answers: list[Answer]):
        """Decodes everything, yielding the indices of requests as they end."""
        pending = [i for i, r in enumerate(requests) if r.max_new_tokens > 0]
        if skipped := [i for i, r in enumerate(requests) if r.max_new_tokens <= 0]:
            yield skipped
        pending.reverse()
        batch = self._batch(requests, min(self.rows, len(pending)))
        while pending or batch.num_active:
            free = batch.free_rows()
            # Prompts come in groups: one at a time would be a pass over the weights each.
            if pending and (len(free) >= max(1, batch.rows // 8) or not batch.num_active):
                group = [pending.pop() for _ in range(min(len(free), len(pending)))]
                h = batch.admit(free[: len(group)], group, [requests[i] for i in group])
                rows = free[: len(group)]
            else:
                if not pending:
                    batch.drop_free_rows()
                rows = batch.active_rows()
                h = batch.step()[rows]
            ended = []
            for row, token in zip(rows, batch.pick(rows, batch.logits(h)), strict=True):
                index = batch.request[row]
                answer = answers[index]
                answer.ids.append(token)
                if token in self.eos:
                    answer.finish = "eos"
                elif len(answer.ids) < requests[index].max_new_tokens:
                    batch.last[row] = token
                    continue
                batch.release(row)
                ended.append(index)
            if ended:
                yield ended

    def _batch(self, requests: Sequence[Request], rows: int) -> Batch:
        if isinstance(self.model, Trunk):
            return TrunkBatch(self.model, rows)
        from hispec_training.texts import TextBatch

        longest = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
        return TextBatch(self.model, rows, longest)


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


class Batch(ABC):
    """The rows in flight: their lengths and last tokens. How they are run is the subclass's.

    A free row has ``request`` -1 and length 0.

    Args:
        rows: How many texts advance together.
    """

    def __init__(self, rows: int) -> None:
        self.request = [-1] * rows
        self.last = [0] * rows
        self.lengths = [0] * rows  # tokens in the cache
        self.temperatures = [0.0] * rows
        self.uniforms: list[Tensor | None] = [None] * rows
        self.counts = [0] * rows

    @property
    def rows(self) -> int:
        """All of them, free ones too."""
        return len(self.request)

    @property
    def num_active(self) -> int:
        """Rows with a text."""
        return self.rows - self.request.count(-1)

    def active_rows(self) -> list[int]:
        """The rows with a text, ascending."""
        return [row for row, index in enumerate(self.request) if index >= 0]

    @abstractmethod
    def free_rows(self) -> list[int]:
        """Free rows, the best to fill first."""

    @abstractmethod
    def admit(self, rows: list[int], indices: list[int], requests: list[Request]) -> Tensor:
        """Runs the prompts in ``rows``; returns the last tokens' final states, (len(rows), D)."""

    @abstractmethod
    def step(self) -> Tensor:
        """Runs the last token of every row.

        Returns:
            (rows, D) final states; rubbish in free rows.
        """

    @abstractmethod
    def logits(self, h: Tensor) -> Tensor:
        """Returns (B, V) of final states (B, D)."""

    @abstractmethod
    def drop_free_rows(self) -> None:
        """Forgets free rows where they cost; called when no more prompts come."""

    def begin(self, row: int, index: int, request: Request) -> None:
        """Row ``row`` belongs to a request from here on, its prompt counted as cached."""
        self.request[row] = index
        self.lengths[row] = len(request.prompt_ids)
        self.temperatures[row] = request.temperature
        self.counts[row] = 0
        if request.temperature > 0:
            generator = torch.Generator().manual_seed(request.seed)
            self.uniforms[row] = torch.rand(request.max_new_tokens, generator=generator)

    def release(self, row: int) -> None:
        """Row ``row`` is free."""
        self.request[row] = -1
        self.last[row] = 0
        self.lengths[row] = 0
        self.uniforms[row] = None

    def pick(self, rows: list[int], logits: Tensor) -> list[int]:
        """The next token of each row: the largest logit, or a draw by the inverse of the CDF.

        Args:
            rows: Which rows.
            logits: (len(rows), V).
        """
        tokens = _argmax(logits)
        drawn = [i for i, row in enumerate(rows) if self.uniforms[row] is not None]
        if drawn:
            heat = torch.tensor([self.temperatures[rows[i]] for i in drawn], device=logits.device)
            points = torch.stack([self.uniforms[rows[i]][self.counts[rows[i]]] for i in drawn])
            sums = (logits[drawn].float() / heat[:, None]).softmax(-1).cumsum(-1)  # (n, V)
            points = points.to(logits.device)[:, None] * sums[:, -1:]
            found = torch.searchsorted(sums, points, right=True)[:, 0]
            tokens[drawn] = found.clamp_(max=logits.shape[-1] - 1)
        for row in rows:
            self.counts[row] += 1
        return tokens.tolist()


class TrunkBatch(Batch):
    """The rows in flight, run by a trunk in groups that share a cache; free rows run along.

    Args:
        trunk: The model.
        rows: How many texts advance together.
    """

    def __init__(self, trunk: Trunk, rows: int) -> None:
        super().__init__(rows)
        self.trunk = trunk
        self.groups = [_Group(trunk, min(_GROUP, rows - i)) for i in range(0, rows, _GROUP)]

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
        trunk, count = self.trunk, len(rows)
        lengths = torch.tensor([len(r.prompt_ids) for r in requests])
        width = int(lengths.max())
        ids = torch.zeros(count, width, dtype=torch.long)
        for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
            ids[i, : lengths[i]] = torch.tensor(list(request.prompt_ids))
            self.begin(row, indices[i], request)
        self._reserve()
        places = [(group, place) for group in self.groups for place in range(group.rows)]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for i, row in enumerate(rows):
                (group, place), length = places[row], self.lengths[row]
                group.keys[layer][place, :, :length] = k[i, :length].transpose(0, 1)
                group.values[layer][place, :, :length] = v[i, :length].transpose(0, 1)
            return trunk.attend_causally(layer, q, k, v)

        positions = torch.arange(width, device=trunk.device).expand(count, width)
        h = trunk.embedding[ids.to(trunk.device)]  # (B, T, D)
        h = trunk.run(h, 0, trunk.config.num_layers, positions, attend)
        return h[torch.arange(count), lengths - 1]  # (B, D)

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
        h = trunk.run(h, 0, c.num_layers, positions, attend)
        for row in self.active_rows():
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
        for name in ("request", "last", "lengths", "temperatures", "uniforms", "counts"):
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


def _argmax(logits: Tensor) -> Tensor:
    """The first largest entry of each row.

    By blocks: torch's own argmax is scalar for bf16, 7 ms for 64 rows of 49,152 against 1 ms.

    Args:
        logits: (B, V).

    Returns:
        (B,) int64.
    """
    size = 128
    if logits.shape[-1] % size:
        return logits.argmax(-1)
    blocks = logits.unflatten(-1, (-1, size))  # (B, V / 128, 128)
    best = blocks.amax(-1).argmax(-1)  # (B,)
    inside = blocks[torch.arange(len(logits), device=logits.device), best].argmax(-1)
    return best * size + inside
