"""A line that says how far a long run is and when it will be done; only on a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO


class Progress:
    """A bar on stderr.

    Args:
        total: blocks of work.
        done: of these, finished before this process.
        stream: where to write; nothing is written unless it is a terminal.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self._total, self._done, self._before = total, done, done
        self._stream = stream or sys.stderr
        self._shown = self._stream.isatty()
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._write("")

    def doing(self, what: str) -> None:
        """Shows what is being worked on."""
        width = 24
        full = width * self._done // max(self._total, 1)
        bar = "█" * full + "·" * (width - full)
        self._write(f"{bar} {self._done}/{self._total}{self._left()}  {what}"[:100])

    def advance(self) -> None:
        """One more block is done."""
        self._done += 1

    def _left(self) -> str:
        here = self._done - self._before
        if not here:
            return ""
        seconds = (time.monotonic() - self._started) / here * (self._total - self._done)
        return f"  {clock_time(seconds)} left"

    def _write(self, text: str) -> None:
        if self._shown:
            self._stream.write(f"\r\033[K{text}")
            self._stream.flush()


def clock_time(seconds: float) -> str:
    """Returns ``45 s``, ``12 min`` or ``3 h 05``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02}"
