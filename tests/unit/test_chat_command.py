"""``hispec chat``: what comes on stdin."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from hispec.cli import main


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_one_sentence(
    tiny_llama: Path, errors: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["chat", "--model", str(tiny_llama), "--device", "cpu", "--dtype", "fp32"]) == 2
    assert capsys.readouterr().err == "hispec: stdin is not valid UTF-8. Convert it first.\n"


def test_a_system_message_that_is_no_text(capsys) -> None:
    assert main(["chat", "--model", "/none", "--system", "\udcff"]) == 2
    assert "--system is not valid UTF-8" in capsys.readouterr().err
