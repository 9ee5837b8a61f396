"""Same tokens under every setting: temperature, filters, penalties, bans, processors, samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.laws import random_prompt, same_tokens
from helpers.lms import chain, over, plain, separate

from hispec.hierarchy import Hierarchy, Level
from hispec.sampling import Sampling

HEADS = ("deep reduced", "block", "deep", "affine reduced", "norm")


def evens_after_odds(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor of the user's: no odd token after an odd one."""
    scores[:, int(ids[0, -1]) % 2 :: 2] -= 5.0 * (ids[0, -1] % 2)
    return scores


SETTINGS: dict[str, dict[str, Any]] = {
    "T=0.3": {"temperature": 0.3},
    "T=1.5": {"temperature": 1.5},
    "top-p": {"temperature": 0.7, "top_p": 0.8},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "typical": {"temperature": 1.0, "typical_p": 0.7},
    "penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
    },
    "greedy, repetition": {"repetition_penalty": 1.5},
    "greedy, n-grams": {"no_repeat_ngram_size": 2},
    "bans": {
        "temperature": 1.0,
        "bad_words_ids": [[5], [7, 9]],
        "suppress_tokens": list(range(100, 200)),
        "begin_suppress_tokens": list(range(50)),
    },
    "processor": {"temperature": 1.0, "top_p": 0.9, "processors": [evens_after_odds]},
}
HIERARCHIES = {
    "layerskip": chain((2, 4)),
    "hispec": chain((1, 2), (3, 4)),
    "hd": Hierarchy(sources=(("context", 8), ("recycle", 8)), nodes=10),
    "ranking": Hierarchy(
        (Level(2, 3, ranks=True), Level(4, 4)), sources=(("context", 6),), nodes=8
    ),
}


@pytest.mark.parametrize("kind", ["torch fp32", "torch bf16", "compiled fp32", "compiled bf16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_any_hierarchy(zoo, kind: str, name: str) -> None:
    lm = zoo("gqa", kind, HEADS)
    hierarchies = [*HIERARCHIES.values(), over(chain((3, 4)), separate(lm, kind), 2)]
    for seed in range(2):
        sampling = Sampling(**SETTINGS[name], seed=seed)
        prompt = random_prompt(seed, 7) * 3  # so that the text before has something to offer
        wanted = plain(lm, prompt, 24, sampling)
        for hierarchy in hierarchies:
            same_tokens(lm, prompt, hierarchy, sampling, 24, wanted)


def test_drafts_obey_the_rules_too(zoo) -> None:
    # If exits ignored them, nothing would be wrong but the speed.
    lm = zoo("echo")
    for name in ("top-k", "penalties", "bans", "processor", "greedy, n-grams"):
        sampling = Sampling(**SETTINGS[name], seed=3)
        found = lm.generate(
            random_prompt(1, 12), hierarchy=chain((2, 4)), max_new_tokens=60, sampling=sampling
        )
        assert found.levels[0].accepted == found.levels[0].drafted, name
        itself = over(Hierarchy(), separate(lm, "torch fp32", layers=6), 4)
        found = lm.generate(
            random_prompt(1, 12), hierarchy=itself, max_new_tokens=60, sampling=sampling
        )
        assert found.levels[0].accepted == found.levels[0].drafted, name


@pytest.mark.parametrize("hierarchy", ["ar", *HIERARCHIES])
def test_a_minimum_a_streamer_criteria_and_scores(zoo, hierarchy: str) -> None:
    lm = zoo("gqa")
    chosen = HIERARCHIES.get(hierarchy, Hierarchy())
    prompt, seen, put = random_prompt(9, 12), [], []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            put.append(value.flatten().tolist())

        def end(self) -> None:
            put.append("end")

    def ends(ids: torch.Tensor, scores: Any) -> bool:
        seen.append(ids.shape[1])
        assert len(scores) == ids.shape[1] - len(prompt) and scores[-1].shape == (1, 320)
        return ids.shape[1] == len(prompt) + 17

    lm_eos, lm.eos = lm.eos, frozenset(range(0, 320, 3))
    try:
        free = lm.generate(prompt, hierarchy=chosen, temperature=1.0, seed=4, max_new_tokens=30)
        assert free.finish_reason == "eos" and free.num_tokens < 10
        found = lm.generate(
            prompt,
            hierarchy=chosen,
            temperature=1.0,
            seed=4,
            max_new_tokens=30,
            min_new_tokens=30,
            stopping_criteria=[ends],
            streamer=Streamer(),
            logprobs=True,
            output_scores=True,
            output_logits=True,
        )
    finally:
        lm.eos = lm_eos
    assert (found.num_tokens, found.finish_reason, found.stop_reason) == (17, "stop", "ends")
    assert not any(token % 3 == 0 for token in found.token_ids)
    assert seen == list(range(len(prompt) + 1, len(prompt) + 18))
    assert put == [prompt, *([token] for token in found.token_ids), "end"]
    # the scores are those of plain decoding of the text, not of what was drafted beside it
    whole, model = [*prompt, *found.token_ids], lm.model
    with torch.inference_mode():
        cache = model.new_cache([model.config.num_layers])
        model.prefill(cache, whole)
        logits = model.logits(cache.states[model.config.num_layers][len(prompt) - 1 : len(whole)])
    torch.testing.assert_close(torch.stack(found.logits), logits[:-1], rtol=1e-3, atol=1e-3)
    for row, token in enumerate(found.token_ids):
        scores = found.scores[row]
        assert scores[0] == -torch.inf and found.scores[row][1] == found.logits[row][1]
        assert found.logprobs[row] == pytest.approx(float(scores.log_softmax(0)[token]), abs=1e-5)


def test_samples_are_the_texts_of_their_seeds(zoo) -> None:
    lm, prompt = zoo("gqa"), random_prompt(3, 300)
    for hierarchy in (Hierarchy(), *HIERARCHIES.values()):
        options = {"hierarchy": hierarchy, "temperature": 1.0, "max_new_tokens": 20}
        samples = lm.samples(prompt, 3, seed=8, **options)
        texts = [sample.token_ids for sample in samples]
        assert len({tuple(text) for text in texts}) == 3
        alone = [lm.generate(prompt, seed=x.seed, **options).token_ids for x in samples]
        assert alone == texts and samples[0].seed == 8
        assert [x.num_cached_tokens for x in samples] == [0, 300, 300]
