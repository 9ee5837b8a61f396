"""Counts of n-grams, and stores of them on disk, against counting with dictionaries."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hispec.sources import back_off, build, store
from hispec.sources.build import Builder, merge_stores
from hispec.sources.corpus import Corpus
from hispec.sources.fingerprint import DatabaseError, fingerprint
from hispec.sources.ngrams import COLUMNS, Counts, Records, count, keys_of, merge
from hispec.sources.source import GRADES
from hispec.sources.store import Store

TEXTS = st.lists(st.lists(st.integers(0, 5), max_size=25), max_size=8)


def brute(texts: list[list[int]], longest: int) -> dict[int, Counter[int]]:
    """key → successor → count."""
    rows: dict[int, Counter[int]] = defaultdict(Counter)
    for text in texts:
        for length in range(1, longest + 1):
            for at in range(length, len(text)):
                rows[keys_of(text[at - length : at])[-1]][text[at]] += 1
    return rows


def ranked(row: Counter[int], least: int, width: int) -> list[tuple[int, int]]:
    kept = [(token, times) for token, times in row.items() if times >= least]
    return sorted(kept, key=lambda pair: (-pair[1], pair[0]))[:width]


def assert_counts(counts: Counts, rows: dict[int, Counter[int]], least: int, width: int) -> None:
    for key, row in rows.items():
        best = ranked(row, least, width)
        found = counts.row(key)
        if not best:
            assert found is None
            continue
        tokens, times = map(list, zip(*best, strict=True))
        assert found == (tokens, times, sum(row.values()), len(best))
    assert len(counts.keys) == sum(bool(ranked(row, least, width)) for row in rows.values())


@given(TEXTS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_counts_are_those_of_dictionaries(
    texts: list[list[int]], longest: int, least: int, width: int
) -> None:
    counts = Counts.of(count(texts, longest), least=least, width=width)
    assert_counts(counts, brute(texts, longest), least, width)
    assert counts.row(12345) is None


@given(TEXTS, TEXTS)
def test_merged_records_are_the_records_of_both(
    one: list[list[int]], other: list[list[int]]
) -> None:
    together = merge([count(one, 3), count(other, 3)])
    for column, wanted in zip(together, count(one + other, 3), strict=True):
        assert np.array_equal(column, wanted)


@given(TEXTS, st.integers(1, 2))
def test_records_of_counts_make_the_counts_again(texts: list[list[int]], width: int) -> None:
    counts = Counts.of(count(texts, 3), width=width)
    again = Counts.of(counts.records(), width=width)
    for name in COLUMNS:
        assert np.array_equal(getattr(counts, name), getattr(again, name)), name


def test_keys_tell_order_and_length() -> None:
    seen = {keys_of(s)[-1] for s in [(1,), (2,), (1, 2), (2, 1), (1, 1), (1, 1, 1), (0,), (0, 0)]}
    assert len(seen) == 8
    assert keys_of((7, 8, 9))[:2] == keys_of((8, 9))


def test_backing_off_takes_the_longest_known_suffix_first() -> None:
    texts = [[1, 2, 3, 4], [1, 2, 3, 4], [9, 3, 5], [8, 3, 5], [7, 3, 5], [3, 6]]
    rows = back_off.BackOff([Counts.of(count(texts))], 100, [0.5] * GRADES, 1)
    ids, grades, known = rows._successors((1, 2, 3))
    assert ids == [4] and known == (1, 2, 3)
    ids, shorter, known = rows._successors((6, 6, 3))
    assert ids == [5, 4, 6] and known == (3,)
    assert grades[0] > shorter[0] > shorter[1] > shorter[2]
    assert rows._successors((6, 6)) == ([], [], ())


# -- stores --


def built(path: Path, texts: list[list[int]], least: int = 1, longest: int = 3) -> Store:
    builder = Builder(path, {"texts": len(texts)}, longest)
    builder.add(texts)
    builder.finish({"tokenizer": "t"}, least=least, width=4)
    return Store(path, "t")


def draws(seed: int, texts: int = 60) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(20) for _ in range(draw.randrange(40))] for _ in range(texts)]


@pytest.mark.parametrize("least", [1, 3])
def test_store_of_many_runs_and_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    monkeypatch.setattr(build, "RUN_TOKENS", 100)
    monkeypatch.setattr(build, "RANGE_RECORDS", 200)
    texts = draws(0)
    builder = Builder(tmp_path / "s", {}, 3)
    for text in texts:
        builder.add([text])
    assert len(builder._runs) > 5
    builder.finish({"tokenizer": "t"}, least=least, width=4)
    opened = Store(tmp_path / "s", "t")
    assert_counts(opened.counts, brute(texts, 3), least, 4)
    assert opened.fact("num_tokens") == sum(map(len, texts))
    assert opened.fact("num_texts") == len(texts)
    assert [path.name for path in tmp_path.iterdir()] == ["s"], "something was left behind"


def test_interrupted_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "RUN_TOKENS", 100)
    texts = draws(1)
    first = Builder(tmp_path / "s", {"of": "this"}, 3)
    for text in texts[:30]:
        first.add([text])
    first.close()  # killed: what was not in a whole run is lost
    second = Builder(tmp_path / "s", {"of": "this"}, 3)
    assert 0 < second.num_texts <= 30
    for text in texts[second.num_texts :]:
        second.add([text])
    second.finish({"tokenizer": "t"}, least=1, width=4)
    assert_counts(Store(tmp_path / "s", "t").counts, brute(texts, 3), 1, 4)


def test_another_plan_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "RUN_TOKENS", 10)
    first = Builder(tmp_path / "s", {"of": "this"}, 3)
    first.add(draws(1))
    first.close()
    second = Builder(tmp_path / "s", {"of": "that"}, 3)
    assert second.num_texts == 0
    second.add([[1, 2]])
    second.finish({"tokenizer": "t"}, least=1, width=4)
    assert len(Store(tmp_path / "s").counts) == 1


def test_two_builders_of_one_file(tmp_path: Path) -> None:
    first = Builder(tmp_path / "s", {}, 3)
    with pytest.raises(DatabaseError, match="Another process is building"):
        Builder(tmp_path / "s", {}, 3)
    first.close()


def test_no_text_is_refused(tmp_path: Path) -> None:
    builder = Builder(tmp_path / "s", {}, 3)
    with pytest.raises(DatabaseError, match="no text to count"):
        builder.finish({}, least=1, width=4)
    assert not list(tmp_path.iterdir())


def test_texts_too_rare_make_an_empty_store(tmp_path: Path) -> None:
    opened = built(tmp_path / "s", [[1, 2, 3]], least=2)
    assert len(opened.counts) == 0
    source = Corpus(opened, 10)
    source.begin([1, 2])
    assert source.propose((), 8) == []


def test_merged_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "RANGE_RECORDS", 200)
    one, other = draws(2), draws(3)
    stores = [built(tmp_path / "a", one, longest=2), built(tmp_path / "b", other, longest=2)]
    merge_stores(stores, tmp_path / "c")
    merged, wanted = Store(tmp_path / "c").counts, brute(one + other, 2)
    assert set(merged.keys.tolist()) == set(wanted)
    for key, row in wanted.items():
        assert merged.row(key)[2] == sum(row.values()), "totals survive what was dropped"


def test_writing_counts(tmp_path: Path) -> None:
    counts = Counts.of(count(draws(4), 3))
    store.write(tmp_path / "s", counts, {"tokenizer": "t"})
    opened = Store(tmp_path / "s", "t").counts
    for name in COLUMNS:
        assert np.array_equal(getattr(counts, name), getattr(opened, name))
    from safetensors import safe_open

    with safe_open(tmp_path / "s", "np") as file:  # the format is what it claims to be
        assert set(file.keys()) == set(COLUMNS)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    built(tmp_path / "s", [[1, 2]])
    with pytest.raises(DatabaseError, match="another tokenizer"):
        Store(tmp_path / "s", "another")


def test_fingerprint_is_that_of_the_vocabulary() -> None:
    class Words:
        def __init__(self, **ids: int) -> None:
            self.ids = ids

        def get_vocab(self) -> dict[str, int]:
            return self.ids

    assert fingerprint(Words(a=0, b=1)) == fingerprint(Words(b=1, a=0))
    assert fingerprint(Words(a=0, b=1)) != fingerprint(Words(a=1, b=0))


@pytest.mark.parametrize("part", [0, 4, 30, 200, -1])
def test_truncated_store_is_refused(tmp_path: Path, part: int) -> None:
    built(tmp_path / "s", draws(5))
    whole = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(whole[:part])
    with pytest.raises(DatabaseError, match=r"truncated|no n-gram store"):
        Store(tmp_path / "s")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    foreign = {
        "text": b"once upon a time there was a file",
        "tensors": len(header).to_bytes(8, "little") + header,
        "empty": b"",
    }
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DatabaseError, match="no n-gram store"):
            Store(tmp_path / name)
    with pytest.raises(DatabaseError, match="Cannot read"):
        Store(tmp_path / "nothing")
    with pytest.raises(DatabaseError, match="Cannot read"):
        Store(tmp_path)


# -- the source --


def test_corpus_proposes_what_it_counted(tmp_path: Path) -> None:
    source = Corpus(built(tmp_path / "s", [[1, 2, 3, 4, 5, 6]] * 3), 10)
    source.begin([9, 1])
    source.commit([2])
    assert source.propose((), 4)[0].tokens == [3, 4, 5, 6]
    assert source.propose((3, 4), 4)[0].tokens == [5, 6]
    assert source.propose((), 0) == []


def test_ids_past_the_vocabulary_are_never_proposed(tmp_path: Path) -> None:
    source = Corpus(built(tmp_path / "s", [[1, 2, 9, 1, 2, 9]]), vocab_size=9)
    source.begin([1])
    assert [c.tokens for c in source.propose((), 4)] == [[2]]


def test_empty_records() -> None:
    assert len(Counts.of(Records.none())) == 0
    assert Counts.of(Records.none()).row(7) is None
    assert len(count([], 3).keys) == 0
    assert len(count([[], [1]], 3).keys) == 0
