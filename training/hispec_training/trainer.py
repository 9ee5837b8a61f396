"""``hispec train``: from a Llama and some prompts to exits worth accepting.

    data        the target's own answers; prompts without them are answered first (``distill``)
    cache       the frozen trunk runs over every text once, its states go to disk (``shards``); on
                a GPU it runs for every batch instead (``live``)
    heads       started by least squares, then trained on what the trunk said (``loop``)
    folder      the exits, their acceptance on held-out texts, a report (``export``, ``report``)

Each stage leaves files in ``OUT/work`` and is skipped by ``--resume`` where they are whole, so a
run killed anywhere goes on. ``--mode lora`` adapts the backbone instead (``lora``).

Launched with ``accelerate launch -m hispec_training.trainer …`` the heads train data-parallel;
the first process prepares the cache, the others wait for it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.errors import UsageError
from hispec.model.bundled import model_help
from hispec_training.options import (
    check_above_zero,
    check_at_least_one,
    check_not_negative,
    check_share,
    exit_layers,
    require,
    run,
    say,
)

if TYPE_CHECKING:
    from hispec.model.checkpoint import Checkpoint
    from hispec_training.loop import Recipe
    from hispec_training.shard_cache import Texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``parser`` knows the options of ``hispec train``."""
    add = parser.add_argument
    add("--model", required=True, help=model_help())
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="what hispec distill wrote, or prompts (which are answered by the model first)",
    )
    add("--out", required=True, type=Path, help="folder for the exits; work files beside them")
    add("--exits", default=None, help="layers, such as 0,8 (default: 0 and a quarter)")
    add("--mode", choices=["frozen", "lora"], default="frozen", help="heads, or the backbone too")
    add("--resume", action="store_true", help="go on with a run that was stopped")
    add("--seed", type=int, default=0)
    add(
        "--start-from",
        metavar="DIR",
        help="exits to go on training (new ones start from the nearest); in lora mode, an adapter",
    )
    add("--force", action="store_true", help="start from exits of another base (--start-from)")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--held-out", nargs="*", default=[], metavar="FILE", help="texts to measure on"
    )
    data.add_argument("--max-length", type=int, default=1024, help="longer texts are cut, tokens")
    data.add_argument(
        "--max-new-tokens", type=int, default=200, help="length of a distilled answer"
    )
    data.add_argument("--distill-minutes", type=float, default=None, help="bound on answering")
    data.add_argument("--cache-gb", type=float, default=None, help="bound on the cache of states")
    data.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run the frozen layers for every batch, keep no states (default: on a GPU)",
    )
    data.add_argument(
        "--use-responses", action="store_true", help="take the data's answers, not the model's"
    )
    heads = parser.add_argument_group("heads (frozen mode)")
    heads.add_argument("--head", choices=["block", "lora", "affine", "shared"], default="block")
    heads.add_argument("--head-rank", type=int, default=16, help="of the updates of --head lora")
    heads.add_argument("--context", choices=["deep", "none"], default=None, help="default: deep")
    heads.add_argument(
        "--head-vocab", type=int, default=8192, help="rows of the head, most frequent first; 0: all"
    )
    steps = parser.add_argument_group("steps")
    steps.add_argument("--steps", type=int, default=None, help="optimizer steps")
    steps.add_argument("--epochs", type=float, default=2.0, help="if --steps is not given")
    steps.add_argument("--minutes", type=float, default=None, help="what fits into about so long")
    steps.add_argument("--batch-targets", type=int, default=2048, help="response tokens of a batch")
    steps.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    steps.add_argument("--lr", type=float, default=1e-3, help="peak, after a warm-up")
    steps.add_argument("--soft", type=float, default=1.0, help="the distribution against the pick")
    steps.add_argument("--dropout", type=float, default=0.1, help="of the final states heads see")
    steps.add_argument("--eval-every", type=int, default=250, help="steps")
    steps.add_argument("--save-every", type=int, default=250, help="steps")
    steps.add_argument("--report-to", choices=["none", "tensorboard", "wandb"], default="none")
    from hispec_training import lora

    lora.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """The exits are in ``args.out``; returns the exit code.

    Raises:
        HispecError: Bad options or data, a full disk, or a loss that is not a number.
    """
    _check(args)
    _check_out(args)
    lora_too = args.mode == "lora" or args.head == "lora"
    # matplotlib draws the report, when all is trained
    require(["accelerate", "matplotlib", *(["peft"] if lora_too else [])])
    check_tracker(args.report_to)
    if args.mode == "lora":
        from hispec_training import lora

        return lora.main(args)
    return train_heads(args)


