#!/usr/bin/env python3
"""Forecasts beside measurements: is the planner right?

    scripts/check_planner.py --model smollm2-135m --prompts question.jsonl --limit 60 --out check
    scripts/check_planner.py --model smollm2-135m --synthetic --out check

The first calibrates on every other prompt, forecasts the presets, what the planner would run, and
the best hierarchies of one and of several levels, and measures all of them on the other prompts.
The second lets exits agree as often as chosen (hispec/planner/synthetic.py) and compares tokens a
pass (which are drawn: luck is part of the error), passes of every level and a round's time with the
simulator: the cost model apart from the exits. Both print a table and write rows.jsonl, one object
a hierarchy, with what they were measured on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from hispec.advice import chain_of
from hispec.bench.prompts import load_prompts
from hispec.bench.provenance import collect
from hispec.bench.report import write_report
from hispec.bench.roster import engines
from hispec.bench.run import Plan
from hispec.bench.sweep import default_exits
from hispec.commands.bench import execute
from hispec.commands.plan import calibrated, halves, settled
from hispec.errors import HispecError
from hispec.files import write_whole
from hispec.generation import LM
from hispec.hierarchy import AR, Hierarchy, Level
from hispec.loading import load
from hispec.planner.calibrate import fitted
from hispec.planner.choose import Candidate, candidates, finalists
from hispec.planner.cost_table import CostTable
from hispec.planner.costs import cost_table
from hispec.planner.simulator import Forecast, forecast
from hispec.planner.synthetic import Script, scripted
from hispec.result import Result
from hispec.streaming import Stream

#: What must be forecast within a tenth.
PRESETS = ("auto", "hd", "layerskip", "hispec")
#: Tokens that plain decoding and a hierarchy of synthetic exits yield in turn.
TURN = 12
#: Synthetic exits' rates: of each to agree with the next, where the one below agrees and where not.
SYNTHETIC = (
    ((4, 2), ((0.6, 0.6),)),
    ((4, 4), ((0.85, 0.85),)),
    ((8, 3), ((0.75, 0.75),)),
    ((4, 2, 8, 4), ((0.7, 0.7), (0.8, 0.6))),
    ((4, 1, 8, 2), ((0.8, 0.8), (0.9, 0.5))),
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one of the two checks; returns 1 if a forecast is off by more than it may be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", metavar="M")
    parser.add_argument("--exits", metavar="DIR")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", default="builtin", metavar="FILE")
    parser.add_argument("--limit", type=int, metavar="K")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="R")
    parser.add_argument("--synthetic", action="store_true", help="chosen acceptance instead")
    parser.add_argument("--tokens", type=int, default=500, metavar="N", help="of synthetic runs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(arguments)
    try:
        lm = load(args.model, exits=args.exits, dtype=args.dtype)
        rows = synthetic(lm, args) if args.synthetic else real(lm, args)
    except HispecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = "synthetic" if args.synthetic else "rows"
    lines = [json.dumps(row) + "\n" for row in rows]
    write_whole(args.out / f"{name}.jsonl", "".join(lines))
    write_whole(args.out / f"{name}-provenance.json", json.dumps(collect(lm), indent=1) + "\n")
    show(rows)
    bound = 0.05 if args.synthetic else 0.1
    return int(any(abs(row["error"]) > bound for row in rows if row["counts"]))


def real(lm: LM, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns forecasts on half of the prompts and measurements on the other."""
    args.raw = False
    first, second = halves(load_prompts(args.prompts, args.limit))
    exits = default_exits(lm.model.config.num_layers, lm.exits.exit_layers if lm.exits else ())
    calibration = calibrated(lm, first.prompts, exits, args)
    found = candidates(lm, calibration, exits)
    plain = calibration.replay(lm, AR).latency_s
    presets = []
    for name in PRESETS:
        hierarchy = replace(lm.hierarchy(name), name=name)
        done = calibration.replay(lm, hierarchy)
        presets.append(Candidate(hierarchy, done, plain / done.latency_s))
    chains = [x for x in found if x.hierarchy.levels and not x.hierarchy.sources]
    single = [x for x in chains if len(x.hierarchy.levels) == 1][:1]
    several = [x for x in chains if len(x.hierarchy.levels) > 1][:1]
    chosen = {x.hierarchy.name: x for x in [*presets, *finalists(found), *single, *several]}
    hierarchies = {name: candidate.hierarchy for name, candidate in chosen.items()}
    settings = Plan(second, args.max_new_tokens, args.repeats)
    folder = execute(settings, args.out / "measured", *engines(lm, hierarchies))
    methods = write_report(folder)["methods"]
    rows = []
    for name, candidate in chosen.items():
        entry = methods[name]
        rows.append(
            {
                "name": name,
                "hierarchy": candidate.hierarchy.to_json(),
                "counts": name in PRESETS,
                "predicted": candidate.speedup,
                "measured": entry["speedup"],
                "low": entry["speedup_low"],
                "high": entry["speedup_high"],
                "error": candidate.speedup / entry["speedup"] - 1,
                "predicted_tokens_per_pass": candidate.done.tokens_per_pass,
                "tokens_per_pass": entry["block_efficiency"],
                "one_level": candidate in single,
                "levels": candidate in several,
                "mismatched_prompts": entry["mismatched_prompts"],
            }
        )
    print(f"The planner would run {settled(methods, found).hierarchy}")
    if single and several:
        one, more = (methods[x[0].hierarchy.name]["speedup"] for x in (single, several))
        print(
            f"The best chain of several levels over the best of one: "
            f"{several[0].speedup / single[0].speedup:.3f} expected, {more / one:.3f} measured"
        )
    for doubt in calibration.doubts():
        print(doubt)
    return rows


