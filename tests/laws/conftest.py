"""The zoo of tiny models that the laws are tried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.register_assert_rewrite("helpers.chats", "helpers.failures", "helpers.laws", "helpers.lms")

from helpers.lms import HEAD_KINDS, open_lm, save_exits, save_model  # noqa: E402

from hispec.generation import LM  # noqa: E402
from hispec.model.checkpoint import open_checkpoint  # noqa: E402
from hispec.model.exits import Exits  # noqa: E402


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LM]:
    """Opens one of ``MODELS``, with trained heads if kinds are named; each combination once.

    ``kind`` is a way of running passes (see ``open_lm``) and a dtype; ``exits`` names the heads of
    the exits ``first``, ``first`` + 1, … in turn.
    """
    root = tmp_path_factory.mktemp("zoo")
    opened: dict[tuple[str, str, tuple[str, ...], int], LM] = {}

    def get(name: str, kind: str = "torch fp32", exits: tuple[str, ...] = (), first: int = 1) -> LM:
        key = name, kind, exits, first
        if key not in opened:
            passes, dtype = kind.split()
            folder: Path = root / name
            if not folder.exists():
                save_model(folder, name)
            heads = root / "+".join([name, str(first), *exits])
            if exits and not heads.exists():
                kinds = {place: HEAD_KINDS[kind] for place, kind in enumerate(exits, first)}
                save_exits(heads, open_checkpoint(folder), kinds)
            opened[key] = open_lm(
                folder,
                dtype,
                Exits.open(heads) if exits else None,
                passes,
            )
        return opened[key]

    return get
