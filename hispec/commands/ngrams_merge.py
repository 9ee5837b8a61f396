"""``hispec ngrams merge``: several databases of one tokenizer become one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hispec.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="stores, or histories")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the database to write, or to replace"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def main(args: argparse.Namespace) -> int:
    """Adds the counts of all files; stores make a store, histories a history.

    What ``--out`` held before is gone, so a second run ends with the same file.
    """
    from hispec.commands.ngrams_info import describe, is_history
    from hispec.sources import history_file
    from hispec.sources.build import merge_stores
    from hispec.sources.store import Store

    paths = [Path(name).expanduser() for name in args.files]
    out = Path(args.out).expanduser()
    if any(path.absolute() == out.absolute() for path in paths):
        raise UsageError(f"--out {out} is one of the files to merge. Give another name.")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder. Give a file in it.")
    histories = [is_history(path) for path in paths]
    if all(histories):
        tokenizer, records = None, []
        for path in paths:
            with history_file.reading(path, tokenizer) as file:
                tokenizer = history_file.tokenizer_of(file)
                records.append(history_file.records_of(file))
        assert tokenizer is not None, "at least one file is required"
        history_file.replace_records(out, tokenizer, records)
    elif any(histories):
        raise UsageError("stores and histories do not mix. Merge those of one kind.")
    else:
        first = Store(paths[0])
        merge_stores([Store(path, first.facts.get("tokenizer")) for path in paths], out)
    print(f"{out}: {len(paths)} databases", file=sys.stderr)
    if args.json:
        print(json.dumps(describe(out)))
    return 0
