"""Which tokenizer a database's ids belong to."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol

from hispec.errors import HispecError


class DatabaseError(HispecError):
    """An n-gram database cannot be read, or belongs to another tokenizer."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer this module needs."""

    def get_vocab(self) -> dict[str, int]:
        """Returns token → id."""
        ...


def fingerprint(tokenizer: Tokenizer | Any) -> str:
    """Returns a digest of the vocabulary: ids mean the same where it is the same."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:32]


def check(found: str | None, wanted: str, what: str) -> None:
    """A database fits the tokenizer.

    Args:
        found: the fingerprint it was built with.
        wanted: the tokenizer's.
        what: the database, for the message.

    Raises:
        DatabaseError: it does not.
    """
    if found != wanted:
        raise DatabaseError(
            f"{what} was built with another tokenizer ({(found or 'none')[:12]}, this model's is "
            f"{wanted[:12]}). Build it again with hispec ngrams build."
        )
