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
        UsageError: the prompt is empty, or has ids the model does not.
        CheckpointError: the chat template refuses the conversation.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise UsageError("the prompt is empty. Give at least one character.")
        if not raw and tokenizer.chat_template:
            return _encode_chat([{"role": "user", "content": prompt}], tokenizer)
        ids = list(tokenizer(prompt)["input_ids"])
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
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        raise CheckpointError(
            f"the model's chat template refuses this conversation: {error}. Change it, or give the "
            f"whole text with raw."
        ) from error
    # The template writes the special tokens itself.
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])
