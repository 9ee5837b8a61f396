"""``hispec distill``: the target's own continuations, for training and for the history database.

An exit learns to say what the full model would say next, so it should see what the full model
says: its own answers, greedy and sampled mixed. Rows are planned first (``plan.py``), the plan is
cut into shards (``answers.py``), and shard after shard is decoded (``decode.py``).

With ``--states`` what the layers made of every token is kept beside the answers: the model has just
computed it, and training exits at these layers needs no pass of the model over the texts then.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.errors import UsageError
from hispec.model.bundled import model_help
from hispec_training.answers import ShardFolder
from hispec_training.data import DataError, Overlap, Record, prompt_text, read_records
from hispec_training.options import check_at_least_one, check_share, exit_layers, run, say
from hispec_training.plan import Row, plan_rows

if TYPE_CHECKING:
    from hispec_training.decode import Answer, BatchDecoder

_FORMAT = 1


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``parser`` knows the options of ``hispec distill``."""
    add = parser.add_argument
    add("--model", required=True, help=model_help())
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
    add(
        "--states",
        default=None,
        metavar="EXITS",
        help="keep the states at these layers, such as 4,8, for hispec train: 5 kB a token",
    )
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto")
    add("--device", default="cpu")
    add("--resume", action="store_true", help="go on with a run that was stopped")


def main(args: argparse.Namespace, *, partial: bool = True) -> int:
    """The continuations are in ``args.out``; returns the exit code.

    Args:
        args: See `add_arguments`.
        partial: Whether a run that is stopped leaves what there is in ``args.out``. Otherwise the
            file is there only once the run has ended, by ``--minutes`` too.

    Raises:
        HispecError: Bad options or data, or the disk is full.
    """
    _check(args)
    import torch

    from hispec.loading import choose_for
    from hispec.model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(args.model)
    choice = choose_for(checkpoint.config, args.device.partition(":")[0])
    if args.device == "auto":
        args.device = choice.device.type
    if args.dtype == "auto":
        args.dtype = "bf16" if choice.dtype is torch.bfloat16 else "fp32"
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
        say(f"{count} prompts: {reason}")
    if not rows:
        raise DataError("No prompt is left: all are too long, empty or excluded.")

    layers: list[int] = []
    if args.states is not None:
        num_layers = checkpoint.config.num_layers
        layers = [e for e in (*exit_layers(args.states, num_layers), num_layers) if e]
    folder = ShardFolder(
        args.out, rows, args.shard_rows, checkpoint.fingerprint if layers else None
    )
    folder.open(_provenance(args, checkpoint.fingerprint, rows, layers), resume=args.resume)
    todo = [i for i in range(len(folder.shards)) if not folder.is_whole(i)]
    say(f"{len(rows)} prompts in {len(folder.shards)} shards, {len(todo)} to do")
    ended = False
    try:
        if todo:
            _decode(args, checkpoint, folder, todo, layers)
        ended = True
    finally:
        if ended or partial:
            folder.merge(stopped=not ended)
    return 0


def _decode(
    args: argparse.Namespace,
    checkpoint: Any,
    folder: ShardFolder,
    todo: list[int],
    layers: list[int],
) -> None:
    import torch

    from hispec.model.device import DTYPES
    from hispec.model.llama import Llama, best_layout
    from hispec_training.decode import BatchDecoder
    from hispec_training.trunk import Trunk

    _keep_memory()
    dtype, device = DTYPES[args.dtype], torch.device(args.device)
    model: Trunk | Llama
    if best_layout(checkpoint.config, dtype, device) in ("tiles", "pairs"):
        model = Llama.load(checkpoint, dtype, device)
    else:
        model = Trunk(checkpoint, dtype, args.device)
    decoder = BatchDecoder(model, checkpoint.eos_token_ids, args.rows, layers)
    progress = Progress(sum(len(folder.shards[i]) for i in todo))
    for index in todo:
        answers = decode_shard(decoder, folder.shards[index], args.max_new_tokens, progress.add)
        folder.write(index, answers)
        if args.minutes is not None and progress.elapsed_s > 60 * args.minutes:
            say(f"stopped after {args.minutes:g} minutes; --resume goes on")
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
        say(
            f"{self.rows}/{self.total} rows, {self.tokens:,} tokens, {self._rate():.0f} tok/s, "
            f"{left_s / 60:.0f} min left"
        )


def _check(args: argparse.Namespace) -> None:
    check_at_least_one(args, ("max_new_tokens", "max_prompt_tokens", "rows", "shard_rows", "limit"))
    check_share(args, ("sampled_fraction",))
    if bad := [t for t in args.temperatures if t <= 0]:
        raise UsageError(f"--temperatures must be above 0, got {bad[0]}.")
    for name in (*args.prompts, *args.exclude):
        if Path(name).expanduser().resolve() == args.out.resolve():
            raise UsageError(
                f"--out {args.out} is the file the prompts are read from: give another."
                if name in args.prompts
                else f"--out {args.out} is the file to keep out (--exclude): give another."
            )


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


def _provenance(
    args: argparse.Namespace, fingerprint: str, rows: Sequence[Row], layers: Sequence[int]
) -> dict[str, Any]:
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
            **({"states": list(layers)} if layers else {}),
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


if __name__ == "__main__":
    run("hispec_training.distill", __doc__, add_arguments, main)
