"""Where compiled code may be missing, and where its absence is a failure."""

from __future__ import annotations

import ctypes
from typing import NoReturn

import pytest

#: Of Linux on x86-64: a process asks for the tiles' registers.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18
_NO_AMX = "the kernel does not grant AMX"
#: What a machine may lack. A compiler that refuses our code is none of these.
EXCUSES = (
    "no C compiler",
    "this torch does not use GNU OpenMP",
    _NO_AMX,
)


def skip_or_fail(reason: str) -> NoReturn:
    """Skips the test where the machine is the reason, and fails it where our code is."""
    if reason.startswith(_NO_AMX) and kernel_grants_amx():
        pytest.fail(f"it does: our own request is wrong ({reason})")
    if reason.startswith(EXCUSES):
        pytest.skip(reason)
    pytest.fail(f"the compiled code cannot be had: {reason}")


def kernel_grants_amx() -> bool:
    """Asks the kernel itself: that it refuses is otherwise known from our compiled code alone."""
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0
