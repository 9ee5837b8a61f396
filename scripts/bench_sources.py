"""What the databases cost: a round's proposals, and a corpus store from many tokens.

    python scripts/bench_sources.py [--context 8000] [--ngrams 1000000] [--budget 8]
    python scripts/bench_sources.py --store FILE --tokens 50000000

The first times proposing, committing and observing, source by source and together, over a text that
repeats itself as answers do. The second builds a store from synthetic text (a Zipfian vocabulary
with phrases that come back) in a process of its own, then opens it in another: time, peak memory,
anonymous memory above the baseline, and the time of a lookup. With HISPEC_NATIVE=0 trees are grown
in Python, as they are where no C compiler is found.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from hispec.model.native import native_library
from hispec.sources import history_file
from hispec.sources.build import Builder
from hispec.sources.context import Context
from hispec.sources.corpus import Corpus
from hispec.sources.history import History
from hispec.sources.ngrams import count
from hispec.sources.recycle import Recycle
from hispec.sources.store import Store

V = 49_152


def synthetic(rng: np.random.Generator, tokens: int, phrases: int = 20_000) -> np.ndarray:
    """Zipfian tokens; half of them in phrases of 4 to 12, themselves Zipfian."""
    book = [rng.zipf(1.2, rng.integers(4, 13)) % V for _ in range(phrases)]
    parts: list[np.ndarray] = []
    size = 0
    while size < tokens:
        for pick in (rng.zipf(1.2, 512) % phrases).tolist():
            parts.append(book[pick])
            parts.append(rng.zipf(1.2, int(rng.integers(4, 13))) % V)
            size += len(parts[-1]) + len(parts[-2])
    return np.concatenate(parts)[:tokens].astype(np.uint32)


def use_compiled() -> None:
    """Trees are grown by the compiled library, if it is to be had."""
    _, why = native_library(None, torch.bfloat16, torch.device("cpu"))
    print(f"grown in Python: {why}" if why else "grown by the compiled library")


def quantiles(times: list[float]) -> str:
    times = sorted(times)
    return "".join(f"{times[int(q * (len(times) - 1))] * 1e6:10.0f}" for q in (0.5, 0.9, 0.99))


def proposals(args: argparse.Namespace) -> None:
    use_compiled()
    rng = np.random.default_rng(0)
    text = synthetic(rng, args.context + 1000, phrases=2000).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "history"
        more = count([synthetic(np.random.default_rng(1), args.ngrams // 2)])
        history_file.MAX_RECORDS = args.ngrams
        keep = np.sort(rng.choice(len(more.keys), min(args.ngrams, len(more.keys)), replace=False))
        history_file.add_records(path, "t", type(more)(*(column[keep] for column in more)))
        store = Builder(Path(folder) / "store", {}, 5)
        store.add([synthetic(np.random.default_rng(2), 2_000_000)])
        store.finish({"tokenizer": "t"}, least=2, width=8)
        history = History(path, "t", V)
        sources = [Context(), history, Corpus(Store(Path(folder) / "store"), V), Recycle(V)]
        started = time.perf_counter()
        for source in sources:
            source.begin(text[: args.context])
        print(f"begin, {args.context} tokens: {(time.perf_counter() - started) * 1e3:.0f} ms")
        print(f"history: {len(history._counts):,} n-grams")
        took: dict[str, list[float]] = defaultdict(list)
        for at in range(args.context, args.context + 1000, 2):
            total = 0.0
            for source in sources:
                started = time.perf_counter()
                source.propose((), args.budget)
                took[source.name].append(time.perf_counter() - started)
                total += took[source.name][-1]
            took["together"].append(total)
            tokens = text[at - args.budget : at]
            top = rng.integers(0, V, (args.budget, 8))
            started = time.perf_counter()
            for source in sources:
                source.observe(tokens, top, text[at - args.budget - 1 : at - 1])
            took["observe"].append(time.perf_counter() - started)
            started = time.perf_counter()
            for source in sources:
                source.commit(text[at : at + 2])
            took["commit 2"].append(time.perf_counter() - started)
    print(f"microseconds at a budget of {args.budget}  {'median':>8}{'p90':>10}{'p99':>10}")
    for name, times in took.items():
        print(f"  {name:<28}{quantiles(times)}")


BUILD = """
import resource, sys, time
sys.path.insert(0, {scripts!r})
from bench_sources import build
build({path!r}, {tokens})
print(f"peak memory {{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f}} MB")
"""
ASK = """
import sys
sys.path.insert(0, {scripts!r})
from bench_sources import ask
ask({path!r})
"""


def build(path: str, tokens: int) -> None:
    started = time.perf_counter()
    builder = Builder(Path(path), {"tokens": tokens}, 5)
    for part in range(tokens // 1_000_000):
        rng = np.random.default_rng(7)
        rng = np.random.default_rng([7, part]) if part else rng
        builder.add([synthetic(rng, 1_000_000)])
    counted = time.perf_counter()
    builder.finish({"tokenizer": "t"}, least=2, width=8)
    store = Store(path)
    print(
        f"{tokens:,} tokens: counted in {counted - started:.0f} s, merged in "
        f"{time.perf_counter() - counted:.0f} s; {len(store.counts.keys):,} rows, "
        f"{len(store.counts):,} successors, {Path(path).stat().st_size / 1e6:.0f} MB"
    )


def anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


def ask(path: str) -> None:
    use_compiled()
    text = synthetic(np.random.default_rng([7, 1]), 200_000).tolist()
    before = anonymous_mb()
    source = Corpus(Store(path), V)
    took = []
    for _ in range(2):  # the first time around warms the pages
        took.clear()
        for at in range(5, len(text), 20):
            source.begin(text[at - 5 : at])
            started = time.perf_counter()
            source.propose((), 8)
            took.append(time.perf_counter() - started)
    print(f"anonymous memory above the baseline {anonymous_mb() - before:.1f} MB")
    print(f"microseconds a lookup of 8 nodes  {'median':>8}{'p90':>10}{'p99':>10}")
    print(f"{'':34}{quantiles(took)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--ngrams", type=int, default=1_000_000)
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--store")
    parser.add_argument("--tokens", type=int, default=50_000_000)
    args = parser.parse_args()
    if not args.store:
        proposals(args)
        return
    facts = {"scripts": str(Path(__file__).parent), "path": args.store, "tokens": args.tokens}
    if not Path(args.store).exists():
        subprocess.run([sys.executable, "-c", BUILD.format(**facts)], check=True)
    subprocess.run([sys.executable, "-c", ASK.format(**facts)], check=True)


if __name__ == "__main__":
    main()
