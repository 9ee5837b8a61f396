"""``hispec train --mode lora``: a backbone that can also stop early, and what that cost.

    cache       as for heads, but only the original's final states are kept
    updates     LoRA through peft, trained with early-exit losses (``adapt``)
    OUT         the adapter, a report of what changed (``quality``), a card
    OUT/merged  the same as a plain Llama checkpoint, for transformers' ``assistant_early_exit``

The output of the result is lossless only with respect to the adapted model: perplexity and greedy
agreement with the original are measured before and after, on the merged checkpoint as it is saved.
Launched with ``accelerate launch -m hispec_training.trainer --mode lora …`` it trains
data-parallel.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.errors import UsageError
from hispec_training.options import (
    check_above_zero,
    check_at_least_one,
    check_not_negative,
    check_share,
    exit_layers,
    say,
)

if TYPE_CHECKING:
    from hispec.model.checkpoint import Checkpoint
    from hispec_training.adapt import LoraRecipe
    from hispec_training.checkpoints import History
    from hispec_training.shard_cache import Texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``parser`` knows the options of ``lora`` mode beyond those of ``hispec train``."""
    group = parser.add_argument_group("backbone (lora mode)")
    add = group.add_argument
    add("--rank", type=int, default=64, help="of the layers below the deepest exit")
    add("--deep-rank", type=int, default=8, help="of the layers above; 0 leaves them alone")
    add("--alpha", type=float, default=8.0, help="scale of the updates: B grows so much faster")
    add(
        "--curriculum",
        choices=["all", "rotate", "gradual"],
        default="all",
        help="exits with a loss at a step: all, one after the other, or the deepest first",
    )
    add("--exit-scale", type=float, default=0.0, help="how much more deeper exits weigh")
    add("--layer-dropout", type=float, default=0.0, help="chance to leave out the last layer")
    add("--keep", type=float, default=2.0, help="weight of the divergence from the original")
    add("--keep-share", type=float, default=0.5, help="share of texts it is taken on")
    add("--keep-fraction", type=float, default=0.25, help="share of their positions")
    add("--batch-tokens", type=int, default=4096, help="padded tokens of a batch")
    add("--save-minutes", type=float, default=10.0, help="a checkpoint at least this often")
    add("--perplexity", metavar="FILE", help="plain text to report perplexity on (.gz too)")
    add("--perplexity-tokens", type=int, default=None, help="use only its first tokens")


def main(args: argparse.Namespace) -> int:
    """The adapter, the merged checkpoint and the report are in ``args.out``; returns the exit code.

    Raises:
        HispecError: Bad options or data, a full disk, or a loss that is not a number.
    """
    _check(args)
    import torch

    from hispec.model.adapter import Adapter
    from hispec.model.checkpoint import open_checkpoint
    from hispec_training.adapt import LoraTrainer
    from hispec_training.adapter import LoraShape, Student, add_lora, save_adapter, start_from
    from hispec_training.files import saving
    from hispec_training.prepare import prepare
    from hispec_training.report import make_accelerator, reported

    checkpoint = open_checkpoint(args.model)
    last = checkpoint.config.num_layers
    exits = exit_layers(args.exits, last, own=True)
    if exits[0] == 0:
        raise UsageError("before the first layer there is nothing to adapt: give exits from 1 on.")
    before = None if args.start_from is None else Adapter.open(Path(args.start_from))
    if before is not None and not args.force:
        before.check_base(checkpoint)
    accelerator = make_accelerator(args)
    work = args.out / "work"
    with accelerator.main_process_first():
        cache, held_out = prepare(args, checkpoint, [last], work, accelerator.is_main_process)
    recipe = make_recipe(args, exits, cache)
    shape = LoraShape(args.rank, args.deep_rank, args.alpha)
    dtype = torch.bfloat16 if recipe.autocast else torch.float32
    model = add_lora(checkpoint, exits, shape, dtype, args.seed)
    if before is not None:
        start_from(model, before, checkpoint)
    student = Student(model)
    with reported(recipe, args.report_to, accelerator) as progress:
        trainer = LoraTrainer(
            student,
            cache,
            held_out,
            recipe,
            work,
            accelerator,
            progress.add,
            args.save_minutes,
            args.minutes,
        )
        if args.resume:
            trainer.resume()
        if accelerator.is_main_process:
            count = sum(p.numel() for p in trainer.parameters)
            say(f"{len(cache):,} texts, {recipe.steps} steps; {count:,} parameters")
        history = trainer.run()
    if accelerator.is_main_process:
        with saving(args.out):
            save_adapter(student.model, args.out)
        finish(args, checkpoint, exits, held_out, _facts(trainer.recipe, cache, history), history)
    accelerator.wait_for_everyone()
    return 0


