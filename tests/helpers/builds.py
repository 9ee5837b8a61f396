"""Where compiled code may be missing, and where its absence is a failure."""

from __future__ import annotations

from typing import NoReturn

import pytest

#: What a machine may lack. A compiler that refuses our code is none of these.
EXCUSES = (
    "no C compiler",
    "this torch does not use GNU OpenMP",
    "the kernel does not grant AMX",
)


def skip_or_fail(reason: str) -> NoReturn:
    """Skips the test where the machine is the reason, and fails it where our code is."""
    if reason.startswith(EXCUSES):
        pytest.skip(reason)
    pytest.fail(f"the compiled code cannot be had: {reason}")