def synthetic(lm: LM, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns simulations of exits with chosen rates, and what the engine made of the same.

    The machine is not the same from one second to the next. So costs are measured in every repeat,
    plain decoding and the hierarchy take turns every few tokens, and each forecast is held against
    the measurement next to it.
    """
    prompt = lm.encode("Tell a long story about a lighthouse.")
    beside = LM(lm.checkpoint, lm.model)  # has a cache of its own
    lm.eos = beside.eos = frozenset()  # the text goes on as long as is wanted
    text = lm.generate(prompt, hierarchy=AR, max_new_tokens=args.tokens + 64).token_ids
    runs = [_Run(numbers, rates) for numbers, rates in SYNTHETIC]
    exits = sorted({layer for run in runs for layer in run.hierarchy.exit_layers})
    for layer in exits:
        lm.head(layer)
    for repeat in range(args.repeats):

        def script(run: _Run, layers: Sequence[int], seed: int = repeat) -> Script:
            size = lm.model.config.vocab_size
            return Script([*prompt, *text], layers, run.rates, size, seed=seed)

        with scripted(lm._heads, script(runs[-1], exits)):
            heads = {layer: lm.head(layer) for layer in exits}
            costs = cost_table(lm.model, heads, len(prompt) + args.tokens // 2, anew=True)
        for run in runs:
            chosen = script(run, run.hierarchy.exit_layers)
            with scripted(lm._heads, chosen):
                plain, done = by_turns(
                    one.stream(prompt, hierarchy=x, max_new_tokens=args.tokens, learn=False)
                    for one, x in ((beside, AR), (lm, run.hierarchy))
                )
            fit = fitted(costs, plain)
            assert done.token_ids == plain.token_ids, "drafting changed a token"
            wanted = forecast(chain_of(run.hierarchy), fit, chosen.acceptance())
            run.add(plain, done, wanted, fit)
        print(f"repeat {repeat + 1} of {args.repeats}", file=sys.stderr)
    return [run.row() for run in runs]


def by_turns(streams: Iterable[Stream]) -> list[Result]:
    """Walks streams that take turns; the time of a result's decoding is that of its own turns."""
    both = list(streams)
    walks = [stream.tokens() for stream in both]
    taken = [0.0 for _ in walks]
    for walk in walks:
        next(walk)  # the prompt
    going = list(range(len(walks)))
    while going:
        for place in list(going):
            started = time.perf_counter()
            some = sum(1 for _ in islice(walks[place], TURN))
            taken[place] += time.perf_counter() - started
            if some < TURN:
                going.remove(place)
    return [replace(x.result, decode_s=s) for x, s in zip(both, taken, strict=True)]


class _Run:
    """A hierarchy of scripted exits: what was forecast and what was measured, repeat by repeat."""

    def __init__(self, numbers: Sequence[int], rates: Sequence[tuple[float, float]]) -> None:
        levels = tuple(Level(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True))
        name = "-".join(f"{level.exit_layer}x{level.window}" for level in levels)
        self.hierarchy, self.rates = Hierarchy(levels, name), rates
        self.repeats: list[dict[str, Any]] = []
        self.committed = 0
        self.passes: Counter[str] = Counter()

    def add(self, plain: Result, done: Result, wanted: Forecast, costs: CostTable) -> None:
        """Takes a repeat down."""
        self.committed += done.committed
        self.passes.update({level.name: level.passes for level in done.levels})
        self.repeats.append(
            {
                "predicted": wanted.speedup,
                "measured": plain.decode_s / plain.committed / done.decode_s * done.committed,
                "predicted_round_ms": 1e3 * wanted.latency_s * wanted.tokens_per_pass,
                "round_ms": 1e3 * done.decode_s / done.passes,
                "plain_ms": 1e3 * plain.decode_s / plain.passes,
                "level_ms": {x.name: 1e3 * x.time_s / x.passes for x in done.levels},
            }
        )
        self.predicted, self.costs = wanted, costs

    def row(self) -> dict[str, Any]:
        """Returns all repeats as one: the medians of times, tokens of all rounds.

        How many tokens a round has is a matter of draws, and known the better the more there are.
        """
        measured = [repeat["measured"] for repeat in self.repeats]
        target = self.passes["target"]
        rounds = statistics.median(x["plain_ms"] / x["round_ms"] for x in self.repeats)
        found = self.committed / target * rounds
        predicted = statistics.median(repeat["predicted"] for repeat in self.repeats)
        return {
            "name": f"{self.hierarchy.name} {self.rates}",
            "counts": True,
            "predicted": predicted,
            "measured": found,
            "low": min(measured),
            "high": max(measured),
            "error": predicted / found - 1,
            "round_error": statistics.median(
                x["predicted_round_ms"] / x["round_ms"] - 1 for x in self.repeats
            ),
            "predicted_tokens_per_pass": self.predicted.tokens_per_pass,
            "tokens_per_pass": self.committed / target,
            "predicted_passes": dict(self.predicted.passes),
            "passes": {name: count / target for name, count in self.passes.items()},
            "repeats": self.repeats,
            "last_costs": self.costs.to_json(),
        }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a table."""
    heads = f"{'error':>8}{'tokens a pass':>18}{'a round':>10}"
    print(f"{'':34}{'predicted':>10}{'measured':>10}{'':16}{heads}")
    for row in rows:
        within = f"[{row['low']:.2f}, {row['high']:.2f}]" if row["low"] else ""
        time = f"{row['round_error']:.1%}" if "round_error" in row else ""
        tokens = f"{row['predicted_tokens_per_pass']:.2f} / {row['tokens_per_pass']:.2f}"
        print(
            f"{row['name'][:34]:34}{row['predicted']:10.2f}{row['measured']:10.2f} {within:15}"
            f"{row['error']:8.1%}{tokens:>18}{time:>10}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
