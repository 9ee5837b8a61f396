"""The context database against looking at every position of the text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hispec.sources.context import STARTS, Context
from hispec.sources.source import GRADES

TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=50)
PATH = st.lists(st.integers(0, 2), max_size=5)


def brute_matches(text: list[int], path: list[int]) -> tuple[int, list[int]]:
    """The longest suffix of text + path that occurred before, and where it ended, newest first.

    Only places inside the text count; without a path, the end of the text is no earlier place.
    """
    whole = text + path
    places = range(1, len(text) + (1 if path else 0))
    for length in range(len(whole), 0, -1):
        ends = [e for e in places if e >= length and text[e - length : e] == whole[-length:]]
        if ends:
            return length, ends[::-1]
    return 0, []


def wrapped(text: list[int], path: list[int], start: int, count: int) -> list[int]:
    """``count`` tokens from ``start`` on in text, path and what was read already."""
    whole = text + path
    for _ in range(count):
        whole.append(whole[start + len(whole) - len(text) - len(path)])
    return whole[len(text) + len(path) :]


@given(TEXT, PATH)
def test_longest_suffix_is_found_and_its_newest_continuation_comes_first(
    text: list[int], path: list[int]
) -> None:
    source = Context()
    source.begin(text)
    length, ends = brute_matches(text, path)
    assert source.match(path)[1] == length
    found = source.propose(path, budget=8)
    if not ends:
        assert not found
        return
    assert list(found[0].tokens) == wrapped(text, path, ends[0], len(found[0].tokens))


@given(TEXT, PATH)
def test_candidates_are_what_followed_the_suffixes(text: list[int], path: list[int]) -> None:
    source = Context()
    source.begin(text)
    whole = text + path
    following = {}  # token -> the longest suffix it followed
    for length in range(1, len(whole) + 1):
        for end in range(length, len(text) + (1 if path else 0)):
            if text[end - length : end] == whole[-length:]:
                following[whole[end]] = length
    found = source.propose(path, budget=100)
    assert len(following) < STARTS
    assert {c.tokens[0] for c in found} == set(following)
    assert len(found) == len(following), "a token starts two candidates"


@given(TEXT, st.lists(st.integers(0, 2), max_size=10), PATH)
def test_growing_token_by_token_is_beginning_anew(
    text: list[int], more: list[int], path: list[int]
) -> None:
    grown, whole = Context(), Context()
    grown.begin(text)
    for token in more:
        grown.commit([token])
    whole.begin(text + more)
    assert grown.propose(path, 12) == whole.propose(path, 12)


@given(TEXT, TEXT)
def test_a_new_text_forgets_the_old_one(old: list[int], new: list[int]) -> None:
    used, fresh = Context(), Context()
    used.begin(old)
    used.begin(new)
    fresh.begin(new)
    assert used.propose((), 12) == fresh.propose((), 12)


@given(TEXT, PATH, st.integers(0, 40))
def test_budget_is_kept(text: list[int], path: list[int], budget: int) -> None:
    source = Context()
    source.begin(text)
    found = source.propose(path, budget)
    assert sum(len(c.tokens) for c in found) <= budget
    for candidate in found:
        assert len(candidate.tokens) == len(candidate.grades) > 0
        assert all(0 <= grade < GRADES for grade in candidate.grades)


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ([1, 2, 3, 1, 2], (), [3, 1, 2, 3, 1]),  # runs into the end and wraps
        ([7, 7], (), [7, 7, 7, 7, 7]),
        ([1, 2, 3, 1], (2,), [3, 1, 2, 3, 1]),  # the path is part of what it wraps into
        ([5, 1, 2, 3, 6, 5, 1, 4, 9, 1], (2,), [3, 6, 5, 1, 4]),  # 1 2 beats the newer 1
        ([1, 2, 8, 1, 2, 9, 1, 2], (), [9, 1, 2, 9, 1]),  # the newer of two equal matches
    ],
)
def test_first_candidate(text: list[int], path: Sequence[int], expected: list[int]) -> None:
    source = Context()
    source.begin(text)
    assert list(source.propose(path, 5 * 8)[0].tokens)[:5] == expected


def test_newest_gram_is_known_at_once() -> None:
    source = Context()
    source.begin([1, 2])
    source.commit([3, 1])
    assert source.propose((), 1)[0].tokens == [2]
    source.commit([2])
    assert source.propose((), 1)[0].tokens == [3]


def test_nothing_known_nothing_proposed() -> None:
    source = Context()
    assert source.propose((), 4) == []
    source.begin([1, 2, 3])
    assert source.propose((), 4) == []
    assert source.propose((9,), 4) == []


@pytest.mark.parametrize("text", [[1] * 20_000, [1, 2, 3, 4] * 5_000])
def test_repetition_costs_no_more_than_prose(text: list[int]) -> None:
    source = Context()
    source.begin(text)  # quadratic work would take minutes
    assert source.match()[1] > 19_000
    assert list(source.propose((), 8)[0].tokens) == wrapped(text, [], len(text) - 4, 8)
