"""Databases' trees grown by the compiled library are those that Python grows, to the last grade."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from pathlib import Path

import numpy as np
import pytest
from helpers.builds import skip_or_fail

from hispec.model.store import cache_dir
from hispec.sources import recycle
from hispec.sources.back_off import BackOff
from hispec.sources.growth import Grower
from hispec.sources.history import History
from hispec.sources.ngrams import COLUMNS, Counts, count
from hispec.sources.recycle import WIDTH, Recycle
from hispec.sources.source import GRADES, Source
from hispec.sources.store import Store, write
from hispec_kernels import cpu

V = 40


@pytest.fixture(scope="module")
def library() -> CDLL:
    try:
        return cpu.load_library(cache_dir() / "native")
    except cpu.BuildError as error:
        skip_or_fail(str(error))


@contextmanager
def using(library: CDLL | None) -> Iterator[None]:
    before = cpu.in_use()
    cpu.use(library)
    try:
        yield
    finally:
        cpu.use(before)


def texts(draw: random.Random, n: int, vocab_size: int = V) -> list[list[int]]:
    """Texts in which some ids are much more frequent than others."""
    return [
        [int(vocab_size * draw.random() ** 3) for _ in range(draw.randrange(2, 60))]
        for _ in range(n)
    ]


def assert_same(one: Source, other: Source, draw: random.Random) -> int:
    """Both propose the same after random texts; returns how many tokens that were."""
    proposed = 0
    for _ in range(40):
        text = [int(V * draw.random() ** 3) for _ in range(draw.randrange(1, 8))]
        path = [int(V * draw.random() ** 3) for _ in range(draw.randrange(4))]
        budget = draw.randrange(Grower.MOST + 2)
        for source in (one, other):
            source.begin(text)
        found, wanted = one.propose(path, budget), other.propose(path, budget)
        assert found == wanted
        proposed += sum(len(x.tokens) for x in found)
    return proposed


@pytest.mark.parametrize("seed", range(6))
def test_history_grows_the_same(library: CDLL, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    base = count(texts(draw, 30), longest=3)
    write(tmp_path / "base", Counts.of(base, width=4), {"tokenizer": "t", "longest": "3"})
    outputs = [*texts(draw, 20), [1, 2]]  # too small to be merged with the others
    found = []
    for native in (library, None):
        with using(native):
            store = Store(tmp_path / "base", "t") if seed % 2 else None
            source = History(tmp_path / f"h{native is None}", "t", V, base=store)
            for output in outputs:
                source.begin(())
                source.commit(output)
                source.end()
            assert len(source._rows._tables) > 1, "tables have to be added"
            assert (source._rows._grower is None) == (native is None)
            found.append(source)
    assert assert_same(*found, draw) > 100


@pytest.mark.parametrize("seed", range(6))
def test_recycled_logits_grow_the_same(
    library: CDLL, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(recycle, "PAIRS", 64)  # pairs drive each other out
    draw = random.Random(seed)
    found = []
    for native in (library, None):
        with using(native):
            found.append(Recycle(V))
    for _ in range(60):
        n, wide = draw.randrange(1, 12), draw.choice((3, WIDTH, WIDTH + 2))
        tokens = [int(V * draw.random() ** 2) for _ in range(n)]
        before = [int(V * draw.random() ** 2) for _ in range(n)] if draw.random() < 0.8 else None
        top = np.array([draw.sample(range(V), wide) for _ in range(n)])
        for source in found:
            source.observe(tokens, top, before)
    for name in ("_singles", "_pairs", "_owners", "_turns"):
        assert np.array_equal(getattr(found[0], name), getattr(found[1], name)), name
    assert (found[0]._owners >= 0).all()
    assert assert_same(*found, draw) > 100


def test_equal_chances_keep_their_order(library: CDLL) -> None:
    rows = np.array([[5, 6, 7], [7, 5, 6], [6, 7, 5]])
    found = []
    for native in (library, None):
        with using(native):
            source = Recycle(V)
            source.priors = [0.9] * GRADES
            source.reset()
            source.observe([5, 6, 7], rows)
            source.begin([5])
            found.append([source.propose((), budget) for budget in range(1, 33)])
    assert found[0] == found[1]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("value", [0, 1, 1 << 31, (1 << 64) - 1])
def test_damaged_counts_are_survived(library: CDLL, column: str, value: int) -> None:
    draw = random.Random(0)
    counts = Counts.of(count(texts(draw, 30)))
    columns = {name: getattr(counts, name).copy() for name in COLUMNS}
    damaged = columns[column]
    damaged[1:-1:2] = value & np.iinfo(damaged.dtype).max
    rows = []
    for native in (library, None):
        with using(native):
            rows.append(BackOff([Counts(*columns.values())], V, [0.5] * GRADES, 8))
    for _ in range(200):
        suffix = tuple(int(V * draw.random() ** 3) for _ in range(draw.randrange(1, 6)))
        found, wanted = (x.propose(suffix, 12) for x in rows)
        assert found == wanted
        assert all(0 <= token < V for path in found for token in path.tokens)
