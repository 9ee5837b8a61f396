"""``hispec distill``: the target's own continuations, for training and for the history database.

An exit learns to say what the full model would say next, so it should see what the full model
says: its own answers, greedy and sampled mixed. Rows are planned first: shuffled, each with its
temperature and its own seed. The plan is cut into shards, and a shard is the unit of work: what
it holds depends on its rows and nothing else, and it appears by one rename. So a killed run
resumed gives the same bytes as one that was left alone, and any shards there are can be used
while the run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.errors import HispecError, UsageError
from hispec_training.data import (
    DataError,
    Overlap,
    Record,
    encode_prompt,
    prompt_text,
    read_jsonl,
    read_records,
)
from hispec_training.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hispec_training.decode import Answer, BatchDecoder

_FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One continuation to make.

    Attributes:
        id: The prompt's.
        category: The prompt's.
        prompt_ids: Chat template applied.
        temperature: 0 is greedy.
        seed: Of this row's random numbers.
    """

    id: str
    category: str
    prompt_ids: tuple[int, ...]
    temperature: float
    seed: int


def plan_rows(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    sampled_fraction: float,
    temperatures: Sequence[float],
    max_prompt_tokens: int,
    text_prefix_tokens: int = 64,
    shuffle: bool = True,
) -> tuple[list[Row], Counter[str]]:
    """Returns what to decode, in order, and how many prompts were left out or cut.

    Args:
        records: The prompts.
        tokenizer: Of the target.
        seed: Of the shuffle, the coins and the rows' own seeds.
        sampled_fraction: Chance in [0, 1] that a row is sampled.
        temperatures: One of these is drawn for a sampled row.
        max_prompt_tokens: Longer chats are left out; longer plain text is cut.
        text_prefix_tokens: How much of plain text is the prompt.
        shuffle: Mix the records first, so that any number of shards is a fair sample.
    """
    counts: Counter[str] = Counter()
    records = list(records)
    if shuffle:
        random.Random(f"{seed}:order").shuffle(records)
    rows = []
    for record in records:
        ids = encode_prompt(record, tokenizer)
        if record.text:
            ids = ids[: min(text_prefix_tokens, max_prompt_tokens)]
        if len(ids) > max_prompt_tokens:
            counts["too long, left out"] += 1
            continue
        if not ids:
            counts["no tokens, left out"] += 1
            continue
        coin = random.Random(f"{seed}:{len(rows)}:{record.id}")
        sampled = coin.random() < sampled_fraction
        temperature = coin.choice(list(temperatures)) if sampled else 0.0
        rows.append(Row(record.id, record.category, tuple(ids), temperature, coin.getrandbits(63)))
    return rows, counts


class ShardFolder:
    """The work folder of one run: its provenance and the shards that are finished.

    Args:
        path: The folder.
        rows: The whole plan.
        shard_rows: Rows of a shard.
    """

    def __init__(self, path: Path, rows: Sequence[Row], shard_rows: int) -> None:
        self.path = path
        self.shards = [rows[i : i + shard_rows] for i in range(0, len(rows), shard_rows)]

    def file(self, index: int) -> Path:
        """Where a shard is or will be."""
        return self.path / f"shard-{index:05d}.jsonl"

    def open(self, provenance: dict[str, Any], *, resume: bool) -> None:
        """The folder exists and belongs to this plan.

        Raises:
            UsageError: It exists and ``resume`` is not set, or it belongs to other settings.
            HispecError: It cannot be written.
        """
        stamp = self.path / "provenance.json"
        if stamp.exists():
            if not resume:
                raise UsageError(
                    f"{self.path} holds an earlier run: continue it with --resume, or remove it."
                )
            before = json.loads(stamp.read_text())["run"]
            now = json.loads(json.dumps(provenance["run"]))
            if changed := sorted(k for k in before.keys() | now if before.get(k) != now.get(k)):
                raise UsageError(
                    f"{self.path} was made with other settings ({', '.join(changed)} differ): use "
                    "the same ones, or another --out."
                )
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HispecError(f"Cannot create {self.path}: {error.strerror}.") from error
        write_atomically(stamp, json.dumps(provenance, indent=1) + "\n")

    def is_whole(self, index: int) -> bool:
        """Whether the shard is there with exactly its rows; a damaged one is not."""
        try:
            made = [row for _, row in read_jsonl(self.file(index))]
        except DataError:
            return False
        rows = self.shards[index]
        return len(made) == len(rows) and all(
            got.get("id") == row.id
            and got.get("prompt_ids") == list(row.prompt_ids)
            and isinstance(got.get("response_ids"), list)
            for got, row in zip(made, rows, strict=True)
        )

    def write(self, index: int, answers: Sequence[Answer]) -> None:
        """The shard is on disk, whole."""
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
            for row, answer in zip(self.shards[index], answers, strict=True)
        ]
        write_atomically(self.file(index), "".join(line + "\n" for line in lines))

    def merge(self, out: Path) -> None:
        """``out`` holds the shards that are there, in order, and its provenance lies beside it."""
        parts = [self.file(i) for i in range(len(self.shards)) if self.file(i).exists()]
        write_atomically(out, "".join(part.read_text() for part in parts))
        stamp = (self.path / "provenance.json").read_text()
        write_atomically(out.with_name(out.name + ".provenance.json"), stamp)


