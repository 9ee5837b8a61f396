"""Timing on a device, and the ceiling it is held against.

Kernels of a few microseconds are captured into a graph that runs them many times over rotating
inputs: launched one by one, the launches would be what is timed, and over one input set the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

#: Bytes that input sets take together, well over any L2 cache.
ROTATED = 256 << 20
CALLS, REPLAYS = 32, 15


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
    return max(1, min(CALLS, ROTATED // max(size, 1))) if device.type == "cuda" else 1


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
