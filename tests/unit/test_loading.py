"""What happens beside loading a model."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.builds import skip_or_fail

from hispec import loading
from hispec.errors import CheckpointError
from hispec.model.store import cache_dir
from hispec_kernels import cpu


def test_passes_are_compiled_while_a_model_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, found = threading.Event(), threading.Event()

    def load_library(folder: Path) -> Any:
        begun.set()
        assert found.wait(20), "loading does not wait for it"
        raise OSError("told where the passes are needed, not here")

    def open_checkpoint(model: str) -> Any:
        assert begun.wait(20)
        found.set()
        raise CheckpointError("nowhere.")

    monkeypatch.setattr(cpu, "load_library", load_library)
    monkeypatch.setattr(loading, "open_checkpoint", open_checkpoint)
    with pytest.raises(CheckpointError, match="nowhere"):
        loading.load("no model", device="cpu")


def test_two_threads_build_the_library_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        cpu.load_library(cache_dir() / "native")
    except cpu.BuildError as error:
        skip_or_fail(str(error))
    (built, *_) = sorted((cache_dir() / "native").glob("*.so"), key=lambda x: -x.stat().st_mtime)
    builds: list[Path] = []

    def build(_: str, path: Path) -> None:
        builds.append(path)
        time.sleep(0.3)
        shutil.copy(built, path)

    monkeypatch.setattr(cpu, "_compile", build)
    loaded: list[Any] = []
    threads = [
        threading.Thread(target=lambda: loaded.append(cpu.load_library(tmp_path))) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(loaded) == 2 and len(builds) == 1
