#!/usr/bin/env python3
"""What hierarchies would bring models and machines that are not at hand: the simulator's table.

    scripts/forecast_machines.py [--out FILE.jsonl]

Costs are lower bounds from sizes and data sheets (hispec/planner/devices.py). Acceptance is HSD's,
one rate an edge; the exits are HiSpec's, an eighth and a quarter of the layers. *Weak* and *strong*
exits agree with the target as the papers' do; *shipped* ones as SmolLM2-135M's trained exits do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hispec.files import write_whole
from hispec.hierarchy import eighth_and_quarter
from hispec.planner import devices
from hispec.planner.acceptance import Acceptance
from hispec.planner.cost_table import TARGET
from hispec.planner.shortest_path import shortest
from hispec.planner.simulator import forecast

#: How often the lower exit agrees with the target, the lower with the upper, the upper with the
#: target.
EXITS = {
    "weak": (0.40, 0.70, 0.45),
    "strong": (0.55, 0.80, 0.62),
    "shipped": (0.43, 0.71, 0.49),
}
#: Heads: the model's own, or a Llama block over its 8,192 most frequent tokens.
HEADS = {"own": devices.Head(), "trained": devices.Head(8192, 1)}
MACHINES = ("h100", "h200")
#: 70B in bf16 needs two of either.
MODELS = (("llama-3-8b", 1), ("llama-3-70b", 2))


def rows() -> Iterator[dict[str, Any]]:
    """Yields a forecast for each model, head and quality of the exits.

    Machines differ in tokens a second. Speed-ups are the same on all of them, as long as rows are
    free and bandwidth is the bound.
    """
    for name, count in MODELS:
        shape = devices.SHAPES[name]
        layers = eighth_and_quarter(shape.num_layers)
        lower, upper = (f"exit {layer}" for layer in layers)
        for head_name, head in HEADS.items():
            costs, *others = (
                devices.cost_table(
                    shape, devices.DEVICES[machine], dict.fromkeys(layers, head), devices=count
                )
                for machine in MACHINES
            )
            for exits, (low, between, high) in EXITS.items():
                edges = {(lower, TARGET): low, (lower, upper): between, (upper, TARGET): high}
                rates = Acceptance.constant(edges)
                one = [shortest(costs, rates, [level])[0] for level in (lower, upper)]
                single = min(one, key=lambda route: route.latency_s)
                best = shortest(costs, rates, [lower, upper])[0]
                yield {
                    "model": name,
                    "machines": count,
                    "head": head_name,
                    "exits": exits,
                    "plain_tok_per_s": [1 / x.plain_s for x in (costs, *others)],
                    "hispec_paper": forecast(((lower, 2), (upper, 4)), costs, rates).speedup,
                    "best_single": costs.plain_s / single.latency_s,
                    "best": costs.plain_s / best.latency_s,
                    "chain": [list(level) for level in best.chain],
                }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSONL")
    args = parser.parse_args(arguments)
    found = list(rows())
    plain = f"plain tok/s, {', '.join(MACHINES)}"
    print(f"| model | head | exits | {plain} | HiSpec 2/4 | one exit | best |")
    print("|---|---|---|---|---|---|---|")
    for row in found:
        chain = " → ".join(f"{name} x {window}" for name, window in row["chain"]) or "plain"
        speeds = ", ".join(f"{speed:.0f}" for speed in row["plain_tok_per_s"])
        print(
            f"| {row['model']} on {row['machines']} | {row['head']} | {row['exits']} | {speeds} | "
            f"{row['hispec_paper']:.2f} | {row['best_single']:.2f} | {row['best']:.2f} ({chain}) |"
        )
    if args.out:
        write_whole(args.out, "".join(json.dumps(row) + "\n" for row in found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
