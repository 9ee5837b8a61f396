"""``hispec plan``: the fastest hierarchy for this model on this machine, forecast and measured."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.commands import bench, options
from hispec.errors import HispecError, UsageError

if TYPE_CHECKING:
    from hispec.bench.prompts import PromptSet
    from hispec.generation import LM
    from hispec.planner.choose import Candidate

#: Tokens of every answer, where nothing else is said: a minute on a small model.
TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_model(parser)
    bench.add_prompts(parser)
    options.add_level(
        parser, "a smaller model of the same vocabulary that may draft, too (repeatable)"
    )
    parser.set_defaults(max_new_tokens=TOKENS)
    parser.add_argument("--repeats", type=int, default=2, metavar="R", help="of what is measured")
    parser.add_argument(
        "--out", metavar="PLAN.json", help="also write the plan here, and its picture beside it"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON document")
    parser.epilog = (
        "Half of the prompts calibrate, the other half measure. The plan is kept for this model, "
        "its exits and this dtype, and is what --hierarchy auto runs from then on."
    )


def main(args: argparse.Namespace) -> int:
    """Calibrates, plans, measures and saves; returns 1 if a measured method failed."""
    from hispec.bench.prompts import load_prompts
    from hispec.bench.run import Plan as Settings

    prompts = load_prompts(args.prompts, args.limit)
    out = Path(args.out) if args.out else None
    if out and out.suffix != ".json":
        raise UsageError(f"--out should end with .json, got {args.out}.")
    if prompts.is_spec_bench:
        raise UsageError(
            "Spec-Bench is what results are reported on, so nothing is planned on it. Give other "
            "prompts, such as --prompts builtin or a held-out file."
        )
    calibrating, measuring = halves(prompts)
    settings = Settings(measuring, args.max_new_tokens, args.repeats, args.raw)
    from hispec.bench.sweep import default_exits
    from hispec.planner.choose import candidates, finalists

    lm, exact = bench.load_exact(args)
    exits = default_exits(lm.model.config.num_layers, lm.exits.exit_layers if lm.exits else ())
    calibration = calibrated(lm, calibrating.prompts, exits, args)
    found = candidates(lm, calibration, exits, args.level)
    chosen = finalists(found)
    document = _measured(settings, lm, chosen, args, exact=exact)
    if not any(entry["speedup"] for name, entry in document["methods"].items() if name != "ar"):
        raise HispecError(
            "nothing could be measured beside plain decoding, so no plan was made. The errors "
            "above say why."
        )
    best = settled(document["methods"], found)
    record = described(lm, calibration, found, document, best)
    _save(lm, best, record, out)
    print(table(found, document["methods"], best))
    for doubt in calibration.doubts():
        print(doubt, file=sys.stderr)
    if args.json:
        print(json.dumps({**best.hierarchy.to_json(), "plan": record}))
    return 1 if any(entry["error"] for entry in document["methods"].values()) else 0


def halves(prompts: PromptSet) -> tuple[PromptSet, PromptSet]:
    """Returns every other prompt, and the rest; all of them twice where there are fewer than 4."""
    from dataclasses import replace

    if len(prompts.prompts) < 4:
        return prompts, prompts
    first, second = prompts.prompts[0::2], prompts.prompts[1::2]
    return replace(prompts, prompts=first), replace(prompts, prompts=second)


def calibrated(lm: LM, prompts: Any, exits: Any, args: argparse.Namespace) -> Any:
    """Returns the calibration on the first turn of every prompt that fits; shows how far it is."""
    from hispec.bench.progress import Progress
    from hispec.bench.prompts import encode
    from hispec.planner.calibrate import calibrate

    asked = [encode(lm, prompt, raw=args.raw) for prompt in prompts]
    models = getattr(args, "level", ())
    contexts = [lm.model.config.max_positions, *(lm.separate(x).context for x in models)]
    room = min(contexts) - args.max_new_tokens
    asked = [ids for ids in asked if len(ids) <= room]
    if not asked:
        raise UsageError(
            f"no prompt leaves room for {args.max_new_tokens} new tokens in a context of "
            f"{room + args.max_new_tokens}. Give shorter ones."
        )
    with Progress(len(asked) + 1) as progress:

        def tell(what: str) -> None:
            progress.doing(what)
            progress.advance()

        return calibrate(lm, asked, exits, args.max_new_tokens, tell, models)


def _measured(
    settings: Any, lm: LM, chosen: list[Candidate], args: argparse.Namespace, *, exact: bool
) -> dict[str, Any]:
    from hispec.bench.report import write_report
    from hispec.bench.roster import engines

    hierarchies = {candidate.hierarchy.name: candidate.hierarchy for candidate in chosen}
    folder = bench.default_folder("plan", args.model)
    return write_report(bench.execute(settings, folder, *engines(lm, hierarchies, exact=exact)))


def settled(methods: dict[str, Any], found: list[Candidate]) -> Candidate:
    """Returns the candidate to run: the best forecast of those that may be the fastest.

    Measured differences of a few per cent are mostly chance, which a forecast does not have. So
    what counts is the forecast, among all whose interval reaches the fastest measured one; and
    plain decoding where either says that nothing is gained.

    Args:
        methods: measured, by name.
        found: candidates, the best forecast first; plain decoding is among them.
    """
    speed = {x.hierarchy.name: methods.get(x.hierarchy.name) for x in found}
    known = {name: entry for name, entry in speed.items() if entry and entry["speedup"]}
    top = max((entry["speedup"] for name, entry in known.items() if name != "ar"), default=0.0)
    for candidate in found:
        name = candidate.hierarchy.name
        if name == "ar" or name not in known or top <= 1.0:
            continue
        entry = known[name]
        gains = min(entry["speedup"], candidate.speedup) > 1.0
        if gains and (entry["speedup_high"] or entry["speedup"]) >= top:
            return candidate
    return next(x for x in found if x.hierarchy.name == "ar")


def described(
    lm: LM, calibration: Any, found: list[Candidate], document: dict[str, Any], best: Candidate
) -> dict[str, Any]:
    """Returns what a plan's file says besides its hierarchy."""
    from hispec.planner.plan import made_for

    methods = document["methods"]
    return {
        "made_for": made_for(lm, best.hierarchy),
        "date": document["provenance"]["date"],
        "prompts": document["settings"]["prompts"],
        "rounds": calibration.roots,
        "chosen": best.hierarchy.name,
        "alternatives": [
            {
                "hierarchy": candidate.hierarchy.to_json(),
                "predicted_speedup": candidate.speedup,
                "predicted_tokens_per_pass": candidate.done.tokens_per_pass,
                "parts_ms_per_token": {
                    name: 1e3 * seconds / candidate.done.tokens
                    for name, seconds in candidate.done.parts.items()
                },
                "measured": {
                    key: methods[candidate.hierarchy.name][key]
                    for key in ("speedup", "speedup_low", "speedup_high", "block_efficiency")
                }
                if candidate.hierarchy.name in methods
                else None,
            }
            for candidate in found
        ],
        "costs": calibration.costs.to_json(),
        "acceptance": calibration.acceptance.to_json(),
    }


