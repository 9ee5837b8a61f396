"""Prompts: every accepted form of a line, what is said of the others, and fair limits."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hispec.bench import presets
from hispec.bench.prompts import Prompt, load_prompts, read_jsonl, spread
from hispec.errors import HispecError, UsageError

GROUPS = {"chat", "translation", "summarization", "qa", "math_reasoning", "rag"}


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_the_projects_own_set_covers_every_group() -> None:
    found = load_prompts("builtin")
    tally = Counter(prompt.category for prompt in found.prompts)
    assert tally.keys() == GROUPS
    assert min(tally.values()) >= 4
    assert any(prompt.num_turns == 2 for prompt in found.prompts)
    assert not found.is_spec_bench


def test_every_form_of_a_line(tmp_path: Path) -> None:
    file = write(
        tmp_path / "p.jsonl",
        {"prompt": "a", "category": "qa", "reference": "b"},
        "",
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        {"turns": ["one", "two"], "question_id": 81, "category": "coding"},
        {"prompt_ids": [1, 2], "id": "x"},
        {"prompt": "d", "reference": [["nested"]]},
    )
    text, chat, turns, ids, nested = read_jsonl(file)
    assert (text.turns, text.category, text.references) == (("a",), "qa", ("b",))
    assert [message["role"] for message in chat.chat(0, [])] == ["system", "user"]
    assert (turns.id, turns.category, turns.num_turns) == ("81", "chat", 2)
    assert [message["content"] for message in turns.chat(1, ["answer"])] == ["one", "answer", "two"]
    assert (ids.id, ids.ids, ids.num_turns) == ("x", (1, 2), 1)
    assert nested.references == ()


def test_both_halves_of_a_pair_are_a_character(tmp_path: Path) -> None:
    (prompt,) = read_jsonl(write(tmp_path / "p.jsonl", r'{"prompt": "\ud83d\ude00"}'))
    assert prompt.turns == ("😀",)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "a"', r"line 2 is not JSON"),
        ("[1]", r"line 2 should be an object"),
        ('{"text": "a"}', r"line 2: .* this has only text"),
        ('{"prompt": "a", "turns": ["b"]}', r"line 2: .* prompt and turns"),
        ('{"prompt": "  "}', r"line 2: prompt should be a text"),
        ('{"turns": []}', r"line 2: turns should be a list"),
        ('{"turns": ["a", 3]}', r"line 2: turns should be texts"),
        ('{"messages": [{"role": "user"}]}', r"line 2: a message has role and content"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            r"line 2: role and content should be texts",
        ),
        ('{"messages": [{"role": 1, "content": "a"}]}', r"line 2: role and content should be"),
        (r'{"prompt": "a \ud83d"}', r"line 2: a text has \\ud83d, half of a surrogate pair"),
        (r'{"turns": ["a", "\udE00 b"]}', r"line 2: a text has \\ude00, half of"),
        (r'{"messages": [{"role": "user", "content": "\ud83d"}]}', r"line 2: a text has \\ud83d"),
        (r'{"prompt": "a", "category": "\ud83d"}', r"line 2: a text has \\ud83d"),
        ('{"prompt_ids": [1, "a"]}', r"line 2: prompt_ids should be whole numbers"),
        ('{"prompt": "a", "id": "1"}', r"line 2: id 1 is already line 1's"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(UsageError, match=complaint):
        load_prompts(str(file))


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a file nor one of builtin, humaneval"):
        load_prompts(str(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="has no prompts"):
        load_prompts(str(write(tmp_path / "empty.jsonl", "")))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_prompts(str(tmp_path / "bytes.jsonl"))
    with pytest.raises(UsageError, match="--limit must be at least 1"):
        load_prompts("builtin", 0)


def test_a_limit_is_spread_over_the_categories() -> None:
    prompts = [Prompt(f"{c}{i}", c) for c, n in (("a", 8), ("b", 1), ("c", 4)) for i in range(n)]
    assert [p.id for p in spread(prompts, 5)] == ["a0", "a4", "b0", "c0", "c2"]
    assert spread(prompts, 99) == prompts
    for limit in range(1, 14):
        tally = Counter(p.category for p in spread(prompts, limit))
        assert sum(tally.values()) == limit
        assert tally["a"] - tally["c"] <= 1 or tally["c"] == 4


def test_spec_bench_is_recognised(tmp_path: Path) -> None:
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        {"question_id": 161, "category": "translation", "turns": ["a"]},
        {"question_id": 481, "category": "rag", "turns": ["a"]},
    ]
    file = write(tmp_path / "question.jsonl", *rows)
    assert load_prompts(str(file), 1).is_spec_bench  # by the whole file, whatever the limit
    assert not load_prompts(str(write(tmp_path / "own.jsonl", *rows[:2]))).is_spec_bench


ROWS = {
    "humaneval": {"prompt": "def f():\n", "canonical_solution": "    return 1"},
    "gsm8k": {"question": "1 + 1?", "answer": "2"},
    "cnn_dm": {"article": "Long.", "highlights": "Short."},
    "xsum": {"document": "Long.", "summary": "Short."},
    "dolly": {"instruction": "Do.", "context": "", "response": "Done.", "category": "closed_qa"},
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_read_a_local_file(tmp_path: Path, name: str) -> None:
    (prompt,) = load_prompts(f"{name}={write(tmp_path / 'rows.jsonl', ROWS[name])}").prompts
    assert prompt.turns[0] and prompt.references[0]
    assert prompt.category == ("closed_qa" if name == "dolly" else presets.PRESETS[name].category)


def test_presets_read_a_folder_that_datasets_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pytest.importorskip("datasets.config")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "test.jsonl", ROWS["gsm8k"])
    (prompt,) = load_prompts(f"gsm8k={tmp_path / 'data'}").prompts
    assert prompt == Prompt("gsm8k-1", "math_reasoning", ("1 + 1?",), references=("2",))
    with pytest.raises(HispecError, match=r"cannot be loaded.*--prompts xsum=FOLDER"):
        (tmp_path / "nothing").mkdir()
        load_prompts(f"xsum={tmp_path / 'nothing'}")


def test_only_dollys_test_split_is_asked(tmp_path: Path) -> None:
    rows = [{**ROWS["dolly"], "split": split} for split in ("train", "test", "train")]
    file = tmp_path / "dolly.jsonl.gz"
    with gzip.open(file, "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    assert [prompt.id for prompt in load_prompts(f"dolly={file}").prompts] == ["dolly-2"]


def test_a_preset_on_other_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no field 'question'; is it gsm8k"):
        load_prompts(f"gsm8k={write(tmp_path / 'rows.jsonl', ROWS['xsum'])}")
    with pytest.raises(UsageError, match="neither a folder nor a file"):
        load_prompts(f"gsm8k={tmp_path / 'none'}")


def test_a_damaged_gzip_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "damaged.jsonl.gz"
    text = "".join(f'{{"prompt": "{number}"}}\n' for number in range(2000))
    data = bytearray(gzip.compress(text.encode(), mtime=0))
    data[12:16] = b"\xff\xff\xff\xff"
    file.write_bytes(data)
    with pytest.raises(UsageError, match="cannot read"):
        load_prompts(str(file))
