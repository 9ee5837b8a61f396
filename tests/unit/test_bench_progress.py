"""Progress lines."""

from __future__ import annotations

import pytest

from hispec.bench.progress import Progress, clock_time


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2) as progress:
        progress.doing("a")
        progress.advance()
    assert capsys.readouterr() == ("", "")

    class Terminal:
        text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None: ...

    terminal = Terminal()
    with Progress(4, done=2, stream=terminal) as progress:  # type: ignore[arg-type]
        progress.doing("first")
        progress.advance()
        progress.doing("second")
    assert "2/4  first" in terminal.text
    assert "3/4  0 s left  second" in terminal.text
    assert terminal.text.endswith("\r\033[K")
    assert [clock_time(s) for s in (4, 89, 600, 7500)] == ["4 s", "89 s", "10 min", "2 h 05"]
