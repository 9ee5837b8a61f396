"""Many prompts from a file: order, bad rows, resuming after a kill."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hispec import answers
from hispec.cli import main
from hispec.files import append_whole

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tiny_llama: Path) -> Path:
    return tiny_llama


def prompts(path: Path, count: int) -> Path:
    rows = [{"prompt": f"Number {i}, and what comes after {i * 7}?"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    return [
        *("generate", "--model", str(model), "--prompts", str(prompts), "--out", str(out)),
        *("--max-new-tokens", "8", "--dtype", "fp32", "--device", "cpu", *more),
    ]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_in_order(folder: Path, tmp_path: Path, capsys) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text(
        '{"prompt": "one", "id": "a"}\n'
        '{"messages": [{"role": "user", "content": "two"}]}\n'
        '{"turns": ["three", "and four"], "category": "writing"}\n'
        '{"prompt_ids": [3, 4, 5]}\n'
    )
    out = tmp_path / "answers.jsonl"
    assert main(command(folder, source, out, "--json")) == 0
    rows = lines(out)
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["id"] == "a" and rows[0]["num_tokens"] == len(rows[0]["token_ids"]) == 8
    assert len(rows[2]["turns"]) == 2
    assert rows[2]["turns"][1]["num_prompt_tokens"] > rows[2]["turns"][0]["num_prompt_tokens"] + 8
    assert rows[3]["num_prompt_tokens"] == 3
    totals = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (totals["rows"], totals["answered"], totals["failed"]) == (4, 4, [])
    assert totals["num_generation_tokens"] == 40
    header, *stats = lines(tmp_path / "answers.jsonl.stats.jsonl")
    assert header["max_new_tokens"] == 8
    assert [entry["line"] for entry in stats] == [1, 2, 3, 4]
    assert stats[0]["metrics"][0]["num_generation_tokens"] == 8


def test_bad_rows_are_named_and_the_others_answered(folder, tmp_path, capsys) -> None:
    source = tmp_path / "prompts.jsonl"
    long = json.dumps({"prompt": "x" * 2000})
    source.write_bytes(
        b'{"prompt": "fine"}\n'
        b"\n"
        b'{"prompt": "torn\n'
        b"[1, 2]\n"
        b'{"prompt": ""}\n'
        b'{"question": "what?"}\n'
        b'{"prompt": "\xff"}\n' + long.encode() + b"\n"
        b'{"prompt": "fine, too"}'
    )
    out = tmp_path / "answers.jsonl"
    assert main(command(folder, source, out)) == 1
    rows = lines(out)
    assert [row["line"] for row in rows] == list(range(1, 10))
    assert [row["line"] for row in rows if "error" not in row] == [1, 9]
    said = capsys.readouterr().err
    for number, why in (
        (2, "empty"), (3, "JSON"), (4, "object"), (5, "prompt"), (6, "question"), (7, "UTF-8"),
        (8, "context"),
    ):  # fmt: skip
        assert f"line {number}: " in said and why in rows[number - 1]["error"]


def test_rows_that_are_no_text(folder, tmp_path, capsys) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text(
        '{"messages": [{"role": "user", "content": null}]}\n'
        '{"prompt": "\\ud83d"}\n'
        '{"messages": [{"role": "user", "content": "\\ud83d"}], "id": "\\ude00"}\n'
        '{"\\ud83d": "what?"}\n'
        '{"prompt": "fine"}\n'
    )
    out = tmp_path / "answers.jsonl"
    assert main(command(folder, source, out)) == 1
    rows = lines(out)
    assert [row["line"] for row in rows if "error" not in row] == [5]
    assert "content" in rows[0]["error"]
    assert all("surrogate" in row["error"] for row in rows[1:4])
    said = capsys.readouterr().err
    assert all(f"line {number}: " in said for number in range(1, 5))


def test_a_file_from_windows(folder, tmp_path, capsys) -> None:
    source, plain = tmp_path / "prompts.jsonl", prompts(tmp_path / "plain.jsonl", 2)
    source.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    assert main(command(folder, source, tmp_path / "a")) == 0, capsys.readouterr().err
    assert main(command(folder, plain, tmp_path / "b")) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"prompt,category\nhello,chat\n" * 99, "Line 1: not JSON"),
        (b'[{"prompt": "hi"}]\n', "Line 1: not an object"),
        ('{"prompt": "hi"}\n'.encode("utf-16"), "Line 1: not UTF-8"),
        (b"\x1f\x8b\x08\x00\xff", "Line 1: not UTF-8"),
        (b"\xef\xbb\xbf", "has no prompts.\n"),
        (b"\r\n\n", "has no prompts.\n"),
        (b'\n{"Prompt": "hi"}\n', "Line 2: a prompt has one of"),
    ],
)
def test_a_file_without_prompts_needs_no_model(tmp_path, capsys, content, why) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(content)
    assert main(command(tmp_path / "no model", source, tmp_path / "answers")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hispec: {source} has no prompts.") and why in said
    assert said.count("\n") == 1 and not (tmp_path / "answers").exists()


def test_a_device_keeps_no_answers(tmp_path, capsys) -> None:
    source = prompts(tmp_path / "prompts.jsonl", 1)
    os.mkfifo(tmp_path / "pipe")
    for out in (Path("/dev/full"), tmp_path / "pipe"):
        assert main(command(tmp_path / "no model", source, out)) == 2
        assert f"{out} is a device or a pipe" in capsys.readouterr().err


def test_a_full_disk_keeps_the_answers_before(folder, tmp_path, capsys, monkeypatch) -> None:
    source, out = prompts(tmp_path / "prompts.jsonl", 4), tmp_path / "answers.jsonl"
    assert main(command(folder, source, tmp_path / "whole.jsonl")) == 0
    wanted = (tmp_path / "whole.jsonl").read_bytes()
    calls = []

    def append(path: Path, text: str) -> None:
        calls.append(path)
        if len(calls) == 7:  # the header, two prompts with their counts, the counts of the third
            raise OSError(errno.ENOSPC, "No space left on device")
        append_whole(path, text)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(answers, "append_whole", append)
        assert main(command(folder, source, out)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"hispec: cannot write {out} (No space left on device): 2 of 4 prompts")
    assert wanted.startswith(out.read_bytes()) and out.read_bytes().count(b"\n") == 2
    assert main(command(folder, source, out)) == 0
    assert out.read_bytes() == wanted
    stats = lines(tmp_path / "answers.jsonl.stats.jsonl")
    assert [entry["line"] for entry in stats[1:]] == [1, 2, 3, 4]


def test_gzipped_prompts(folder, tmp_path, capsys) -> None:
    source, packed = prompts(tmp_path / "prompts.jsonl", 2), tmp_path / "prompts.jsonl.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    assert main(command(folder, source, tmp_path / "a")) == 0
    assert main(command(folder, packed, tmp_path / "b")) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    capsys.readouterr()
    whole = packed.read_bytes()
    for damaged in (source.read_bytes(), whole[:-12], whole[:10] + b"\xff" + whole[11:]):
        packed.write_bytes(damaged)
        assert main(command(folder, packed, tmp_path / "c")) == 2
        said = capsys.readouterr().err
        assert "cannot read" in said and said.count("\n") == 1


@pytest.mark.parametrize("sampling", [(), ("--temperature", "1.0", "--seed", "7", "--n", "2")])
def test_a_resumed_run_ends_with_the_same_file(folder, tmp_path, sampling) -> None:
    source = prompts(tmp_path / "prompts.jsonl", 6)
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert main(command(folder, source, whole, *sampling)) == 0
    wanted = whole.read_bytes()
    stats = (tmp_path / "whole.jsonl.stats.jsonl").read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(wanted) if byte == 10)]
    for rows, tail in ((0, 20), (2, 0), (3, 35), (6, 0)):
        torn.write_bytes(wanted[: starts[rows] + tail])
        kept = b"".join(line + b"\n" for line in stats.split(b"\n")[: rows + 1])
        (tmp_path / "torn.jsonl.stats.jsonl").write_bytes(kept + b'{"line"'[: 2 * tail])
        # in exact numerics another hierarchy goes on with the same text
        more = ("--hierarchy", "layerskip-paper") if rows == 2 else ()
        assert main(command(folder, source, torn, *sampling, *more)) == 0
        assert torn.read_bytes() == wanted
        found = lines(tmp_path / "torn.jsonl.stats.jsonl")
        assert [entry["line"] for entry in found[1:]] == [1, 2, 3, 4, 5, 6]


def test_killed_half_way(folder: Path, tmp_path: Path) -> None:
    source = prompts(tmp_path / "prompts.jsonl", 24)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    options = ("--temperature", "0.8", "--seed", "3", "--max-new-tokens", "24")
    assert main(command(folder, source, whole, *options)) == 0
    run = [sys.executable, "-m", "hispec.cli", *command(folder, source, killed, *options)]
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(run, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE)
        before = killed.stat().st_size if killed.exists() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if killed.exists() and killed.stat().st_size > before + 1000:
                process.send_signal(number)
                break
            time.sleep(0.001)
        _, said = process.communicate()
        assert process.returncode in (-9, 143, 0), said
    assert killed.stat().st_size < whole.stat().st_size, "it was not stopped in time"
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "rows were there" in done.stderr, done.stderr
    assert killed.read_bytes() == whole.read_bytes()


def test_a_drawn_seed_is_gone_on_with(folder: Path, tmp_path: Path) -> None:
    source, out = prompts(tmp_path / "prompts.jsonl", 4), tmp_path / "answers.jsonl"
    options = ("--temperature", "1")
    assert main(command(folder, source, out, *options)) == 0
    wanted = out.read_bytes()
    out.write_bytes(wanted[: wanted.index(b"\n") + 1])
    assert main(command(folder, source, out, *options)) == 0
    assert out.read_bytes() == wanted
    assert len({row["seed"] for row in lines(out)}) == 4  # each row has noise of its own


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--temperature", "0.5", "--seed", "1"), ("temperature", "--out")),
        (("--max-new-tokens", "9"), ("max_new_tokens=8, not 9",)),
        (("--stop", "x"), ("stop",)),
        (("--raw",), ("raw",)),
    ],
)
def test_other_settings_do_not_go_on(folder, tmp_path, capsys, options, words) -> None:
    source, out = prompts(tmp_path / "prompts.jsonl", 2), tmp_path / "answers.jsonl"
    assert main(command(folder, source, out)) == 0
    before = out.read_bytes()
    assert main(command(folder, source, out, *options)) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and out.read_bytes() == before


def test_files_that_cannot_be(folder: Path, tmp_path: Path, capsys) -> None:
    source = prompts(tmp_path / "prompts.jsonl", 1)
    other = tmp_path / "notes.txt"
    other.write_text("my notes\n")
    (tmp_path / "nothing.jsonl").write_text("")
    for arguments, word in (
        (command(folder, source, other), "holds no answers"),
        (command(folder, source, tmp_path / "no" / "answers"), "no folder"),
        (command(folder, tmp_path / "none.jsonl", tmp_path / "a"), "cannot read"),
        (command(folder, tmp_path / "nothing.jsonl", tmp_path / "a"), "no prompts"),
        (command(folder, source, source), "other rows"),
        (command(folder, source, tmp_path / "a")[:5], "--out"),
    ):
        assert main(arguments) == 2
        assert word in capsys.readouterr().err
    assert other.read_text() == "my notes\n"
    assert source.read_text().startswith('{"prompt"')


def test_what_cannot_be_written_is_said_before_a_model_is_loaded(tmp_path: Path, capsys) -> None:
    source = prompts(tmp_path / "prompts.jsonl", 1)
    model = tmp_path / "no model"
    (tmp_path / "a").symlink_to(tmp_path / "nowhere" / "a")
    (tmp_path / "b.stats.jsonl").mkdir()
    for name in ("a", "b"):
        assert main(command(model, source, tmp_path / name)) == 2
        said = capsys.readouterr().err
        assert "cannot write" in said and said.count("\n") == 1
    before = {path.name for path in tmp_path.iterdir()}
    assert main(command(model, source, tmp_path / "c")) == 1
    assert "no folder" in capsys.readouterr().err.lower()
    assert {path.name for path in tmp_path.iterdir()} == before, "the check left a file behind"
