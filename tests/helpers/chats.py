"""Two turns on one cache, and the law that the second goes on as plain decoding would.

However the first ended: at its length, left by its reader, or in a failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

from helpers.failures import Injected, failing_at
from helpers.lms import recording
from hispec.generation import LM
from hispec.hierarchy import Hierarchy
from hispec.sampling import Sampling


class Letters:
    """A tokenizer in which every token is a letter, so that every token ends a piece of text."""

    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids)


@dataclass
class Talk:
    """Two turns on one cache: what they said, and the (position, rows) of the second's prefill."""

    first: list[int]
    second: list[int]
    chunks: list[tuple[int, int]]


def talk(
    lm: LM,
    prompt: Sequence[int],
    more: Sequence[int],
    hierarchy: Hierarchy,
    sampling: Sampling,
    count: int,
    *,
    stop_after: int = 10**9,
    fail_at: int = 10**9,
) -> Talk:
    """A turn that is left after ``stop_after`` tokens or fails in a pass, and the turn after it."""
    options: dict[str, Any] = {"hierarchy": hierarchy, "sampling": sampling}
    with mock.patch.object(lm, "tokenizer", Letters()), recording(lm) as recorder:
        stream = lm.stream(prompt, max_new_tokens=60, **options)
        with failing_at(lm, fail_at), suppress(Injected):
            for place, _ in enumerate(stream, 1):
                if place == stop_after:
                    break
        first = list(stream.result.token_ids)
        prompt = [*prompt, *first, *more]
        mark = len(recorder.passes)
        second = lm.generate(prompt, max_new_tokens=count, continued=True, **options)
    chunks = [(at, rows) for start, _, at, rows in recorder.passes[mark:] if start == 0]
    return Talk(first, second.token_ids, [chunk for chunk in chunks if chunk[0] < len(prompt)])


def continues_like_plain(
    lm: LM,
    prompt: Sequence[int],
    more: Sequence[int],
    hierarchy: Hierarchy,
    sampling: Sampling,
    count: int,
    **end: int,
) -> Talk:
    """A chat on its cache equals plain decoding continued the same way, in tokens and in chunks.

    Whatever ended the first turn, its outcome for the second is that of a reader who left after as
    many tokens.
    """
    found = talk(lm, prompt, more, hierarchy, sampling, count, **end)
    assert found.first, "the first turn failed before its first token"
    wanted = talk(lm, prompt, more, Hierarchy(), sampling, count, stop_after=len(found.first))
    assert found == wanted
    assert found.chunks[0][0] == len(prompt) + len(found.first) - 1, "known tokens were run again"
    return found
