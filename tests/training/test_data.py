import gzip
import json

import pytest
from helpers.tiny_llama import byte_tokenizer

from hispec_training.data import (
    DataError,
    Overlap,
    encode_prompt,
    prompt_text,
    read_records,
    to_record,
)


def write(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path


def record(**row):
    return to_record(row, default_id="x:1", default_category="x")


SHAPES = [
    ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, "A"),
    ({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]}, None),
    ({"prompt": "Q", "completion": "A"}, "A"),
    (
        {
            "prompt": [{"role": "user", "content": "Q"}],
            "completion": [{"role": "assistant", "content": "A"}],
        },
        "A",
    ),
    ({"instruction": "Q", "response": "A"}, "A"),
    ({"instruction": "Q", "input": "", "output": "A"}, "A"),
    ({"question": "Q", "answer": "A"}, "A"),
    ({"turns": ["Q", "more"]}, None),
]


@pytest.mark.parametrize(("row", "response"), SHAPES, ids=lambda value: str(value)[:30])
def test_every_shape_becomes_the_same_record(row, response):
    made = record(**row)
    assert prompt_text(made) == "Q"
    assert made.messages[-1] == {"role": "user", "content": "Q"}
    assert made.response == response


def test_context_and_input_join_the_prompt():
    assert prompt_text(record(instruction="Do", context="this", response="")) == "Do\n\nthis"
    assert prompt_text(record(instruction="Do", input="this")) == "Do\n\nthis"
    assert prompt_text(record(question="Why?", context="Because.")) == "Because.\n\nWhy?"


def test_a_long_chat_ends_at_the_last_user_turn():
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    made = record(messages=[{"role": r, "content": c} for r, c in turns])
    assert [m["content"] for m in made.messages] == ["1", "2", "3"]
    assert made.response == "4"


def test_ids_and_categories_come_from_the_row_or_the_file(tmp_path):
    rows = [{"text": "a"}, {"text": "b", "id": 7, "category": "c"}, {"text": "d", "question_id": 0}]
    made = read_records(write(tmp_path / "poems.jsonl.gz", rows)).records
    assert [r.id for r in made] == ["poems:1", "7", "0"]
    assert [r.category for r in made] == ["poems", "c", "poems"]
    assert made[0].text == "a" and not made[0].messages


def test_empty_prompts_are_counted(tmp_path):
    rows = [{"instruction": " "}, {"messages": []}, {"turns": []}, {"instruction": "go"}]
    reading = read_records(write(tmp_path / "a.jsonl", rows))
    assert len(reading.records) == 1
    assert reading.skipped == {"empty prompt": 3}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"body": "x", "title": "y"}], ["body, title", "a:1"]),
        ([{"text": "x"}, "{oops"], ["line 2", "is not JSON"]),
        ([{"text": "x"}, "[1]"], ["line 2", "object"]),
        ([{"text": ""}], ["nothing to train on", "all 1 rows"]),
        ([], ["nothing to train on", "no rows"]),
        ([{"instruction": 3}], ["instruction should be text, got int"]),
        ([{"messages": "hello"}], ["messages should be a list, got str"]),
        ([{"messages": [{"from": "human"}]}], ["role", "content"]),
    ],
    ids=lambda value: str(value)[:25],
)
def test_bad_files_end_in_one_clear_sentence(tmp_path, rows, words):
    with pytest.raises(DataError) as error:
        read_records(write(tmp_path / "a.jsonl", rows))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no file"):
        read_records(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="folder"):
        read_records(tmp_path)
    whole = write(tmp_path / "a.jsonl.gz", [{"text": "x" * 50} for _ in range(50)])
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cannot read .*torn"):
        read_records(torn)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        read_records(tmp_path / "latin.jsonl")


def test_chat_goes_through_the_template_and_text_does_not():
    tokenizer = byte_tokenizer()
    chat = encode_prompt(record(instruction="hey"), tokenizer)
    assert tokenizer.decode(chat).endswith("<|eos|><|assistant|>")
    assert tokenizer.decode(encode_prompt(record(text="hey"), tokenizer)) == "hey"


def test_near_duplicates_are_found():
    seen = Overlap(["How would you find the nth Fibonacci number in Python?", "Who am I"])
    assert "how would you find the nth fibonacci number in python" in seen
    assert "How would you find the nth Fibonacci number in Python, for n = 6?" in seen
    assert "who am i?" in seen
    assert "Who am I, and where does this end?" not in seen
    assert "How would you find a good restaurant in Lisbon?" not in seen
