"""Acceptance of saved exits on texts of the target, and the table in their folder.

    python -m hispec_training.measure --model M --exits DIR --data FILE... [--write]

Prints one JSON document with each exit's table: agreement over all positions, by category, by
distance from the root, the mean run of right guesses for every window, and the speed-up to expect
of a chain that this exit drafts alone, on this machine, whose passes are timed for it. ``--write``
makes the acceptance that of the folder's config and model card. What ``hispec distill --states``
has kept of the texts is not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from hispec.files import disk_errors
from hispec.loading import load
from hispec.model.checkpoint import Checkpoint, open_checkpoint
from hispec.planner.calibrate import timed
from hispec_training.answers import shards_of
from hispec_training.evaluate import ROUND, evaluate, tokens_per_ms
from hispec_training.exits import Exits
from hispec_training.export import TrainedExits, load_into, local_folder
from hispec_training.options import run
from hispec_training.shard_cache import ShardCache
from hispec_training.shards import Example, build_shards, find_states, read_examples
from hispec_training.trunk import Trunk, fast_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``parser`` knows the options."""
    add = parser.add_argument
    add("--model", required=True, help="the exits' base")
    add("--exits", required=True, type=Path, metavar="DIR", help="what hispec train wrote")
    add("--data", required=True, nargs="+", metavar="FILE", help="what hispec distill wrote")
    add("--name", default=None, help="of the texts, for the card (default: the files' names)")
    add("--cache", type=Path, default=None, help="folder for the states, kept (default: dropped)")
    add("--max-length", type=int, default=4096, help="longer texts are cut, tokens")
    add("--shifts", type=int, default=ROUND, help=f"passes, at most {ROUND}: more is finer")
    add("--write", action="store_true", help="into the folder's config and card")


def main(args: argparse.Namespace) -> int:
    """The tables are on stdout; returns the exit code.

    Raises:
        HispecError: Bad data or exits, or no room for what is written.
    """
    checkpoint = open_checkpoint(args.model)
    folder = local_folder(args.exits)
    saved = TrainedExits.from_pretrained(folder, checkpoint)
    exits = revive(saved, checkpoint)
    layers = sorted({*exits.specs, checkpoint.config.num_layers} - {0})
    kept: list[Path] = []  # shards that distilling left
    examples: list[Example] = []  # those of all other files
    for file in map(Path, args.data):
        found, _ = read_examples([file], args.max_length)
        shards = sorted(shards_of(file).glob("shard-*.safetensors"))
        if shards and find_states(shards, found, checkpoint.fingerprint, layers):
            kept += shards
        else:
            examples += found
    with tempfile.TemporaryDirectory() as scratch:
        if examples:
            kept += build_shards(
                args.cache or Path(scratch),
                examples,
                lambda: Trunk(checkpoint),
                fingerprint=checkpoint.fingerprint,
                layers=layers,
                progress=lambda done, total: print(f"{done}/{total} shards", file=sys.stderr),
                advice="free some room, or give --cache a folder on another disk",
            ).paths
        cache = ShardCache(kept)
        if 0 in exits.specs:  # before the first layer, states are looked up
            cache.words = checkpoint.tensor("model.embed_tokens.weight").bfloat16()
        tallies = evaluate(
            exits, cache, shifts=range(args.shifts), autocast=fast_dtype("cpu") is torch.bfloat16
        )
    name = args.name or ", ".join(Path(name).name for name in args.data)
    tables = {e: {"texts": name, **tally.table()} for e, tally in tallies.items()}
    for entry in saved.record["exits"]:
        entry["acceptance"] = dict(tables[entry["exit_layer"]])
    print(json.dumps(tables), file=sys.stderr)  # timing takes a while, and may fail
    costs = timed(load(args.model, exits=folder))
    for e, tally in tallies.items():
        runs = [tally.mean_run(window) for window in range(1, ROUND + 1)]
        rate, window = tokens_per_ms(runs, costs, e)
        level = f"exit {e}"
        first = costs.pass_s(level, 0, 1) + costs.first_s(level, 0)  # of a round
        tables[e] |= {
            "draft_ms": round(1e3 * first, 4),
            "predicted_tok_per_ms": round(rate, 5),
            "best_window": window,
            "predicted_speedup": round(rate * 1e3 * costs.plain_s, 4),
        }
    print(json.dumps(tables), flush=True)  # before the disk has a chance to lose it
    if args.write:
        advice = "the tables are printed; free some room and run again"
        with disk_errors(folder, advice):
            saved.save_record(folder)
    return 0


def revive(saved: TrainedExits, checkpoint: Checkpoint) -> Exits:
    """Saved heads as they were under training, vocabulary included."""
    specs = [head.spec for head in saved.heads.values()]
    counts = torch.zeros(checkpoint.config.vocab_size)
    exits = Exits(specs, checkpoint, counts, fast_dtype("cpu"))
    load_into(exits, saved)
    for e, ids in saved.vocab_ids.items():
        if ids is not None:
            exits.set_vocabulary(e, ids)
    return exits


if __name__ == "__main__":
    run("hispec_training.measure", __doc__, add_arguments, main)
