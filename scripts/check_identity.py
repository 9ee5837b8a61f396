"""Are they the same tokens? On real prompts, and bit for bit in the logits.

    python scripts/check_identity.py --prompts question.jsonl --hf
    python scripts/check_identity.py --prompts question.jsonl --limit 100 --device cuda \\
        --hierarchies 'layerskip,hispec,hd,auto,late,scripts/hierarchies/*.json'

For each dtype (by default bf16 and fp32 on a CPU, bf16 and fp16 on a GPU):

1. *Tokens.* Every prompt is continued greedily by plain decoding (``ar``) and by each hierarchy (a
   preset, a JSON file, or a pattern of those), its databases afresh; the ids must be the same.
   ``late`` has two exits near the top, whose drafts are often right even where none were trained.
   In fp32, with ``--hf``, ``ar`` is also compared with transformers' greedy ``generate`` on the
   same converted folder; where they part, the top-2 gap of the logits at that token is listed.
   Below 1e-3 it is a rounding tie: transformers multiplies in other shapes.
2. *Bits.* Long texts (the prompts, one behind the other, cut at 1,500 tokens) are run token by
   token as plain decoding runs them, then again in passes of random widths, chains and trees by
   turns, cut at the exits of ``hispec``. No bit of any row of logits may differ, nor any pick that
   a head makes by itself (:mod:`hispec.bench.bits`).

The ids of plain decoding and of transformers are kept in the cache folder, so that later runs only
pay for the hierarchies. Kept ids are not trusted blindly: where a hierarchy differs, plain decoding
is run anew, and if it is what changed, that is printed too and the new ids are kept.

Exit code 1 if any token or bit differs, ties with transformers apart. ``--out`` gets one JSON
object a line: the machine first, then a row a prompt, then the bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from glob import glob
from pathlib import Path
from typing import Any

import torch

import hispec
from hispec.bench.bits import WARM, compare_bits, long_texts
from hispec.bench.prompts import Prompt, load_prompts
from hispec.bench.provenance import collect, cpu_name
from hispec.files import write_whole
from hispec.generation import LM
from hispec.hierarchy import Hierarchy, Level
from hispec.model.device import choose
from hispec.model.store import cache_dir

ROOT = Path(__file__).resolve().parent.parent
TIE = 1e-3  # top-2 gap of logits below which transformers may round to the other side


class Kept:
    """Token ids by (what made them, prompt), in a JSON file that is rewritten whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.ids: dict[str, list[int]] = json.loads(path.read_text())
        except (OSError, ValueError):
            self.ids = {}

    def get(self, key: str, make: Callable[[], list[int]]) -> tuple[list[int], bool]:
        """Returns the ids, and whether they were kept from an earlier run."""
        if key in self.ids:
            return self.ids[key], True
        return self.put(key, make()), False

    def put(self, key: str, ids: list[int]) -> list[int]:
        self.ids[key] = ids
        write_whole(self.path, json.dumps(self.ids))
        return ids


def key_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:24]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place at which two texts differ, None if nowhere."""
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return None if len(a) == len(b) else min(len(a), len(b))


def machine(device: torch.device) -> str:
    """Returns the name of what computes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def hierarchies(text: str) -> list[str]:
    """Returns the names of ``--hierarchies``, in a pattern's place what it stands for."""
    found = []
    for name in filter(None, text.split(",")):
        found += sorted(glob(name)) or [name] if "*" in name else [name]
    return found