def decode_shard(
    decoder: BatchDecoder,
    rows: Sequence[Row],
    max_new_tokens: int,
    done: Callable[[Answer], None] | None = None,
) -> list[Answer]:
    """Returns the answers of a shard's rows, in their order; decoded shortest prompt first."""
    from hispec_training.decode import Request

    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt_ids), i))
    requests = [
        Request(rows[i].prompt_ids, max_new_tokens, rows[i].temperature, rows[i].seed)
        for i in order
    ]
    answers: list[Any] = [None] * len(rows)
    for place, answer in zip(order, decoder.decode(requests, done), strict=True):
        answers[place] = answer
    return answers


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``parser`` knows the options of ``hispec distill``."""
    add = parser.add_argument
    add("--model", required=True, help="hub id, folder, .gguf file or smollm2-135m")
    add(
        "--prompts",
        required=True,
        nargs="+",
        metavar="FILE",
        help="JSONL files (.gz too) or datasets ids: messages, prompt, instruction, question, text",
    )
    add("--out", required=True, type=Path, help="JSONL of continuations; work folder beside it")
    add("--exclude", nargs="*", default=[], metavar="FILE", help="prompts to keep out (evaluation)")
    add("--split", default="train", help="split of a datasets id")
    add("--limit", type=int, default=None, help="at most so many prompts")
    add("--max-new-tokens", type=int, default=200, help="length of a continuation")
    add("--max-prompt-tokens", type=int, default=1024, help="longer prompts are left out")
    add("--sampled-fraction", type=float, default=0.5, help="share of rows that are sampled")
    add("--temperatures", type=float, nargs="+", default=[0.7, 1.0], help="of sampled rows")
    add("--seed", type=int, default=0)
    add("--keep-order", action="store_true", help="do not shuffle the prompts")
    add("--rows", type=int, default=64, help="texts decoded together")
    add("--shard-rows", type=int, default=256, help="rows of a shard, the unit of resuming")
    add("--minutes", type=float, default=None, help="stop after the shard under way then")
    add("--dtype", choices=["bf16", "fp32"], default="bf16")
    add("--device", default="cpu")
    add("--resume", action="store_true", help="go on with a run that was stopped")


def main(args: argparse.Namespace) -> int:
    """The continuations are in ``args.out``; returns the exit code.

    Raises:
        HispecError: Bad options or data, or the disk is full.
    """
    _check(args)
    from hispec.model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(args.model)
    records, skipped = _read_prompts(args)
    rows, cut = plan_rows(
        records,
        checkpoint.tokenizer,
        seed=args.seed,
        sampled_fraction=args.sampled_fraction,
        temperatures=args.temperatures,
        max_prompt_tokens=min(
            args.max_prompt_tokens, checkpoint.config.max_positions - args.max_new_tokens
        ),
        shuffle=not args.keep_order,
    )
    rows = rows[: args.limit]
    for reason, count in (skipped + cut).items():
        _say(f"{count} prompts: {reason}")
    if not rows:
        raise DataError("No prompt is left: all are too long, empty or excluded.")

    folder = ShardFolder(shards_of(args.out), rows, args.shard_rows)
    folder.open(_provenance(args, checkpoint.fingerprint, rows), resume=args.resume)
    todo = [i for i in range(len(folder.shards)) if not folder.is_whole(i)]
    _say(f"{len(rows)} prompts in {len(folder.shards)} shards, {len(todo)} to do")
    if todo:
        _decode(args, checkpoint, folder, todo)
    folder.merge(args.out)
    return 0


def _decode(args: argparse.Namespace, checkpoint: Any, folder: ShardFolder, todo: list[int]):
    import torch

    from hispec.model.llama import Llama, best_layout
    from hispec_training.decode import BatchDecoder
    from hispec_training.trunk import Trunk

    _keep_memory()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    device = torch.device(args.device)
    model: Trunk | Llama
    if best_layout(checkpoint.config, dtype, device) == "tiles":
        model = Llama.load(checkpoint, dtype, device)
    else:
        model = Trunk(checkpoint, dtype, args.device)
    decoder = BatchDecoder(model, checkpoint.eos_token_ids, args.rows)
    progress = Progress(sum(len(folder.shards[i]) for i in todo))
    for index in todo:
        answers = decode_shard(decoder, folder.shards[index], args.max_new_tokens, progress.add)
        folder.write(index, answers)
        if args.minutes is not None and progress.elapsed_s > 60 * args.minutes:
            _say(f"stopped after {args.minutes:g} minutes; --resume goes on")
            break
    progress.close()


class Progress:
    """How far a run is: a bar on a terminal, a line a minute elsewhere, always on stderr.

    Args:
        total: Rows to do.
    """

    def __init__(self, total: int) -> None:
        self.total, self.rows, self.tokens = total, 0, 0
        self._start = self._said = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="row", file=sys.stderr)

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def add(self, answer: Answer) -> None:
        """One more row is done."""
        self.rows += 1
        self.tokens += len(answer.ids)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._rate():.0f} tok/s", refresh=False)
            self._bar.update()
        elif time.monotonic() - self._said > 60:
            self._report()

    def close(self) -> None:
        """The last word is said."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._report()

    def _rate(self) -> float:
        return self.tokens / max(self.elapsed_s, 1e-9)

    def _report(self) -> None:
        self._said = time.monotonic()
        left_s = (self.total - self.rows) * self.elapsed_s / max(self.rows, 1)
        _say(
            f"{self.rows}/{self.total} rows, {self.tokens:,} tokens, {self._rate():.0f} tok/s, "
            f"{left_s / 60:.0f} min left"
        )


