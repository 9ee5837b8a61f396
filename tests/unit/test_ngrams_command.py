"""``hispec ngrams``: databases from files, on the command line."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hispec.cli import main
from hispec.model.checkpoint import open_checkpoint
from hispec.sources import build
from hispec.sources.corpus import Corpus
from hispec.sources.fingerprint import fingerprint
from hispec.sources.history import History
from hispec.sources.history_file import add_texts, default_path, reading, records_of, waiting
from hispec.sources.ngrams import COLUMNS, count
from hispec.sources.store import Store

ANSWERS = [{"prompt_ids": [9, 9, 9], "response_ids": [1, 2, 3, 4]} for _ in range(3)]


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def ngrams(
    tiny_llama: Path, cache_home: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs ``hispec ngrams``: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        model = ["--model", str(tiny_llama)] if arguments[0] == "build" else []
        command, *rest = map(str, arguments)
        code = main(["ngrams", command, *model, *rest])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_corpus_of_text_files(ngrams: Any, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 50)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("the dog sat on the mat\n" * 50)
    rows = lines(tmp_path / "c.jsonl", [{"text": "the cow"}, {"messages": [{"content": "the"}]}])
    out = tmp_path / "corpus"
    data = [tmp_path / "a.txt", tmp_path / "b.txt.gz", rows]
    code, said, _ = ngrams("build", "--out", out, "--json", "--data", *data)
    facts = json.loads(said.splitlines()[-1])
    assert code == 0 and facts["kind"] == "corpus" and facts["num_texts"] == 4
    tokenizer = open_checkpoint(tiny_llama).tokenizer
    source = Corpus(Store(out, fingerprint(tokenizer)), len(tokenizer))
    source.begin(tokenizer("sat on", add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(source.propose((), 8)[0].tokens).startswith(" the")


def test_history_joins_what_the_model_keeps(ngrams: Any, tiny_llama: Path, tmp_path: Path) -> None:
    rows = lines(tmp_path / "answers.jsonl", ANSWERS)
    for _ in range(2):
        code, _, said = ngrams("build", "--kind", "history", "--data", rows)
        assert code == 0 and "12 tokens of 3 texts" in said
    checkpoint = open_checkpoint(tiny_llama)
    path = default_path(checkpoint.fingerprint)
    source = History(path, fingerprint(checkpoint.tokenizer), 300)
    source.begin([1])
    assert source.propose((), 3)[0].tokens == [2, 3, 4]
    source.begin([9])
    assert source.propose((), 3) == [], "prompts are not learned"
    _, said, _ = ngrams("info", path, "--json")
    assert json.loads(said.splitlines()[-1])[0]["successors"] == 6
    assert {p.name for p in path.parent.iterdir()} == {path.name}


def test_answers_of_generate(ngrams: Any, tiny_llama: Path, tmp_path: Path) -> None:
    prompts = [{"turns": ["one", "and two"]}, {"prompt": ""}, {"prompt": "three"}]
    source = lines(tmp_path / "prompts.jsonl", prompts)
    for name, options in (
        ("turns", []),
        ("samples", ["--n", "2", "--temperature", "1", "--seed", "1"]),
    ):
        out = tmp_path / f"{name}.jsonl"
        model = ["--model", str(tiny_llama), "--dtype", "fp32", "--device", "cpu"]
        length = ["--min-new-tokens", "6", "--max-new-tokens", "6"]
        main(["generate", *model, "--prompts", source, "--out", str(out), *length, *options])
        assert f'"{name}": [' in out.read_text()
    data = [tmp_path / "turns.jsonl", tmp_path / "samples.jsonl"]
    for kind in ("history", "corpus"):
        arguments = ["--kind", kind, "--least", "1", "--out", tmp_path / kind, "--json", "--data"]
        code, said, error = ngrams("build", *arguments, *data)
        facts = json.loads(said.splitlines()[-1])
        assert code == 0, error
        if kind == "history":  # a text of odd tokens may be empty
            assert facts["num_texts"] == 3 + 2, "two turns and an answer, two samples"
        # A prompt of turns has no samples yet, and an empty one never has.
        assert "3 rows hold an error and were left out" in error


def test_messages_without_content(ngrams: Any, tmp_path: Path) -> None:
    messages = [{"role": "assistant", "content": None}, {"role": "assistant", "content": "yes"}]
    rows = lines(tmp_path / "a.jsonl", [{"messages": messages}])
    counted = {}
    for name, text in (("a", rows), ("b", lines(tmp_path / "b.jsonl", [{"response": "\nyes"}]))):
        assert (
            ngrams("build", "--kind", "history", "--out", tmp_path / name, "--data", text)[0] == 0
        )
        counted[name] = Store(tmp_path / name).counts.keys.tolist()
    assert counted["a"] == counted["b"]


def test_merging_histories_replaces_what_was_there(ngrams: Any, tmp_path: Path) -> None:
    for name, ids in (("a", [1, 2, 3]), ("b", [1, 2, 4]), ("c", [7, 8, 9])):
        add_texts(tmp_path / name, "t", [ids])
    out = tmp_path / "c"
    for _ in range(2):
        assert ngrams("merge", tmp_path / "a", tmp_path / "b", "--out", out)[0] == 0
        with reading(out) as file:
            assert waiting(file) == []
            found = records_of(file)
        wanted = count([[1, 2, 3], [1, 2, 4]])
        assert all(map(np.array_equal, found, wanted))


def test_histories_of_two_tokenizers_are_not_merged(ngrams: Any, tmp_path: Path) -> None:
    for name in ("t", "u"):
        add_texts(tmp_path / name, name, [[1, 2]])
    code, _, said = ngrams("merge", tmp_path / "t", tmp_path / "u", "--out", tmp_path / "c")
    assert code == 1 and "another tokenizer" in said and not (tmp_path / "c").exists()


def test_a_folder_is_no_database(ngrams: Any, tmp_path: Path) -> None:
    rows = lines(tmp_path / "answers.jsonl", ANSWERS)
    assert ngrams("build", "--out", tmp_path / "a", "--data", rows, "--kind", "history")[0] == 0
    (tmp_path / "out").mkdir()
    build = ["build", "--kind", "history", "--data", tmp_path / "answers.jsonl"]
    for arguments in (build, ["merge", tmp_path / "a"]):
        code, _, said = ngrams(*arguments, "--out", tmp_path / "out")
        assert code == 2 and "is a folder" in said and said.count("\n") == 1
    assert not list(tmp_path.glob(".*")), "it was noticed after counting"


def test_a_full_disk_is_one_sentence(
    ngrams: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource", reason="limits a file's size")
    draw = random.Random(0)
    data = [{"response_ids": [draw.randrange(200) for _ in range(3000)]}]
    rows = lines(tmp_path / "answers.jsonl", data)
    arguments = ["build", "--kind", "history", "--data", rows, "--out", tmp_path / "out"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (4_000, 60_000):  # in a run, and in the store made of runs
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            code, _, said = ngrams(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code == 1 and said.count("\n") == 1
        assert f"cannot write {tmp_path / 'out'} (File too large)" in said
    code, _, said = ngrams(*arguments)
    assert code == 0, said
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))
    try:
        code, _, said = ngrams("merge", tmp_path / "out", "--out", tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and f"cannot write {tmp_path / 'merged'} (File too large)" in said


def test_a_full_disk_asks_for_room(
    ngrams: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "count_each", full)
    rows = lines(tmp_path / "answers.jsonl", ANSWERS)
    code, _, said = ngrams("build", "--out", tmp_path / "out", "--data", rows, "--kind", "history")
    assert code == 1 and "(No space left on device): free some room" in said


def test_merging(ngrams: Any, tmp_path: Path) -> None:
    for name, ids in (("a", [1, 2]), ("b", [1, 3])):
        rows = lines(tmp_path / f"{name}.jsonl", [{"response_ids": ids}])
        ngrams("build", "--kind", "history", "--out", tmp_path / name, "--data", rows)
    code, said, _ = ngrams(
        "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c", "--json"
    )
    facts = json.loads(said)
    assert (code, facts["successors"], facts["num_texts"], facts["kind"]) == (0, 2, 2, "history")
    code, _, said = ngrams("merge", tmp_path / "a", "--out", tmp_path / "a")
    assert code == 2 and "one of the files" in said


def test_an_interrupted_build_goes_on(
    ngrams: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "RUN_TOKENS", 1000)
    rows = [{"response_ids": [i % 50, i % 30, i % 20, 7]} for i in range(3000)]
    data = lines(tmp_path / "answers.jsonl", rows)
    arguments = ["build", "--kind", "history", "--data", data, "--out"]
    add, calls = build.Builder.add, []

    def fails(self: Any, *given: Any) -> None:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        add(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(build.Builder, "add", fails)
        assert ngrams(*arguments, tmp_path / "a")[0] == 130
    code, _, said = ngrams(*arguments, tmp_path / "a")
    assert code == 0 and "Going on after" in said
    ngrams(*arguments, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"--data": "missing.txt"}, 2, "there is no file"),
        ({"--data": "empty.txt"}, 1, "no text to count"),
        ({"--data": "bytes.txt"}, 2, "not UTF-8"),
        ({"--data": "broken.jsonl"}, 2, "line 2 is not JSON"),
        ({"--data": "fields.jsonl"}, 2, "has none of text"),
        ({"--data": "half.jsonl"}, 2, r"half.jsonl line 2: a text has \\ud800, half of a"),
        ({"--data": "chat.jsonl"}, 2, "chat.jsonl line 1: messages should be objects, got 'hi'"),
        ({"--data": "ids.jsonl", "--kind": "history"}, 2, "ids.jsonl line 1: .*token ids, got 'a'"),
        ({"--data": "below.jsonl", "--kind": "history"}, 2, "line 1: token_ids .* got '-1'"),
        ({"--data": "plain.jsonl.gz"}, 2, "cannot read .*: Not a gzipped file"),
        ({"--data": "torn.jsonl.gz"}, 2, "cannot read .*: Compressed file ended"),
        ({"--data": "flipped.jsonl.gz"}, 2, "cannot read .*: Error -3"),
        ({"--data": "flipped.txt.gz"}, 2, "cannot read .*: Error -3"),
        ({"--kind": "successors"}, 2, "invalid choice"),
        ({"--data": "."}, 2, "is a folder"),
        ({"--longest": "9"}, 2, r"in \[1, 5\]"),
        ({"--least": "0"}, 2, "at least 1"),
        ({"--limit": "0"}, 2, "at least 1"),
        ({"--out": "a.txt/store"}, 1, "cannot write"),
        ({"--model": "nowhere/at/all"}, 1, "no folder"),
    ],
)
def test_bad_input(
    ngrams: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    code: int,
    message: str,
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text":\n')
    (tmp_path / "fields.jsonl").write_text('{"words": "a"}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "a\\ud800"}\n')
    (tmp_path / "chat.jsonl").write_text('{"messages": ["hi"]}\n')
    (tmp_path / "ids.jsonl").write_text('{"response_ids": [1, "a"]}\n')
    (tmp_path / "below.jsonl").write_text('{"token_ids": [-1]}\n')
    whole = gzip.compress(b'{"text": "some text"}\n' * 9)
    (tmp_path / "plain.jsonl.gz").write_text('{"text": "a"}\n')
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[:-12])
    for name in ("flipped.jsonl.gz", "flipped.txt.gz"):
        (tmp_path / name).write_bytes(whole[:10] + b"\xff" + whole[11:])
    options = {"--data": "a.txt", "--out": "store"} | options
    found, _, said = ngrams("build", *(word for pair in options.items() for word in pair))
    assert found == code
    assert re.search(message, said) and said.count("\n") == 1, said
    assert not (tmp_path / "store").exists()


def test_corpus_needs_a_name(ngrams: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n")
    code, _, said = ngrams("build", "--data", tmp_path / "a.txt")
    assert code == 2 and "--out is missing" in said


def test_a_device_is_not_replaced(ngrams: Any, tmp_path: Path) -> None:
    rows = lines(tmp_path / "answers.jsonl", ANSWERS)
    os.mkfifo(tmp_path / "pipe")
    given = ["--kind", "history", "--data", rows, "--out", tmp_path / "pipe"]
    code, _, said = ngrams("build", *given)
    assert code == 1 and "pipe (it is no plain file): name another place" in said
    assert (tmp_path / "pipe").is_fifo()


def test_files_that_are_none(ngrams: Any, tmp_path: Path) -> None:
    rows = lines(tmp_path / "answers.jsonl", ANSWERS)
    ngrams("build", "--kind", "history", "--data", rows, "--out", tmp_path / "store")
    store = (tmp_path / "store").read_bytes()
    add_texts(tmp_path / "texts", "t", [[1, 2]])
    texts = (tmp_path / "texts").read_bytes()
    for name, content, message in (
        ("text", b"no store", "no n-gram store"),
        ("empty", b"", "no n-gram store"),
        ("list", (9).to_bytes(8, "little") + b"[1, 2, 3]", "no n-gram store"),
        ("torn", store[:-9], "truncated or damaged"),
        ("head", store[:40], "beginning is damaged"),
        ("number", store.replace(b'"num_texts":"3"', b'"num_texts":"x"'), "truncated or damaged"),
        ("sqlite", b"SQLite", "no history of hispec or damaged"),
        ("cut", texts[:5000], "damaged"),
        ("other", sqlite_file(tmp_path / "a", "create table t (x)"), "no history of hispec"),
        ("bare", sqlite_file(tmp_path / "b", *WITHOUT_COUNTS), "a row is missing"),
        (
            "short",
            sqlite_file(tmp_path / "texts", "insert into texts (tokens) values ('abc')"),
            "an array is cut short",
        ),
    ):
        (tmp_path / name).write_bytes(content)
        code, _, said = ngrams("info", tmp_path / name)
        assert code == 1 and message in said and said.count("\n") == 1, (name, said)
    for path in (tmp_path, tmp_path / "nothing"):
        code, _, said = ngrams("info", path)
        assert code == 1 and "Cannot read" in said


WITHOUT_COUNTS = (
    "create table facts (name, value)",
    "insert into facts values ('format', 'hispec-history-1'), ('tokenizer', 't')",
    f"create table counts (generation, {', '.join(COLUMNS)})",
    "create table texts (id, tokens)",
)


def sqlite_file(path: Path, *statements: str) -> bytes:
    """A database as these statements leave it."""
    file = sqlite3.connect(path)
    for statement in statements:
        file.execute(statement)
    file.commit()
    file.close()
    return path.read_bytes()
