"""``hispec train``: from a Llama and some prompts to exits worth accepting.

    data        the target's own answers; prompts without them are answered first (``distill``)
    cache       the frozen trunk runs over every text once, its states go to disk (``shards``)
    heads       started by least squares, then trained on the cache alone (``loop``)
    folder      the exits, their acceptance on held-out texts, a report (``export``, ``report``)

Each stage leaves files in ``OUT/work`` and is skipped by ``--resume`` where they are whole, so a
run killed anywhere goes on. ``--mode lora`` adapts the backbone instead (``lora``).

Launched with ``accelerate launch -m hispec_training.trainer …`` the heads train data-parallel;
the first process prepares the cache, the others wait for it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.errors import HispecError, UsageError

if TYPE_CHECKING:
    from hispec.model.checkpoint import Checkpoint
    from hispec_training.loop import Recipe
    from hispec_training.shards import ShardCache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``parser`` knows the options of ``hispec train``."""
    add = parser.add_argument
    add("--model", required=True, help="hub id, folder, .gguf file or smollm2-135m")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="what hispec distill wrote, or prompts (which are answered by the model first)",
    )
    add("--out", required=True, type=Path, help="folder for the exits; work files beside them")
    add("--exits", default=None, help="layers, such as 4,8 (default: an eighth and a quarter)")
    add("--mode", choices=["frozen", "lora"], default="frozen", help="heads, or the backbone too")
    add("--resume", action="store_true", help="go on with a run that was stopped")
    add("--seed", type=int, default=0)
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
        "--use-responses", action="store_true", help="take the data's answers, not the model's"
    )
    heads = parser.add_argument_group("heads (frozen mode)")
    heads.add_argument("--head", choices=["block", "affine", "shared"], default="block")
    heads.add_argument("--context", choices=["deep", "none"], default=None, help="default: deep")
    heads.add_argument(
        "--head-vocab", type=int, default=8192, help="rows of the head, most frequent first; 0: all"
    )
    heads.add_argument("--start-from", metavar="DIR", help="exits to go on training")
    steps = parser.add_argument_group("steps")
    steps.add_argument("--steps", type=int, default=None, help="optimizer steps")
    steps.add_argument("--epochs", type=float, default=2.0, help="if --steps is not given")
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
    if args.mode == "lora":
        from hispec_training import lora

        return lora.main(args)
    return train_heads(args)


