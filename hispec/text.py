"""From token ids to text as it grows: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a transformers tokenizer this module needs."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> Any:
        """Returns the text of some ids; transformers types it as a text or several."""
        ...


class Detokenizer:
    """Turns ids into pieces of text whose concatenation is the text of all ids.

    A token may hold part of a UTF-8 character, and some tokenizers join words by context. So a
    piece is the difference between two decodings of the last few tokens, and waits while it ends in
    an unfinished character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from = 0  # where the decoded tail starts
        self._shown = 0  # ids whose text has been handed out

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def add(self, token: int) -> str:
        """Returns the text that ``token`` completes, possibly none."""
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """Returns what was held back."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._from : self._shown])
        after = self._decode(self._ids[self._from :])
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


class StopScanner:
    """Lets text through up to the first of some stop strings.

    Text that may turn out to be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit = False
        self.stop = ""  # the one that came

    def add(self, piece: str) -> str:
        """Returns the text that is certain to come before any stop string."""
        if self.hit:
            return ""
        text = self._held + piece
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.stop = min(found)
            self.hit, self._held = True, ""
            return text[:at]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """Returns what was held back, if no stop string came."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
