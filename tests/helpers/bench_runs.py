"""Runs of the benchmark on a clock that ticks when it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helpers.bench import write_prompts
from hispec.bench import roster
from hispec.bench.folder import RunFolder
from hispec.bench.prompts import load_prompts
from hispec.bench.run import Plan, Run
from hispec.generation import LM
from hispec.hierarchy import Hierarchy, Level

TWO_LEVELS = Hierarchy((Level(2, 2), Level(4, 4)), "hispec")


class Steady:
    """A clock that ticks once whenever it is read: every decode takes as long as any other."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def prepare(
    lm: LM, tmp_path: Path, add: Callable[[Any], Sequence[Any]] = lambda ar: (), **options: Any
) -> Run:
    """A run of plain decoding, HiSpec, and what ``add`` makes of plain decoding."""
    rows = options.pop("rows", None)
    bench, methods = roster.engines(lm, {"hispec": TWO_LEVELS})
    bench.clock = Steady()
    methods = [methods[0], methods[-1], *add(methods[0])]
    prompts = load_prompts(str(write_prompts(tmp_path / "prompts.jsonl", rows)))
    plan = Plan(prompts, **{"max_new_tokens": 8, "repeats": 2, **options})
    with RunFolder.create(tmp_path / "run", plan.settings(lm, methods), PROVENANCE) as folder:
        return Run(plan, folder, bench, methods)


PROVENANCE = {
    "model": "tiny",
    "layers": 6,
    "dtype": "fp32",
    "device": "cpu",
    "cpu": "a <CPU>",
    "threads": 1,
    "torch": "2",
    "transformers": "5",
    "hispec": "0",
    "commit": None,
    "date": "2026-01-01T00:00:00",
    "weight_bytes": 10**6,
    "kv_bytes_per_token": 1000,
    "read_gb_per_s": 10.0,
    "passes": "torch",
    "why_not_compiled": None,
}
