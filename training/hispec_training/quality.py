"""What adapting the backbone cost and gained: perplexity, and agreement with the original.

Once the backbone moves, the output is lossless only with respect to the adapted model. So a report
says how far that model is from the original: perplexity on plain text, and how often its greedy
pick equals the original's on the original's own answers. The same pass gives what the change was
for: how often each exit, through the shared norm and head, picks what the final layer picks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hispec_training.shard_cache import Texts
from hispec_training.shards import cut
from hispec_training.trunk import Trunk

_TOKENS = 4096  # padded tokens of a batch
_ROWS = 512  # rows of full-vocabulary logits held at once


@torch.no_grad()
def perplexity(trunk: Trunk, ids: Sequence[int], *, window: int = 1024) -> float:
    """Returns exp of the mean loss over consecutive windows, each from its second token on.

    Args:
        trunk: The model.
        ids: The whole text.
        window: Tokens of context at most.
    """
    last = trunk.config.num_layers
    rows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    if not len(rows):
        rows = torch.tensor(ids)[None]
    loss, count = 0.0, 0
    for part in rows.split(max(1, _TOKENS // window)):
        h = trunk.states(part, [part.shape[1]] * len(part), (last,))[last]
        wanted = part[:, 1:].flatten()
        for logits, y in _logits(trunk, h[:, :-1].flatten(0, 1), wanted):
            loss += F.cross_entropy(logits.float(), y.to(h.device), reduction="sum").item()
            count += len(y)
    return math.exp(loss / max(1, count))


@dataclass
class Agreement:
    """Counts over response positions; ratios only when printing.

    Attributes:
        positions: By category.
        same: By category, the model's pick equals the original's.
        own: By exit and category, the exit's pick equals this model's.
        original: By exit and category, the exit's pick equals the original's.
    """

    positions: dict[str, int] = field(default_factory=dict)
    same: dict[str, int] = field(default_factory=dict)
    own: dict[int, dict[str, int]] = field(default_factory=dict)
    original: dict[int, dict[str, int]] = field(default_factory=dict)

    def table(self) -> dict[str, Any]:
        """Returns the ratios, over everything and by category."""

        def ratio(counts: dict[str, int]) -> dict[str, Any]:
            total = sum(self.positions.values())
            by = {c: round(counts.get(c, 0) / n, 4) for c, n in sorted(self.positions.items())}
            return {"all": round(sum(counts.values()) / max(1, total), 4), "by_category": by}

        return {
            "positions": sum(self.positions.values()),
            "greedy_agreement": ratio(self.same),
            "exits": {str(e): ratio(counts) for e, counts in sorted(self.own.items())},
            "exits_vs_original": {
                str(e): ratio(counts) for e, counts in sorted(self.original.items())
            },
        }


@torch.no_grad()
def agreement(
    trunk: Trunk, cache: Texts, exits: Sequence[int], *, limit: int | None = None
) -> Agreement:
    """Returns how the picks of a model and its exits compare, teacher-forced on cached texts.

    Args:
        trunk: The model to judge.
        cache: The original's answers with its picks.
        exits: Exits to judge, through the shared norm and head.
        limit: Texts to look at.
    """
    last = trunk.config.num_layers
    found = Agreement(own={e: {} for e in exits}, original={e: {} for e in exits})
    texts = range(len(cache) if limit is None else min(limit, len(cache)))
    order = sorted(texts, key=lambda i: cache.lengths[i])
    for batch in cut(order, cache.lengths, _TOKENS):
        group = cache.texts(batch)
        lengths = [len(text.ids) for text in group]
        ids = torch.zeros(len(group), max(lengths), dtype=torch.long)
        for row, text in enumerate(group):
            ids[row, : lengths[row]] = text.ids
        states = trunk.states(ids, lengths, (*exits, last))
        for row, text in enumerate(group):
            place = slice(text.first, text.first + len(text.pick))
            picks = {e: _picks(trunk, states[e][row, place]) for e in (*exits, last)}
            theirs = text.pick.to(picks[last])
            _add(found.positions, text.category, len(theirs))
            _add(found.same, text.category, int((picks[last] == theirs).sum()))
            for e in exits:
                _add(found.own[e], text.category, int((picks[e] == picks[last]).sum()))
                _add(found.original[e], text.category, int((picks[e] == theirs).sum()))
    return found


def _picks(trunk: Trunk, h: Tensor) -> Tensor:
    """(N, D) states -> (N,) ids."""
    return torch.cat([z.argmax(-1) for z, _ in _logits(trunk, h, h)])


def _logits(trunk: Trunk, h: Tensor, beside: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(N, D) states -> (n, V) logits and the same rows of ``beside``, a chunk at a time."""
    for part, other in zip(h.split(_ROWS), beside.split(_ROWS), strict=True):
        yield trunk.logits(part), other


def _add(counts: dict[str, int], category: str, number: int) -> None:
    counts[category] = counts.get(category, 0) + number
