"""Texts to train on, and where they come from on a CPU: the shards that ``shards.py`` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class CachedText:
    """One text and what the trunk said about it.

    Attributes:
        ids: (T,) int32.
        states: Layer → (T, D) bf16.
        first: First position with a target, ``prompt_length - 1``.
        pick: (R,) int32 the target's picks at positions ``first … T - 2``.
        top_ids: (R, K) int32, best first.
        top_logits: (R, K) fp32.
        category: For tables.
    """

    ids: Tensor
    states: dict[int, Tensor]
    first: int
    pick: Tensor
    top_ids: Tensor
    top_logits: Tensor
    category: str

    def cpu(self) -> CachedText:
        """The same text in the host's memory."""
        states = {e: h.cpu() for e, h in self.states.items()}
        pick, top_ids, top_logits = (x.cpu() for x in (self.pick, self.top_ids, self.top_logits))
        return replace(self, states=states, pick=pick, top_ids=top_ids, top_logits=top_logits)


class Texts(Protocol):
    """Texts with what the trunk said about them, kept (`ShardCache`) or said anew (`live.py`).

    Attributes:
        lengths: Tokens of each text.
        response_lengths: Of them those with a target.
    """

    lengths: list[int]
    response_lengths: list[int]

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> CachedText:
        """Raises IndexError past the last one, which ends an iteration."""

    def texts(self, indices: Sequence[int]) -> list[CachedText]:
        """Returns some of them, on whatever device they are; cheaper than one by one."""

    def pick_counts(self, vocab_size: int) -> Tensor:
        """(V,) int64: how often the target picked each token."""


class ShardCache:
    """The sequences of some shards, mapped.

    Attributes:
        words: (V, D) bf16 embedding, or None; with it states before the first layer are looked up.

    Args:
        paths: Shards, each whole.
        chosen: Numbers of the sequences to show, counted over all shards; all if None.
    """

    def __init__(self, paths: Sequence[Path], chosen: Sequence[int] | None = None) -> None:
        self.paths = list(paths)
        self._tensors: list[dict[str, Tensor]] = []
        self._layers: list[int] = []
        self.words: Tensor | None = None
        self._where: list[tuple[int, int]] = []  # sequence → (shard, number in it)
        self._categories: list[list[str]] = []
        self.lengths: list[int] = []
        self.response_lengths: list[int] = []
        for number, path in enumerate(self.paths):
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self._categories.append(json.loads(file.metadata()["categories"]))
            self._tensors.append(tensors)
            lengths = tensors["starts"].diff().tolist()
            self.lengths += lengths
            self.response_lengths += tensors["targets"].diff().tolist()
            self._where += [(number, i) for i in range(len(lengths))]
            found = {int(n[6:]) for n in tensors if n.startswith("state_")}
            self._layers = sorted(found & set(self._layers) if number else found)
        if chosen is not None:
            for name in ("lengths", "response_lengths", "_where"):
                setattr(self, name, [getattr(self, name)[i] for i in chosen])

    def __len__(self) -> int:
        return len(self._where)

    @property
    def layers(self) -> list[int]:
        """The layers whose states are kept, L last."""
        return self._layers if self.words is None or 0 in self._layers else [0, *self._layers]

    def __getitem__(self, index: int) -> CachedText:
        """Raises IndexError past the last one, which ends an iteration."""
        shard, number = self._where[index]
        tensors = self._tensors[shard]
        start, end = tensors["starts"][number : number + 2].tolist()
        low, high = tensors["targets"][number : number + 2].tolist()
        ids = tensors["ids"][start:end]
        states = {e: tensors[f"state_{e}"][start:end] for e in self._layers}
        if self.words is not None and 0 not in states:
            states[0] = self.words[ids.long()]
        return CachedText(
            ids=ids,
            states=states,
            first=int(tensors["first"][number]),
            pick=tensors["pick"][low:high],
            top_ids=tensors["top_ids"][low:high],
            top_logits=tensors["top_logits"][low:high],
            category=self._categories[shard][number],
        )

    def texts(self, indices: Sequence[int]) -> list[CachedText]:
        """Returns some of them."""
        return [self[i] for i in indices]

    def pick_counts(self, vocab_size: int) -> Tensor:
        """(V,) int64: how often the target picked each token, in all texts of the shards."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for tensors in self._tensors:
            counts += torch.bincount(tensors["pick"].long(), minlength=vocab_size)
        return counts
