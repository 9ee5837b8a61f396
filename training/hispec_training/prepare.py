"""What training reads: the target's answers, and what the frozen layers say about them.

Prompts without answers are answered first (``distill``). On a CPU the states are kept on disk, so
that the frozen layers run once; on a GPU they are computed anew for every batch (``live``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.errors import UsageError
from hispec_training.options import say

if TYPE_CHECKING:
    from hispec.model.checkpoint import Checkpoint
    from hispec_training.shard_cache import ShardCache, Texts
    from hispec_training.shards import Example
    from hispec_training.trunk import Trunk


def prepare(
    args: argparse.Namespace, checkpoint: Checkpoint, layers: list[int], work: Path, loud: bool
) -> tuple[Texts, Texts | None]:
    """Returns the training and the held-out texts; what is there and whole is not made again.

    Without ``--held-out``, every 50th text (at least one, at most 200) is held out. All files are
    looked at before the model answers a prompt.

    Args:
        args: Of ``hispec train``.
        checkpoint: The base.
        layers: Whose states are wanted, ascending, L last.
        work: For the files made on the way.
        loud: Whether this process says what it does.

    Raises:
        HispecError: A file cannot be read or holds nothing to use, or the disk is full.
    """
    from hispec_training.data import first_row
    from hispec_training.shards import read_examples

    longest = min(args.max_length, checkpoint.config.max_positions)
    kept = [e for e in layers if e > 0]  # before the first layer, states are looked up
    firsts = [first_row(name) for name in args.data]
    aside: list[Example] = []
    if args.held_out:
        paths = [Path(name).expanduser() for name in args.held_out]
        aside, _ = read_examples(paths, longest)
    files = []
    for number, (name, first) in enumerate(zip(args.data, firsts, strict=True)):
        path = Path(name).expanduser()
        if first is not None and "response_ids" in first:
            files.append(path)
        elif args.use_responses:
            files.append(_tokenized(checkpoint, name, work / f"tokenized-{number}.jsonl"))
        else:
            files.append(_answered(args, checkpoint, path, work, kept))
    read = [read_examples([file], longest) for file in files]
    if loud:
        counts = sum((Counter(count) for _, count in read), Counter[str]())
        say(", ".join(f"{n:,} {what}" for what, n in counts.items()))
    if recomputes(args):
        return _live(checkpoint, layers, [x for found, _ in read for x in found], aside)
    groups = [(file, found) for file, (found, _) in zip(files, read, strict=True)]
    return _cached(args, checkpoint, layers, work, groups, aside, loud)


def recomputes(args: argparse.Namespace) -> bool:
    """Whether the frozen layers run for every batch: on a GPU, unless a cache is asked for."""
    import torch

    if args.recompute is None:
        return torch.cuda.is_available() and args.cache_gb is None
    return args.recompute


def _trunk(checkpoint: Checkpoint) -> Trunk:
    import torch

    from hispec_training.trunk import Trunk

    return Trunk(checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")


def _split(count: int) -> tuple[list[int], list[int]]:
    """Which of ``count`` texts to train on and which to hold out."""
    chosen = range(0, count, 50)[:200]
    return [i for i in range(count) if i not in chosen], list(chosen)


def _live(
    checkpoint: Checkpoint, layers: list[int], examples: list[Example], aside: list[Example]
) -> tuple[Texts, Texts | None]:
    from hispec_training.live import LiveTexts

    trunk = _trunk(checkpoint)
    if not aside and len(examples) > 1:
        rest, chosen = _split(len(examples))
        aside, examples = [examples[i] for i in chosen], [examples[i] for i in rest]
    held_out = LiveTexts(aside, trunk, layers) if aside else None
    return LiveTexts(examples, trunk, layers), held_out


def _cached(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    layers: list[int],
    work: Path,
    files: list[tuple[Path, list[Example]]],
    aside: list[Example],
    loud: bool,
) -> tuple[ShardCache, ShardCache | None]:
    from hispec_training.answers import shards_of
    from hispec_training.shard_cache import ShardCache
    from hispec_training.shards import build_shards, find_states

    words = None
    if 0 in layers:
        layers = layers[1:]
        words = checkpoint.tensor("model.embed_tokens.weight").bfloat16()
    kept: list[Path] = []  # shards that distilling left
    examples: list[Example] = []  # those of all other files
    for file, found in files:
        shards = sorted(shards_of(file).glob("shard-*.safetensors"))
        if shards and find_states(shards, found, checkpoint.fingerprint, layers):
            kept += shards
        else:
            examples += found
    if loud and kept:
        say(f"states of {len(kept)} shards are there from answering")
    trunk: list[Trunk] = []

    def make_trunk() -> Trunk:
        if not trunk:
            trunk.append(_trunk(checkpoint))
        return trunk[0]

    def progress(done: int, total: int) -> None:
        if loud:
            say(f"states of {done}/{total} shards on disk")

    common: dict[str, Any] = {"fingerprint": checkpoint.fingerprint, "layers": layers}
    limit = None if args.cache_gb is None else int(args.cache_gb * 1e9)
    if examples:
        built = build_shards(
            work / "cache", examples, make_trunk, max_bytes=limit, progress=progress, **common
        )
        kept += built.paths
        if loud and (left := len(examples) - len(built)):
            say(f"{left:,} texts left out: their states do not fit into --cache-gb")
    cache, held_out = ShardCache(kept), None
    if aside:
        held_out = build_shards(work / "held_out", aside, make_trunk, **common)
    elif len(cache) > 1:
        rest, chosen = _split(len(cache))
        cache, held_out = ShardCache(kept, rest), ShardCache(kept, chosen)
    for one in (cache, held_out):
        if one:
            one.words = words
    return cache, held_out


def _answered(
    args: argparse.Namespace, checkpoint: Checkpoint, path: Path, work: Path, layers: list[int]
) -> Path:
    """A file of the model's answers to prompts: one that a run has finished, or made now.

    Its name says what the answers depend on, so those to other prompts are never taken for them.
    """
    import torch

    from hispec_training import distill
    from hispec_training.answers import shards_of

    is_file = path.is_file()
    what = [path.name if is_file else str(path), checkpoint.fingerprint]
    digest = hashlib.sha256(repr([*what, args.max_new_tokens, args.seed]).encode())
    if is_file:
        digest.update(path.read_bytes())
    out = work / f"distilled-{digest.hexdigest()[:12]}.jsonl"
    if out.exists():
        return out
    parser = argparse.ArgumentParser()
    distill.add_arguments(parser)
    given = ["--model", args.model, "--prompts", str(path), "--out", str(out), "--resume"]
    given += ["--max-new-tokens", str(args.max_new_tokens), "--seed", str(args.seed)]
    if torch.cuda.is_available():
        stamp = shards_of(out) / "provenance.json"  # a run goes on with as many as it began with
        begun = json.loads(stamp.read_text())["run"]["rows"] if stamp.exists() else None
        rows = begun or _rows_that_fit(args, checkpoint)
        given += ["--device", "cuda", "--rows", str(rows), "--shard-rows", str(8 * rows)]
    if not recomputes(args) and args.cache_gb is None:  # the cache costs no pass of its own then
        given += ["--states", ",".join(map(str, layers[:-1])) or "0"]
    if args.distill_minutes is not None:
        given += ["--minutes", str(args.distill_minutes)]
    distill.main(parser.parse_args(given), partial=False)
    return out


def _rows_that_fit(args: argparse.Namespace, checkpoint: Checkpoint) -> int:
    """How many texts of a usual prompt's length a GPU's free memory holds, twice: caches grow."""
    import torch

    config = checkpoint.config
    token = 4 * config.num_layers * config.num_kv_heads * config.head_dim  # keys, values, 2 bytes
    free, _ = torch.cuda.mem_get_info()
    return max(8, min(1024, free // (3 * token * (512 + args.max_new_tokens))))


def _tokenized(checkpoint: Checkpoint, source: str, out: Path) -> Path:
    """``out`` holds the source's own prompts and responses as token ids."""
    from hispec.files import write_whole
    from hispec_training.data import encode_prompt, read_records

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
    write_whole(out, "".join(lines), sync=True)
    return out
