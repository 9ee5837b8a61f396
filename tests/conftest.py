"""Fixtures shared by all tests; what they build with is in ``helpers``."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network

from hispec.model.store import cache_dir

if os.environ.get("HISPEC_VIRTUAL_GPU"):
    from helpers import virtual_gpu

    virtual_gpu.install(cache_dir() / "virtual-gpu")

import pytest
import torch
from helpers.tiny_llama import save_tiny_llama

if not torch.cuda.is_available():  # read when a kernel is defined, so before any is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
    torch.set_num_threads(len(os.sched_getaffinity(0)))
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Processes whose threads wait for each other's processors are ten times slower than alone.
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # of commands that tests start


def _own_cache() -> None:
    """Gives the tests a cache folder of their own: what earlier runs or the user's texts have
    taught must not help them, nor theirs the user. What is slow to build is the user's."""
    home = tempfile.TemporaryDirectory(prefix="hispec-tests-")
    atexit.register(home.cleanup)
    for name in ("native", "converted", "digests", "wheels", "virtual-gpu"):
        (cache_dir() / name).mkdir(parents=True, exist_ok=True)
        (Path(home.name) / name).symlink_to(cache_dir() / name)
    os.environ["HISPEC_HOME"] = home.name


_own_cache()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama: GQA, untied head. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    save_tiny_llama(folder)
    return folder


@pytest.fixture
def make_llama(tmp_path: Path) -> Callable[..., Path]:
    """Saves a fresh tiny Llama with the given config changes and returns its folder."""

    def make(name: str = "llama", **config: Any) -> Path:
        save_tiny_llama(tmp_path / name, **config)
        return tmp_path / name

    return make


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that replaces the user's own."""
    monkeypatch.setenv("HISPEC_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
