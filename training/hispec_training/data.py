"""Reading training text, whatever shape it comes in, as one kind of record.

A record is a prompt (chat turns, or plain text) and, where the data has one, a response. Files are
JSON lines, gzipped or not, or a ``datasets`` id. Which fields a row has decides how it is read:

    messages                                chat turns; the last assistant turn is the response
    prompt + completion                     strings, or lists of turns as TRL writes them
    instruction [+ input or context] + response or output
    question [+ context] + answer
    turns                                   a benchmark's user turns: the first is the prompt
    text                                    no chat template; a prefix is continued

Nothing is dropped silently: rows without a usable prompt are counted in ``Reading.skipped``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.errors import HispecError, UsageError
from hispec.jsonl import read_objects

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KNOWN = (
    "messages, prompt + completion, instruction (+ input or context) + response, "
    "question + answer, turns or text"
)
_NGRAM = 5  # words; two prompts that share this many in a row often enough are the same prompt


class DataError(HispecError):
    """Training data cannot be read or holds nothing to train on."""


@dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
        id: Unique in its file: the row's own id, or the file's name and the line.
        category: The row's own label, or the file's name.
        messages: Chat turns up to the response; empty for plain text.
        text: Plain text; empty for chat.
        response: What the data answers; None where the target is to answer.
    """

    id: str
    category: str
    messages: tuple[Mapping[str, str], ...] = ()
    text: str = ""
    response: str | None = None


@dataclass
class Reading:
    """Records and what happened on the way.

    Attributes:
        records: In the order of the source.
        skipped: Reason -> how many rows.
    """

    records: list[Record] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def read_records(source: str | Path, *, split: str = "train") -> Reading:
    """Returns every usable row of a file or a ``datasets`` id.

    Args:
        source: A ``.jsonl`` or ``.jsonl.gz`` file, or an id such as ``org/name``.
        split: Which split of a ``datasets`` id.

    Raises:
        DataError: No such file, malformed JSON, no known fields, or nothing left.
    """
    path = Path(source).expanduser()
    rows = _file_rows(path) if path.exists() or _looks_local(source) else _hub_rows(source, split)
    name = path.name.split(".")[0]
    reading = Reading()
    for number, row in rows:
        record = to_record(row, default_id=f"{name}:{number}", default_category=name)
        if record is None:
            reading.skipped["empty prompt"] += 1
        else:
            reading.records.append(record)
    if not reading.records:
        empty = sum(reading.skipped.values())
        why = f"all {empty} rows have an empty prompt" if empty else "it has no rows"
        raise DataError(f"{source} holds nothing to train on: {why}.")
    return reading


def to_record(row: Mapping[str, Any], *, default_id: str, default_category: str) -> Record | None:
    """Returns the record of one row, or None when its prompt is empty.

    Args:
        row: The parsed row.
        default_id: For rows without ``id`` or ``question_id``; also names the row in errors.
        default_category: For rows without ``category``.

    Raises:
        DataError: The row has none of the known fields, or one of them has the wrong type.
    """

    def string(name: str) -> str:
        value = row.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise DataError(f"{default_id}: {name} should be text, got {type(value).__name__}.")
        return value.strip()

    def first(*names: str) -> str | None:
        return next((string(n) for n in names if row.get(n) is not None), None)

    def user(content: str) -> tuple[Mapping[str, str], ...]:
        return ({"role": "user", "content": content},) if content else ()

    response: str | None = None
    text = ""
    messages: tuple[Mapping[str, str], ...]
    if "messages" in row:
        messages, response = _chat(row["messages"], default_id)
    elif "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not all(isinstance(t, str) for t in turns):
            raise DataError(f"{default_id}: turns should be a list of texts.")
        messages = user(turns[0].strip() if turns else "")
    elif "prompt" in row:
        done = row.get("completion")
        if isinstance(row["prompt"], list):
            turns = row["prompt"] + (done if isinstance(done, list) else [])
            messages, response = _chat(turns, default_id)
        else:
            messages = user(string("prompt"))
            response = first("completion", "response")
    elif "instruction" in row:
        more = first("input", "context") or first("context")
        messages = user("\n\n".join(part for part in (string("instruction"), more) if part))
        response = first("response", "output")
    elif "question" in row:
        parts = (string("context"), string("question"))
        messages = user("\n\n".join(part for part in parts if part))
        response = first("answer", "response")
    elif "text" in row:
        messages, text = (), string("text")
    else:
        found = ", ".join(map(str, row)) or "none"
        raise DataError(f"{default_id} has none of the fields {_KNOWN}; its fields are: {found}.")
    if not messages and not text:
        return None
    identity = next((row[n] for n in ("id", "question_id") if row.get(n) is not None), default_id)
    return Record(
        id=str(identity),
        category=str(row.get("category") or default_category),
        messages=messages,
        text=text,
        response=response or None,
    )


