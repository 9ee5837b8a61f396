#!/usr/bin/env python3
"""Exit heads side by side: what each agrees with, costs and is expected to bring.

    scripts/compare_heads.py --data train.jsonl --held-out heldout.jsonl --minutes 3 --out heads

Every kind of head, with all rows of the vocabulary and with the most frequent ones, is trained on
the same answers (what ``hispec distill`` wrote) for the same time, judged on the same held-out
answers, and its passes are timed on this machine. What decides is the speed-up to expect of a chain
that it drafts alone, at the best window: acceptance and cost together. A head of that exit, kind,
rows and minutes that is in DIR already is not trained again, so other data want another DIR. Writes
heads.jsonl and prints it as a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hispec.bench.provenance import collect
from hispec.cli import main as hispec
from hispec.errors import HispecError
from hispec.files import write_whole
from hispec.loading import load
from hispec.planner.calibrate import timed
from hispec_training.evaluate import ROUND, tokens_per_ms

KINDS = ("shared", "affine", "block", "lora")


def main(arguments: list[str] | None = None) -> int:
    """Trains, judges and times; returns 1 if a training failed, 2 on a mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", metavar="M")
    add("--data", nargs="+", required=True, metavar="FILE", help="what hispec distill wrote")
    add("--held-out", nargs="+", required=True, metavar="FILE", help="likewise")
    add("--exit", type=int, default=4, metavar="E", help="the layer")
    add("--minutes", type=float, default=3.0, help="of training, each")
    add("--heads", nargs="+", choices=KINDS, default=KINDS, help="which")
    add("--rows", nargs="+", type=int, default=[0, 8192], metavar="N", help="0: all")
    add("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(arguments)
    rows = []
    try:
        for kind in args.heads:
            for size in args.rows:
                folder = named(args, kind, size)
                if not (folder / "config.json").exists() and (code := train(args, kind, size)):
                    return code
                rows.append(judged(args, kind, folder))
                print(f"{folder.name}: {rows[-1]['top1']:.3f}", file=sys.stderr)
        provenance = collect(load(args.model))
    except HispecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = [json.dumps({**row, "provenance": provenance}) + "\n" for row in rows]
    write_whole(args.out / "heads.jsonl", "".join(lines))
    show(rows)
    return 0


def named(args: argparse.Namespace, kind: str, size: int) -> Path:
    """Returns the folder of a head; its name says what tells heads apart in one --out."""
    return args.out / f"exit{args.exit}-{kind}-{size or 'all'}-{args.minutes:g}min"


def train(args: argparse.Namespace, kind: str, size: int) -> int:
    """Trains one head in a folder of its own; states are computed once for all of them."""
    folder = named(args, kind, size)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    for name in ("cache", "held_out"):
        (args.out / name).mkdir(exist_ok=True)
        link = folder / "work" / name
        if not link.is_symlink():
            link.symlink_to((args.out / name).resolve(), target_is_directory=True)
    command = ["train", "--model", args.model, "--resume"]
    command += ["--data", *args.data, "--held-out", *args.held_out, "--exits", str(args.exit)]
    command += ["--head", kind, "--head-vocab", str(size), "--minutes", str(args.minutes)]
    return hispec([*command, "--out", str(folder)])


def judged(args: argparse.Namespace, kind: str, folder: Path) -> dict[str, Any]:
    """Returns a trained head's row."""
    config = json.loads((folder / "config.json").read_text())
    (entry,) = config["exits"]
    table = entry["acceptance"]
    lm = load(args.model, exits=folder)
    costs = timed(lm)
    runs = [table["mean_run"][str(window)] for window in range(1, ROUND + 1)]
    rate, window = tokens_per_ms(runs, costs, args.exit)
    return {
        "head": kind,
        "rows": entry["vocab_size"] or lm.model.config.vocab_size,
        "steps": config["training"]["steps"],
        "file_mb": sum(x.stat().st_size for x in folder.glob("exit_*.safetensors")) / 1e6,
        "top1": table["top1"],
        "at_root": table["by_offset"][0],
        "draft_ms": 1e3 * costs.pass_s(f"exit {args.exit}", 0, 1),
        "round_ms": 1e3 * costs.first_s(f"exit {args.exit}", 0),
        "plain_ms": 1e3 * costs.plain_s,
        "window": window,
        "tok_per_ms": rate,
        "speedup": rate * 1e3 * costs.plain_s,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a table, the best head first."""
    print("| head | rows | steps | MB | top-1 | at the root | draft ms | window | expected |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: -row["speedup"]):
        print(
            f"| {row['head']} | {row['rows']:,} | {row['steps']} | {row['file_mb']:.1f} "
            f"| {row['top1']:.3f} | {row['at_root']:.3f} | {row['draft_ms']:.2f} "
            f"| {row['window']} | {row['speedup']:.3f} |"
        )


if __name__ == "__main__":
    raise SystemExit(main())
