"""What the frozen trunk said about every training token, kept on disk so that it runs once.

A shard is one safetensors file of a few hundred sequences: token ids, the hidden states at the
exits and at the end (bf16), and for every response position the target's pick and its top logits.
Files are mapped, not read: a training step touches the pages it needs, and the
size of the cache is bounded by the disk, not by memory.

A shard counts once its note (a JSON file beside it with a key and a checksum) is in place, and
the note is written last. The key hashes everything the content depends on; a shard that is torn,
damaged or made from other data or another model is simply made again.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hispec.errors import UsageError
from hispec.files import disk_errors, replacing
from hispec_training.files import read_bytes, save_tensors
from hispec_training.shard_cache import ShardCache

FORMAT = 1
BATCH_TOKENS = 2048  # padded tokens the trunk sees at once
HEAD_ROWS = 256  # rows of full-vocabulary logits held at once
TOP_K = 12  # target logits kept for each response position


class Backbone(Protocol):
    """The frozen model, as far as the cache needs it (``trunk.py``)."""

    def states(self, ids: Tensor, lengths: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """(B, T) ids → (B, T, D) residual streams after ``layers[0:e]``."""

    def logits(self, states: Tensor) -> Tensor:
        """(N, D) final states, before the norm → (N, V)."""


@dataclass(frozen=True)
class Example:
    """One text the trunk will see.

    Attributes:
        ids: Prompt and response.
        prompt_length: Tokens before the response; the response's first token is predicted from
            position ``prompt_length - 1``.
        category: For tables.
    """

    ids: tuple[int, ...]
    prompt_length: int
    category: str = ""


def read_examples(files: Sequence[Path], max_length: int) -> tuple[list[Example], dict[str, int]]:
    """The usable rows of distilled JSONL files, in file order.

    Args:
        files: JSONL with ``prompt_ids`` and ``response_ids``, gzipped or not.
        max_length: Tokens; longer texts are cut at their end, and counted.

    Returns:
        The examples, and counts: rows, truncated, skipped.

    Raises:
        UsageError: If a file cannot be read, a row lacks the fields, or nothing usable is left.
    """
    examples: list[Example] = []
    counts = {"rows": 0, "truncated": 0, "skipped": 0}
    for path in files:
        lines = read_bytes(path).split(b"\n")
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                prompt, response = list(row["prompt_ids"]), list(row["response_ids"])
                if not all(type(token) is int for token in prompt + response):
                    raise TypeError
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) - 1:
                    break  # a writer's unfinished last line
                fields = sorted(row) if isinstance(error, KeyError) else []
                kind = "lists of token ids" if isinstance(error, TypeError) else "in a JSON object"
                raise UsageError(
                    f"{path}, line {number + 1}: a row needs prompt_ids and response_ids, "
                    + (f"found {', '.join(fields)}." if fields else f"{kind}.")
                ) from error
            counts["rows"] += 1
            ids = tuple(prompt + response)[:max_length]
            if not prompt or len(ids) <= len(prompt):
                counts["skipped"] += 1
                continue
            counts["truncated"] += len(ids) < len(prompt) + len(response)
            examples.append(Example(ids, len(prompt), str(row.get("category", ""))))
    if not examples:
        raise UsageError(f"No usable example in {', '.join(map(str, files))}: all were empty.")
    return examples, counts


def split_examples(examples: Sequence[Example], shard_tokens: int) -> list[list[Example]]:
    """Consecutive groups of about ``shard_tokens`` tokens; appending rows keeps earlier groups."""
    groups: list[list[Example]] = [[]]
    size = 0
    for example in examples:
        if size >= shard_tokens:
            groups.append([])
            size = 0
        groups[-1].append(example)
        size += len(example.ids)
    return groups


def cut(order: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive groups of at most ``limit`` padded; one too long for any group stands alone."""
    groups: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, sizes[index])
        if not groups or longest * (len(groups[-1]) + 1) > limit:
            groups.append([])
            longest = sizes[index]
        groups[-1].append(index)
    return groups


