#!/usr/bin/env python
"""Is `auto` as fast as the best fixed hierarchy? Chosen on half the prompts, told on the rest.

    scripts/compare_halves.py RUN [--against auto] [--fixed 'PATTERN'] [--hindsight] [--out FILE]

RUN is a folder that `hispec bench` wrote, with plain decoding, ``auto`` and fixed hierarchies among
its methods. Prompts are dealt out to two halves in turn, category by category. On either half the
fixed method with the least total time is chosen, and compared with ``auto`` on the other; both
directions together are the result: ``auto``'s speed over the chosen one's, by category, with a 95 %
bootstrap interval over prompts. Beside it the same ratio free of noise: counted passes times the
costs of passes measured on this machine. With ``--hindsight`` the fixed method is the best for the
very prompts that are told about, all of them: what nobody could have chosen beforehand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from hispec.bench.folder import Row, RunFolder
from hispec.bench.roster import exits_of
from hispec.bench.stats import ratio
from hispec.errors import HispecError
from hispec.files import write_whole
from hispec.hierarchy import Hierarchy
from hispec.loading import load
from hispec.model.device import dtype_name
from hispec.model.measured import cpu_name
from hispec.planner.cost_table import TARGET, CostTable
from hispec.planner.costs import cost_table

#: By method and item.
Rows = dict[str, dict[str, list[Row]]]
#: Bookkeeping and other engines: not what `auto` could have chosen.
NOT_FIXED = ("hf", "llama", "ar-fast")


def main(arguments: list[str] | None = None) -> int:
    """Prints the comparison; returns 1 if the run has nothing to compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--against", default="auto", help="the adaptive method")
    parser.add_argument("--fixed", default="*", metavar="PATTERN", help="methods to choose from")
    parser.add_argument("--hindsight", action="store_true", help="choose by the prompts themselves")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSONL")
    args = parser.parse_args(arguments)
    try:
        folder = RunFolder.open(args.run)
        costs = _costs(folder.settings)
    except HispecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if folder.provenance["cpu"] != cpu_name():
        print(f"Counted passes are priced on this machine, not on {folder.provenance['cpu']}.")
    rows: Rows = defaultdict(lambda: defaultdict(list))
    for row in folder.rows:
        if not row["error"]:
            rows[row["method"]][row["item"]].append(row)
    fixed = [
        name
        for name in rows
        if name != args.against and not name.startswith(NOT_FIXED) and fnmatch(name, args.fixed)
    ]
    if args.against not in rows or not fixed:
        print(f"{args.run} lacks {args.against} or anything to compare it with.", file=sys.stderr)
        return 1
    if not any(all(x in rows[name] for name in fixed) for x in rows[args.against]):
        print(f"{args.run} has no prompt that all methods have answered.", file=sys.stderr)
        return 1
    pairs = _chosen(rows, fixed, args.against, hindsight=args.hindsight)
    records = _compared(rows, pairs, args.against, costs)
    print(f"{'':18}{'answers':>8}{args.against + ' over the best fixed':>30}{'counted':>10}")
    for record in records:
        within = f"{record['ratio']:.3f}"
        if record["low"] is not None:  # one prompt says nothing about others
            within += f" [{record['low']:.3f}, {record['high']:.3f}]"
        counted = f"{record['counted']:.3f}" if record["counted"] else "-"
        print(f"{record['category']:18}{record['answers']:8}{within:>30}{counted:>10}")
    if args.out:
        provenance = {"run": args.run.name, **folder.provenance}
        lines = [provenance, *records]
        write_whole(args.out, "".join(json.dumps(line) + "\n" for line in lines))
    return 0


