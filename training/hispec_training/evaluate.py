"""How often an exit's pick is the target's, and what that would buy.

Teacher-forced on texts of the target: at every response position the exit guesses what the target
picks next. With deep context the guess depends on where the round's root is, so texts are cut
into rounds of ``ROUND`` positions and the tables keep the offset from the root. Within a round
the guesses at offsets 0, 1, 2 … see exactly what a draft would see as long as all before were
right, so the run of right guesses from a root is the length a greedy draft would have had
accepted, and tokens per millisecond follow from the costs of a draft token and of a full pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hispec.planner.cost_table import TARGET, CostTable
from hispec_training.batches import collate, fixed_roots
from hispec_training.exits import Exits
from hispec_training.shard_cache import Texts
from hispec_training.shards import cut

ROUND = 8


@dataclass
class Tally:
    """Raw counts of one exit; ratios only when printing.

    Attributes:
        seen: By category.
        right: By category.
        offset_seen: (ROUND,) positions by distance from the root.
        offset_right: (ROUND,).
        runs: (ROUND + 1,) whole rounds by the number of right guesses before the first wrong one.
        divisions: Ways in which the texts were cut into rounds: every position counts in each.
    """

    seen: dict[str, int] = field(default_factory=dict)
    right: dict[str, int] = field(default_factory=dict)
    offset_seen: Tensor = field(default_factory=lambda: torch.zeros(ROUND, dtype=torch.int64))
    offset_right: Tensor = field(default_factory=lambda: torch.zeros(ROUND, dtype=torch.int64))
    runs: Tensor = field(default_factory=lambda: torch.zeros(ROUND + 1, dtype=torch.int64))
    divisions: int = 1

    @property
    def top1(self) -> float:
        """Agreement over all positions."""
        return sum(self.right.values()) / max(1, sum(self.seen.values()))

    def table(self) -> dict[str, Any]:
        """The acceptance table of the saved form and the model card."""
        ratio = (self.offset_right / self.offset_seen.clamp_min(1)).tolist()
        return {
            "top1": round(self.top1, 4),
            "positions": sum(self.seen.values()) // self.divisions,
            "divisions": self.divisions,
            "by_category": {c: round(self.right[c] / n, 4) for c, n in sorted(self.seen.items())},
            "by_offset": [round(value, 4) for value in ratio],
            "mean_run": {str(w): round(self.mean_run(w), 4) for w in range(1, ROUND + 1)},
        }

    def mean_run(self, window: int) -> float:
        """Expected accepted tokens of a greedy draft of ``window`` tokens."""
        lengths = torch.arange(ROUND + 1).clamp_max(window)
        return float((lengths * self.runs).sum() / self.runs.sum().clamp_min(1))


def tokens_per_ms(runs: Sequence[float], costs: CostTable, exit_layer: int) -> tuple[float, int]:
    """Predicted tokens per millisecond at the best window of an exit that drafts, and that window.

    Args:
        runs: (ROUND,) expected accepted tokens of a greedy draft of 1, 2, … tokens.
        costs: Of the exit's passes and the target's, which goes on from the exit's states.
        exit_layer: e.
    """
    name = f"exit {exit_layer}"
    rates = {}
    for window, run in enumerate(runs, 1):
        drafting = window * costs.pass_s(name, 0, 1) + costs.first_s(name, 0)
        seconds = drafting + costs.pass_s(TARGET, exit_layer, window + 1)
        rates[window] = (1 + run) / seconds / 1e3
    best = max(rates, key=lambda window: rates[window])
    return rates[best], best


@torch.no_grad()
def evaluate(
    exits: Exits,
    cache: Texts,
    *,
    batch_tokens: int = 8192,
    shifts: Sequence[int] = (0,),
    limit: int | None = None,
    autocast: bool = True,
) -> dict[int, Tally]:
    """Counts for every exit.

    Args:
        exits: The heads.
        cache: Texts of the target with the states the heads need.
        batch_tokens: Padded tokens at once.
        shifts: Length of the first round, one pass over the texts for each; all of
            ``range(ROUND)`` meet every position at every offset.
        limit: Use only the first texts.
        autocast: Compute in bf16.
    """
    tallies = {e: Tally(divisions=len(shifts)) for e in exits.specs}
    order = sorted(range(min(limit or len(cache), len(cache))), key=lambda i: cache.lengths[i])
    batches = cut(order, cache.lengths, batch_tokens)
    was_training = exits.training
    exits.eval()
    device = next(exits.parameters()).device
    for indices in batches:
        texts = cache.texts(indices)
        for shift in shifts:
            roots = [fixed_roots(t.first, len(t.pick), ROUND, shift) for t in texts]
            batch = collate(texts, roots, exits.layers).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                guesses = exits(batch)
            for e, guess in guesses.items():
                right, start = (guess.picks == batch.pick).cpu(), 0
                for text in texts:
                    part = slice(start, start + len(text.pick))
                    _count(tallies[e], text.category, right[part], shift)
                    start = part.stop
    exits.train(was_training)
    return tallies


def _count(tally: Tally, category: str, right: Tensor, shift: int) -> None:
    """Adds one text whose rounds begin at ``shift``."""
    tally.seen[category] = tally.seen.get(category, 0) + right.numel()
    tally.right[category] = tally.right.get(category, 0) + int(right.sum())
    place = torch.arange(right.numel())
    offset = torch.where(place < shift, place, (place - shift) % ROUND)
    tally.offset_seen += torch.bincount(offset, minlength=ROUND)
    tally.offset_right += torch.bincount(offset[right], minlength=ROUND)
    whole = (right.numel() - shift) // ROUND
    if whole > 0:
        rounds = right[shift : shift + whole * ROUND].view(whole, ROUND)
        runs = rounds.long().cumprod(1).sum(1)
        tally.runs += torch.bincount(runs, minlength=ROUND + 1)