def _save(lm: LM, best: Candidate, record: dict[str, Any], out: Path | None) -> None:
    from hispec.bench.plan_page import render
    from hispec.files import write_whole
    from hispec.planner.plan import Plan, saved_path

    plan = Plan(best.hierarchy, record)
    places = [saved_path(lm), *([out] if out else [])]
    for place in places:
        plan.save(place)
    picture = (out or saved_path(lm)).with_suffix(".html")
    write_whole(picture, render(plan))
    print(f"The plan: {out or places[0]}; with a picture: {picture}", file=sys.stderr)


def table(found: list[Candidate], methods: dict[str, Any], best: Candidate) -> str:
    """Returns the measured hierarchies, predicted against measured, as text."""
    lines = [f"{'':2}{'':14}{'predicted':>10}{'measured':>22}{'tokens a pass':>20}"]
    for candidate in found:
        name, hierarchy = candidate.hierarchy.name, candidate.hierarchy
        entry = methods.get(name)
        if not entry or entry["speedup"] is None:
            continue
        low, high = entry["speedup_low"], entry["speedup_high"]
        within = f" [{low:.2f}, {high:.2f}]" if low is not None else ""
        tokens = f"{candidate.done.tokens_per_pass:.2f} / {entry['block_efficiency']:.2f}"
        mark = "* " if candidate is best else "  "
        lines.append(
            f"{mark}{name:14}{candidate.speedup:10.2f}{entry['speedup']:8.2f}{within:14}"
            f"{tokens:>20}  {str(hierarchy).partition(': ')[2]}"
        )
    return "\n".join(lines)
