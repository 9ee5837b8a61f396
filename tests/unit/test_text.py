"""Text as it grows: whole characters, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from helpers.tiny_llama import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from hispec.text import Detokenizer, StopScanner

TOKENIZER = byte_tokenizer()
SPECIAL = (258, 259, 260)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def pieces_of(ids: Sequence[int], tokenizer=TOKENIZER) -> list[str]:
    words = Detokenizer(tokenizer)
    return [*(words.add(token) for token in ids), words.finish()]


class Words:
    """Words joined as sentencepiece's decoders do: the first one loses its space."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(f" w{token}" for token in token_ids).removeprefix(" ")


@pytest.mark.parametrize(
    "text", ["plain", "the the", "naïve café", "日本語 🙂🙃 x", "👩‍👩‍👧‍👦", ""]
)
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    pieces = pieces_of(ids_of(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    ids = ids_of("a🙂b")
    assert len(ids) == 6
    assert pieces_of(ids) == ["a", "", "", "", "🙂", "b", ""]


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    ids = ids_of("a🙂")[:-1]
    pieces = pieces_of(ids)
    assert pieces[:-1] == ["a", "", "", ""]
    assert pieces[-1] == "\ufffd"
    assert "".join(pieces) == TOKENIZER.decode(ids)


def test_special_tokens_are_not_text() -> None:
    ids = [258, *ids_of("hi"), 260, *ids_of(" you"), 259]
    assert "".join(pieces_of(ids)) == "hi you"


def test_words_keep_the_space_between_them() -> None:
    # Decoding each token by itself would give w1w2w3.
    assert pieces_of([1, 2, 3], Words()) == ["w1", " w2", " w3", ""]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 260), max_size=40))
def test_any_ids_add_up_to_their_text(ids: list[int]) -> None:
    assert "".join(pieces_of(ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=20))
def test_any_text_comes_through(text: str) -> None:
    ids = ids_of(text)
    assert "".join(pieces_of(ids)) == TOKENIZER.decode(ids)


# ------------------------------------------------------------------ stop strings


def scan(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool, list[str]]:
    scanner = StopScanner(stops)
    shown = [scanner.add(piece) for piece in pieces]
    shown.append(scanner.finish())
    return "".join(shown), scanner.hit, shown


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "hit"),
    [
        (["one STOP two"], ["STOP"], "one ", True),
        (["one S", "TO", "P two"], ["STOP"], "one ", True),
        (["one S", "TO", "x"], ["STOP"], "one STOx", False),
        (["one STO"], ["STOP"], "one STO", False),
        (["STOP"], ["STOP"], "", True),
        (["a", "b", "c"], [], "abc", False),
        (["a\n", "\nb"], ["\n\n"], "a", True),
        (["aab", "aac"], ["aac"], "aab", True),
        (["aaab"], ["aab"], "a", True),
        (["x", "aa", "ab"], ["aab"], "xa", True),
        (["one two"], ["two", "one"], "", True),
        (["abc"], ["", "c"], "ab", True),
        (["日本", "語"], ["本語"], "日", True),
    ],
)
def test_text_ends_before_the_first_stop_string(pieces, stops, text: str, hit: bool) -> None:
    assert scan(pieces, stops)[:2] == (text, hit)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    _, _, shown = scan(["one S", "T", "art", "S", "top"], ["STOP"])
    assert shown == ["one ", "", "STart", "", "Stop", ""]


def test_nothing_comes_after_a_hit() -> None:
    scanner = StopScanner(["x"])
    assert [scanner.add("axb"), scanner.add("c"), scanner.finish()] == ["a", "", ""]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.text("ab", min_size=1, max_size=4),
)
def test_borders_between_pieces_do_not_matter(pieces: list[str], stop: str) -> None:
    whole = "".join(pieces)
    text, hit, _ = scan(pieces, [stop])
    assert hit == (stop in whole)
    assert text == whole.split(stop)[0]
