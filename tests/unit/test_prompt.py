"""Prompts that are no text, or that a chat template fails on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hispec.errors import CheckpointError, UsageError
from hispec.model.checkpoint import open_checkpoint
from hispec.prompt import encode


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    """One whose template adds texts, as most do."""
    found = open_checkpoint(tiny_llama).tokenizer
    found.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    return found


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("prompt", ["a \ud83d", [{"role": "user", "content": "a \ud83d"}]])
def test_half_of_a_surrogate_pair(tokenizer: Any, prompt: Any, raw: bool) -> None:
    with pytest.raises(UsageError, match=r"has '\\ud83d', half of a surrogate pair"):
        encode(prompt, tokenizer, 300, raw=raw)
    assert encode("a 😀", tokenizer, 300, raw=raw)


@pytest.mark.parametrize("message", [{"role": "user", "content": None}, {"role": "user"}, "hello"])
def test_messages_a_template_fails_on(tokenizer: Any, message: Any) -> None:
    with pytest.raises(CheckpointError, match="chat template refuses this conversation") as caught:
        encode([{"role": "user", "content": "a"}, message], tokenizer, 300)
    assert "\n" not in str(caught.value)
