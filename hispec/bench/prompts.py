"""What is asked: prompts from a JSONL file, a preset of a public data set, or the project's own.

A line of a JSONL file has one of

    {"prompt": "…"}                        one user message
    {"messages": [{"role", "content"}]}    a chat, answered after its last message
    {"turns": ["…", "…"]}                  Spec-Bench: the second continues on the first's answer
    {"prompt_ids": [1, 2, …]}              token ids, taken as they are

and may have ``category``, ``id`` (or ``question_id``) and ``reference`` (a text or a list of them).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.errors import UsageError
from hispec.jsonl import read_objects, refuse_halves

if TYPE_CHECKING:
    from hispec.generation import LM

BUILTIN = Path(__file__).parent.parent / "data" / "prompts.jsonl"

#: MT-bench's eight sub-categories are one group in Spec-Bench's tables.
CHAT = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)


@dataclass(frozen=True)
class Prompt:
    """One conversation to be answered.

    Attributes:
        id: unique within its file.
        category: the group it is reported under.
        turns: user messages; each continues on the answers to those before it.
        messages: or a chat as it is,
        ids: or token ids.
        references: texts that answer the last turn; none where there is no reference.
    """

    id: str
    category: str = "all"
    turns: tuple[str, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    ids: tuple[int, ...] = ()
    references: tuple[str, ...] = ()

    @property
    def num_turns(self) -> int:
        """How many answers it takes."""
        return len(self.turns) or 1

    def chat(self, turn: int, answers: Sequence[str]) -> list[Mapping[str, str]]:
        """Returns the messages up to user message ``turn``, given the answers to those before."""
        if self.messages:
            return list(self.messages)
        chat: list[Mapping[str, str]] = []
        for question, answer in zip(self.turns[:turn], answers, strict=True):
            chat.append({"role": "user", "content": question})
            chat.append({"role": "assistant", "content": answer})
        return [*chat, {"role": "user", "content": self.turns[turn]}]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a run.

    Attributes:
        name: what the user gave.
        prompts: in order.
        is_spec_bench: reported on, never tuned on.
    """

    name: str
    prompts: tuple[Prompt, ...]
    is_spec_bench: bool = False


def load_prompts(name: str, limit: int | None = None) -> PromptSet:
    """Returns the prompts a name stands for.

    Args:
        name: ``builtin``, a JSONL file (``.gz`` too), a preset (``gsm8k``), or a preset and where
            its data lie (``gsm8k=FOLDER``).
        limit: at most so many, spread evenly over the categories.

    Raises:
        UsageError: no such file or preset, or a malformed line.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}.")
    from hispec.bench import presets

    preset, _, place = name.partition("=")
    if name == "builtin":
        found = read_jsonl(BUILTIN)
    elif preset in presets.PRESETS:
        found = presets.load(preset, place or None)
    elif Path(name).is_file():
        found = read_jsonl(Path(name))
    else:
        raise UsageError(
            f"no prompts in {name}: it is neither a file nor one of builtin, "
            f"{', '.join(presets.PRESETS)}."
        )
    # Spec-Bench numbers its questions 81-560, by category.
    marks = {("81", "chat"), ("161", "translation"), ("481", "rag")}
    is_spec_bench = marks <= {(prompt.id, prompt.category) for prompt in found}
    return PromptSet(name, tuple(spread(found, limit)), is_spec_bench)


def spread(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """Returns at most ``limit`` prompts, as many of each category as of any other if it has them.

    Within a category they are taken at equal distances: MT-bench's sub-categories come in blocks.
    """
    if limit is None or limit >= len(prompts):
        return list(prompts)
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt.category, []).append(index)
    shares = dict.fromkeys(members, 0)
    while sum(shares.values()) < limit:
        for category, indices in members.items():
            if shares[category] < len(indices) and sum(shares.values()) < limit:
                shares[category] += 1
    chosen = [
        indices[place * len(indices) // shares[category]]
        for category, indices in members.items()
        for place in range(shares[category])
    ]
    return [prompts[index] for index in sorted(chosen)]


def read_jsonl(path: Path) -> list[Prompt]:
    """Returns the prompts of a JSONL file.

    Raises:
        UsageError: with the number of the line that is wrong and what is wrong with it.
    """
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, row in read_objects(path):
        try:
            prompt = parse(row, number)
        except UsageError as error:
            raise UsageError(f"{path} line {number}: {error}") from None
        if prompt.id in seen:
            raise UsageError(
                f"{path} line {number}: id {prompt.id} is already line {seen[prompt.id]}'s."
            )
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f"{path} has no prompts.")
    return prompts


def parse(row: Mapping[str, Any], number: int) -> Prompt:
    """Returns the prompt of one parsed line.

    Args:
        row: the object.
        number: the line's number, its id where it names none.

    Raises:
        UsageError: there is nothing to answer, or a field is of the wrong kind.
    """
    refuse_halves(row)
    kinds = [key for key in ("prompt", "messages", "turns", "prompt_ids") if key in row]
    if len(kinds) != 1:
        raise UsageError(
            "a prompt has one of prompt, messages, turns or prompt_ids; this has "
            + (" and ".join(kinds) if kinds else f"only {', '.join(row) or 'nothing'}")
            + "."
        )
    kind, value = kinds[0], row[kinds[0]]
    category = str(row.get("category") or "all")
    fields: dict[str, Any] = {
        "id": str(row.get("id", row.get("question_id", number))),
        "category": "chat" if kind == "turns" and category in CHAT else category,
        "references": _references(row.get("reference")),
    }
    if kind == "prompt":
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"prompt should be a text, got {_shown(value)}.")
        return Prompt(**fields, turns=(value,))
    if not isinstance(value, list) or not value:
        raise UsageError(f"{kind} should be a list with something in it, got {_shown(value)}.")
    if kind == "turns":
        if not all(isinstance(turn, str) and turn.strip() for turn in value):
            raise UsageError(f"turns should be texts, got {_shown(value)}.")
        return Prompt(**fields, turns=tuple(value))
    if kind == "messages":
        for message in value:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise UsageError(f"a message has role and content, got {_shown(message)}.")
            if not all(isinstance(message[key], str) for key in ("role", "content")):
                raise UsageError(f"role and content should be texts, got {_shown(message)}.")
        return Prompt(**fields, messages=tuple(value))
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in value):
        raise UsageError(f"prompt_ids should be whole numbers, got {_shown(value)}.")
    return Prompt(**fields, ids=tuple(value))


def encode(
    lm: LM, prompt: Prompt, turn: int = 0, answers: Sequence[str] = (), *, raw: bool = False
) -> list[int]:
    """Returns the token ids of a prompt's turn.

    Args:
        lm: whose tokenizer and chat template.
        prompt: ids are taken as they are.
        turn: which of its turns.
        answers: to the turns before.
        raw: no chat template: the messages are one text.

    Raises:
        UsageError: it has ids that the model does not; the prompt is named.
    """
    try:
        if prompt.ids:
            return lm.encode(prompt.ids)
        chat = prompt.chat(turn, answers)
        if raw or not lm.tokenizer.chat_template:
            return lm.encode("\n\n".join(message["content"] for message in chat), raw=True)
        return lm.encode(chat)
    except UsageError as error:
        raise UsageError(f"prompt {prompt.id}: {error}") from None


def _references(value: Any) -> tuple[str, ...]:
    """A text or a list of texts; anything else (RAG's nested lists) is no reference to score by."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return tuple(value)
    return ()


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
