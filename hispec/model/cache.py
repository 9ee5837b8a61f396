"""What the model remembers: keys, values and the hidden states at the exits, slot by slot.

One owner of place. Slots are the text's positions, and behind them those of a draft tree
(:mod:`hispec.model.nodes`). Each *boundary* (an exit's layer, or L) has a watermark
``computed[b]``: the number of leading slots that have run through ``layers[0:b]``, whose state
there is stored. Deeper layers never know more than shallower ones: ``computed[4] ≥ computed[8] ≥
computed[30]``. Running a level means raising its watermark from the states stored at the one below,
so no layer runs twice for a token; rejecting means lowering them all: ``truncate(length)``, or
``keep`` where nodes between others go.

Nothing is ever erased: slots at and past a watermark hold leftovers that are masked until they are
written again. The buffers cover the model's whole context from the start, but as untouched
memory: on a CPU a page costs nothing before its first write.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hispec.model.device import enough_memory, upload


class KVCache:
    """Keys and values of ``layers`` blocks over ``capacity`` positions.

    Attributes:
        storage: all of them, (L, 2, H_kv, S, D_h).
        keys: one (H_kv, S, D_h) tensor a layer.
        values: likewise.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.storage = lazy_zeros((layers, 2, kv_heads, capacity, head_dim), dtype, device)
        self.keys = [self.storage[i, 0] for i in range(layers)]
        self.values = [self.storage[i, 1] for i in range(layers)]
        self.bytes_per_position = 2 * layers * kv_heads * head_dim * dtype.itemsize


class Cache:
    """KV of the whole model, hidden states at its boundaries, and their watermarks.

    Args:
        boundaries: ascending layer numbers at which states are kept; the last is L.
        capacity: positions, padded by the caller to whole attention buckets.
        state_dtype: of the hidden states; by default that of keys and values.
    """

    def __init__(
        self,
        boundaries: Sequence[int],
        kv_heads: int,
        head_dim: int,
        hidden_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self.capacity = capacity
        self.kv = KVCache(boundaries[-1], kv_heads, head_dim, capacity, dtype, device)
        self.boundaries: list[int] = []
        self.states: dict[int, Tensor] = {}  # boundary → (S, D)
        self.computed: dict[int, int] = {}
        self._state_spec = (hidden_size, state_dtype or dtype, device)
        self.reset(boundaries)

    @property
    def length(self) -> int:
        """Positions known to every layer."""
        return self.computed[self.boundaries[-1]]

    def reset(self, boundaries: Sequence[int]) -> None:
        """Forgets all positions and keeps states at ``boundaries`` from here on."""
        hidden_size, dtype, device = self._state_spec
        what = f"keeping an exit's states over {self.capacity} tokens of context"
        size = self.capacity * hidden_size * dtype.itemsize
        for boundary in boundaries:
            if boundary not in self.states:
                with enough_memory(what, size, "give a shorter --context"):
                    self.states[boundary] = lazy_zeros((self.capacity, hidden_size), dtype, device)
        self.boundaries = list(boundaries)
        self.computed = dict.fromkeys(boundaries, 0)

    def truncate(self, length: int) -> None:
        """After the call no layer knows a position at or past ``length`` (absolute)."""
        for boundary, known in self.computed.items():
            if known > length:
                self.computed[boundary] = length

    def keep(self, root: int, kept: Sequence[int]) -> None:
        """After the call the slots from ``root`` on hold the states of the nodes ``kept``.

        Keys and values are the passes' to move: see :meth:`hispec.model.llama.Llama.keep`.

        Args:
            root: the root's slot.
            kept: ascending node numbers, the root's 0 first.
        """
        for boundary, known in self.computed.items():
            stay = [node for node in kept if root + node < known]
            if known > root:
                self.computed[boundary] = root + len(stay)
            first = next((new for new, node in enumerate(stay) if new != node), len(stay))
            if first < len(stay):
                self._move(self.states[boundary], root, stay, first)

    def _move(self, states: Tensor, root: int, stay: Sequence[int], first: int) -> None:
        """Moves the states of the nodes ``stay[first:]`` to the slots ``root + first`` and on."""
        if states.device.type == "cpu":
            # The weights have driven torch's own code from the caches: by addresses this takes a
            # third. What ascends moves down, so nothing is overwritten before it has moved.
            size = states.shape[1] * states.itemsize
            start = states.data_ptr() + root * size
            for new, node in enumerate(stay[first:], first):
                ctypes.memmove(start + new * size, start + node * size, size)
            return
        sources = upload(np.array([root + node for node in stay[first:]]), states.device)
        states[root + first : root + len(stay)] = states[sources]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns zeros that, on a CPU, take up memory page by page as they are written.

    ``torch.zeros`` touches every page; an anonymous mapping does not. Zeros matter: masked
    positions are read (with weight 0), and leftovers of the allocator could be NaN.
    """
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if device.type != "cpu" or size < 1 << 16:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