def train_heads(args: argparse.Namespace) -> int:
    """``frozen`` mode; see `main`."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from hispec.model.checkpoint import open_checkpoint
    from hispec_training.exits import Exits
    from hispec_training.export import TrainedExits, load_into
    from hispec_training.least_squares import start_from_least_squares
    from hispec_training.loop import CHECKPOINT, Trainer
    from hispec_training.report import Progress, write_report

    checkpoint = open_checkpoint(args.model)
    layers = exit_layers(args.exits, checkpoint.config.num_layers)
    specs = head_specs(args, layers, checkpoint)
    accelerator = Accelerator(
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=str(args.out / "work"),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    work = args.out / "work"
    kept = sorted({*layers, checkpoint.config.num_layers})
    with accelerator.main_process_first():
        cache, held_out = prepare(args, checkpoint, kept, work, accelerator.is_main_process)
    exits = Exits(specs, checkpoint, cache.pick_counts(checkpoint.config.vocab_size))
    if args.start_from:
        load_into(
            exits, TrainedExits.from_pretrained(args.start_from, checkpoint, force=args.force)
        )
    elif not (args.resume and (work / CHECKPOINT).exists()):
        start_from_least_squares(exits, cache, seed=args.seed)
    recipe = make_recipe(args, cache)
    if accelerator.is_main_process:
        _say(
            f"{len(cache):,} texts, {sum(cache.response_lengths):,} targets, "
            f"{recipe.steps} steps; {sum(p.numel() for p in exits.parameters()):,} parameters"
        )
    if args.report_to != "none":
        accelerator.init_trackers("hispec", config=vars(recipe))
    progress = Progress(recipe.steps, accelerator if args.report_to != "none" else None)
    trainer = Trainer(exits, cache, held_out, recipe, work, accelerator, progress.add)
    if args.resume:
        trainer.resume()
    try:
        history = trainer.run()
    finally:
        progress.close()
        if args.report_to != "none":
            accelerator.end_training()
    if accelerator.is_main_process:
        acceptance = measure(exits, held_out, recipe.autocast)
        facts = run_facts(args, cache, recipe, history.losses[-1]["seconds"])
        saved = TrainedExits.from_training(exits, checkpoint, acceptance, training=facts)
        saved.save_pretrained(args.out)
        write_report(args.out / "report", history, acceptance)
        _say(f"exits in {args.out}, report in {args.out / 'report'}")
    accelerator.wait_for_everyone()
    return 0


def exit_layers(text: str | None, num_layers: int) -> list[int]:
    """The exits asked for, ascending; an eighth and a quarter of the depth if none are.

    Raises:
        UsageError: If one is not a layer of this model.
    """
    if text is None:
        return sorted({max(1, int(num_layers / part + 0.5)) for part in (8, 4)})
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"--exits takes layers such as 4,8, got {text!r}.") from None
    for layer in layers:
        if not 1 <= layer < num_layers:
            raise UsageError(
                f"exit_layer must be in [1, {num_layers - 1}] for this {num_layers}-layer model, "
                f"got {layer}."
            )
    return layers


def head_specs(args: argparse.Namespace, layers: list[int], checkpoint: Checkpoint) -> list[Any]:
    """What each exit's head is made of."""
    from hispec_training.heads import HeadSpec

    context = args.context or ("deep" if args.head == "block" else "none")
    rows = args.head_vocab if args.head_vocab < checkpoint.config.vocab_size else 0
    specs = [
        HeadSpec(e, args.head, context, context == "deep", rows, start_layer=e) for e in layers
    ]
    for spec in specs:
        spec.check(checkpoint.config.num_layers)
    return specs


