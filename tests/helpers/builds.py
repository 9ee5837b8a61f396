"""Where compiled code may be missing, and where its absence is a failure."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import NoReturn

import pytest

#: Of Linux on x86-64: a process asks for the tiles' registers.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18


def skip_or_fail(reason: str) -> NoReturn:
    """Skips the test where the machine is the reason, and fails it where our code is.

    What a machine is said to lack we know from our own code alone, which may be wrong: so the
    machine is asked once more, in another way. A compiler that refuses our code is no excuse.
    """
    for excuse, has in (
        ("no C compiler", has_compiler),
        ("this torch does not use GNU OpenMP", has_gnu_openmp),
        ("the kernel does not grant AMX", kernel_grants_amx),
    ):
        if reason.startswith(excuse):
            if has():
                pytest.fail(f"our code says: {reason}. But this machine has it.")
            pytest.skip(reason)
    pytest.fail(f"the compiled code cannot be had: {reason}")


def has_compiler() -> bool:
    """Looks for what a system's C compiler is called, folder by folder."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return any(os.access(Path(x) / name, os.X_OK) for x in folders if x for name in ("cc", "gcc"))


def has_gnu_openmp() -> bool:
    """Looks at what torch, long imported, has had loaded; or at what it brings."""
    try:
        return "libgomp" in Path("/proc/self/maps").read_text()
    except OSError:  # not Linux, which alone tells
        import torch

        return any((Path(torch.__file__).parent / "lib").glob("libgomp*"))


def kernel_grants_amx() -> bool:
    """Asks the kernel itself."""
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0