def _costs(settings: Mapping[str, Any]) -> CostTable:
    """Returns what the passes of a run's model and exits cost here."""
    exits = settings["exits"]
    lm = load(
        settings["model"],
        exits=exits if exits and Path(exits).is_dir() else None,
        dtype=dtype_name(getattr(torch, settings["dtype"])),
        device=settings["device"],
    )
    torch.set_num_threads(settings["threads"])
    used = [x["hierarchy"] for x in settings["methods"].values() if "hierarchy" in x]
    layers = exits_of(map(Hierarchy.from_json, used))
    label = lm.exits.fingerprint if lm.exits else "own"
    return cost_table(lm.model, {e: lm.head(e) for e in layers}, label=label)


def _chosen(
    rows: Rows, fixed: list[str], against: str, *, hindsight: bool
) -> list[tuple[str, str, str]]:
    """Returns what is compared: category, item, and the fixed method chosen elsewhere."""
    items = [x for x in rows[against] if all(x in rows[name] for name in fixed)]
    halves = _halves(items, rows[against])
    pairs: list[tuple[str, str, str]] = []
    for here, there in ((items, items),) if hindsight else (halves, halves[::-1]):
        best = min(fixed, key=lambda name: sum(_seconds(rows[name][x]) for x in here))
        print(f"chosen on {len(here)} answers, told on {len(there)}: {best}")
        pairs += [(rows[best][x][0]["category"], x, best) for x in there]
    return pairs


def _compared(
    rows: Rows, pairs: list[tuple[str, str, str]], against: str, costs: CostTable
) -> list[dict[str, Any]]:
    """Returns the ratios, of all answers and by category."""
    records = []
    for category in ("all", *dict.fromkeys(pair[0] for pair in pairs)):
        some = [pair for pair in pairs if category in ("all", pair[0])]
        one = [[row["decode_s"] for row in rows[name][x]] for _, x, name in some]
        other = [[row["decode_s"] for row in rows[against][x]] for _, x, _ in some]
        found = ratio(one, other, [rows[name][x][0]["prompt"] for _, x, name in some])
        theirs = [_counted(rows[name][x][0], costs) for _, x, name in some]
        mine = [_counted(rows[against][x][0], costs) for _, x, _ in some]
        records.append(
            {
                "category": category,
                "answers": len(some),
                "against": sorted({name for _, _, name in some}),
                "ratio": found.value,
                "low": found.low,
                "high": found.high,
                "counted": sum(theirs) / sum(mine) if all(theirs) and all(mine) else None,
            }
        )
    return records


def _halves(items: list[str], rows: dict[str, list[Row]]) -> tuple[list[str], list[str]]:
    """Deals prompts out in turn; both turns of a chat go to one half."""
    halves: tuple[list[str], list[str]] = ([], [])
    dealt: dict[str, int] = {}
    counts: dict[str, int] = defaultdict(int)
    for item in items:
        prompt, category = rows[item][0]["prompt"], rows[item][0]["category"]
        if prompt not in dealt:
            dealt[prompt] = counts[category] % 2
            counts[category] += 1
        halves[dealt[prompt]].append(item)
    return halves


def _seconds(rows: list[Row]) -> float:
    return statistics.median(row["decode_s"] for row in rows)


def _counted(row: dict[str, Any], costs: CostTable) -> float:
    """The time of an answer's passes by the table; 0 where that is not known.

    A pass above an exit that ran has only the newest row to lift through the layers below it; where
    the exit was left out, all rows.
    """
    seconds, known, below = 0.0, 0, 0
    for level in row["levels"]:
        name, passes = level["name"], level["passes"]
        if not passes:
            continue
        if name not in costs.depths:  # a separate model
            return 0.0
        ran = min(below / passes, 1.0)
        for rows, count in enumerate(level.get("passes_of", ())):
            lifted = costs.lifted_s(0, known) * ran + known * costs.layer_s[rows] * (1 - ran)
            seconds += count * (lifted + costs.pass_s(name, known, rows, 0.0))
        if name != TARGET:
            seconds += row["prompt_tokens"] * costs.prompt_s.get(name, 0.0)
            seconds += min(passes, row["passes"]) * costs.first_s(name, known)
        known, below = costs.depths[name], passes
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