def train_heads(args: argparse.Namespace) -> int:
    """``frozen`` mode; see `main`."""
    from accelerate.utils import DistributedDataParallelKwargs

    from hispec.model.checkpoint import open_checkpoint
    from hispec_training.checkpoints import CHECKPOINT
    from hispec_training.exits import Exits
    from hispec_training.export import TrainedExits, donor_of, load_into
    from hispec_training.files import saving
    from hispec_training.least_squares import start_from_least_squares
    from hispec_training.loop import Trainer
    from hispec_training.prepare import prepare
    from hispec_training.report import make_accelerator, reported, write_report

    checkpoint = open_checkpoint(args.model)
    layers = exit_layers(args.exits, checkpoint.config.num_layers)
    specs = head_specs(args, layers, checkpoint)
    accelerator = make_accelerator(
        args, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    work = args.out / "work"
    kept = {*layers, checkpoint.config.num_layers}
    if args.start_from:
        saved = TrainedExits.from_pretrained(args.start_from, checkpoint, force=args.force)
        kept |= {donor_of(e, saved) for e in layers}
    with accelerator.main_process_first():
        cache, held_out = prepare(args, checkpoint, sorted(kept), work, accelerator.is_main_process)
    exits = Exits(specs, checkpoint, cache.pick_counts(checkpoint.config.vocab_size))
    if args.start_from:
        load_into(exits, saved, cache)
    elif not (args.resume and (work / CHECKPOINT).exists()):
        start_from_least_squares(exits, cache, seed=args.seed)
    recipe = make_recipe(args, cache)
    if accelerator.is_main_process:
        say(
            f"{len(cache):,} texts, {sum(cache.response_lengths):,} targets, "
            f"{recipe.steps} steps; {sum(p.numel() for p in exits.parameters()):,} parameters"
        )
    with reported(recipe, args.report_to, accelerator) as progress:
        trainer = Trainer(
            exits, cache, held_out, recipe, work, accelerator, progress.add, args.minutes
        )
        if args.resume:
            trainer.resume()
        history = trainer.run()
    acceptance = measure(exits, held_out, recipe.autocast)  # by all: heads may be sharded
    weights = trainer.weights()
    if accelerator.is_main_process:
        made_whole = Exits(specs, checkpoint, cache.pick_counts(checkpoint.config.vocab_size))
        for e in made_whole.specs:
            made_whole.set_vocabulary(e, exits.vocab_ids(e).cpu())
        made_whole.load_state_dict(weights)
        facts = run_facts(args, cache, trainer.recipe, history.losses[-1]["seconds"])
        made = TrainedExits.from_training(made_whole, checkpoint, acceptance, training=facts)
        with saving(args.out):
            made.save_pretrained(args.out)
            write_report(args.out / "report", history, acceptance)
        say(f"exits in {args.out}, report in {args.out / 'report'}")
    accelerator.wait_for_everyone()
    return 0


def check_tracker(name: str) -> None:
    """Raises ``UsageError`` if a tracker's package is missing: accelerate would leave it out."""
    from accelerate import utils

    known = {"tensorboard": utils.is_tensorboard_available, "wandb": utils.is_wandb_available}
    if name in known and not known[name]():
        raise UsageError(f"--report-to {name} needs the package {name}: pip install {name}.")


def head_specs(args: argparse.Namespace, layers: list[int], checkpoint: Checkpoint) -> list[Any]:
    """What each exit's head is made of."""
    from hispec_training.heads import HeadSpec

    context = args.context or ("deep" if args.head in ("block", "lora") else "none")
    rows = args.head_vocab if args.head_vocab < checkpoint.config.vocab_size else 0
    specs = [
        HeadSpec(e, args.head, context, context == "deep", rows, start_layer=e, rank=args.head_rank)
        for e in layers
    ]
    for spec in specs:
        spec.check(checkpoint.config.num_layers)
    return specs


def make_recipe(args: argparse.Namespace, cache: Texts) -> Recipe:
    """The recipe of the options; epochs become steps."""
    import torch

    from hispec_training.batches import epoch_batches
    from hispec_training.loop import Recipe
    from hispec_training.trunk import fast_dtype

    steps = args.steps
    if steps is None:
        per_epoch = len(epoch_batches(cache, args.batch_targets, args.seed, 0)) / args.accumulate
        steps = max(1, round(args.epochs * per_epoch))
    return Recipe(
        steps=steps,
        batch_targets=args.batch_targets,
        accumulate=args.accumulate,
        lr=args.lr,
        warmup_steps=min(50, max(1, steps // 10)),
        soft=args.soft,
        dropout=args.dropout,
        seed=args.seed,
        eval_every=args.eval_every,
        save_every=args.save_every,
        autocast=fast_dtype() is torch.bfloat16,
    )


def measure(exits: Any, held_out: Texts | None, autocast: bool) -> dict[int, dict[str, Any]]:
    """The acceptance table of every exit; empty without held-out texts."""
    from hispec_training.evaluate import ROUND, evaluate

    if held_out is None:
        return {}
    tallies = evaluate(exits, held_out, shifts=range(ROUND), autocast=autocast)
    return {e: {"texts": "held-out texts", **tally.table()} for e, tally in tallies.items()}


def run_facts(
    args: argparse.Namespace, cache: Texts, recipe: Recipe, seconds: float
) -> dict[str, Any]:
    """What the model card says about the run."""
    import platform

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "data": ", ".join(Path(name).name for name in args.data),
        "tokens": sum(cache.lengths),
        "targets": sum(cache.response_lengths),
        "steps": recipe.steps,
        "seconds": round(seconds),
        "device": f"{device}, {torch.get_num_threads()} threads",
        "finished": time.strftime("%Y-%m-%d"),
    }


def _check(args: argparse.Namespace) -> None:
    check_at_least_one(
        args, ("max_length", "batch_targets", "accumulate", "eval_every", "save_every", "steps")
    )
    check_above_zero(args, ("lr", "epochs", "minutes"))
    check_share(args, ("soft",))
    check_not_negative(args, ("head_vocab",))
    if not 0 <= args.dropout < 1:
        raise UsageError(f"--dropout must lie in [0, 1), got {args.dropout}.")
    if args.recompute and args.cache_gb is not None:
        raise UsageError("--cache-gb bounds states on disk, and --recompute keeps none: drop one.")


def _check_out(args: argparse.Namespace) -> None:
    """Raises ``UsageError`` if the run would write over a model, or over another run's files."""
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is a file: give a folder.")
    out, model = args.out.resolve(), Path(args.model).expanduser()
    home = (model.parent if model.is_file() else model).resolve()
    if home in (out, out / "merged"):
        raise UsageError(
            f"--out {args.out} is the folder of the model {args.model}, whose files would be "
            "written over: give another."
        )
    if held := sorted(file.name for file in args.out.glob("model*.safetensors*")):
        raise UsageError(
            f"--out {args.out} holds a model ({held[0]}), whose files would be written over: give "
            "another."
        )
    if args.start_from is not None and Path(args.start_from).expanduser().resolve() == out:
        raise UsageError(
            f"--start-from and --out are both {args.out}: give another --out, so that what the run "
            "starts from outlives it."
        )
    if (args.out / "work" / "checkpoint.pt").exists() and not args.resume:
        raise UsageError(
            f"{args.out} holds an earlier run: continue it with --resume, or give another --out."
        )


if __name__ == "__main__":
    run("hispec_training.trainer", __doc__, add_arguments, main)