def build_shards(
    folder: Path,
    examples: Sequence[Example],
    make_trunk: Callable[[], Backbone],
    *,
    fingerprint: str,
    layers: Sequence[int],
    top_k: int = TOP_K,
    shard_tokens: int = 65_536,
    max_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    advice: str = "free some room and run again, or bound the cache with --cache-gb",
) -> ShardCache:
    """Every shard that fits is in place; those already there and whole are kept.

    Args:
        folder: Where the shards live; created.
        examples: What to run.
        make_trunk: Called only if something has to run.
        fingerprint: Of the base model.
        layers: Exits whose states are kept, and L.
        top_k: Target logits kept for each response position.
        shard_tokens: Tokens in a shard.
        max_bytes: Bound on the cache; examples beyond it are left out.
        progress: Called with shards done and shards in all.
        advice: What to do where there is no room, for the message.

    Raises:
        WriteError: If the disk is full or the folder cannot be written.
    """
    groups = split_examples(examples, shard_tokens)
    trunk: Backbone | None = None
    total_bytes, notes = 0, []
    for index, group in enumerate(groups):
        key = _key(group, fingerprint, layers, top_k)
        path = folder / f"shard-{index:05d}.safetensors"
        note = read_note(path)
        made = note is not None and note["key"] == key
        if max_bytes is not None and notes:
            # Shards are about as large as each other; what does not fit is not run either.
            size = note["bytes"] if note and made else total_bytes / len(notes)
            if total_bytes + size > max_bytes:
                break
        if note is None or not made:
            trunk = trunk or make_trunk()
            found = _run(trunk, group, layers, top_k)
            with disk_errors(path, f"{index} of {len(groups)} shards were written; {advice}"):
                note = _write_shard(path, key, found, len(group))
        total_bytes += note["bytes"]
        notes.append(path)
        if progress is not None:
            progress(index + 1, len(groups))
    return ShardCache(notes)


def read_note(path: Path) -> dict[str, Any] | None:
    """The note of a whole shard; None if the shard is missing, torn or damaged."""
    try:
        note = json.loads(path.with_suffix(".json").read_bytes())
        if path.stat().st_size != note["bytes"] or _checksum(path) != note["crc32"]:
            return None
    except (OSError, ValueError, KeyError):
        return None
    return note


def _key(group: Sequence[Example], fingerprint: str, layers: Sequence[int], top_k: int) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, fingerprint, list(layers), top_k]).encode())
    for example in group:
        digest.update(json.dumps([example.ids, example.prompt_length, example.category]).encode())
    return digest.hexdigest()


@torch.inference_mode()
def _run(
    trunk: Backbone, group: Sequence[Example], layers: Sequence[int], top_k: int
) -> dict[str, Tensor | str]:
    """The tensors of one shard, its sequences in the group's order."""
    return _pack(group, said_about(trunk, group, layers, top_k, BATCH_TOKENS))


def said_about(
    trunk: Backbone, group: Sequence[Example], layers: Sequence[int], top_k: int, limit: int
) -> list[dict[str, Tensor]]:
    """What the trunk says about some texts, by the names of a shard, in their order.

    Args:
        trunk: The model; what it says stays on its device.
        group: The texts.
        layers: Whose states are wanted, L among them.
        top_k: Target logits for each response position.
        limit: Padded tokens run at once.
    """
    final = max(layers)
    found: list[dict[str, Tensor]] = [{} for _ in group]
    sizes = [len(example.ids) for example in group]
    order = sorted(range(len(group)), key=lambda i: sizes[i])
    for batch in cut(order, sizes, limit):
        ids = torch.zeros(len(batch), max(sizes[i] for i in batch), dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : sizes[i]] = torch.tensor(group[i].ids)
        states = trunk.states(ids, torch.tensor([sizes[i] for i in batch]), layers)
        places = [slice(group[i].prompt_length - 1, sizes[i] - 1) for i in batch]
        asked = torch.cat([states[final][row, place] for row, place in enumerate(places)])
        answers = _answers(trunk, asked, top_k)
        counts = [place.stop - place.start for place in places]
        parts = {name: values.split(counts) for name, values in answers.items()}
        for row, i in enumerate(batch):
            kept = {f"state_{e}": states[e][row, : sizes[i]].bfloat16() for e in layers}
            found[i] = kept | {name: values[row] for name, values in parts.items()}
    return found


