"""The history database: what it learns, and its file under kills, rivals and bad luck."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hispec.sources import history, history_file
from hispec.sources.fingerprint import DatabaseError
from hispec.sources.history import History
from hispec.sources.history_file import add_records, add_texts, grown, reading, records_of
from hispec.sources.ngrams import Counts, Records, count, keys_of
from hispec.sources.store import Store, write

ROOT = Path(__file__).parents[2]
V = 100


def told(source: History, output: list[int], prompt: tuple[int, ...] = (50, 51)) -> None:
    """One text from beginning to end."""
    source.begin(prompt)
    for token in output:
        source.commit([token])
    source.end()


def next_ids(source: History, *text: int) -> list[int]:
    source.begin(text)
    return list(dict.fromkeys(c.tokens[0] for c in source.propose((), 4)))


def texts(seed: int, n: int = 20) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(7) for _ in range(draw.randrange(2, 30))] for _ in range(n)]


def known(path: Path) -> Records:
    with reading(path, "t") as file:
        return records_of(file)


def assert_same(found: Records, wanted: Records) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one, other)


def test_outputs_are_learned_and_prompts_are_not(tmp_path: Path) -> None:
    source = History(tmp_path / "h", "t", V)
    told(source, [1, 2, 3], prompt=(7, 8, 9))
    assert next_ids(source, 1) == [2]
    assert next_ids(source, 7) == []
    assert next_ids(source, 9) == [], "the prompt's end is no key either"
    source.begin([1])
    assert source.propose((2,), 4)[0].tokens == [3]
    assert source.propose((2,), 0) == []


def test_another_process_finds_it(tmp_path: Path) -> None:
    one = History(tmp_path / "h", "t", V)
    told(one, [1, 2, 3])
    other = History(tmp_path / "h", "t", V)
    assert next_ids(other, 2) == [3]
    told(one, [1, 5, 6])
    told(other, [3, 3])  # its end is when it looks
    assert next_ids(other, 5) == [6]


def test_counting_changes_nothing_but_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = texts(0)
    lazy = History(tmp_path / "lazy", "t", V)
    rival = History(tmp_path / "eager", "t", V)
    rival.begin([1])
    for output in outputs:
        told(lazy, output)
    monkeypatch.setattr(history_file, "PENDING", 40)
    eager = History(tmp_path / "eager", "t", V)
    for output in outputs:
        told(eager, output)
    told(rival, outputs[0])
    told(lazy, outputs[0])
    told(eager, [1, 1])
    told(lazy, [1, 1])
    with reading(tmp_path / "eager") as file:
        assert history_file.generation(file) > 2
    for key in {
        k for o in outputs for i in range(1, len(o)) for k in keys_of(o[max(i - 5, 0) : i])
    }:
        assert eager._rows.row(key, 8) == lazy._rows.row(key, 8)
    assert_same(known(tmp_path / "eager"), known(tmp_path / "lazy"))
    told(rival, [1, 1])
    assert next_ids(rival, 1, 1) == next_ids(History(tmp_path / "eager", "t", V), 1, 1)


def test_old_counts_are_halved_when_there_are_too_many() -> None:
    often, once, new = [[1, 2]] * 9, [[3, 4]], [[5, 6]]
    found = Counts.of(grown(count(often + once), count(new), most=2))
    assert found.row(keys_of([1])[0]) == ([2], [4], 4, 1)
    assert found.row(keys_of([3])[0]) is None
    assert found.row(keys_of([5])[0]) == ([6], [1], 1, 1)
    assert len(grown(count(texts(0)), count(texts(1)), most=50).keys) <= 50


def test_memory_is_bounded_where_nothing_can_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "PENDING", 50)
    source = History(None, "t", V)
    for output in texts(0, 50):
        told(source, output)
    assert source._own_tokens <= 80
    wanted = Counts.of(count(texts(0, 50)))
    for key in wanted.keys.tolist():
        assert source._rows.row(key, 8)[:3] == wanted.row(key)[:3]
    source.reset()
    assert next_ids(source, 1) == []


def test_reset_unlearns_and_saves_no_more(tmp_path: Path) -> None:
    add_texts(tmp_path / "h", "t", [[1, 2, 3]])
    before = (tmp_path / "h").read_bytes()
    source = History(tmp_path / "h", "t", V)
    source.reset()
    told(source, [1, 7, 7, 7])
    assert set(next_ids(source, 1)) == {2, 7}
    source.reset()
    assert next_ids(source, 1) == [2]
    for unlearned in ([1, 7], [7], [7, 7]):
        assert source._rows.row(keys_of(unlearned)[-1], 8) is None
    assert (tmp_path / "h").read_bytes() == before


def test_delivered_counts_lie_below(tmp_path: Path) -> None:
    write(tmp_path / "base", Counts.of(count([[1, 2, 3]] * 4)), {"tokenizer": "t"})
    source = History(tmp_path / "h", "t", V, base=Store(tmp_path / "base", "t"))
    assert next_ids(source, 1) == [2]
    told(source, [1, 9])
    assert next_ids(source, 1) == [2, 9]
    source.reset()
    assert_same(known(tmp_path / "h"), count([[1, 9]]))


def test_ids_past_the_vocabulary_are_never_proposed(tmp_path: Path) -> None:
    add_texts(tmp_path / "h", "t", [[1, 100, 3]])
    assert next_ids(History(tmp_path / "h", "t", V), 1) == []


# -- the file --

WRITER = """
import sys
from pathlib import Path
from hispec.sources import history_file
history_file.PENDING = 64
history_file.MAX_RECORDS = 10 ** 9
name, number = Path(sys.argv[1]), int(sys.argv[2])
for i in range(int(sys.argv[3])):
    history_file.add_texts(name, "t", [[number, i % 7, number, i % 5, 3]])
    print(i, flush=True)