def encode_prompt(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids a model sees before it answers.

    Chat turns go through the tokenizer's chat template, with the opening of the answer; a
    tokenizer without a template gets the turns as plain text, as does a plain-text record.
    """
    if record.messages and tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(
            list(record.messages), add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])
    text = record.text or "\n\n".join(m["content"] for m in record.messages) + "\n"
    return list(tokenizer(text)["input_ids"])


class Overlap:
    """Finds prompts that are, or nearly are, among some given ones.

    Two texts count as the same when at least half of either's word 5-grams occur in the other, or
    when their words are equal. Long shared passages with a different question count too: that is
    the safe side for keeping evaluation prompts out of training.

    Args:
        texts: The given ones.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._grams: list[set[tuple[str, ...]]] = []
        self._where: dict[tuple[str, ...], list[int]] = {}
        self._whole: set[tuple[str, ...]] = set()
        for text in texts:
            words = _words(text)
            self._whole.add(words)
            grams = _grams(words)
            for gram in grams:
                self._where.setdefault(gram, []).append(len(self._grams))
            self._grams.append(grams)

    def __contains__(self, text: str) -> bool:
        words = _words(text)
        if words in self._whole:
            return True
        grams = _grams(words)
        shared = Counter(i for gram in grams for i in self._where.get(gram, ()))
        return any(2 * count >= min(len(grams), len(self._grams[i])) for i, count in shared.items())


def prompt_text(record: Record) -> str:
    """Returns the words of a prompt: the user's turns, or the plain text."""
    if not record.messages:
        return record.text
    return "\n".join(m["content"] for m in record.messages if m["role"] == "user")


def first_row(source: str | Path) -> Mapping[str, Any] | None:
    """Returns the first row of a file, or None for a ``datasets`` id.

    Raises:
        DataError: No such file, it cannot be read, or it holds no row.
    """
    path = Path(source).expanduser()
    if not path.exists() and not _looks_local(source):
        return None
    for _, row in _file_rows(path):
        return row
    raise DataError(f"{source} is empty: nothing to train on.")


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields line numbers from 1 and the objects of a JSON-lines file, gzipped or not.

    Raises:
        DataError: The file cannot be read, or a line is not a JSON object.
    """
    return read_objects(path, DataError)


def _file_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.is_dir():
        raise DataError(f"{path} is a folder: give a .jsonl or .jsonl.gz file.")
    if not path.exists():
        raise DataError(f"There is no file {path}.")
    return read_jsonl(path)


def _looks_local(source: str | Path) -> bool:
    text = str(source)
    return (
        isinstance(source, Path)
        or text.endswith((".jsonl", ".jsonl.gz", ".json", ".gz"))
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
    )


def _hub_rows(source: str | Path, split: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"There is no file {source}, and reading it as a data set's id needs the package "
            "datasets: pip install 'hispec[train]'."
        ) from error
    try:
        table = datasets.load_dataset(str(source), split=split)
    except Exception as error:  # datasets raises many kinds, down to bare ones from the builders
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"There is no file {source}, and no data set of that id could be loaded: {reason}"
        ) from error
    return enumerate(table, 1)


def _chat(turns: Any, where: str) -> tuple[tuple[Mapping[str, str], ...], str | None]:
    """The prompt's turns and the last assistant turn after them."""
    if not isinstance(turns, list):
        raise DataError(f"{where}: messages should be a list, got {type(turns).__name__}.")
    for turn in turns:
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise DataError(f"{where}: every message needs a role and a content.")
        if not isinstance(turn["content"], str):
            raise DataError(f"{where}: a message's content should be text.")
    kept = [{"role": str(t["role"]), "content": t["content"]} for t in turns]
    response = None
    while kept and kept[-1]["role"] == "assistant":
        response = kept.pop()["content"]
    if not any(t["role"] == "user" and t["content"].strip() for t in kept):
        return (), None
    return tuple(kept), response


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _grams(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    if len(words) < _NGRAM:
        return set()
    return {words[i : i + _NGRAM] for i in range(len(words) - _NGRAM + 1)}
