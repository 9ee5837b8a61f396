"""What needs a GPU passes on the virtual one, in a process whose torch has it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.virtual_gpu import why_not

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/e2e/test_on_a_gpu.py",
    "tests/kernels/test_gpu_library.py",
    "tests/kernels/test_gpu_sender.py",
)


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_what_needs_a_gpu() -> None:
    env = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    env |= {"HISPEC_VIRTUAL_GPU": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 15 and "skipped" not in run.stdout, run.stdout
