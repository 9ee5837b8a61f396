#!/usr/bin/env python3
"""An adapter, a little less of it: nearer to the original, its exits a little worse.

    scripts/scale_adapter.py ADAPTER FACTOR OUT --held-out CACHE --perplexity TEXT

Between the original and the adapted model perplexity rises faster than exits gain (weights between
two fine-tuned models, arXiv 2109.01903), so the last tenth of an adapter's way costs more than it
brings. OUT gets ADAPTER with its scales times FACTOR, judged as training judged it: on the answers
in CACHE (``work/held_out`` of the run that made ADAPTER, with its --held-out) and the first tokens
of TEXT. What the original does is taken from ADAPTER's quality.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hispec.errors import HispecError
from hispec.files import write_whole
from hispec.model.adapter import CONFIG, WEIGHTS, Adapter, merge
from hispec.model.checkpoint import open_checkpoint
from hispec_training.lora import card, exits_record, judge, read_text, summary
from hispec_training.shard_cache import ShardCache


def scaled(config: dict[str, Any], factor: float) -> dict[str, Any]:
    """Returns an adapter's config with all its scales times ``factor``."""
    pattern = {name: factor * alpha for name, alpha in (config.get("alpha_pattern") or {}).items()}
    return {**config, "lora_alpha": factor * config["lora_alpha"], "alpha_pattern": pattern}


def main() -> int:
    """Writes the adapter; returns 2 on a mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER")
    parser.add_argument("factor", type=float, metavar="FACTOR")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--held-out", type=Path, required=True, metavar="CACHE")
    parser.add_argument("--perplexity", type=Path, required=True, metavar="TEXT")
    parser.add_argument("--perplexity-tokens", type=int, default=40_000, metavar="N")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is there already: name a new folder.")
    try:
        make(args)
    except (HispecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(args: argparse.Namespace) -> None:
    """Scales, merges, judges and records."""
    adapter = Adapter.open(args.adapter)
    original = open_checkpoint(adapter.base)
    record = json.loads((args.adapter / "config.json").read_text())
    quality = json.loads((args.adapter / "quality.json").read_text())
    exits = [entry["exit_layer"] for entry in record["exits"]]
    ids = read_text(args.perplexity, original)[: args.perplexity_tokens]
    cache = ShardCache(sorted(args.held_out.glob("shard-*.safetensors")))
    judged = quality.get("perplexity_text"), quality["before"].get("positions")
    asked = f"{args.perplexity.name}, {len(ids)} tokens", sum(cache.response_lengths)
    if judged != asked:
        raise HispecError(
            f"{args.adapter} was judged on {judged[0]} and {judged[1]} positions of answers, not "
            f"on {asked[0]} and {asked[1]}: give the same."
        )
    config = scaled(dict(adapter.config), args.factor)
    write_whole(args.out / CONFIG, json.dumps(config, indent=2) + "\n")
    shutil.copyfile(args.adapter / WEIGHTS, args.out / WEIGHTS)
    # Its record names the weights that it merges into, which are not known yet.
    with TemporaryDirectory() as folder:
        merge(Adapter.open(args.out), original, Path(folder))
        merged = open_checkpoint(folder)
        quality["after"] = judge(merged, exits, cache, ids)
        factor = args.factor * record["training"].get("scaled", 1.0)
        facts = {**record["training"], "scaled": factor}
        made = exits_record(original, merged, record["base"]["model"], exits, facts)
    before, after = quality["before"], quality["after"]
    quality["perplexity_change"] = round(after["perplexity"] / before["perplexity"] - 1, 4)
    made["hierarchies"] = record["hierarchies"]
    for name, text in (
        ("config.json", json.dumps(made, indent=2) + "\n"),
        ("quality.json", json.dumps(quality, indent=1) + "\n"),
        ("README.md", card(made, quality)),
    ):
        write_whole(args.out / name, text)
    print("\n".join(summary(quality)))


if __name__ == "__main__":
    raise SystemExit(main())
