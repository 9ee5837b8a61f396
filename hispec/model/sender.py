"""Tells a GPU what the rows of the next passes are and where they stand.

All that the host knows goes in one copy; ids that the device has picked itself are moved there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hispec.model.device import upload
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Words

#: Passes that one message tells of: of layers from boundary to boundary, and of a head's block.
PASSES = 6
#: Where what is not a pass's plan lies, in front of them: the noise's seed and positions, the
#: temperature, and two plans of straight rows.
_TEMPERATURE, _ROWS, _PLANS = 36, 40, 48
assert 1 + MAX_WIDTH <= _TEMPERATURE


class Sender:
    """Fills the array that kernels read.

    Args:
        device: where the array is.

    Attributes:
        told: the array, int32: see the constants above and :mod:`hispec_kernels.gpu.plan`.
    """

    def __init__(self, device: torch.device) -> None:
        from hispec_kernels.gpu import plan

        self.layout = plan
        self.device = device
        self.told = torch.zeros(_PLANS + PASSES * plan.LENGTH, dtype=torch.int32, device=device)


class Message:
    """What a graph is told: its passes' plans in the order they are made.

    Whoever is told gets the part of the array where it will stand, and reads it on the device.

    Args:
        sender: where it goes.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._values = np.zeros(len(sender.told), np.int32)
        self._end = 0
        self._plans = 0
        self._rows = 0
        self._unread: list[tuple[int, list[Tensor]]] = []

    def plan(
        self, position: int, width: int, nodes: Nodes | None = None, words: Words | None = None
    ) -> Tensor:
        """Adds a plan; returns where it will be, (LENGTH,).

        Args:
            position: slot of the first row.
            width: W.
            nodes: the round's tree; slots are positions where it is a chain, or there is none.
            words: the rows' tokens, where they are to be embedded.

        Raises:
            IndexError: a token's id is none.
        """
        at = self._sender.layout
        first = _PLANS + self._plans * at.LENGTH
        self._plans += 1
        plan = self._values[first : first + at.LENGTH]
        tree = nodes is not None and not nodes.straight(position + width - nodes.root)
        length = at.LENGTH if tree else at.DEPTHS if words else at.IDS
        self._head(plan, position, width)
        if nodes:
            plan[at.ROOT] = nodes.root
        if words:
            self._embed(words, width, plan, first + at.IDS)
        if nodes and tree:
            plan[2] = nodes.root
            plan[at.DEPTHS : at.PATHS] = nodes.depths_array
            plan[at.PATHS :] = nodes.paths_array.ravel()
        self._end = first + length
        return self._sender.told[first : first + at.LENGTH]

    def rows(self, position: int, width: int) -> Tensor:
        """Adds a plan of rows whose slots are positions; at most two of them, (4,) each."""
        first = _ROWS + 4 * self._rows
        self._rows += 1
        assert first < _PLANS, "there is room for two"
        self._head(self._values[first : first + 4], position, width)
        self._end = max(self._end, _PLANS)
        return self._sender.told[first : first + 4]

    def ranking(self, asked: Asked, skipped: int) -> tuple[Tensor, Tensor]:
        """Adds what ranks ids.

        Args:
            asked: what of them.
            skipped: rows of the head's in front of those that it is about.

        Returns:
            Where the seed and the rows' positions will be, (1 + MAX_WIDTH,), and the temperature,
            (1,) fp32.
        """
        from hispec_kernels.noise import seeded_state

        values, told = self._values, self._sender.told
        if asked.seed is not None:
            values[:1].view(np.uint32)[0] = seeded_state(asked.seed)
            values[1 + skipped : 1 + skipped + len(asked.positions)] = asked.positions
        temperature = slice(_TEMPERATURE, _TEMPERATURE + 1)
        values[temperature].view(np.float32)[0] = asked.temperature
        self._end = max(self._end, _PLANS)
        return told[: 1 + MAX_WIDTH], told[temperature].view(torch.float32)

    def send(self) -> None:
        """Sends it all, before any kernel that reads it is started."""
        sender, end = self._sender, self._end
        upload(self._values[:end], sender.device, sender.told[:end])
        for place, tokens in self._unread:  # known to the device alone
            last = tokens[0][None] if len(tokens) == 1 else torch.stack(tokens)
            sender.told[place : place + len(tokens)].copy_(last)

    def _head(self, plan: np.ndarray, position: int, width: int) -> None:
        plan[:3] = position, width, self._sender.layout.STRAIGHT

    def _embed(self, words: Words, width: int, plan: np.ndarray, place: int) -> None:
        at = self._sender.layout
        assert len(words.ids) == width, "a row has a token"
        unread = [token for token in words.ids if isinstance(token, Tensor)]
        known = width - len(unread)  # numbers come first
        plan[at.IDS : at.IDS + known] = words.ids[:known]
        ids = plan[at.IDS : at.IDS + width]
        if ids.min() < 0 or ids.max() >= words.linear.rows:
            raise IndexError(f"token ids must be in [0, {words.linear.rows - 1}]")
        if unread:
            self._unread.append((place + known, unread))
