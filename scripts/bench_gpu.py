"""What the GPU path is worth: right first, then fast, against what the memory allows.

    python scripts/bench_gpu.py --model smollm2-135m --out gpu            # all stages
    python scripts/bench_gpu.py --only kernels,ar --shapes 8B --out gpu

Stages; what one has not begun after --stage-s is left out, and said to be:

    kernels   every kernel against fp64 on fresh inputs, outputs poisoned; then its time over the
              bytes it must move at the measured copy bandwidth; torch's and, where they are
              installed, Liger's beside them; other tilings
    ar        plain decoding of Llama shapes with random weights over the same floor, and by kernel
              where that is missed; with torch's products in turn, which promise no bits
    spec      our methods on the model and its exits: tokens compared with plain decoding's, the
              host's part of a round; plain decoding with torch's products here, too
    peers     transformers: generate, with a static (compiled) cache, early exit, prompt lookup;
              early exit beside layerskip on the checkpoint adapted for it
    shapes    passes by range and width, and what hierarchies yield on them at given acceptance

On a GPU --numerics fast runs the very kernels of exact, so what exactness costs is told beside
torch's products (hispec/bench/gpu_library.py); host and idle: hispec/bench/gpu_methods.py. What it
brings that kernels take turns (hispec_kernels/gpu/turns.py) is told by a second run, HISPEC_PDL=0.
Prints tables; --out takes one JSON object a row, the machine first. --tiny shows on any machine
that it works: seconds, in Triton's interpreter where TRITON_INTERPRET=1 is set, no number of worth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hispec.bench import gpu_shapes
from hispec.bench.gpu_kernels import Trial, measure, tilings
from hispec.bench.gpu_peers import Peers, measure_peer
from hispec.bench.gpu_picks import LISTED, Picks, step_rows
from hispec.bench.gpu_timing import copy_gb_per_s
from hispec.bench.prompts import load_prompts
from hispec.bench.provenance import _commit, collect, cpu_name
from hispec.errors import HispecError, UsageError
from hispec.generation import LM
from hispec.loading import load
from hispec.model.device import choose, dtype_name, out_of_memory
from hispec_kernels import gpu

Row = dict[str, Any]
#: Rows of the passes in which kernels are timed.
WIDTHS = (1, 8, 16, 32)
#: The default model, and the one whose exits transformers can use.
MODEL, LAYERSKIP = "smollm2-135m", "smollm2-135m-layerskip"
OURS = ("layerskip", "hispec", "hd", "auto")


class Bench:
    """One run: its options, the machine's ceiling and where rows go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        choice = choose(args.device, args.dtype)
        self.device, self.dtype = choice.device, choice.dtype
        self.ceiling = copy_gb_per_s(self.device, 8 if args.tiny else 2048)
        self.repeats = 1 if args.tiny else 30
        self.started = time.perf_counter()  # the stage
        self._lms: dict[str, LM] = {}
        self.write({"stage": "machine", **self.machine()})

    def machine(self) -> Row:
        """Returns what the numbers were measured on."""
        cuda = self.device.type == "cuda"
        return {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": " ".join(sys.argv),
            "commit": _commit(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if cuda else cpu_name(),
            "cuda": torch.version.cuda,
            "dtype": dtype_name(self.dtype),
            "copy_gb_per_s": self.ceiling,
            "kernels": gpu.why_not(self.device) or "triton",
            "turns": cuda and _take_turns(self.device),
        }

    def spent(self) -> float:
        """Returns the share of a stage's time that is over."""
        return (time.perf_counter() - self.started) / self.args.stage_s

    def late(self, what: str) -> bool:
        """Returns whether a stage's time is over, and says what is left out then."""
        late = self.spent() > 1
        if late:
            print(f"{what}: left out, {self.args.stage_s:g} s are over", file=sys.stderr)
        return late

    def guarded(self, what: Row, make: Callable[[], Iterable[Row]]) -> list[Row]:
        """Returns the rows that ``make`` does; one that says why, where it fails."""
        try:
            return list(make())
        except UsageError:
            raise
        except Exception as error:  # Triton's are of kinds of their own; the rest may well run
            full = isinstance(error, RuntimeError) and out_of_memory(error)
            why = (str(error).splitlines() or [type(error).__name__])[0]
            advice = ": leave it out (--shapes), or lower --limit" if full else ""
            return [{**what, "right": False, "why": why + advice}]
        finally:
            with suppress(RuntimeError):  # said again by a device that has failed
                torch.cuda.empty_cache()

    def write(self, row: Row) -> None:
        """Appends a row to --out."""
        if self.args.out:
            with open(self.args.out, "a") as file:
                file.write(json.dumps(row) + "\n")

    def lm(self, dtype: str, model: str = "") -> LM:
        """Returns the model, or another one, in a dtype, loaded once."""
        name, exits = model or self.args.model, None if model else self.args.exits
        key = f"{name} {dtype}"
        if key not in self._lms:
            self._lms[key] = load(name, exits=exits, dtype=dtype, device=self.device.type)
            self.write({"stage": "model", **collect(self._lms[key])})
        return self._lms[key]

    def shapes(self) -> list[str]:
        """Returns the shapes asked for."""
        return ["tiny"] if self.args.tiny else self.args.shapes.split(",")


def _take_turns(device: torch.device) -> bool:
    """Returns whether kernels start before the last one has ended."""
    if gpu.why_not(device):
        return False
    from hispec_kernels.gpu.turns import taken  # needs Triton

    return taken(device)


def kernels(bench: Bench) -> Iterator[Row]:
    """Every kernel at every shape and width."""
    if why := gpu.why_not(bench.device):
        print(f"kernels: left out, {why}", file=sys.stderr)
        return
    dtype = _real(bench)
    for name, width in itertools.product(bench.shapes(), (3,) if bench.args.tiny else WIDTHS):
        context = 130 if bench.args.tiny else 1024
        config = gpu_shapes.shape(name, context + 64)
        what = (config, width, context, dtype, bench.device)
        cases, where = Picks(*what), {"shape": name, "width": width}
        if bench.late(f"kernels of {name} at {width} rows"):
            continue
        for kernel, make in cases.all():
            row = {**where, "kernel": kernel}
            for found in bench.guarded({}, partial(_measured, make, dtype, bench.ceiling)):
                yield {**row, **found}
        for kernel, make in Peers(*what).all():
            yield {**where, "peer": kernel, **measure_peer(make, dtype, bench.ceiling)}
            torch.cuda.empty_cache()
        if bench.args.tilings and width == 1 and bench.device.type == "cuda":
            for row in tilings(cases, bench.ceiling):
                yield {**where, **row}


def _measured(make: Callable[[], Trial], dtype: torch.dtype, ceiling: float) -> list[Row]:
    return [measure(make, dtype, ceiling)]


def ar(bench: Bench) -> Iterator[Row]:
    """Plain decoding of random shapes."""
    for name in bench.shapes():
        if not bench.late(f"plain decoding of {name}"):
            yield from bench.guarded({"shape": name}, partial(_plain, bench, name))


def _plain(bench: Bench, name: str) -> Iterator[Row]:
    context = 20 if bench.args.tiny else 512
    model = gpu_shapes.random_llama(name, _real(bench), bench.device, context + 512)
    yield {"shape": name, "check": "rows alone and together", **gpu_shapes.rows_agree(model)}
    rows = gpu_shapes.plain_rows(name, model, context, bench.repeats, bench.ceiling)
    yield from rows
    del model
    torch.cuda.empty_cache()
    exact = rows[0]
    if exact["ratio"] < LISTED and not gpu.why_not(bench.device):
        config = gpu_shapes.shape(name, context + 64)
        cases = Picks(config, 1, context, _real(bench), bench.device)
        for row in step_rows(cases, exact["ms"], bench.ceiling):
            yield {"shape": name, **row}


def shapes(bench: Bench) -> Iterator[Row]:
    """The planner's curve on real costs."""
    for name in bench.shapes():
        if not bench.late(f"passes of {name}"):
            yield from bench.guarded({"shape": name}, partial(_curve, bench, name))


def _curve(bench: Bench, name: str) -> list[Row]:
    context = 20 if bench.args.tiny else 512
    model = gpu_shapes.random_llama(name, _real(bench), bench.device, context + 512)
    return gpu_shapes.curve_rows(name, model, context, bench.repeats)


def _real(bench: Bench) -> torch.dtype:
    """The dtype asked for; small shapes may run in the interpreter, where bf16 is wrong."""
    return torch.float32 if bench.args.tiny else bench.dtype


def spec(bench: Bench) -> Iterator[Row]:
    """Our methods, in every dtype this device is fast at."""
    dtypes = ["fp32"] if bench.device.type == "cpu" else ["bf16", "fp16"]
    names = [name.strip() for name in bench.args.methods.split(",")]
    names = names[:2] if bench.args.tiny else names
    for part, dtype in enumerate(dtypes):

        def spent(part: int = part) -> float:
            return bench.spent() * len(dtypes) - part

        yield from compare(bench, dtype, names, spent, fast=True)


def peers(bench: Bench) -> Iterator[Row]:
    """transformers' methods beside plain decoding."""
    dtype = "fp32" if bench.args.tiny else dtype_name(bench.dtype)
    names = ("hf", "hf-static", "hf-early-exit", "hf-prompt-lookup")
    both = bench.args.model == MODEL
    yield from compare(bench, dtype, names, lambda: bench.spent() * (1 + both))
    if both:  # the only exits that transformers can use share the model's own head
        names = ("layerskip", "hf-early-exit")
        yield from compare(bench, dtype, names, lambda: 2 * bench.spent() - 1, model=LAYERSKIP)


def compare(
    bench: Bench,
    dtype: str,
    names: Sequence[str],
    spent: Callable[[], float],
    *,
    fast: bool = False,
    model: str = "",
) -> Iterator[Row]:
    """Plain decoding, with torch's products too where ``fast``, and each method."""
    from hispec.bench import gpu_methods
    from hispec.bench.baselines import HF, HFModel
    from hispec.bench.methods import Question
    from hispec.bench.roster import build

    lm = bench.lm(dtype, model)
    work, methods = build(lm, [name for name in names if name != "hf-static"])
    if fast:
        methods[1:1] = gpu_methods.plain_on_fast(work)
    if "hf-static" in names:
        static = {"cache_implementation": "static"}  # for which transformers compiles the pass
        methods.append(HF(HFModel(lm), "hf-static", static, compiled=True))
    prompts = load_prompts(bench.args.prompts, 1 if bench.args.tiny else bench.args.limit).prompts
    limit = 4 if bench.args.tiny else bench.args.max_new_tokens
    questions = [Question(lm.encode(prompt.chat(0, [])), limit) for prompt in prompts]
    cuda = bench.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated if cuda else None
    clear = torch.cuda.reset_peak_memory_stats if cuda else lambda: None
    asked = len(questions)
    for row in gpu_methods.compare(lm, methods, questions, clear, memory, spent):
        asked = row.get("prompts", asked)
        named = {"model": model} if model else {}
        yield {"method": row.pop("method"), "dtype": dtype, **named, **row}
    if asked < len(questions):
        over = f"{bench.args.stage_s:g} s are over"
        print(f"{dtype}: {len(questions) - asked} questions left out, {over}", file=sys.stderr)


STAGES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "kernels": kernels,
    "ar": ar,
    "spec": spec,
    "peers": peers,
    "shapes": shapes,
}


