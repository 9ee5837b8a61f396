"""``hispec bench report``: rebuilds the report of a run, or compares several; needs no model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hispec.errors import HispecError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder of hispec bench")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where the report goes (default: the run's folder, for a comparison the current one)",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def main(args: argparse.Namespace) -> int:
    """Writes the reports and prints the tables."""
    from hispec.bench.folder import RunFolder
    from hispec.bench.report import write_comparison, write_report

    folders = [RunFolder.open(Path(run)) for run in args.runs]
    empty = next((folder.path for folder in folders if not folder.rows), None)
    if empty:
        raise HispecError(f"{empty} has no rows yet. Let its run finish a prompt.")
    if len(folders) == 1:
        place, name = Path(args.out or folders[0].path), "report"
        document = write_report(folders[0], place)
    else:
        place, name = Path(args.out or "."), "comparison"
        document = write_comparison(folders, place)
    print((place / f"{name}.md").read_text(encoding="utf-8"))
    print(f"The report with pictures: {place / name}.html", file=sys.stderr)
    if args.json:
        print(json.dumps(document))
    return 0
