"""CUDA graphs of passes: captured when a shape comes back, replayed from then on.

A pass over thirty layers is some 250 kernels of a few microseconds; launched one by one from Python
they take longer to launch than to run. A graph launches them all at once. What differs from pass to
pass (places, trees, rows) is read from static buffers, so one graph serves a whole *bucket* of
shapes. All graphs share one memory pool: they run one after the other, and nothing that lives in
the pool outlives its graph's run.

The first pass of a bucket runs kernel by kernel, which also compiles them; the second is captured.
So what happens once costs no capture. ``HISPEC_GRAPHS=0`` runs everything kernel by kernel.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from hispec.model.device import out_of_memory, wanted


class Step(NamedTuple):
    """A part of a graph.

    Attributes:
        key: all that shapes the work.
        work: starts kernels on static buffers; told whether to start as many programs as the whole
            bucket needs, or only as many as this time.
    """

    key: Hashable
    work: Callable[[bool], object]


class Graphs:
    """Captures and replays work on one device; on a CPU it just runs it.

    Args:
        device: where the work runs.

    Attributes:
        on: whether work is captured.
        prepared: runs that also built kernels or captured a graph, and took their time; counted
            while work is captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = device.type == "cuda" and os.environ.get("HISPEC_GRAPHS", "1") != "0"
        self.prepared = 0
        self._pool: Any = None
        self._mark: Callable[[], object] | None = None

    def run(
        self,
        known: dict[Hashable, torch.cuda.CUDAGraph | None],
        steps: Sequence[Step],
    ) -> None:
        """Runs steps one after the other, from one graph if this is not their first time.

        Args:
            known: the graphs of whatever owns the memory that the work uses; grows by its key.
            steps: what to run.
        """
        key = tuple(step.key for step in steps)

        def work(whole: bool) -> None:
            for step in steps:
                step.work(whole)

        if self._mark:
            self._mark()
        graph = known.get(key) if self.on else None
        self.prepared += self.on and graph is None
        if self.on and graph is None and key in known:
            graph = known[key] = self._capture(work)
        if graph is None:
            work(False)
            if self.on:
                known.setdefault(key, None)  # its kernels are built
        else:
            graph.replay()
        if self._mark:
            self._mark()

    @contextmanager
    def kernel_by_kernel(self) -> Iterator[None]:
        """Inside, nothing is captured or replayed."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    @contextmanager
    def watched(self, mark: Callable[[], object]) -> Iterator[None]:
        """Inside, ``mark`` is called right before and right behind all that graphs stand for."""
        before, self._mark = self._mark, mark
        try:
            yield
        finally:
            self._mark = before

    def _capture(self, work: Callable[[bool], None]) -> torch.cuda.CUDAGraph | None:
        """Returns the graph of ``work``; None, and no more graphs, where it cannot be captured."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work(True)
        except RuntimeError as raised:
            torch.cuda.set_stream(stream)  # torch leaves its own where ending a capture fails
            cause = raised.__context__  # of which that failure is but a consequence
            error = cause if isinstance(cause, RuntimeError) else raised
            self.on = False
            if out_of_memory(error):
                why = f"no memory left for CUDA graphs, which need {wanted(error)}"
                advice = ": lower --context"
            else:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                why, advice = f"no CUDA graphs here ({first})", ""
            slow = "so passes run kernel by kernel, which is slower"
            print(f"hispec: {why}, {slow}{advice}.", file=sys.stderr)
            return None
        return graph
