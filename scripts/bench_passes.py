"""What a pass costs, by width, position and layers: compiled against torch, interleaved.

    python scripts/bench_passes.py [--model smollm2-135m] [--dtype bf16] [--out FILE.jsonl]

Times layers 0-L, layers 0-L/8 and the vocabulary head: the median of repeats, the two ways in turn,
so that a drifting machine hurts both alike. Prints a table; --out appends one JSON object a row,
the machine first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

import torch

from hispec.bench.provenance import collect
from hispec.generation import LM
from hispec.hierarchy import eighth_and_quarter
from hispec.model.checkpoint import open_checkpoint
from hispec.model.device import DTYPES
from hispec.model.llama import Llama
from hispec.model.native import _library

WIDTHS = (1, 2, 4, 8, 16, 32)
POSITIONS = (0, 200, 1000)


def load(name: str, dtype: torch.dtype, native: bool) -> Llama:
    os.environ["HISPEC_NATIVE"] = "1" if native else "0"
    _library.cache_clear()
    return Llama.load(open_checkpoint(name), dtype, torch.device("cpu"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out")
    args = parser.parse_args()
    models = {
        "compiled": load(args.model, DTYPES[args.dtype], native=True),
        "torch": load(args.model, DTYPES[args.dtype], native=False),
    }
    if models["compiled"].why_not_native:
        print(f"no compiled passes here: {models['compiled'].why_not_native}", file=sys.stderr)
        return 1
    layers = models["torch"].config.num_layers
    draft, _ = eighth_and_quarter(layers)
    caches = {name: model.new_cache((layers,)) for name, model in models.items()}
    rows = []
    print(f"{'width':>5} {'position':>8}  " + "  ".join(f"{n:>24}" for n in models) + "   (ms)")
    print(" " * 16 + "  ".join(f"{'all':>8}{'draft':>8}{'head':>8}" for _ in models))
    for width in WIDTHS:
        for position in POSITIONS:
            times: dict[str, list[list[float]]] = {name: [[], [], []] for name in models}
            for repeat in range(args.repeats + 2):
                for name, model in models.items():
                    x = torch.randn(width, model.config.hidden_size)
                    kv = caches[name].kv
                    with torch.inference_mode():
                        marks = [time.perf_counter()]
                        model.run_layers(x, 0, layers, position, kv)
                        marks.append(time.perf_counter())
                        model.run_layers(x, 0, draft, position, kv)
                        marks.append(time.perf_counter())
                        model.logits(x)
                        marks.append(time.perf_counter())
                    if repeat >= 2:  # the first two warm up
                        for kept, a, b in zip(times[name], marks, marks[1:], strict=False):
                            kept.append((b - a) * 1e3)
            found = {n: [statistics.median(part) for part in parts] for n, parts in times.items()}
            print(
                f"{width:5d} {position:8d}  "
                + "  ".join("".join(f"{ms:8.2f}" for ms in parts) for parts in found.values()),
                flush=True,
            )
            names = ("all_ms", "draft_ms", "head_ms")
            rows += [
                {"way": n, "width": width, "position": position, **dict(zip(names, p, strict=True))}
                for n, p in found.items()
            ]
    if args.out:
        record = collect(LM(open_checkpoint(args.model), models["compiled"])) | {
            "dtype": args.dtype,
            "draft_layers": draft,
        }
        with open(args.out, "a") as file:
            for row in [record, *rows]:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