def make_recipe(args: argparse.Namespace, exits: Sequence[int], cache: Texts) -> LoraRecipe:
    """The recipe of the options; epochs become steps."""
    import torch

    from hispec_training.adapt import LoraRecipe
    from hispec_training.padded import text_batches
    from hispec_training.trunk import fast_dtype

    steps = args.steps
    if steps is None:
        per_epoch = len(text_batches(cache, args.batch_tokens, args.seed, 0)) / args.accumulate
        steps = max(1, round(args.epochs * per_epoch))
    return LoraRecipe(
        exits=tuple(exits),
        steps=steps,
        batch_tokens=args.batch_tokens,
        accumulate=args.accumulate,
        lr=args.lr,
        warmup_steps=min(20, max(1, steps // 10)),
        soft=args.soft,
        curriculum=args.curriculum,
        exit_scale=args.exit_scale,
        layer_dropout=args.layer_dropout,
        keep=args.keep,
        keep_share=args.keep_share,
        keep_fraction=args.keep_fraction,
        seed=args.seed,
        eval_every=args.eval_every,
        save_every=args.save_every,
        autocast=fast_dtype() is torch.bfloat16,
    )


def finish(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    exits: Sequence[int],
    held_out: Texts | None,
    facts: dict[str, Any],
    history: History,
) -> dict[str, Any]:
    """The merged checkpoint, the exits' record, the report and the card are in ``args.out``.

    Returns:
        What ``quality.json`` holds.
    """
    from hispec.files import write_whole
    from hispec.model.adapter import Adapter, merge
    from hispec.model.checkpoint import open_checkpoint
    from hispec_training.files import RESUME, saving
    from hispec_training.report import write_report

    folder = args.out / "merged"
    with saving(folder):
        folder.mkdir(exist_ok=True)
        merge(Adapter.open(args.out), checkpoint, folder)
    merged = open_checkpoint(folder)
    quality = compare(
        checkpoint,
        merged,
        exits,
        held_out,
        None if args.perplexity is None else Path(args.perplexity),
        args.perplexity_tokens,
    )
    record = exits_record(checkpoint, merged, args.out.name, exits, facts)
    for name, text in (
        ("quality.json", json.dumps(quality, indent=1) + "\n"),
        ("README.md", card(record, quality)),
        ("config.json", json.dumps(record, indent=2) + "\n"),
    ):
        write_whole(args.out / name, text, sync=True, advice=RESUME)
    filled: dict[str, float] = {}
    for number, row in enumerate(history.losses):  # exits take turns: draw the last known value
        filled |= row
        history.losses[number] = dict(filled)
    known = [row for row in history.losses if all(f"loss_{e}" in row for e in exits)]
    history.losses[:] = known or history.losses[:0]
    with saving(args.out / "report"):
        write_report(args.out / "report", history, {})
    say(f"adapter in {args.out}, merged checkpoint in {folder}")
    for line in summary(quality):
        say(line)
    return quality


def exits_record(
    original: Checkpoint,
    merged: Checkpoint,
    name: str,
    exits: Sequence[int],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the adapter's ``config.json``: exits that use the merged model's own norm and head.

    Args:
        original: What the adapter was trained on.
        merged: What the exits belong to.
        name: Of the merged model.
        exits: Their layers.
        facts: About the training.
    """
    from hispec.model.exits import FORMAT

    return {
        "format": FORMAT,
        "version": 1,
        "base": {"model": name, "revision": None, "fingerprint": merged.fingerprint},
        "adapter_of": {
            "model": original.name,
            "revision": original.revision,
            "fingerprint": original.fingerprint,
        },
        "num_layers": merged.config.num_layers,
        "exits": [{"exit_layer": e, "kind": "own"} for e in exits],
        "training": dict(facts),
        "hierarchies": {},
    }


def compare(
    original: Checkpoint,
    adapted: Checkpoint,
    exits: Sequence[int],
    held_out: Texts | None,
    text: Path | None,
    text_tokens: int | None,
) -> dict[str, Any]:
    """Returns perplexity and agreement of both, one after the other."""
    ids = None if text is None else read_text(text, original)[:text_tokens]
    quality: dict[str, Any] = {
        "before": judge(original, exits, held_out, ids),
        "after": judge(adapted, exits, held_out, ids),
    }
    if ids is not None:
        before, after = quality["before"]["perplexity"], quality["after"]["perplexity"]
        quality["perplexity_change"] = round(after / before - 1, 4)
        quality["perplexity_text"] = f"{text.name if text else ''}, {len(ids)} tokens"
    return quality


def judge(
    checkpoint: Checkpoint, exits: Sequence[int], held_out: Texts | None, ids: list[int] | None
) -> dict[str, Any]:
    """Returns one model's perplexity on ``ids`` and its agreement with held-out answers."""
    import torch

    from hispec_training.quality import agreement, perplexity
    from hispec_training.trunk import Trunk

    trunk = Trunk(checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {}
    if ids is not None:
        found["perplexity"] = round(perplexity(trunk, ids), 4)
    if held_out is not None:
        found |= agreement(trunk, held_out, exits).table()
    return found


def read_text(path: Path, checkpoint: Checkpoint) -> list[int]:
    """Returns the ids of a plain text file, gzipped or not.

    Raises:
        UsageError: It cannot be read or holds fewer than two tokens.
    """
    from hispec_training.files import read_bytes

    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"Cannot read the text {path}: {error}.") from error
    ids = checkpoint.tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise UsageError(f"{path} is too short to measure perplexity on.")
    return list(ids)


def summary(quality: Mapping[str, Any]) -> list[str]:
    """Returns the report in a few lines."""
    before, after, lines = quality["before"], quality["after"], []
    if "perplexity" in after:
        lines.append(
            f"perplexity {before['perplexity']:.2f} -> {after['perplexity']:.2f} "
            f"({quality['perplexity_change']:+.1%}) on {quality['perplexity_text']}"
        )
    if "greedy_agreement" in after:
        lines.append(
            f"greedy agreement with the original {after['greedy_agreement']['all']:.3f} "
            f"over {after['positions']} positions"
        )
        for e, ratio in after["exits"].items():
            was = before["exits"][e]["all"]
            lines.append(f"exit {e} agrees with the final layer: {was:.3f} -> {ratio['all']:.3f}")
    return lines


def card(record: Mapping[str, Any], quality: Mapping[str, Any]) -> str:
    """Returns the adapter's model card."""
    exits = ", ".join(str(entry["exit_layer"]) for entry in record["exits"])
    exits = f"layer{'s' * (len(record['exits']) > 1)} {exits}"
    base = record["adapter_of"]["model"]
    lines = "\n".join(f"- {line}" for line in summary(quality))
    training = ", ".join(f"{k} {v}" for k, v in record["training"].items() if k != "recipe")
    return f"""---
base_model: {base}
library_name: peft
tags: [early-exit, layerskip, self-speculative-decoding]
---

# Early exits at {exits} for {base}

A LoRA adapter trained with early-exit losses, so that the model's own norm and head can be used
after {exits}. Merged into its base it is a plain Llama for self-speculative decoding, with
hispec or with transformers' `assistant_early_exit`.

{lines}

Training: {training}.
"""


def _facts(recipe: LoraRecipe, cache: Texts, history: History) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "steps": recipe.steps,
        "texts": len(cache),
        "tokens": sum(cache.lengths),
        "seconds": round(history.losses[-1]["seconds"]) if history.losses else 0,
        "finished": time.strftime("%Y-%m-%d"),
        "recipe": asdict(recipe),
    }


def _check(args: argparse.Namespace) -> None:
    check_at_least_one(args, ("rank", "batch_tokens", "perplexity_tokens"))
    check_not_negative(args, ("deep_rank", "keep", "exit_scale"))
    check_above_zero(args, ("alpha", "keep_share", "keep_fraction"))
    check_share(args, ("keep_share", "keep_fraction"))
    if not 0 <= args.layer_dropout < 1:
        raise UsageError(f"--layer-dropout must lie in [0, 1), got {args.layer_dropout}.")
    if args.perplexity is not None and not Path(args.perplexity).is_file():
        raise UsageError(f"There is no file {args.perplexity}.")
