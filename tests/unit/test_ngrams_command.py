"""``hispec ngrams``: databases from files, on the command line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hispec.cli import main
from hispec.model.checkpoint import open_checkpoint
from hispec.sources import build
from hispec.sources.corpus import Corpus
from hispec.sources.fingerprint import fingerprint
from hispec.sources.history import History
from hispec.sources.history_file import default_path
from hispec.sources.recycle import Recycle, seed_from
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


def test_successors_seed_recycling(ngrams: Any, tmp_path: Path) -> None:
    out = tmp_path / "successors"
    rows = lines(tmp_path / "answers.jsonl", [*ANSWERS, {"response_ids": [1, 5]}])
    assert ngrams("build", "--kind", "successors", "--out", out, "--data", rows)[0] == 0
    source = Recycle(300, seed_from(Store(out), 300))
    source.begin([1])
    assert {c.tokens[0] for c in source.propose((), 8)} == {2, 5}
    assert Recycle(4, seed_from(Store(out), 4))._seed.max() == 3


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
        ({"--data": "."}, 2, "is a folder"),
        ({"--longest": "9"}, 2, r"in \[1, 5\]"),
        ({"--least": "0"}, 2, "at least 1"),
        ({"--limit": "0"}, 2, "at least 1"),
        ({"--out": "a.txt/store"}, 1, "cannot be written"),
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
    options = {"--data": "a.txt", "--out": "store"} | options
    found, _, said = ngrams("build", *(word for pair in options.items() for word in pair))
    assert found == code
    assert re.search(message, said) and said.count("\n") == 1, said
    assert not (tmp_path / "store").exists()


def test_corpus_needs_a_name(ngrams: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n")
    code, _, said = ngrams("build", "--data", tmp_path / "a.txt")
    assert code == 2 and "--out is missing" in said


def test_files_that_are_none(ngrams: Any, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("no store")
    for name, message in (("a", "no n-gram store"), ("b", "Cannot read")):
        code, _, said = ngrams("info", tmp_path / name)
        assert code == 1 and message in said