def prepare(
    args: argparse.Namespace, checkpoint: Checkpoint, layers: list[int], work: Path, loud: bool
) -> tuple[ShardCache, ShardCache | None]:
    """The cached training and held-out texts; what is there and whole is not made again.

    Without ``--held-out``, every 50th text (at least one, at most 200) is held out.
    """
    import torch

    from hispec_training.shards import build_shards, read_examples
    from hispec_training.trunk import Trunk

    files = [_answered(args, Path(name), i, work) for i, name in enumerate(args.data)]
    examples, counts = read_examples(files, args.max_length)
    if args.held_out:
        aside, _ = read_examples([Path(name) for name in args.held_out], args.max_length)
    else:
        chosen = set(range(0, len(examples), 50)[:200]) if len(examples) > 1 else set()
        aside = [example for i, example in enumerate(examples) if i in chosen]
        examples = [example for i, example in enumerate(examples) if i not in chosen]
    if loud:
        _say(", ".join(f"{n:,} {what}" for what, n in counts.items()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trunk: list[Trunk] = []

    def make_trunk() -> Trunk:
        if not trunk:
            trunk.append(Trunk(checkpoint, device=device))
        return trunk[0]

    def progress(done: int, total: int) -> None:
        if loud:
            _say(f"states of {done}/{total} shards on disk")

    common: dict[str, Any] = {"fingerprint": checkpoint.fingerprint, "layers": layers}
    limit = None if args.cache_gb is None else int(args.cache_gb * 1e9)
    cache = build_shards(
        work / "cache", examples, make_trunk, max_bytes=limit, progress=progress, **common
    )
    held_out = build_shards(work / "held_out", aside, make_trunk, **common) if aside else None
    return cache, held_out


def make_recipe(args: argparse.Namespace, cache: ShardCache) -> Recipe:
    """The recipe of the options; epochs become steps."""
    from hispec_training.batches import epoch_batches
    from hispec_training.loop import Recipe

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
    )


def measure(exits: Any, held_out: ShardCache | None, autocast: bool) -> dict[int, dict[str, Any]]:
    """The acceptance table of every exit; empty without held-out texts."""
    from hispec_training.evaluate import ROUND, evaluate

    if held_out is None:
        return {}
    tallies = evaluate(exits, held_out, shifts=range(ROUND), autocast=autocast)
    return {e: {"texts": "held-out texts", **tally.table()} for e, tally in tallies.items()}


def run_facts(
    args: argparse.Namespace, cache: ShardCache, recipe: Recipe, seconds: float
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


def _answered(args: argparse.Namespace, path: Path, index: int, work: Path) -> Path:
    """The file itself if it holds tokenized answers, else one that does, made now."""
    from hispec_training import distill
    from hispec_training.data import read_jsonl

    if path.exists() and path.is_file():
        first = next(read_jsonl(path), None)
        if first is None:
            raise UsageError(f"{path} is empty: nothing to train on.")
        if "response_ids" in first[1]:
            return path
    work.mkdir(parents=True, exist_ok=True)
    if args.use_responses:
        return _tokenized(args.model, path, work / f"tokenized-{index}.jsonl")
    out = work / f"distilled-{index}.jsonl"
    if out.exists():
        return out
    parser = argparse.ArgumentParser()
    distill.add_arguments(parser)
    given = ["--model", args.model, "--prompts", str(path), "--out", str(out), "--resume"]
    given += ["--max-new-tokens", str(args.max_new_tokens), "--seed", str(args.seed)]
    if args.distill_minutes is not None:
        given += ["--minutes", str(args.distill_minutes)]
    distill.main(parser.parse_args(given))
    return out


def _tokenized(model: str, source: Path, out: Path) -> Path:
    """``out`` holds the source's own prompts and responses as token ids."""
    from hispec.model.checkpoint import open_checkpoint
    from hispec_training.data import encode_prompt, read_records
    from hispec_training.distill import write_atomically

    checkpoint = open_checkpoint(model)
    lines = []
    for record in read_records(source).records:
        if record.response is None:
            continue
        response = checkpoint.tokenizer(record.response, add_special_tokens=False)["input_ids"]
        row = {
            "id": record.id,
            "category": record.category,
            "prompt_ids": encode_prompt(record, checkpoint.tokenizer),
            "response_ids": [*response, *checkpoint.eos_token_ids[:1]],
        }
        lines.append(json.dumps(row) + "\n")
    if not lines:
        raise UsageError(
            f"{source} has no responses to train on: leave --use-responses out to have the model "
            "answer the prompts."
        )
    write_atomically(out, "".join(lines))
    return out


def _check(args: argparse.Namespace) -> None:
    positive = ("max_length", "batch_targets", "accumulate", "eval_every", "save_every", "steps")
    for name in positive:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    for name in ("lr", "epochs"):
        if not getattr(args, name) > 0:
            raise UsageError(f"--{name} must be above 0, got {getattr(args, name)}.")
    if not 0 <= args.soft <= 1:
        raise UsageError(f"--soft must lie in [0, 1], got {args.soft}.")
    if not 0 <= args.dropout < 1:
        raise UsageError(f"--dropout must lie in [0, 1), got {args.dropout}.")
    if args.head_vocab < 0:
        raise UsageError(f"--head-vocab must be 0 (all) or more, got {args.head_vocab}.")
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is a file: give a folder.")
    if (args.out / "work" / "checkpoint.pt").exists() and not args.resume:
        raise UsageError(
            f"{args.out} holds an earlier run: continue it with --resume, or give another --out."
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="hispec_training.trainer", description=__doc__)
    add_arguments(_parser)
    try:
        sys.exit(main(_parser.parse_args()))
    except HispecError as _error:
        _say(f"error: {_error}")
        sys.exit(_error.exit_code)
