"""A run's folder: nothing is lost, nothing is counted twice, no two runs are mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hispec.bench.folder import RunFolder
from hispec.errors import HispecError, UsageError

SETTINGS = {"methods": {"ar": {}}, "max_new_tokens": 8}


def create(path: Path, **changes: Any) -> RunFolder:
    return RunFolder.create(path, {**SETTINGS, **changes}, {"date": "today"})


def block(item: str, repeat: int = 0) -> list[dict[str, Any]]:
    shared = {"item": item, "repeat": repeat, "of": 2, "text": "ä\u2028"}
    return [{**shared, "method": name} for name in ("ar", "hispec")]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = create(tmp_path / "run")
    first.append(block("a"))
    first.skip({"item": "z", "reason": "long"})
    again = create(tmp_path / "run")
    assert again.rows == block("a")
    assert again.has_block("a", 0) and not again.has_block("a", 1)
    again.append(block("a", 1))
    again.skip({"item": "z", "reason": "long"})
    assert len(RunFolder.open(tmp_path / "run").rows) == 4
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("torn", [1, 30, 70])
def test_an_unfinished_block_is_run_again(tmp_path: Path, torn: int) -> None:
    """The end of the file is cut within the second block: in its first row, or its second."""
    folder = create(tmp_path / "run")
    folder.append(block("a"))
    whole = (tmp_path / "run" / "rows.jsonl").read_bytes()
    folder.append(block("b"))
    both = (tmp_path / "run" / "rows.jsonl").read_bytes()
    (tmp_path / "run" / "rows.jsonl").write_bytes(both[:-torn])

    watched = RunFolder.open(tmp_path / "run")  # a report does not touch a run under way
    assert watched.rows == block("a")
    assert (tmp_path / "run" / "rows.jsonl").read_bytes() == both[:-torn]

    again = create(tmp_path / "run")
    assert again.rows == block("a") and not again.has_block("b", 0)
    assert (tmp_path / "run" / "rows.jsonl").read_bytes() == whole


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    create(tmp_path / "run")
    with pytest.raises(UsageError, match="another run: its max new tokens is 8, not 16"):
        create(tmp_path / "run", max_new_tokens=16)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        create(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match="holds no run"):
        RunFolder.open(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        create(tmp_path / "file")


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    first, second = create(tmp_path / "run"), create(tmp_path / "run")
    with (
        first.held(),
        pytest.raises(UsageError, match="another process is working on"),
        second.held(),
    ):
        pass
    with second.held():  # the first has let go
        pass


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    folder = create(tmp_path / "run")
    folder.append(block("a"))
    (tmp_path / "run" / "rows.jsonl").write_text("{\n" + json.dumps(block("a")[0]) + "\n")
    with pytest.raises(HispecError, match=r"rows.jsonl line 1 is damaged"):
        RunFolder.open(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(HispecError, match=r"run.json cannot be read"):
        RunFolder.open(tmp_path / "run")