def chained(bench: Bench, stage: str) -> Iterator[Row]:
    """Yields a stage's rows, and one more if it fails in between."""
    rows = STAGES[stage](bench)
    while True:
        (row, *_) = bench.guarded({}, partial(itertools.islice, rows, 1)) or [None]
        if row is None:
            return
        yield row


def tables(rows: list[Row]) -> str:
    """Returns rows as aligned columns, those of other columns in a table of their own."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    return "\n\n".join(map(table, kinds.values()))


def table(rows: list[Row]) -> str:
    """Returns rows as aligned columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(STAGES), metavar="STAGES")
    parser.add_argument("--model", default=MODEL, metavar="M")
    parser.add_argument("--exits", metavar="DIR")
    parser.add_argument(
        "--methods",
        default=",".join(OURS),
        metavar="LIST",
        help="presets and files of hierarchies for spec",
    )
    parser.add_argument("--shapes", default="135M,1B,8B,70B", metavar="LIST")
    parser.add_argument("--stage-s", type=float, default=420, metavar="S", help="of each stage")
    parser.add_argument("--prompts", default="builtin", metavar="FILE")
    parser.add_argument("--limit", type=int, default=12, metavar="K")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--dtype", default="auto", metavar="auto|bf16|fp16|fp32")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    parser.add_argument("--tilings", action="store_true", help="time products cut in other ways")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that it works")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")
    args = parser.parse_args(arguments)
    try:
        stages = args.only.split(",")
        unknown = next((name for name in stages if name not in STAGES), None)
        if unknown:
            raise UsageError(f"unknown stage {unknown!r}. Known: {', '.join(STAGES)}.")
        wrong = next((x for x in args.shapes.split(",") if x not in gpu_shapes.SHAPES), None)
        if wrong:
            raise UsageError(f"unknown shape {wrong!r}. Known: {', '.join(gpu_shapes.SHAPES)}.")
        if args.stage_s <= 0:
            raise UsageError(f"--stage-s must be above 0, got {args.stage_s:g}.")
        bench = Bench(args)
        print(f"{bench.machine()['device']}: a copy moves {bench.ceiling:.0f} GB/s", flush=True)
        failed = False
        for stage in stages:
            bench.started, rows = time.perf_counter(), []
            with torch.inference_mode():
                for row in chained(bench, stage):
                    bench.write({"stage": stage, **row})
                    failed |= row.get("right") is False and "peer" not in row
                    failed |= bool(row.get("exact") and row["differ"])
                    rows.append(row)
            print(f"\n{stage} ({bench.spent() * args.stage_s:.0f} s)")
            print(tables(rows) if rows else "nothing", flush=True)
        return int(failed)
    except HispecError as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
