"""Many prompts from a file, answered in order into a file that a kill does not spoil.

A row of answers is written when it is complete, and depends on nothing but its prompt, its place
and the settings. So a run that was killed goes on behind the last whole row and ends with the file
that an uninterrupted one would have written, byte for byte. What differs from run to run (times,
and counts of drafts that databases learned from) goes to a second file, ``OUT.stats.jsonl``, whose
first line holds the settings that the rows were made with.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hispec.bench.progress import Progress
from hispec.bench.prompts import Prompt, parse
from hispec.errors import HispecError, UsageError
from hispec.files import append_whole, disk_errors, unwritable
from hispec.generation import LM
from hispec.result import Result
from hispec.sampling import Sampling

EMPTY = "the line is empty"


@dataclass(frozen=True)
class Row:
    """A line of the prompt file: a prompt, or what is wrong with it."""

    line: int
    prompt: Prompt | None = None
    error: str = ""


def read_rows(path: Path) -> list[Row]:
    """Returns every line of a file of prompts (see :mod:`hispec.bench.prompts`), bad ones too.

    Args:
        path: the file; gzipped if it ends with ``.gz``.

    Raises:
        UsageError: the file cannot be read, or no line of it is a prompt.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read {path}: {why}.") from None
    lines = raw.removeprefix(BOM_UTF8).split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    rows = [_row(number, line) for number, line in enumerate(lines, 1)]
    if all(row.error for row in rows):
        why = next((f" Line {row.line}: {row.error}." for row in rows if row.error != EMPTY), "")
        raise UsageError(f"{path} has no prompts.{why}")
    return rows


def _row(number: int, line: bytes) -> Row:
    try:
        text = line.decode()
        if not text.strip():
            return Row(number, error=EMPTY)
        found = json.loads(text)
        if not isinstance(found, dict):
            return Row(number, error=f"not an object: {text.strip()[:40]}")
        return Row(number, parse(found, number))
    except UnicodeDecodeError:
        return Row(number, error="not UTF-8")
    except (json.JSONDecodeError, RecursionError) as error:
        return Row(number, error=f"not JSON: {error}")
    except UsageError as error:
        return Row(number, error=str(error).rstrip("."))


class Answers:
    """The answers to a file of prompts, complete or on their way.

    Args:
        path: the file of answers.
        rows: the prompts.
        fixed_seed: the user named the seed; otherwise a resumed run goes on with that of the first.

    Raises:
        UsageError: the file cannot be written, is none, or holds something else.
    """

    def __init__(self, path: Path, rows: Sequence[Row], *, fixed_seed: bool = True) -> None:
        self.path = path
        self.stats_path = path.with_name(path.name + ".stats.jsonl")
        self.rows = list(rows)
        self._fixed_seed = fixed_seed
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent} for {path.name}. Make it first.")
        for file in (self.path, self.stats_path):
            _check_writable(file)
        self._written = _whole_lines(path)
        lines = [row.line for row in self.rows]
        if [entry.get("line") for entry in self._written] != lines[: len(self._written)]:
            raise UsageError(f"{path} holds other rows than the prompts. Name another --out.")
        self._header: dict[str, Any] = {}
        self._stats: list[dict[str, Any]] = []
        if self._written:
            found = _whole_lines(self.stats_path)
            if not found:
                raise UsageError(
                    f"{self.stats_path}, which says how {path.name} was begun, is missing. Name "
                    f"another --out."
                )
            self._header, self._stats = found[0], found[1 : len(self._written) + 1]
        self._before = len(self._written)

    def run(self, lm: LM, n: int, settings: dict[str, Any]) -> None:
        """Answers the rows that have no answer yet.

        Args:
            lm: the model.
            n: samples of each prompt.
            settings: keyword arguments of :meth:`LM.stream`.

        Raises:
            UsageError: the rows that are there were made with other settings.
            WriteError: the disk is full; the rows before stay.
        """
        sampling = self._resume(lm, n, settings)
        lm.hierarchy(settings["hierarchy"])  # a wrong exit is said before the first row
        with Progress(len(self.rows), len(self._written)) as progress:
            for row in self.rows[len(self._written) :]:
                progress.doing(f"line {row.line}")
                own = {**settings, "sampling": sampling.stream(row.line - 1)}
                answer, results = _answer(lm, row, n, own)
                entry = {"line": row.line, "metrics": [x.metrics() for x in results]}
                self._write(self.stats_path, entry)  # first: counts of no answer are cut off later
                self._write(self.path, answer)
                self._stats.append(entry)
                self._written.append(answer)
                progress.advance()

    def _resume(self, lm: LM, n: int, settings: Mapping[str, Any]) -> Sampling:
        """Compares the settings with those of the rows that are there; starts the file of counts.

        In exact numerics the hierarchy does not matter to the text, so it may change.
        """
        sampling: Sampling = settings["sampling"]
        asked = json.dumps([str(row) for row in self.rows]).encode()
        wanted = {
            "weights": lm.checkpoint.fingerprint,
            "dtype": str(lm.model.dtype),
            "device": lm.model.device.type,
            "numerics": "exact" if lm.model.exact else str(lm.hierarchy(settings["hierarchy"])),
            "prompts": hashlib.sha256(asked).hexdigest()[:16],
            "n": n,
            **{k: settings[k] for k in ("max_new_tokens", "min_new_tokens", "stop", "raw")},
            "logprobs": settings["logprobs"],
            **sampling.changed(),
        }
        wanted = json.loads(json.dumps(wanted, default=repr))
        if self._written:
            if not self._fixed_seed and "seed" in self._header:
                wanted["seed"] = self._header["seed"]
            for name in sorted({*wanted, *self._header}, key=lambda name: (name == "seed", name)):
                mine, theirs = wanted.get(name), self._header.get(name)
                if mine != theirs:
                    raise UsageError(
                        f"{self.path} was begun with {name}={theirs!r}, not {mine!r}. Use the same "
                        f"settings to go on, or name another --out."
                    )
            with disk_errors(self.path):
                _cut(self.path, len(self._written))
                _cut(self.stats_path, 1 + len(self._stats))
        else:
            with disk_errors(self.path):
                self.path.write_bytes(b"")
                self.stats_path.write_bytes(b"")
            self._write(self.stats_path, wanted)
        return Sampling(**{**vars(sampling), "seed": wanted.get("seed")})

    def _write(self, path: Path, entry: Mapping[str, Any]) -> None:
        """Appends a line to one of the two files."""
        done = f"{len(self._written)} of {len(self.rows)} prompts are answered"
        advice = f"{done}; free some room, and the same command goes on with the others"
        with disk_errors(path, advice):
            append_whole(path, json.dumps(entry, ensure_ascii=False) + "\n")

    def totals(self) -> dict[str, Any]:
        """Returns the counts of all rows; times are of the rows whose statistics are there."""
        failed = [entry for entry in self._written if "error" in entry]
        metrics = [one for entry in self._stats for one in entry["metrics"]]
        tokens = sum(one["num_generation_tokens"] for one in metrics)
        decoding = sum(one["decode_time"] for one in metrics)
        passes = sum(one["num_drafts"] for one in metrics)
        accepted = sum(one["num_accepted_tokens"] for one in metrics)
        return {
            "rows": len(self.rows),
            "answered": len(self._written) - len(failed),
            "failed": [{"line": entry["line"], "error": entry["error"]} for entry in failed],
            "resumed_after": self._before,
            "num_generation_tokens": tokens,
            "prefill_time": sum(one["prefill_time"] for one in metrics),
            "decode_time": decoding,
            "tok_per_s": max(tokens - len(metrics), 0) / decoding if decoding else 0.0,
            "block_efficiency": (accepted + passes) / passes if passes else 0.0,
        }

    def summary(self) -> str:
        """Returns the totals in words, with the line of every prompt that has no answer."""
        totals = self.totals()
        lines = [
            f"{totals['answered']} of {totals['rows']} prompts answered in {self.path}: "
            f"{totals['num_generation_tokens']} tokens, {totals['tok_per_s']:.1f} tok/s decoding, "
            f"{totals['block_efficiency']:.2f} tokens a full pass"
        ]
        if self._before:
            lines[0] += f" ({self._before} rows were there)"
        missing = totals["rows"] - len(self._written)
        if missing:
            lines.append(f"{missing} are left: the same command goes on with them.")
        lines += [f"line {bad['line']}: {bad['error']}" for bad in totals["failed"]]
        return "\n".join(f"hispec: {line}" for line in lines)