def named(lm: LM, name: str) -> str | Hierarchy:
    """Returns what a name of ``--hierarchies`` stands for."""
    if name != "late":
        return name
    top = lm.model.config.num_layers
    return Hierarchy((Level(top * 4 // 5, 2), Level(top - max(1, top // 15), 4)), name)


# ------------------------------------------------------------------ tokens


class Tokens:
    """Compares the texts of all methods, one prompt after the other."""

    def __init__(self, lm: LM, dtype: str, args: argparse.Namespace, kept: Kept) -> None:
        self.lm, self.dtype, self.args, self.kept = lm, dtype, args, kept
        self.reference: Any = None  # transformers' model, loaded when first needed
        self.counts = {name: [0, 0] for name in args.hierarchies}  # equal, compared
        self.counts["transformers"] = [0, 0]
        self.ties: list[str] = []

    def prompt(self, prompt: Prompt, ids: list[int]) -> dict[str, Any]:
        """Returns the row of one prompt."""
        lm, count = self.lm, self.args.max_new_tokens
        setting = (torch.__version__, machine(lm.model.device), torch.get_num_threads())
        what = (self.dtype, lm.model.device, count)
        key = key_of("ar", lm.checkpoint.fingerprint, *what, ids, setting)

        def plain() -> list[int]:
            return lm.generate(ids, hierarchy="ar", max_new_tokens=count, learn=False).token_ids

        wanted, old = self.kept.get(key, plain)
        row: dict[str, Any] = {
            "kind": "tokens",
            "dtype": self.dtype,
            "prompt": prompt.id,
            "category": prompt.category,
            "prompt_tokens": len(ids),
            "tokens": len(wanted),
        }
        for name in self.args.hierarchies:
            # From what earlier answers taught it, a database would draft whole texts rightly.
            result = lm.generate(ids, hierarchy=named(lm, name), max_new_tokens=count, learn=False)
            if old and result.token_ids != wanted:
                wanted, old, was = self.kept.put(key, plain()), False, wanted
                if wanted != was:
                    print(
                        f"  {prompt.id}: plain decoding itself has changed since the ids were kept"
                    )
            place = first_difference(result.token_ids, wanted)
            row[name] = {
                "first_difference": place,
                "block_efficiency": round(result.block_efficiency, 4),
                "layer_visits": result.layer_visits,
            }
            self.counts[name][0] += place is None
            self.counts[name][1] += 1
            if place is not None:
                print(f"  {prompt.id}: {name} differs from ar at token {place} of {len(wanted)}")
        if self.args.hf and self.dtype == "fp32":
            row["transformers"] = self.transformers(prompt, ids, wanted)
        return row

    def transformers(self, prompt: Prompt, ids: list[int], ours: list[int]) -> dict[str, Any]:
        """Compares with transformers' ``generate``; ties are listed, not counted against us."""
        import transformers

        count, version = self.args.max_new_tokens, (torch.__version__, transformers.__version__)
        device = self.lm.model.device
        key = key_of("hf", self.lm.checkpoint.fingerprint, device, count, ids, version)

        def generate() -> list[int]:
            model = self.hf_model()
            with torch.inference_mode():
                text = model.generate(
                    torch.tensor([ids], device=device),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=device),
                    max_new_tokens=count,
                    do_sample=False,
                    repetition_penalty=None,
                    eos_token_id=sorted(self.lm.eos),
                    pad_token_id=min(self.lm.eos),
                )
            return text[0, len(ids) :].tolist()

        theirs, _ = self.kept.get(key, generate)
        place = first_difference(ours, theirs)
        found: dict[str, Any] = {"first_difference": place}
        self.counts["transformers"][1] += 1
        if place is None:
            self.counts["transformers"][0] += 1
        else:
            with torch.inference_mode():
                text = torch.tensor([ids + theirs[:place]], device=device)
                logits = self.hf_model()(text).logits[0, -1]
            gap = float(logits.topk(2).values.diff().abs())
            found |= {"top2_gap": gap, "tie": gap < TIE}
            line = f"{prompt.id}: ar and transformers part at token {place}, top-2 gap {gap:.1e}"
            print(f"  {line}")
            if gap < TIE:
                self.ties.append(line)
        return found

    def hf_model(self) -> Any:
        if self.reference is None:
            from transformers import AutoModelForCausalLM

            path = str(self.lm.checkpoint.path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            self.reference = model.to(self.lm.model.device)
        return self.reference

    def failed(self) -> bool:
        """Whether any text differs, ties with transformers apart."""
        hierarchies = any(
            self.counts[name][0] < self.counts[name][1] for name in self.args.hierarchies
        )
        equal, compared = self.counts["transformers"]
        return hierarchies or equal + len(self.ties) < compared


# ------------------------------------------------------------------ the whole


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = choose(args.device).device
    args.dtypes = args.dtypes or ["bf16", "fp16" if device.type == "cuda" else "fp32"]
    prompts = load_prompts(args.prompts, args.limit).prompts
    if args.hf and "fp32" not in args.dtypes:
        print("transformers: left out, it is compared in fp32 alone (--dtypes fp32)")
    kept = Kept(args.cache)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    with args.out.open("w") as out:

        def write(row: dict[str, Any]) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()

        for dtype in args.dtypes:
            lm = hispec.load(args.model, exits=args.exits, dtype=dtype, device=args.device)
            write({"kind": "provenance", **collect(lm), "settings": settings_of(args)})
            where = f"{machine(lm.model.device)}, {lm.model.narrow.name} passes"
            print(f"{dtype} on {where}, {torch.get_num_threads()} threads")
            failed |= check(lm, dtype, prompts, args, kept, write)
    print(f"rows are in {args.out}")
    return int(failed)


def check(
    lm: LM,
    dtype: str,
    prompts: Sequence[Prompt],
    args: argparse.Namespace,
    kept: Kept,
    write: Callable[[dict[str, Any]], None],
) -> bool:
    """Writes and prints one dtype's results; returns whether anything differs."""
    tokens, pieces, started = Tokens(lm, dtype, args, kept), [], time.perf_counter()
    room = lm.model.config.max_positions - args.max_new_tokens
    for prompt in prompts:
        ids = list(prompt.ids) or lm.encode(prompt.chat(0, ()))
        pieces.append(ids)
        if len(ids) >= room:
            print(f"  {prompt.id}: left out, its {len(ids)} tokens do not fit into the context")
            continue
        write(tokens.prompt(prompt, ids))
        if sys.stderr.isatty():
            print(f"\r{len(pieces)} of {len(prompts)}", end="", file=sys.stderr, flush=True)
    for name, (equal, compared) in tokens.counts.items():
        if compared:
            ties = f", {len(tokens.ties)} part at a tie" if name == "transformers" else ""
            print(f"  {name}: {equal} of {compared} texts equal plain decoding's{ties}")
    summary = {"kind": "summary", "dtype": dtype, "counts": tokens.counts, "ties": tokens.ties}
    write({**summary, "took_s": round(time.perf_counter() - started, 1)})
    if not args.positions:
        return tokens.failed()
    started = time.perf_counter()
    length = min(args.context, lm.model.config.max_positions)
    found = compare_bits(lm, long_texts(pieces, length, args.positions), args.positions)
    took = round(time.perf_counter() - started, 1)
    write({"kind": "bits", "dtype": dtype, **asdict(found), "took_s": took})
    rows = f"{found.rows_that_differ} of {found.rows} rows of logits"
    company = f"{found.trees} trees, contexts to {found.longest} tokens"
    print(f"  bits: {found.bits_that_differ} differ in {rows} ({company})")
    print(f"  picks: {found.picks_that_differ} rows' best ids or odds differ")
    return tokens.failed() or not found.same


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--prompts", default="builtin", help="JSONL file or preset (builtin)")
    parser.add_argument("--limit", type=int, default=60, help="prompts, of all categories (60)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--exits", help="folder of trained exits")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    parser.add_argument("--dtypes", type=names, help="bf16,fp32; on a GPU bf16,fp16")
    parser.add_argument("--hierarchies", type=hierarchies, default="layerskip,hispec,late")
    parser.add_argument("--hf", action="store_true", help="compare with transformers in fp32, too")
    parser.add_argument("--positions", type=int, default=2400, help="rows of logits; or 0 (2400)")
    parser.add_argument("--context", type=int, default=1500, help="length of the long texts (1500)")
    parser.add_argument("--cache", type=Path, default=cache_dir() / "identity.json")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "results" / "identity.jsonl")
    args = parser.parse_args(arguments)
    if args.positions and args.context <= WARM:
        parser.error(f"--context must be above {WARM}")
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except hispec.HispecError as error:
        print(f"check_identity: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
