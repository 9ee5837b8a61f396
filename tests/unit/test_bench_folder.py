"""A run's folder: nothing is lost, nothing is counted twice, no two runs are mixed."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from hispec.bench.folder import LOCK, RunFolder
from hispec.errors import HispecError, UsageError

SETTINGS = {"methods": {"ar": {}}, "max_new_tokens": 8}


def create(path: Path, **changes: Any) -> AbstractContextManager[RunFolder]:
    return RunFolder.create(path, {**SETTINGS, **changes}, {"date": "today"})


def block(item: str, repeat: int = 0) -> list[dict[str, Any]]:
    shared = {"item": item, "repeat": repeat, "of": 2, "text": "ä\u2028"}
    return [{**shared, "method": name} for name in ("ar", "hispec")]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with create(tmp_path / "run") as first:
        first.append(block("a"))
        first.skip({"item": "z", "reason": "long"})
    with create(tmp_path / "run") as again:
        assert again.rows == block("a")
        assert again.has_block("a", 0) and not again.has_block("a", 1)
        again.append(block("a", 1))
        again.skip({"item": "z", "reason": "long"})
    assert len(RunFolder.open(tmp_path / "run").rows) == 4
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("torn", [1, 30, 70])
def test_an_unfinished_block_is_run_again(tmp_path: Path, torn: int) -> None:
    """The end of the file is cut within the second block: in its first row, or its second."""
    with create(tmp_path / "run") as folder:
        folder.append(block("a"))
        whole = (tmp_path / "run" / "rows.jsonl").read_bytes()
        folder.append(block("b"))
    both = (tmp_path / "run" / "rows.jsonl").read_bytes()
    (tmp_path / "run" / "rows.jsonl").write_bytes(both[:-torn])

    watched = RunFolder.open(tmp_path / "run")  # a report does not touch a run under way
    assert watched.rows == block("a")
    assert (tmp_path / "run" / "rows.jsonl").read_bytes() == both[:-torn]

    with create(tmp_path / "run") as again:
        assert again.rows == block("a") and not again.has_block("b", 0)
        assert (tmp_path / "run" / "rows.jsonl").read_bytes() == whole


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    with create(tmp_path / "run"):
        pass
    other = create(tmp_path / "run", max_new_tokens=16)
    with pytest.raises(UsageError, match="another run: its max new tokens is 8, not 16"), other:
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    taken = pytest.raises(UsageError, match="not empty and holds no run")
    with taken, create(tmp_path / "mine"):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match="holds no run"):
        RunFolder.open(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with taken, create(tmp_path / "file"):
        pass


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "run" / "rows.jsonl"
    with create(tmp_path / "run") as first:
        first.append(block("a"))
        whole = file.read_bytes()
        file.write_bytes(whole[:-7])  # as another process sees it while the first appends
        before = file.stat()
        held = pytest.raises(UsageError, match="another process is working on")
        with held, create(tmp_path / "run"):
            pass
        after = file.stat()
        assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size), "it was repaired"
        file.write_bytes(whole)
    with create(tmp_path / "run") as second:  # the first has let go
        assert second.rows == block("a")


def test_a_lock_left_behind_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()
    with create(tmp_path / "run") as folder:
        assert folder.rows == []
    (tmp_path / "file").write_text("")
    with pytest.raises(HispecError, match="cannot write"), create(tmp_path / "file" / "run"):
        pass


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    with create(tmp_path / "run") as folder:
        folder.append(block("a"))
    for damaged in (b"{", b"5", b"\xff\xfe", b"{}", b"[" * 99_999, b""):
        whole = json.dumps(block("a")[0]).encode()
        (tmp_path / "run" / "rows.jsonl").write_bytes(damaged + b"\n" + whole + b"\n")
        with pytest.raises(HispecError, match=r"rows.jsonl line 1 is damaged"):
            RunFolder.open(tmp_path / "run")
    for text, words in (
        ("{", "cannot be read"),
        ("", "cannot be read"),
        ("[]", "holds no run of this version"),
        ('{"format": "hispec-bench-1"}', "run.json is damaged"),
    ):
        (tmp_path / "run" / "run.json").write_text(text)
        with pytest.raises(HispecError, match=words):
            RunFolder.open(tmp_path / "run")


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits a file's size")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with create(tmp_path / "run") as folder:
        folder.append(block("a"))
        size = (tmp_path / "run" / "rows.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, limits[1]))
        try:
            with pytest.raises(
                HispecError, match=r"rows.jsonl \(File too large\): free some room; "
            ):
                folder.append(block("b"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert folder.rows == block("a") and not folder.has_block("b", 0)
        assert (tmp_path / "run" / "rows.jsonl").stat().st_size == size
    assert RunFolder.open(tmp_path / "run").rows == block("a")