def _check(args: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "max_prompt_tokens", "rows", "shard_rows", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if not 0 <= args.sampled_fraction <= 1:
        raise UsageError(f"--sampled-fraction must lie in [0, 1], got {args.sampled_fraction}.")
    if bad := [t for t in args.temperatures if t <= 0]:
        raise UsageError(f"--temperatures must be above 0, got {bad[0]}.")


def _read_prompts(args: argparse.Namespace) -> tuple[list[Record], Counter[str]]:
    skipped: Counter[str] = Counter()
    excluded = Overlap(
        prompt_text(record) for source in args.exclude for record in read_records(source).records
    )
    records = []
    for source in args.prompts:
        reading = read_records(source, split=args.split)
        skipped += reading.skipped
        for record in reading.records:
            if prompt_text(record) in excluded:
                skipped["excluded as an evaluation prompt"] += 1
            else:
                records.append(record)
    return records, skipped


def _provenance(args: argparse.Namespace, fingerprint: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What made the data: ``run`` must match to resume, the rest is for the reader."""
    import torch
    import transformers

    import hispec

    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return {
        "run": {
            "format": _FORMAT,
            "model": fingerprint,
            "plan": digest.hexdigest(),
            "max_new_tokens": args.max_new_tokens,
            "dtype": args.dtype,
            "device": args.device,
            "rows": args.rows,
            "shard_rows": args.shard_rows,
        },
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in _plain(args).items()},
        "versions": {
            "hispec": hispec.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
        "threads": torch.get_num_threads(),
    }


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    kept = (str, int, float, bool, list, Path, type(None))
    return {k: v for k, v in vars(args).items() if isinstance(v, kept)}


def _keep_memory() -> None:
    """Freed memory stays with the process: handing it back and taking it again costs a tenth."""
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 256 << 20)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="hispec_training.distill", description=__doc__)
    add_arguments(_parser)
    try:
        sys.exit(main(_parser.parse_args()))
    except HispecError as _error:
        _say(f"error: {_error}")
        sys.exit(_error.exit_code)
