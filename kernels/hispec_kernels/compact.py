"""A tree's kept nodes move to the slots in which plain decoding would have put them."""

from __future__ import annotations

from torch import Tensor


def compact(cells: Tensor, sources: Tensor, targets: Tensor) -> None:
    """After the call slot ``targets[i]`` of all cells holds what ``sources[i]`` held.

    Args:
        cells: (…, S, D_h).
        sources: (N,) int64 slots.
        targets: (N,) int64 slots, none of them twice; may overlap with ``sources``.
    """
    cells.index_copy_(-2, targets, cells.index_select(-2, sources))
