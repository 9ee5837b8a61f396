"""The picker: greedy, noise, rules; what exits rank; what is kept of a pick."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LogitsProcessor

from hispec.errors import HispecError, UsageError
from hispec.picker import Picker
from hispec.processors import GeneratedPenalty, check_pure
from hispec.sampling import Sampling
from hispec_kernels import gumbel

VOCAB = 500


def logits_of(rows: int, size: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn((rows, size), generator=torch.Generator().manual_seed(seed))


def no_prefix(row: int) -> list[int]:
    raise AssertionError("nobody needs the prefix")


SETTINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(0.7, 3),
    "top-p": Sampling(1.0, 2**40, top_p=0.8),
    "several": Sampling(1.3, 1, top_k=40, top_p=0.9, min_p=0.02, typical_p=0.9),
    "penalties": Sampling(
        0.9, 5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2
    ),
    "greedy with penalties": Sampling(repetition_penalty=1.5, no_repeat_ngram_size=2),
    "bans": Sampling(1.0, 8, bad_words_ids=[[3], [4, 5]], suppress_tokens=list(range(100))),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_answer_depends_on_row_position_and_prefix_alone(name: str) -> None:
    logits, positions = logits_of(6), [7, 8, 8, 9, 9, 10]
    paths = [[1, 2, 3, 4, 5, 6, i] for i in range(6)]
    picker = SETTINGS[name].picker(3, vocab_size=VOCAB)
    found = list(picker.picks(logits, positions, lambda i: paths[i]))
    other = SETTINGS[name].picker(3, vocab_size=VOCAB)
    for row in reversed(range(6)):  # another order, one at a time, twice
        for _ in range(2):
            one = other.picks(
                logits[row : row + 1], positions[row : row + 1], lambda _, row=row: paths[row]
            )
            assert one[0] == found[row]
    assert found != list(range(6)), "the rows are all alike"


def test_only_rows_that_are_read_are_computed() -> None:
    asked = []
    picker = Sampling(1.0, 4, top_k=5).picker(0, vocab_size=VOCAB)

    def prefix(row: int) -> list[int]:
        asked.append(row)
        return [1, 2]

    picks = picker.picks(logits_of(9), range(9), prefix)
    assert len(picks) == 9 and asked == []
    first, again, last = picks[2], picks[2], picks[-1]
    assert asked == [2, 8] and first == again
    assert last == picks[8]


def test_all_rows_at_once_are_the_rows_one_by_one() -> None:
    # As a GPU does it, for one look from the host.
    logits, picker = logits_of(6), Picker(7, 0.6)
    for ids in (None, torch.arange(VOCAB).flip(0)):
        one_by_one = list(picker.picks(logits, range(3, 9), no_prefix, ids))
        assert picker._sampled(logits, range(3, 9), ids) == one_by_one


def test_rules_then_noise_then_the_largest() -> None:
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    sampling = Sampling(0.8, 11, top_p=0.7)
    picker = sampling.picker(2, vocab_size=VOCAB)
    logits = logits_of(30)
    found = list(picker.picks(logits, range(2, 32), lambda i: [5] * i or [1]))
    for row in range(30):
        scores = TemperatureLogitsWarper(0.8)(None, logits[row : row + 1])
        scores = TopPLogitsWarper(0.7)(None, scores)[0]
        noise = gumbel(11, torch.tensor([2 + row]), torch.arange(VOCAB))
        assert found[row] == int((scores + noise).argmax())


def test_a_reduced_vocabulary_follows_the_rules_of_the_whole() -> None:
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:80]
    picker = Sampling(1.0, 2, bad_words_ids=[[int(ids[0])]]).picker(0, vocab_size=VOCAB)
    logits = logits_of(1, 80)
    logits[0, 0] = 100.0
    pick = picker.picks(logits, [4], lambda _: [1], ids)[0]
    assert pick in ids.tolist() and pick != int(ids[0])
    (ranked,), (odds,) = picker.ranked(logits, [4], lambda _: [1], ids, 3)
    assert ranked[0] == pick and int(ids[0]) not in ranked
    assert all(0 <= p <= 1 for p in odds)


@pytest.mark.parametrize("name", ["greedy", "temperature", "penalties", "bans", "top-p"])
def test_the_first_that_is_ranked_is_the_pick(name: str) -> None:
    picker = SETTINGS[name].picker(3, vocab_size=VOCAB)
    logits, path = logits_of(40), [1, 2, 3, 4, 4]
    positions = range(5, 45)
    picks = list(picker.picks(logits, positions, lambda _: path))
    ranked, odds = picker.ranked(logits, positions, lambda _: path, None, 4)
    same = sum(best[0] == pick for best, pick in zip(ranked, picks, strict=True))
    assert same == 40
    assert all(len(set(best)) == 4 for best in ranked)
    if name == "temperature":
        p = (logits / 0.7).softmax(-1)
        wanted = p.gather(-1, torch.tensor(ranked))
        torch.testing.assert_close(torch.tensor(odds), wanted, rtol=1e-4, atol=1e-6)


def test_traces_hold_what_a_pick_was_made_from() -> None:
    picker = Sampling(0.5, 1, top_k=3).picker(1, vocab_size=VOCAB)
    picker.traces = {}
    logits = logits_of(2)
    picks = picker.picks(logits, [1, 2], lambda _: [9])
    assert picks[1] in picker.traces[2].scores.topk(3).indices
    assert 1 not in picker.traces  # not read yet
    assert torch.equal(picker.traces[2].logits, logits[1])
    assert int((picker.traces[2].scores > -math.inf).sum()) == 3
    greedy = Picker()
    greedy.traces = {}
    assert greedy.picks(logits, [1, 2], no_prefix)[0] == int(logits[0].argmax())
    assert torch.equal(greedy.traces[1].scores, logits[0])


def test_nothing_left_to_pick_is_said() -> None:
    picker = Sampling(suppress_tokens=list(range(VOCAB))).picker(1, vocab_size=VOCAB)
    with pytest.raises(HispecError, match="no token to pick at position 5"):
        picker.picks(logits_of(1), [5], lambda _: [1])[0]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"bad_words_ids": [[1, VOCAB]]}, "bad_words_ids"),
        ({"suppress_tokens": [-1]}, "suppress_tokens"),
        ({"forced_eos_token_id": VOCAB + 3}, "forced_eos_token_id"),
        ({"begin_suppress_tokens": [True]}, "begin_suppress_tokens"),
    ],
)
def test_ids_outside_the_vocabulary(settings, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Sampling(**settings).picker(1, vocab_size=VOCAB)


def test_penalties_count_what_was_generated() -> None:
    scores = torch.zeros(1, 10)
    ids = torch.tensor([[1, 2, 2, 3, 3, 3]])  # the prompt is the first two
    found = GeneratedPenalty(2, 0.5, 0.25)(ids, scores)
    assert found[0, :5].tolist() == [0, 0, -0.75, -1.25, 0]
    assert torch.equal(scores, torch.zeros(1, 10)), "the row was written to"


# ------------------------------------------------------------------ purity


class Pure(LogitsProcessor):
    def __init__(self) -> None:
        self.seen = 0
        self.table = None

    def __call__(self, input_ids, scores):
        self.seen += 1  # counting is no sin, only answering by it
        if self.table is None:
            self.table = torch.zeros_like(scores)
        return scores + self.table


class AtTheThird(Pure):
    def __call__(self, input_ids, scores):
        self.seen += 1
        return scores if self.seen < 23 else scores * 0


class Remembers:
    def __init__(self) -> None:
        self.last = None

    def __call__(self, ids, scores):
        answer = scores if self.last is None else scores + self.last
        self.last = float(scores[0, 0])
        return answer


def test_stateful_processors_are_refused() -> None:
    from transformers import SynthIDTextWatermarkLogitsProcessor, TopKLogitsWarper

    pure = Pure()
    check_pure([pure, TopKLogitsWarper(3), lambda ids, scores: scores], [1, 2], VOCAB)
    assert pure.seen == 0, "the user's own was called"
    watermark = SynthIDTextWatermarkLogitsProcessor(5, [1, 2], 8, 0, 4, torch.device("cpu"))
    for rule, word in (
        (AtTheThird(), "AtTheThird"),
        (Remembers(), "Remembers"),
        (watermark, "SynthID"),
    ):
        with pytest.raises(UsageError, match=word):
            check_pure([rule], [1, 2], VOCAB)
    with pytest.raises(UsageError, match="shape"):
        check_pure([lambda ids, scores: scores[0]], [1, 2], VOCAB)
