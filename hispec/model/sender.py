"""Tells a GPU what the rows of the next pass are and where they stand.

All that the host knows goes in one copy; ids that the device has picked itself are moved there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hispec.model.device import upload
from hispec.model.nodes import Nodes
from hispec.model.passes import Words


class Sender:
    """Fills the array that kernels read; see :mod:`hispec_kernels.gpu.plan`.

    Args:
        device: where the array is.

    Attributes:
        told: the array, (LENGTH,) int32.
    """

    def __init__(self, device: torch.device) -> None:
        from hispec_kernels.gpu import plan

        self._layout = plan
        self._device = device
        self.told = torch.zeros(plan.LENGTH, dtype=torch.int32, device=device)

    def plan(
        self, position: int, width: int, nodes: Nodes | None = None, words: Words | None = None
    ) -> None:
        """Sends a plan.

        Args:
            position: slot of the first row.
            width: W.
            nodes: the tree some rows are on; without one, slots are positions.
            words: the rows' tokens, where they are to be embedded.

        Raises:
            IndexError: a token's id is none.
        """
        at = self._layout
        length = at.LENGTH if nodes else at.DEPTHS if words else at.IDS
        plan = np.zeros(length, np.int32)
        plan[:2] = position, width
        plan[2] = nodes.root if nodes else at.STRAIGHT
        unread = [token for token in words.ids if isinstance(token, Tensor)] if words else []
        if words:
            assert len(words.ids) == width, "a row has a token"
            known = width - len(unread)  # numbers come first
            plan[at.IDS : at.IDS + known] = words.ids[:known]
            ids = plan[at.IDS : at.IDS + width]
            if ids.min() < 0 or ids.max() >= words.linear.rows:
                raise IndexError(f"token ids must be in [0, {words.linear.rows - 1}]")
        if nodes:
            plan[at.DEPTHS : at.PATHS] = nodes.depths_array
            plan[at.PATHS :] = nodes.paths_array.ravel()
        upload(plan, self._device, self.told[:length])
        if unread:  # known to the device alone
            last = unread[0][None] if len(unread) == 1 else torch.stack(unread)
            self.told[at.IDS + width - len(unread) : at.IDS + width].copy_(last)
