#!/usr/bin/env python3
"""Writes a hierarchy and, beside it, the same without each of its parts: one bench, one table.

    scripts/ablation_hierarchies.py --hierarchy auto --model smollm2-135m --out ablation
    hispec bench --model smollm2-135m --methods "$(cat ablation/methods)" --prompts FILE

Parts are each source, each exit, all branches (the likeliest chain alone is drafted), ranking
(exits veto instead), and adapting (trees are always as large as they may be).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hispec.errors import HispecError
from hispec.hierarchy import Hierarchy, preset


def without_each(whole: Hierarchy) -> dict[str, Hierarchy]:
    """Returns the whole and one hierarchy for each part removed, by what is missing."""
    found = {"whole": whole}
    active = [name for name, budget in whole.sources if budget and whole.nodes]
    for name in active:
        left = tuple(source for source in whole.sources if source[0] != name)
        found[f"no-{name}"] = replace(whole, sources=left, nodes=whole.nodes if left else 0)
    if len(active) > 1:
        found["no-sources"] = replace(whole, sources=(), nodes=0)
    if whole.branches and active:
        found["no-branches"] = replace(whole, branches=False)
    if whole.adaptive and (active or any(x.ranks or x.adaptive for x in whole.levels)):
        found["no-adapting"] = replace(whole, adaptive=False)
    for level in whole.levels:
        left_levels = tuple(x for x in whole.levels if x is not level)
        found[f"no-{level.name.replace(' ', '')}"] = replace(whole, levels=left_levels)
    if any(level.ranks for level in whole.levels):
        strict = tuple(replace(level, ranks=False) for level in whole.levels)
        found["no-ranking"] = replace(whole, levels=strict)
    return {name: replace(hierarchy, name=name) for name, hierarchy in found.items()}


def read(name: str, model: str) -> Hierarchy:
    """Returns a hierarchy by file or preset; presets of trained exits need the model's."""
    if name.endswith(".json"):
        return Hierarchy.load(Path(name))
    from hispec.model.checkpoint import open_checkpoint
    from hispec.model.exits import shipped_exits

    checkpoint = open_checkpoint(model)
    trained = shipped_exits(checkpoint)
    best = dict(trained.best) if trained else {}
    return preset(name, checkpoint.config.num_layers, best)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files and a list of them for ``--methods``."""
    parser = argparse.ArgumentParser(description="one hierarchy file for each part removed")
    parser.add_argument("--hierarchy", default="auto", metavar="NAME", help="a preset or JSON file")
    parser.add_argument("--model", default="smollm2-135m", metavar="M", help="a preset's model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(arguments)
    try:
        parts = without_each(read(args.hierarchy, args.model))
    except HispecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for name, hierarchy in parts.items():
        (args.out / f"{name}.json").write_text(json.dumps(hierarchy.to_json(), indent=1) + "\n")
    methods = ",".join(str(args.out / f"{name}.json") for name in parts)
    (args.out / "methods").write_text(methods + "\n")
    print(methods)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
