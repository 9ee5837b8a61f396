"""The folder of a distillation run: shards of answers, each there whole or not at all.

A shard is the unit of work and appears by one rename, so a killed run resumed gives the same bytes
as one that was left alone, and the shards there are can be used while the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.errors import UsageError
from hispec.files import write_whole
from hispec_training.data import DataError, read_jsonl
from hispec_training.plan import Row
from hispec_training.shards import Example, read_note, write_states

if TYPE_CHECKING:
    from hispec_training.decode import Answer


class ShardFolder:
    """The work folder of one run: its provenance and the shards that are finished.

    Args:
        out: The file that gets the shards in the end; the folder lies beside it.
        rows: The whole plan.
        shard_rows: Rows of a shard.
        fingerprint: Of the model, if what it said is kept beside its answers.
    """

    def __init__(
        self, out: Path, rows: Sequence[Row], shard_rows: int, fingerprint: str | None = None
    ) -> None:
        self.out, self.path = out, shards_of(out)
        self.shards = [rows[i : i + shard_rows] for i in range(0, len(rows), shard_rows)]
        self.fingerprint = fingerprint

    def file(self, index: int) -> Path:
        """Where a shard is or will be."""
        return self.path / f"shard-{index:05d}.jsonl"

    def states(self, index: int) -> Path:
        """Where what the model said about a shard's texts is or will be."""
        return self.file(index).with_suffix(".safetensors")

    def open(self, provenance: dict[str, Any], *, resume: bool) -> None:
        """The folder exists and belongs to this plan, and so does ``out`` if it is there.

        Raises:
            UsageError: One exists and ``resume`` is not set, or it belongs to other settings, or
                ``out`` is none of ours.
            HispecError: The folder cannot be written.
        """
        stamp, beside = self.path / "provenance.json", _beside(self.out)
        place, known = (self.path, stamp) if stamp.exists() else (self.out, beside)
        if place.exists() and known.exists():
            if not resume:
                raise UsageError(
                    f"{place} holds an earlier run: continue it with --resume, or remove it."
                )
            try:
                before = dict(json.loads(known.read_text(encoding="utf-8"))["run"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{known}, which says how {self.out.name} was begun, is damaged: remove "
                    f"{place}, or give another --out."
                ) from error
            now = json.loads(json.dumps(provenance["run"]))
            if changed := sorted(k for k in before.keys() | now if before.get(k) != now.get(k)):
                raise UsageError(
                    f"{place} was made with other settings ({', '.join(changed)} differ): use "
                    "the same ones, or another --out."
                )
        elif self.out.exists():
            raise UsageError(
                f"{self.out} is there and no run of hispec distill made it: give another --out, or "
                "remove it."
            )
        if stamp.exists():
            return
        write_whole(stamp, json.dumps(provenance, indent=1) + "\n", sync=True)

    def is_whole(self, index: int) -> bool:
        """Whether the shard is there with exactly its rows; a damaged one is not."""
        try:
            made = [row for _, row in read_jsonl(self.file(index))]
        except DataError:
            return False
        if self.fingerprint and read_note(self.states(index)) is None:
            return False
        rows = self.shards[index]
        return len(made) == len(rows) and all(
            got.get("id") == row.id
            and got.get("prompt_ids") == list(row.prompt_ids)
            and isinstance(got.get("response_ids"), list)
            for got, row in zip(made, rows, strict=True)
        )

    def write(self, index: int, answers: Sequence[Answer]) -> None:
        """The shard is on disk, whole.

        Raises:
            HispecError: The disk is full; earlier shards stay.
        """
        rows = self.shards[index]
        if self.fingerprint:
            examples = [
                Example((*row.prompt_ids, *answer.ids), len(row.prompt_ids), row.category)
                for row, answer in zip(rows, answers, strict=True)
            ]
            said = [answer.said for answer in answers]
            write_states(self.states(index), examples, said, self.fingerprint)
        lines = [
            json.dumps(
                {
                    "id": row.id,
                    "category": row.category,
                    "prompt_ids": list(row.prompt_ids),
                    "response_ids": answer.ids,
                    "temperature": row.temperature,
                    "finish": answer.finish,
                }
            )
            for row, answer in zip(rows, answers, strict=True)
        ]
        write_whole(self.file(index), "".join(line + "\n" for line in lines), sync=True)

    def merge(self, *, stopped: bool = False) -> None:
        """``out`` holds the shards that are there, in order, and its provenance lies beside it.

        Args:
            stopped: The run did not end by itself: ``out`` is left alone if it would not grow.
        """
        parts = [self.file(i) for i in range(len(self.shards)) if self.file(i).exists()]
        text = "".join(part.read_text() for part in parts)
        if stopped and len(text) <= (self.out.stat().st_size if self.out.exists() else 0):
            return
        write_whole(self.out, text, sync=True)
        write_whole(_beside(self.out), (self.path / "provenance.json").read_text(), sync=True)


def read_distilled(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a finished file, or of the shards of a run that still goes on.

    Args:
        path: What ``--out`` was.

    Raises:
        DataError: Neither is there, or a line is damaged.
    """
    if path.exists():
        files = [path]
    else:
        files = sorted(shards_of(path).glob("shard-*.jsonl"))
        if not files:
            raise DataError(f"There is no file {path} and no run of that name under way.")
    for file in files:
        for _, row in read_jsonl(file):
            yield row


def shards_of(out: Path) -> Path:
    """Returns the work folder of a run with that output."""
    return out.with_name(out.name + ".shards")


def _beside(out: Path) -> Path:
    """The provenance of a finished file."""
    return out.with_name(out.name + ".provenance.json")