def _answer(
    lm: LM, row: Row, n: int, settings: dict[str, Any]
) -> tuple[dict[str, Any], list[Result]]:
    """Returns what is written for a row, and the results it is made of."""
    if row.prompt is None:
        return {"line": row.line, "error": row.error}, []
    found: dict[str, Any] = {"line": row.line, "id": row.prompt.id}
    try:
        if n > 1:
            if row.prompt.num_turns > 1:
                raise UsageError("several samples of several turns are not built")
            results = lm.samples(_asked(row.prompt, 0, [], settings["raw"]), n, **settings)
            return {**found, "samples": [_shown(x) for x in results]}, results
        results = []
        for turn in range(row.prompt.num_turns):
            asked = _asked(row.prompt, turn, [x.text for x in results], settings["raw"])
            results.append(lm.generate(asked, continued=turn > 0, **settings))
    except HispecError as error:
        return {**found, "error": str(error).rstrip(".")}, []
    if len(results) > 1:
        return {**found, "turns": [_shown(x) for x in results]}, results
    return {**found, **_shown(results[0])}, results


def _asked(prompt: Prompt, turn: int, answers: Sequence[str], raw: bool) -> Any:
    if prompt.ids:
        return list(prompt.ids)
    if raw and len(prompt.turns) == 1:
        return prompt.turns[0]
    return prompt.chat(turn, answers)


def _shown(result: Result) -> dict[str, Any]:
    names = ("text", "token_ids", "finish_reason", "stop_reason", "num_prompt_tokens", "num_tokens")
    shown = {name: getattr(result, name) for name in names}
    shown |= {"seed": result.seed} if result.seed is not None else {}
    return shown | ({"logprobs": result.logprobs} if result.logprobs else {})


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file's whole lines, up to the first that is none."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from None
    found = []
    for line in raw.split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        found.append(entry)
    torn = raw[:2] == b'{"' and b"\n" not in raw  # killed in its first row
    if raw and not found and not torn:
        raise UsageError(f"{path} exists and holds no answers. Name another --out, or delete it.")
    return found


def _check_writable(path: Path) -> None:
    """Raises ``UsageError`` if a file cannot be written; what is there stays as it is."""
    real = path.resolve()  # so that no link is deleted
    was_there = real.exists()
    if was_there and not (real.is_file() or real.is_dir()):
        raise UsageError(f"{path} is a device or a pipe, which keeps nothing. Name a file.")
    try:
        open(real, "ab").close()
        if not was_there:
            real.unlink()
    except OSError as error:
        raise UsageError(unwritable(path, error)) from None


def _cut(path: Path, rows: int) -> None:
    """Cuts off what a kill left behind the last whole row."""
    with open(path, "rb+") as file:
        for _ in range(rows):
            file.readline()
        file.truncate(file.tell())
