"""``hispec bench sweep``: which exits and windows are fastest for this model on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hispec.commands import bench, options
from hispec.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_model(parser)
    bench.add_prompts(parser)
    parser.add_argument(
        "--exit-layers", metavar="LIST", help="such as 4,8 (default: the trained exits)"
    )
    parser.add_argument(
        "--windows", default="1,2,3,4,6,8", metavar="LIST", help="of the drafting exit"
    )
    parser.add_argument(
        "--check-windows", default="2,4,6,8", metavar="LIST", help="of the checking exit"
    )
    parser.add_argument(
        "--finalists", type=int, default=3, metavar="N", help="of each kind, measured again"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="of the finalists")
    parser.add_argument("--out", metavar="DIR", help="the sweep's folder; unfinished ones go on")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")
    parser.epilog = (
        "The grid has single exits, strict and ranking, and pairs of strict ones. Two exits that "
        "rank, as the hispec preset has for trained exits, and exits over databases are not in it: "
        "compare them with hispec bench --methods, or let hispec plan choose."
    )


def main(args: argparse.Namespace) -> int:
    """Runs both stages, writes ``hierarchies.json`` and ``sweep.html``, prints the choice."""
    windows = whole_numbers("--windows", args.windows)
    checks = whole_numbers("--check-windows", args.check_windows)
    wanted = whole_numbers("--exit-layers", args.exit_layers, 0) if args.exit_layers else None
    if args.finalists < 1:
        raise UsageError(f"--finalists must be at least 1, got {args.finalists}.")
    from hispec.bench.prompts import load_prompts
    from hispec.bench.run import Plan

    prompts = load_prompts(args.prompts, args.limit)
    if prompts.is_spec_bench:
        raise UsageError(
            "Spec-Bench is what results are reported on, so nothing is tuned on it. Give other "
            "prompts, such as --prompts dolly or a held-out file."
        )
    grid_plan = Plan(prompts, args.max_new_tokens, 1, args.raw)
    final_plan = Plan(prompts, args.max_new_tokens, args.repeats, args.raw)
    from hispec.bench import sweep
    from hispec.bench.report import write_report
    from hispec.bench.roster import engines
    from hispec.files import write_whole

    lm, exact = bench.load_exact(args)
    num_layers = lm.model.config.num_layers
    trained = lm.exits.exit_layers if lm.exits else ()
    hierarchies = sweep.grid(wanted or sweep.default_exits(num_layers, trained), windows, checks)
    for hierarchy in hierarchies.values():
        hierarchy.check(num_layers)
    out = Path(args.out) if args.out else bench.default_folder("sweep", args.model)
    print(f"{len(hierarchies)} hierarchies on {len(prompts.prompts)} prompts.", file=sys.stderr)
    first = write_report(
        bench.execute(grid_plan, out / "grid", *engines(lm, hierarchies, exact=exact))
    )
    again = sweep.finalists(first, hierarchies, args.finalists)
    final = write_report(bench.execute(final_plan, out / "final", *engines(lm, again, exact=exact)))
    chosen = sweep.best(final, again)
    write_whole(out / "hierarchies.json", json.dumps(chosen, indent=1) + "\n")
    write_whole(out / "sweep.html", sweep.render(first, hierarchies, final, chosen))
    print((out / "final" / "report.md").read_text(encoding="utf-8"))
    print(json.dumps(chosen, indent=1))
    print(f"Heat maps: {out / 'sweep.html'}", file=sys.stderr)
    if args.json:
        print(json.dumps({"hierarchies": chosen, "grid": first, "final": final}))
    failed = [*first["methods"].values(), *final["methods"].values()]
    return 1 if any(entry["error"] for entry in failed) else 0


def whole_numbers(option: str, text: str, least: int = 1) -> list[int]:
    """Returns the numbers of a list such as ``1,2,4``, ascending.

    Raises:
        UsageError: something else is in it, or a number below ``least``.
    """
    try:
        numbers = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise UsageError(f"{option} should be numbers such as 1,2,4, got {text!r}.") from None
    if not numbers or numbers[0] < least:
        raise UsageError(f"{option} should be numbers of at least {least}, got {text!r}.")
    return numbers
