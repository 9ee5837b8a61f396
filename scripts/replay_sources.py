"""Walks the databases over answers that are known: how many tokens would a full pass have yielded?

    python scripts/replay_sources.py answers.jsonl [--history FILE] [--corpus FILE]
        [--sources context,history,corpus,recycle] [--budgets 1,4,8,16]
        [--costs 1:1,8:1.08,32:2.4] [--grades]

Needs no model: drafting decides how many tokens a pass yields, never which, so the block efficiency
of greedy decoding can be read off the greedy answers. A row has `prompt_ids` and `output_ids` (or
`response_ids`, as hispec distill writes them); with `top_ids`, the target's likeliest ids at each
place of the answer, recycling learns from them, though not from rejected nodes as it would in
earnest. Prints block efficiency by category, for chains and for trees of each size. With --costs,
trees are no wider than pays at these times by width, and tokens a unit of time say more. With
--grades, how often each kind of guess stood where its parent did: what the priors should be.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from hispec.drafter import Drafter
from hispec.hierarchy import SOURCES, Hierarchy
from hispec.jsonl import read_objects
from hispec.odds import Odds
from hispec.planner.cost_table import filled
from hispec.planner.prices import Prices
from hispec.sources import Source
from hispec.sources.context import Context
from hispec.sources.corpus import Corpus
from hispec.sources.history import History
from hispec.sources.recycle import Recycle
from hispec.sources.store import Store
from hispec.tree import Tree


def open_sources(args: argparse.Namespace, vocab_size: int) -> list[Source]:
    wanted = args.sources.split(",")
    found: list[Source] = []
    if "context" in wanted:
        found.append(Context())
    if "history" in wanted:
        base = Store(args.history) if args.history else None
        found.append(History(None, base.facts["tokenizer"] if base else "", vocab_size, base=base))
    if "corpus" in wanted and args.corpus:
        found.append(Corpus(Store(args.corpus), vocab_size))
    if "recycle" in wanted:
        found.append(Recycle(vocab_size))
    return found


class Tally:
    """Passes and committed tokens, and how each grade fared."""

    def __init__(self) -> None:
        self.passes: dict[str, int] = defaultdict(int)
        self.tokens: dict[str, int] = defaultdict(int)
        self.time: dict[str, float] = defaultdict(float)  # in passes of one row
        self.stood: dict[tuple[str, int], float] = defaultdict(float)
        self.seen: dict[tuple[str, int], float] = defaultdict(float)
        self.proposing_s: list[float] = []

    def efficiency(self, category: str) -> float:
        return self.tokens[category] / max(self.passes[category], 1)


def replay(
    row: dict,
    sources: list[Source],
    hierarchy: Hierarchy,
    odds: Odds,
    tally: Tally,
    costs: list[float] | None = None,
) -> None:
    prompt, answer = row["prompt_ids"], row.get("output_ids") or row["response_ids"]
    tops = np.array(row["top_ids"]) if "top_ids" in row else None
    drafter = Drafter(sources, hierarchy, Prices(costs, {}) if costs else None, odds)
    text = [*prompt, answer[0]]
    drafter.begin(text)
    done = 1
    while done < len(answer):
        started = time.perf_counter()
        tree = Tree(text[-1], len(text) - 1)
        drafter.grow(tree, 0, len(answer) - done, hierarchy.nodes, ())
        tally.proposing_s.append(time.perf_counter() - started)
        node, origins = 0, []
        while done + len(origins) + 1 < len(answer):
            child = tree.child(node, answer[done + len(origins)])
            if child is None:
                break
            node = child
            origins.append(tree.origins[child])
        committed = answer[done : done + len(origins) + 1]  # and the bonus
        if tops is not None:
            drafter.observe(
                [text[-1], *committed[:-1]],
                tops[done - 1 : done - 1 + len(committed)],
                [text[-2], text[-1], *committed[:-1]][: len(committed)],
            )
        drafter.commit(committed, [*origins, "target"], len(tree))
        tally.time[row["category"]] += costs[len(tree)] if costs else 1.0
        text += committed
        done += len(committed)
        tally.passes[row["category"]] += 1
        tally.tokens[row["category"]] += len(committed)
    drafter.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("answers", type=Path)
    parser.add_argument("--history", type=Path, help="a store of the model's earlier answers")
    parser.add_argument("--corpus", type=Path, help="a store of other text")
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--budgets", default="1,4,8,16")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--learn", action="store_true", help="texts learn from those before")
    parser.add_argument("--grades", action="store_true", help="print how each grade fared")
    parser.add_argument(
        "--costs", help="time of a pass by width, e.g. 1:1,4:1.03,8:1.08,16:1.45,32:2.4"
    )
    args = parser.parse_args()
    pairs = [pair.split(":") for pair in args.costs.split(",")] if args.costs else []
    costs = filled({int(width): float(time) for width, time in pairs}) if pairs else None
    rows = [row for _, row in read_objects(args.answers)][: args.limit]
    rows = [row for row in rows if len(row.get("output_ids") or row["response_ids"]) > 1]
    vocab_size = 1 + max(
        max(row["prompt_ids"] + (row.get("output_ids") or row["response_ids"])) for row in rows
    )
    vocab_size = max(vocab_size, 49_152)
    results: dict[str, Tally] = {}
    for budget in map(int, args.budgets.split(",")):
        for shape in ("chain", "tree"):
            sources = open_sources(args, vocab_size)
            hierarchy = Hierarchy(
                sources=tuple((source.name, budget) for source in sources),
                nodes=budget,
                branches=shape == "tree",
            )
            tally = results[f"{shape} {budget}"] = Tally()
            shared = Odds()
            for row in rows:
                odds = shared if args.learn else Odds()
                if not args.learn:
                    for source in sources:
                        source.reset()
                replay(row, sources, hierarchy, odds, tally, costs)
                if not args.learn or row is rows[-1]:
                    collect(odds, sources, tally)
    show(results, rows)
    if args.grades:
        show_grades(results[list(results)[-1]])


def collect(odds: Odds, sources: list[Source], tally: Tally) -> None:
    for source in sources:
        for grade, (seen, stood) in enumerate(odds.counted(source.name, source.priors)):
            tally.seen[source.name, grade] += seen
            tally.stood[source.name, grade] += stood


def show(results: dict[str, Tally], rows: list[dict]) -> None:
    categories = sorted({row["category"] for row in rows})
    print(f"{len(rows)} answers; tokens a full pass")
    print(f"{'':24}" + "".join(f"{name:>10}" for name in results))
    for category in categories:
        print(
            f"{category[:24]:24}"
            + "".join(f"{tally.efficiency(category):10.3f}" for tally in results.values())
        )
    overall = [sum(t.tokens.values()) / sum(t.passes.values()) for t in results.values()]
    print(f"{'overall':24}" + "".join(f"{value:10.3f}" for value in overall))
    speed = [sum(t.tokens.values()) / sum(t.time.values()) for t in results.values()]
    print(f"{'tokens a unit of time':24}" + "".join(f"{value:10.3f}" for value in speed))
    for name, at in (("median", 0.5), ("p99", 0.99)):
        times = [
            sorted(t.proposing_s)[int(at * len(t.proposing_s))] * 1e6 for t in results.values()
        ]
        print(f"{'proposing, ' + name + ' (us)':24}" + "".join(f"{us:10.0f}" for us in times))


def show_grades(tally: Tally) -> None:
    for (source, grade), seen in sorted(tally.seen.items()):
        if seen > 0.5:
            stood = tally.stood[source, grade]
            print(json.dumps([source, grade, round(seen), round(stood / seen, 3)]))


if __name__ == "__main__":
    main()
