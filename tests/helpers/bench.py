"""What the benchmark's tests build with: a model whose exits agree now and then, fake methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from helpers.tiny_llama import save_tiny_llama
from hispec.bench.methods import Outcome, Question

PROMPTS = [
    {"id": "talk", "category": "chat", "turns": ["Say something.", "Say more."]},
    {"id": "sum", "category": "maths", "prompt": "What is 2 + 3?", "reference": "5"},
    {"id": "ids", "category": "maths", "prompt_ids": [5, 6, 7, 8, 9]},
]


def save_agreeing_llama(folder: Path, **config: Any) -> Path:
    """Saves a tiny Llama whose layers from the third on add little: exits agree, not always."""
    save_tiny_llama(folder, **{"max_position_embeddings": 256, "head_dim": 32, **config})
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        parts = name.split(".")
        outward = name.endswith(("o_proj.weight", "down_proj.weight"))
        if outward and int(parts[2]) >= 2:
            tensor.mul_(0.2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_prompts(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Writes a JSONL file of prompts."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or PROMPTS))
    return path


class FakeMethod:
    """Answers what ``like`` answers, in ``factor`` times its decode time.

    Args:
        name: its row.
        like: the method it copies.
        factor: planted slow-down.
        change: what becomes of the ids.
        error: raised instead of an answer.
    """

    note = ""
    counts_ids = True

    def __init__(
        self,
        name: str,
        like: Callable[[Question], Outcome],
        factor: float = 1.0,
        change: Callable[[list[int]], list[int]] = list,
        error: Exception | None = None,
    ) -> None:
        self.name = name
        self.settings: dict[str, Any] = {"fake": name}
        self.calls: list[Question] = []
        self._like, self._factor, self._change, self._error = like, factor, change, error

    def __call__(self, question: Question) -> Outcome:
        self.calls.append(question)
        if self._error:
            raise self._error
        outcome = self._like(question)
        outcome.token_ids = self._change(outcome.token_ids)
        outcome.origins = []
        outcome.decode_s *= self._factor
        return outcome
