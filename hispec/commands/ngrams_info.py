"""``hispec ngrams info``: what an n-gram database holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="a store or a history")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def main(args: argparse.Namespace) -> int:
    """Prints the facts of each file."""
    found = [describe(Path(name).expanduser()) for name in args.files]
    for facts in found:
        print(facts["file"])
        for name, value in facts.items():
            if name != "file":
                shown = f"{value:,}" if isinstance(value, int) else value
                print(f"  {name.replace('_', ' '):<16} {shown}")
    if args.json:
        print(json.dumps(found))
    return 0


def is_history(path: Path) -> bool:
    """Whether a file is an SQLite database."""
    try:
        with open(path, "rb") as file:
            return file.read(6) == b"SQLite"
    except OSError:
        return False  # the store says what is wrong with it


def describe(path: Path) -> dict[str, Any]:
    """Returns what a database holds.

    Raises:
        DatabaseError: it is none, or it is damaged.
    """
    from hispec.sources import history_file
    from hispec.sources.store import Store

    if is_history(path):
        with history_file.reading(path) as file:
            counts = history_file.read_counts(file)
            waiting = history_file.waiting(file)
            return {
                "file": str(path),
                "kind": "history",
                "rows": len(counts.keys),
                "successors": len(counts),
                "waiting_texts": len(waiting),
                "waiting_tokens": sum(len(tokens) for _, tokens in waiting),
                "num_bytes": path.stat().st_size,
                "tokenizer": history_file.tokenizer_of(file),
            }
    store = Store(path)
    names = ("num_tokens", "num_texts", "longest", "least", "width")
    return {
        "file": str(path),
        "kind": store.facts.get("kind", "corpus"),
        "rows": len(store.counts.keys),
        "successors": len(store.counts),
        **{name: store.fact(name) for name in names},
        "num_bytes": path.stat().st_size,
        "tokenizer": store.facts.get("tokenizer", ""),
    }
