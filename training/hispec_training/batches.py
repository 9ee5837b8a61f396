"""From cached texts to training batches: order, rounds, padding.

Everything random here is a function of (seed, epoch) or (seed, step), so a run that resumes at
step n sees what an uninterrupted one would have seen, on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hispec_training.shard_cache import CachedText, Texts
from hispec_training.shards import cut

MAX_ROUND = 6  # tokens committed by the longest round met in training


@dataclass(frozen=True)
class Batch:
    """Padded texts with the targets of their response positions.

    Attributes:
        states: Layer → (B, T, D) bf16.
        positions: (B, Q) int64 response positions, consecutive; pads repeat the last.
        roots: (B, Q) int64 the root of each position's round.
        chosen: (B, Q) bool, False on pads.
        pick: (N,) int64, N = chosen positions, row by row.
        top_ids: (N, K) int64.
        top_logits: (N, K) fp32.
    """

    states: dict[int, Tensor]
    positions: Tensor
    roots: Tensor
    chosen: Tensor
    pick: Tensor
    top_ids: Tensor
    top_logits: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: x.to(device) for name, x in moved.items() if name != "states"}
        return Batch(states={e: h.to(device) for e, h in self.states.items()}, **moved)

    @property
    def offsets(self) -> Tensor:
        """(N,) distance of each chosen position from its root."""
        return (self.positions - self.roots)[self.chosen]


def draw_roots(first: int, count: int, generator: torch.Generator, longest: int) -> Tensor:
    """Roots of ``count`` positions from ``first`` on, as rounds of random length leave them.

    Lengths are uniform over 1 … longest, and the first round starts inside one.

    Returns:
        (count,) int64, each at most its position and at least ``first``.
    """
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    ends = lengths.cumsum(0)  # a round's end is the next one's root
    place = torch.arange(count)
    number = torch.searchsorted(ends, place, right=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends])[number]
    return first + starts


def fixed_roots(first: int, count: int, length: int, shift: int) -> Tensor:
    """Roots of rounds of one length, the first of them ``shift`` positions long (or none)."""
    place = torch.arange(count)
    return first + ((place - shift).div(length, rounding_mode="floor") * length + shift).clamp_min(
        0
    )


def collate(texts: Sequence[CachedText], roots: Sequence[Tensor], layers: Sequence[int]) -> Batch:
    """The batch of some texts; ``roots`` holds one tensor of (R,) for each."""
    size, device = len(texts), texts[0].pick.device
    # The last position predicts nothing and is never context.
    length = max(len(text.ids) - 1 for text in texts)
    width = max(len(text.pick) for text in texts)
    dim = next(iter(texts[0].states.values())).shape[1]
    shape = (size, length, dim)
    states = {e: torch.zeros(shape, dtype=torch.bfloat16, device=device) for e in layers}
    positions = torch.empty(size, width, dtype=torch.int64)
    root = torch.empty(size, width, dtype=torch.int64)
    chosen = torch.zeros(size, width, dtype=torch.bool)
    for row, text in enumerate(texts):
        used, count = len(text.ids) - 1, len(text.pick)
        for e in layers:
            states[e][row, :used] = text.states[e][:used]
        positions[row, :count] = torch.arange(text.first, text.first + count)
        positions[row, count:] = text.first + count - 1
        root[row, :count] = roots[row]
        root[row, count:] = roots[row][-1]
        chosen[row, :count] = True
    return Batch(
        states=states,
        positions=positions,
        roots=root,
        chosen=chosen,
        pick=torch.cat([text.pick for text in texts]).long(),
        top_ids=torch.cat([text.top_ids for text in texts]).long(),
        top_logits=torch.cat([text.top_logits for text in texts]).float(),
    )


def epoch_batches(cache: Texts, batch_targets: int, seed: int, epoch: int) -> list[list[int]]:
    """A random order of batches of similar length, each at most ``batch_targets`` when padded.

    Texts are shuffled, sorted by response length within windows of 1,024, cut into batches, and
    the batches shuffled: little padding, and different company in every epoch.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(cache), generator=generator).tolist()
    sizes = cache.response_lengths
    batches: list[list[int]] = []
    for start in range(0, len(order), 1024):
        window = order[start : start + 1024]
        window.sort(key=lambda i: (int(8 * math.log2(sizes[i])), cache.lengths[i], i))
        batches += cut(window, sizes, batch_targets)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's own random numbers."""
    return (seed * 1_000_003 + step) % (1 << 62)


def training_batches(
    cache: Texts, batch_targets: int, seed: int, start_step: int = 0
) -> Iterator[tuple[int, list[int]]]:
    """(epoch, texts) for every step from ``start_step`` on, without end."""
    epoch, step = 0, 0
    while True:
        batches = epoch_batches(cache, batch_targets, seed, epoch)
        if step + len(batches) > start_step:
            for texts in batches[max(0, start_step - step) :]:
                yield epoch, texts
        step += len(batches)
        epoch += 1
