"""Keys and values in the order of positions, whatever order the passes keep them in."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from hispec.model.linear import Layout


def by_position(cells: Tensor, kind: Literal["keys", "values"], layout: Layout) -> Tensor:
    """Returns keys or values as (..., S, D_h), from such memory in the compiled passes' order.

    With tiles, 32 positions of one dimension of a value lie together. With pairs, keys lie in
    panels of 16 positions, (S / 16, D_h / 2, 16, 2), and values in panels of 16 dimensions for
    each 128 positions, (S / 128, D_h / 16, 64, 16, 2).
    """
    *heads, length, size = cells.shape
    if kind == "values" and layout == "tiles":
        return cells.view(*heads, length // 32, size, 32).transpose(-1, -2).flatten(-3, -2)
    if kind == "values" and layout == "pairs":
        view = cells.reshape(-1, length // 128, size // 16, 64, 16, 2)
        return view.permute(0, 1, 3, 5, 2, 4).reshape(cells.shape)
    if kind == "keys" and layout == "pairs":
        view = cells.view(*heads, length // 16, size // 2, 16, 2)
        return view.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return cells
