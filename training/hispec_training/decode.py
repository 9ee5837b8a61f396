"""Many texts at once: batched decoding in which a finished row makes room for the next prompt.

How the rows are run is one of two batches': torch's products over a trunk (``grouped.py``) or the
compiled passes (``texts.py``). A row's sampled tokens come from its own seeded numbers, so they do
not depend on its company other than through rounding. In fp32 the text of a row is that of decoding
it alone; in bf16 the same *list* of requests gives the same texts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hispec.model.llama import Llama
from hispec_training.shards import TOP_K, top_picks
from hispec_training.trunk import Trunk


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
        said: What the model said about the text, by the names of a cached shard
            (:mod:`hispec_training.shards`); empty if no layers are kept.
    """

    index: int
    ids: list[int] = field(default_factory=list)
    finish: str = "length"
    said: dict[str, Tensor] = field(default_factory=dict)


class BatchDecoder:
    """Continues lists of requests on a trunk.

    Args:
        model: A trunk, or a model whose compiled passes take rows of several texts.
        eos_token_ids: Tokens that end a text.
        rows: How many texts advance together.
        layers: Whose states to keep, exits and L: a training run on these texts needs no pass of
            its own then.
    """

    def __init__(
        self,
        model: Trunk | Llama,
        eos_token_ids: Sequence[int],
        rows: int = 64,
        layers: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.eos = frozenset(eos_token_ids)
        self.rows = rows
        self.layers = tuple(sorted(layers))

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
            logits = batch.logits(h)
            if self.layers:
                batch.note(rows, logits)
            for row, token in zip(rows, batch.pick(rows, logits), strict=True):
                index = batch.request[row]
                answer = answers[index]
                answer.ids.append(token)
                if token in self.eos:
                    answer.finish = "eos"
                elif len(answer.ids) < requests[index].max_new_tokens:
                    batch.last[row] = token
                    continue
                if self.layers:
                    answer.said = batch.said(row)
                batch.release(row)
                ended.append(index)
            if ended:
                yield ended

    def _batch(self, requests: Sequence[Request], rows: int) -> Batch:
        longest = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=0)
        if isinstance(self.model, Trunk):
            from hispec_training.grouped import TrunkBatch

            return TrunkBatch(self.model, rows, longest, self.layers)
        from hispec_training.texts import TextBatch

        return TextBatch(self.model, rows, longest, self.layers)


class Batch(ABC):
    """The rows in flight: their lengths and last tokens. How they are run is the subclass's.

    A free row has ``request`` -1 and length 0.

    Args:
        rows: How many texts advance together.
        positions: The longest text, prompt and answer together.
        layers: Whose states are kept, ascending; none or exits and L.
        width: D.
    """

    def __init__(self, rows: int, positions: int, layers: Sequence[int], width: int) -> None:
        self.layers = tuple(layers)
        self._span = positions
        # (rows S, D) a layer; a page costs nothing before its first write
        self._states = {
            e: torch.empty(rows * positions, width, dtype=torch.bfloat16) for e in layers
        }
        self._place = list(range(rows))  # of a row's stretch in there
        self._tops: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(rows)]
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

    def stops(self, num_layers: int) -> Sequence[int]:
        """Returns where a pass stops: the layers whose states are kept, or L alone."""
        return self.layers or (num_layers,)

    def keep(self, layer: int, rows: Sequence[int], positions: Sequence[int], h: Tensor) -> None:
        """States (T, D) of some rows' positions are kept, if any of this layer are."""
        if layer in self._states:
            places = zip(rows, positions, strict=True)
            index = torch.tensor([self._place[row] * self._span + at for row, at in places])
            self._states[layer][index] = h.to("cpu", torch.bfloat16)

    def note(self, rows: Sequence[int], logits: Tensor) -> None:
        """The pick and the likeliest tokens at the rows' last positions are kept, (B, V)."""
        for row, *top in zip(rows, *(x.cpu() for x in top_picks(logits, TOP_K)), strict=True):
            self._tops[row].append(tuple(top))

    def said(self, row: int) -> dict[str, Tensor]:
        """Returns what was kept of a row's text, by the names of a cached shard."""
        start, length = self._place[row] * self._span, self.lengths[row]
        states = {
            # The last token was never run: nothing is predicted from it.
            f"state_{e}": torch.nn.functional.pad(x[start : start + length], (0, 0, 0, 1))
            for e, x in self._states.items()
        }
        names = ("pick", "top_ids", "top_logits")
        tops = zip(names, zip(*self._tops[row], strict=True), strict=True)
        return states | {name: torch.stack(values) for name, values in tops}

    def release(self, row: int) -> None:
        """Row ``row`` is free."""
        self._tops[row] = []
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