def _pack(group: Sequence[Example], found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor | str]:
    """The tensors of one shard from those of its sequences."""
    sizes = [len(example.ids) for example in group]
    tensors: dict[str, Tensor | str] = {
        name: torch.cat([kept[name] for kept in found]).contiguous() for name in found[0]
    }
    first = torch.tensor([example.prompt_length - 1 for example in group])
    tensors["ids"] = torch.tensor([t for example in group for t in example.ids]).int()
    tensors["first"] = first.int()
    tensors["starts"] = torch.tensor([0, *sizes]).cumsum(0)
    targets = torch.tensor(sizes) - 1 - first
    tensors["targets"] = torch.cat([torch.zeros(1, dtype=torch.int64), targets.cumsum(0)])
    tensors["categories"] = json.dumps([example.category for example in group])
    return tensors


def _answers(trunk: Backbone, states: Tensor, top_k: int) -> dict[str, Tensor]:
    """The target's pick and top logits at (R, D) final states, HEAD_ROWS at a time."""
    parts: dict[str, list[Tensor]] = {"pick": [], "top_ids": [], "top_logits": []}
    size = HEAD_ROWS if states.device.type == "cpu" else 8 * HEAD_ROWS
    for start in range(0, states.shape[0], size):
        logits = trunk.logits(states[start : start + size])  # (n, V)
        for name, found in zip(parts, top_picks(logits, top_k), strict=True):
            parts[name].append(found)
    return {name: torch.cat(values) for name, values in parts.items()}


def top_picks(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The target's pick (n,), its ``top_k`` likeliest ids, best first, and their logits (n, K)."""
    values, indices = logits.topk(top_k, -1)
    # bf16 logits tie often; the target's pick is then the lowest id. (A second pass over the
    # vocabulary for argmax would double the cost of this function.)
    tied = torch.where(values == values[:, :1], indices, logits.shape[-1])
    return tied.amin(-1).int(), indices.int(), values.float()


def write_states(
    path: Path, group: Sequence[Example], said: Sequence[dict[str, Tensor]], fingerprint: str
) -> None:
    """A shard of what a model said while it answered stands at ``path``.

    Args:
        path: Of the shard.
        group: Its texts.
        said: For each, ``state_e`` (T, D) of some layers, and at the R response positions ``pick``
            (R,), ``top_ids`` and ``top_logits`` (R, K).
        fingerprint: Of the model.

    Raises:
        WriteError: If the disk is full or the folder cannot be written.
    """
    layers = sorted(int(name[6:]) for name in said[0] if name.startswith("state_"))
    key = _key(group, fingerprint, layers, said[0]["top_ids"].shape[1])
    with disk_errors(path):
        _write_shard(path, key, _pack(group, said), len(group))


def find_states(
    paths: Sequence[Path], examples: Sequence[Example], fingerprint: str, layers: Sequence[int]
) -> bool:
    """Whether whole shards of these texts and layers stand at ``paths``, one after the other."""
    start = 0
    for path in paths:
        note = read_note(path)
        if note is None:
            return False
        kept = ShardCache([path]).layers
        group = examples[start : start + note["sequences"]]
        if not set(layers) <= set(kept) or note["key"] != _key(group, fingerprint, kept, TOP_K):
            return False
        start += len(group)
    return start == len(examples)


def _write_shard(
    path: Path, key: str, tensors: dict[str, Tensor | str], sequences: int
) -> dict[str, Any]:
    """The shard and then its note stand under their names; returns the note.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    note_path = path.with_suffix(".json")
    note_path.unlink(missing_ok=True)
    metadata = {"categories": str(tensors.pop("categories"))}
    save_tensors(path, tensors, metadata, sync=True)
    note = {
        "key": key,
        "crc32": _checksum(path),
        "bytes": path.stat().st_size,
        "sequences": sequences,
        "tokens": int(tensors["ids"].numel()),
        "targets": int(tensors["pick"].numel()),
    }
    with replacing(note_path) as temporary:
        temporary.write_text(json.dumps(note))
    return note


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
