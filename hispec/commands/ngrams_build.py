"""``hispec ngrams build``: counts text, or a model's answers, into a database that drafts."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from hispec.errors import UsageError

_BATCH = 128  # texts encoded at a time
_LEAST = {"corpus": 2, "history": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--kind",
        choices=tuple(_LEAST),
        default="corpus",
        help="corpus: counts of any text; history: of a model's answers (default: corpus)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="D",
        help="text files, JSONL (.gz too), or datasets ids",
    )
    parser.add_argument("--split", default="train", help="split of a datasets id (default: train)")
    parser.add_argument("--model", required=True, metavar="M", help="whose tokenizer counts")
    parser.add_argument(
        "--out", metavar="FILE", help="the store; without it, a history joins what the model keeps"
    )
    parser.add_argument("--longest", type=int, metavar="N", help="tokens in a key, 1 to 5")
    parser.add_argument("--least", type=int, metavar="N", help="drop what occurred less often")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after about N tokens")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def main(args: argparse.Namespace) -> int:
    """Builds the database; a run that was interrupted goes on."""
    from hispec.commands.ngrams_info import describe
    from hispec.commands.ngrams_texts import Texts
    from hispec.model.checkpoint import open_checkpoint
    from hispec.sources.build import Builder
    from hispec.sources.fingerprint import fingerprint
    from hispec.sources.history_file import add_records, default_path
    from hispec.sources.ngrams import LONGEST, WIDTH
    from hispec.sources.store import Store

    longest = LONGEST if args.longest is None else args.longest
    least = _LEAST[args.kind] if args.least is None else args.least
    if not 1 <= longest <= LONGEST:
        raise UsageError(f"--longest must be in [1, {LONGEST}], got {longest}.")
    if least < 1:
        raise UsageError(f"--least must be at least 1, got {least}.")
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit must be at least 1, got {args.limit}.")
    if args.out is None and args.kind != "history":
        raise UsageError(f"--out is missing: where should the {args.kind} go?")
    if args.out is not None and Path(args.out).expanduser().is_dir():
        raise UsageError(f"--out {args.out} is a folder. Give a file in it.")
    texts = Texts(args.data, answers=args.kind != "corpus", split=args.split)
    checkpoint = open_checkpoint(args.model)
    own = default_path(checkpoint.fingerprint)
    out = Path(args.out).expanduser() if args.out else own.with_suffix(".counted")
    tokenizer = fingerprint(checkpoint.tokenizer)
    plan = {"data": texts.identity(), "tokenizer": tokenizer, "limit": args.limit}
    builder = Builder(out, plan, longest)
    try:
        _count(builder, texts, checkpoint.tokenizer, args.limit)
        builder.finish({"tokenizer": tokenizer, "kind": args.kind}, least=least, width=WIDTH)
    finally:
        builder.close()
    facts = describe(out)
    if args.out is None:
        add_records(own, tokenizer, Store(out, tokenizer).counts.records())
        out.unlink()
        facts["file"] = str(own)
    said = f"{facts['file']}: {facts['num_tokens']:,} tokens of {facts['num_texts']:,} texts"
    if texts.num_errors:
        said += f"; {texts.num_errors:,} rows hold an error and were left out"
    print(said, file=sys.stderr)
    if args.json:
        print(json.dumps(facts))
    return 0


def _count(builder: Any, texts: Any, tokenizer: Any, limit: int | None) -> None:
    """Feeds the builder what it has not seen yet."""
    from hispec.bench.progress import Progress

    if builder.num_texts:
        print(f"Going on after {builder.num_tokens:,} tokens.", file=sys.stderr)
    pieces = islice(iter(texts), builder.num_texts, None)
    tokens = builder.num_tokens
    with Progress(100) as progress:
        shown = 0
        while batch := list(islice(pieces, _BATCH)):
            if limit is not None and tokens >= limit:
                break
            strings = [piece for piece in batch if isinstance(piece, str)]
            encoded = iter(_encode(tokenizer, strings))
            ids = [next(encoded) if isinstance(piece, str) else piece for piece in batch]
            builder.add(ids)
            tokens += sum(map(len, ids))
            done = int(100 * (texts.part or 0))
            while shown < done:
                progress.advance()
                shown += 1
            progress.doing(f"{tokens:,} tokens")


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
