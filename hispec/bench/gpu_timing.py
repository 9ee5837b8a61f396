"""Timing on a device, and the ceiling it is held against.

Kernels of a few microseconds are captured into a graph that runs them many times over rotating
inputs: launched one by one, the launches would be what is timed, and over one input set the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from warnings import catch_warnings, simplefilter

import torch

#: Bytes that input sets take together, well over any L2 cache.
ROTATED = 256 << 20
CALLS, REPLAYS = 32, 15
#: The most input sets: what moves less than their share of ROTATED is timed a bit too well.
MOST_SETS = 256


def median_ms(works: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Returns the time of one call, median over replays; ``works`` are the same on other inputs."""
    if device.type != "cuda":
        works[0]()
        started = time.perf_counter()
        works[0]()
        return (time.perf_counter() - started) * 1e3
    for work in works:
        work()  # compiles
    calls = max(CALLS, len(works))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            works[call % len(works)]()
    times = []
    for replay in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        if replay >= 3:
            times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def sets_for(size: int, device: torch.device) -> int:
    """Returns how many input sets of ``size`` bytes have to rotate."""
    return max(1, min(MOST_SETS, ROTATED // max(size, 1))) if device.type == "cuda" else 1


class Spans:
    """How long a device was at work between marks that come in pairs, told without waiting for it.

    Args:
        device: on CUDA marks are events in the current stream, elsewhere moments of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._moments: list[float] = []

    def mark(self) -> None:
        """Begins a span, or ends the one that has begun."""
        if self._device.type == "cuda":
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        else:
            self._moments.append(time.perf_counter())

    def seconds(self) -> float:
        """Returns the spans' sum; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        events, moments = self._events, self._moments
        device = sum(a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=True))
        host = sum(b - a for a, b in zip(moments[::2], moments[1::2], strict=True))
        return device * 1e-3 + host


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that torch hands out holds NaN, or the largest integer, until it is written.

    So results that a kernel's own function allocates show what it leaves out.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with catch_warnings():
        simplefilter("ignore")  # of cuBLAS, which would like to be told of determinism by name
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)


def copy_gb_per_s(device: torch.device, megabytes: int) -> float:
    """Returns the bandwidth of a device-to-device copy, bytes read and written both counted."""
    source = torch.rand(megabytes << 18, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(12):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            torch.cuda.synchronize(device)
            best = min(best, start.elapsed_time(end) * 1e-3)
        else:
            started = time.perf_counter()
            target.copy_(source)
            best = min(best, time.perf_counter() - started)
    return 2 * (megabytes << 20) / best / 1e9
