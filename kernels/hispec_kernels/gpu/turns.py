"""Kernels that take turns without a gap: programmatic dependent launch, from Hopper on.

A pass is hundreds of short kernels, one after the other. As a rule one starts when the last one has
ended, and the microsecond in between is lost. Here it is started as soon as all programs of the
last one run, and waits by itself, in its first instruction, for that to end. So every kernel begins
with ``take_turn``, before it reads or writes anything; as each waits for the whole of its
predecessor, which has waited for its own, nothing is seen too early however long the row.

``HISPEC_PDL=0`` turns it off.
"""

from __future__ import annotations

import functools
import os
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: The least compute capability.
CAPABILITY = (9, 0)


@triton.jit
def take_turn(TURNS: tl.constexpr):
    """Lets the next kernel start, and waits until the last one has ended."""
    if TURNS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def turns(tensor: Tensor) -> dict[str, Any]:
    """Returns what a launch on this tensor's device is to be given."""
    if tensor.device.type == "cuda" and taken(tensor.device):
        return {"TURNS": True, "launch_pdl": True}
    return {"TURNS": False}


@triton.jit
def _double(x_ptr, y_ptr, size, TURNS: tl.constexpr, BLOCK: tl.constexpr):
    take_turn(TURNS)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    tl.store(y_ptr + at, 2.0 * tl.load(x_ptr + at, mask=mask), mask=mask)


@functools.cache
def taken(device: torch.device) -> bool:
    """Returns whether kernels can take turns here: tried in a graph, as that is where they do."""
    if os.environ.get("HISPEC_PDL", "1") == "0":
        return False
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    stream = torch.cuda.current_stream(device)
    try:
        return _tried(device)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # an older driver or Triton, each in its own way
        torch.cuda.set_stream(stream)  # torch leaves its own where ending a capture fails
        return False


def _tried(device: torch.device) -> bool:
    """Returns whether a chain of kernels behind a copy gives what it should, from a graph."""
    size, links = 1 << 16, 8
    cells = torch.zeros(links + 1, size, device=device)
    fed = torch.ones(size, device=device)

    def chain() -> None:
        cells[0].copy_(fed)
        for last, now in pairwise(cells):
            _double[(size // 1024,)](last, now, size, BLOCK=1024, TURNS=True, launch_pdl=True)

    chain()  # built before the capture
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for value in (1.0, 3.0):
        fed.fill_(value)
        cells[1:].zero_()
        graph.replay()
        if not bool((cells[-1] == value * 2.0**links).all()):
            return False
    return True
