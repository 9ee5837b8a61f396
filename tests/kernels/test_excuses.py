"""A test may leave compiled code out where the machine is the reason, and nowhere else."""

from __future__ import annotations

import pytest
from helpers import builds

NO_AMX = "the kernel does not grant AMX registers"


@pytest.mark.parametrize(
    ("reason", "granted", "outcome"),
    [
        ("no C compiler (cc or gcc) is installed", False, pytest.skip.Exception),
        (NO_AMX, False, pytest.skip.Exception),
        (NO_AMX, True, pytest.fail.Exception),
        ("cc failed: error: expected ';'", False, pytest.fail.Exception),
    ],
)
def test_whose_fault_it_is(
    reason: str, granted: bool, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builds, "kernel_grants_amx", lambda: granted)
    with pytest.raises(outcome):
        builds.skip_or_fail(reason)
