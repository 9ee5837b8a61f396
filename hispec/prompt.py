"""Prompts: a text, a chat or token ids in, the ids that a model is given out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from hispec.errors import CheckpointError, UsageError

#: A text, chat messages (``{"role": …, "content": …}``), or token ids.
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


def encode(prompt: Prompt, tokenizer: Any, vocab_size: int, *, raw: bool = False) -> list[int]:
    """Returns a prompt's token ids.

    Args:
        prompt: a text is one user message unless ``raw``; ids pass through.
        tokenizer: transformers'.
        vocab_size: V.
        raw: no chat template; special tokens are added as the tokenizer does for plain text.

    Raises:
        UsageError: the prompt is empty, is no text, or has ids the model does not.
        CheckpointError: the chat template refuses the conversation, or fails on it.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise UsageError("the prompt is empty. Give at least one character.")
        if not raw and tokenizer.chat_template:
            return _encode_chat([{"role": "user", "content": prompt}], tokenizer)
        ids = _tokens(prompt, tokenizer)
    elif prompt and isinstance(prompt[0], Mapping):
        ids = _encode_chat(cast("Sequence[Mapping[str, str]]", prompt), tokenizer)
    else:
        ids = [int(token) for token in cast("Sequence[int]", prompt)]
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UsageError(f"token id {wrong} is not in [0, {vocab_size - 1}], the vocabulary.")
    if not ids:
        raise UsageError("the prompt has no tokens. Give at least one.")
    return ids


def _encode_chat(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program: no content is a TypeError in most
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"the model's chat template refuses this conversation: {reason}. Change it, or give "
            f"the whole text with raw."
        ) from error
    # The template writes the special tokens itself.
    return _tokens(str(text), tokenizer, add_special_tokens=False)


def _tokens(text: str, tokenizer: Any, **options: Any) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise UsageError(
            f"the prompt has {half!r}, half of a surrogate pair, which is no character. Write both "
            f"halves, or leave it out."
        ) from None
    return list(tokenizer(text, **options)["input_ids"])
