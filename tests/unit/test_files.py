"""Files appear whole or not at all; what a disk refuses is one sentence."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hispec.files import WriteError, append_whole, disk_errors, replacing, write_whole

ROOT = Path(__file__).parents[2]


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Inside, no file gets larger: writing fails after a part of it, as on a disk that fills."""
    resource = pytest.importorskip("resource", reason="limits a file's size")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("content", ["ä\n", b"\xff\r\n", ""])
def test_a_file_and_its_folders(tmp_path: Path, content: str | bytes, sync: bool) -> None:
    path = tmp_path / "a" / "b" / "file"
    for _ in range(2):
        write_whole(path, content, sync=sync)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert list(path.parent.iterdir()) == [path]


def test_anybody_reads_it_whom_the_umask_lets(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o002, 0o664), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write_whole(tmp_path / "a", "text")
            with replacing(tmp_path / "b") as temporary:
                temporary.unlink()  # as safetensors does, with a file of its own
                os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        finally:
            os.umask(before)
        assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [mode] * 2


def test_what_goes_wrong_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with at_most(100), pytest.raises(WriteError, match=f"cannot write {path} .File too large"):
        write_whole(path, "x" * 1000)
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), replacing(path) as temporary:
            temporary.write_text("half")
            raise error
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_when_the_system_writes(tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError) as caught:
        write_whole(tmp_path / "file", "text", sync=True)
    wanted = f"cannot write {tmp_path / 'file'} (No space left on device): free some room, or name"
    assert str(caught.value) == f"{wanted} another place." and caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".file.part").write_text("longer than the text")
    with replacing(tmp_path / "file", alone=True) as temporary:
        temporary.write_text("text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "text"


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hispec.files import write_whole\n"
        "for _ in range(300): write_whole(Path(sys.argv[1]), sys.argv[2] * 9999)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    running = [subprocess.Popen([*command, letter], cwd=ROOT) for letter in "ab"]
    assert [process.wait(60) for process in running] == [0, 0]
    assert set((tmp_path / "file").read_text()) in ({"a"}, {"b"})
    assert len(list(tmp_path.iterdir())) == 1


def test_only_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "folder", tmp_path / "pipe", Path("/dev/full")):
        before = path.stat()
        with pytest.raises(WriteError, match="it is no plain file"):
            write_whole(path, "text")
        assert path.stat().st_ino == before.st_ino
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"\): name another place"):
        write_whole(tmp_path / "file" / "below", "text")


def test_rows_are_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    append_whole(path, "one\n")
    append_whole(path, "zwölf\n", sync=True)
    before = path.read_bytes()
    assert before.decode() == "one\nzwölf\n"
    failed = pytest.raises(WriteError, match=r"\(File too large\): clean up\.$")
    with at_most(50), failed, disk_errors(path, "clean up"):
        append_whole(path, "x" * 100)
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="No space left"):
        append_whole(Path("/dev/full"), "text")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_an_output_that_is_full_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hispec.cli", "--version"],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("hispec: cannot write the output (No space left on device)")
    assert done.stderr.count("\n") == 1