"""


def writer(path: Path, number: int, times: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(number), str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def written(number: int, times: int) -> list[list[int]]:
    return [[number, i % 7, number, i % 5, 3] for i in range(times)]


def test_two_processes_at_once(tmp_path: Path) -> None:
    both = [writer(tmp_path / "h", number, 60) for number in (20, 30)]
    for process in both:
        process.communicate(timeout=100)
        assert process.returncode == 0
    assert_same(known(tmp_path / "h"), count(written(20, 60) + written(30, 60)))


@pytest.mark.parametrize("seed", range(5))
def test_killed_while_writing(tmp_path: Path, seed: int) -> None:
    process = writer(tmp_path / "h", 20, 100_000)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 5 * seed:
        pass
    time.sleep(random.Random(seed).random() / 50)
    process.send_signal(signal.SIGKILL)
    told_of = [int(line) for line in process.stdout.read().split()]
    process.wait()
    process.stdout.close()
    finished = told_of[-1] + 1 if told_of else 5 * seed + 1
    found = known(tmp_path / "h")
    # what was under way may have been saved before it could be told
    options = [count(written(20, n)) for n in (finished, finished + 1)]
    assert any(all(map(np.array_equal, found, wanted)) for wanted in options)
    told(History(tmp_path / "h", "t", V), [1, 2])  # and it goes on


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    add_texts(tmp_path / "h", "t", [[1, 2]])
    with pytest.raises(DatabaseError, match="another tokenizer"):
        History(tmp_path / "h", "u", V).begin([1])
    with pytest.raises(DatabaseError, match="another tokenizer"):
        add_texts(tmp_path / "h", "u", [[1, 2]])


def test_foreign_and_truncated_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a text that is no database, long enough to be looked at" * 20)
    other = sqlite3.connect(tmp_path / "other")
    other.execute("create table t (x)")
    other.commit()
    other.close()
    add_texts(tmp_path / "cut", "t", texts(0, 200))
    whole = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "other", "cut"):
        with pytest.raises(DatabaseError, match="no history of hispec"):
            History(tmp_path / name, "t", V).begin([1])
        with pytest.raises(DatabaseError, match="no history of hispec"):
            known(tmp_path / name)


def test_columns_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    add_records(tmp_path / "h", "t", count(texts(0)))
    file = sqlite3.connect(tmp_path / "h")
    (starts,) = file.execute("select starts from counts").fetchone()
    file.execute("update counts set starts = ?", (starts[:-8],))
    file.commit()
    file.close()
    with pytest.raises(DatabaseError, match="do not fit each other"):
        History(tmp_path / "h", "t", V).begin([1])


def test_read_only_folder_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    source = History(tmp_path / "file" / "h", "t", V)
    told(source, [1, 2, 3])
    told(source, [1, 2, 4])
    assert next_ids(source, 1) == [2]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "not kept beyond this process" in said


def test_file_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_texts(tmp_path / "h", "t", [[1, 2]])
    connect = sqlite3.connect

    def read_only(address: str, **options: Any) -> sqlite3.Connection:
        return connect(address.replace("mode=rwc", "mode=ro"), **options)

    monkeypatch.setattr(sqlite3, "connect", read_only)
    source = History(tmp_path / "h", "t", V)
    told(source, [1, 3])
    told(source, [1, 3])
    assert next_ids(source, 1) == [3, 2]
    assert capsys.readouterr().err.count("readonly database") == 1


def test_merging_histories(tmp_path: Path) -> None:
    add_texts(tmp_path / "a", "t", texts(1))
    add_records(tmp_path / "b", "t", known(tmp_path / "a"))
    add_texts(tmp_path / "b", "t", texts(2))
    assert_same(known(tmp_path / "b"), count(texts(1) + texts(2)))
