"""``model.generate(custom_generate=…)`` against transformers' own ``generate``, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hf import HISPEC, LAYERSKIP, PROMPT, Backwards
from helpers.tiny_llama import byte_tokenizer
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
    TextIteratorStreamer,
)

from hispec import hf
from hispec.errors import UsageError
from hispec.hf import generate_with


class AfterTen(StoppingCriteria):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= PROMPT.shape[1] + 10)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition penalty": {"repetition_penalty": 1.3},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[70], [14, 33]]},
    "at least": {"min_new_tokens": 12, "eos_token_id": list(range(0, 320, 7))},
    "eos": {"eos_token_id": list(range(0, 320, 29))},
    "forced": {"forced_eos_token_id": 77},
    "suppressed": {"suppress_tokens": [3, 4, 5], "begin_suppress_tokens": list(range(100))},
    "bias": {"sequence_bias": [[[9], 3.0], [[9, 33], -10.0]]},
    "decay": {"exponential_decay_length_penalty": (4, 1.5)},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 5},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}


@pytest.mark.parametrize("hierarchy", ["ar", LAYERSKIP, HISPEC], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_are_transformers(model, case: str, hierarchy) -> None:
    options = {"max_new_tokens": 24, "do_sample": False, **CASES[case]}
    wanted = model.generate(PROMPT, **options)
    found = model.generate(PROMPT, custom_generate=generate_with(hierarchy=hierarchy), **options)
    if case != "scores":
        assert found.tolist() == wanted.tolist()
        return
    assert found.sequences.tolist() == wanted.sequences.tolist()
    for mine, theirs in ((found.scores, wanted.scores), (found.logits, wanted.logits)):
        torch.testing.assert_close(torch.cat(mine), torch.cat(theirs), rtol=1e-4, atol=1e-4)
    transitions = model.compute_transition_scores(
        wanted.sequences, wanted.scores, normalize_logits=True
    )
    torch.testing.assert_close(found.logprobs, transitions, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hierarchy", ["ar", HISPEC], ids=str)
def test_the_users_processors_and_criteria(model, hierarchy) -> None:
    options = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.2}
    mine, theirs = AfterTen(), AfterTen()
    wanted = model.generate(
        PROMPT, logits_processor=[Backwards()], stopping_criteria=[theirs], **options
    )
    found = model.generate(
        PROMPT,
        logits_processor=[Backwards()],
        stopping_criteria=[mine],
        custom_generate=generate_with(hierarchy=hierarchy),
        **options,
    )
    assert found.tolist() == wanted.tolist()
    assert found.shape[1] == PROMPT.shape[1] + 10
    assert mine.seen == theirs.seen  # once a token, in order


def test_streamer_and_stop_string(model) -> None:
    tokenizer = byte_tokenizer()
    options = {"max_new_tokens": 40, "do_sample": False}
    text = tokenizer.decode(model.generate(PROMPT, **options)[0, PROMPT.shape[1] :])
    stop = next(c for c in text[4:] if c.isascii() and c.isprintable() and c not in text[:4])
    streams = [TextIteratorStreamer(tokenizer, skip_prompt=True) for _ in range(2)]
    wanted = model.generate(
        PROMPT, stop_strings=[stop], tokenizer=tokenizer, streamer=streams[0], **options
    )
    found = hf.generate(
        model,
        PROMPT,
        stop_strings=[stop],
        tokenizer=tokenizer,
        streamer=streams[1],
        hierarchy=HISPEC,
        **options,
    )
    assert found.tolist() == wanted.tolist() and found.shape[1] < PROMPT.shape[1] + 40
    assert "".join(streams[0]) == "".join(streams[1]) != ""
    # a streamer given to generate() itself reaches us as well, as criteria do
    stream = TextIteratorStreamer(tokenizer, skip_prompt=True)
    again = model.generate(
        PROMPT,
        stopping_criteria=[StopStringCriteria(tokenizer, [stop])],
        streamer=stream,
        custom_generate=generate_with(hierarchy=LAYERSKIP),
        **options,
    )
    assert again.tolist() == wanted.tolist()
    assert stop in "".join(stream)


def test_rows_of_a_batch(model) -> None:
    # padding on the left; every row is what it is alone, processors see the batch's shape
    short = PROMPT[:, 4:]
    batch = torch.cat([PROMPT, torch.cat([torch.full((1, 4), 260), short], -1)])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 260,
        "repetition_penalty": 1.3,
        "prefix_allowed_tokens_fn": lambda row, ids: list(range(row, 320, 2)),
        "eos_token_id": list(range(0, 320, 29)),
    }
    wanted = model.generate(batch, attention_mask=mask, **options)
    call = generate_with(hierarchy=HISPEC)
    found = model.generate(batch, attention_mask=mask, custom_generate=call, **options)
    assert found.tolist() == wanted.tolist()
    assert [result.num_prompt_tokens for result in call.results] == [11, 7]


def test_transformers_names_for_drafting(model) -> None:
    options = {"max_new_tokens": 20, "do_sample": False}
    wanted = model.generate(PROMPT, **options).tolist()
    for names, exits, sources in (
        ({"assistant_early_exit": 2, "num_assistant_tokens": 3}, (2,), {}),
        ({"prompt_lookup_num_tokens": 4}, (), {"context": 4}),
    ):
        call = generate_with()
        assert model.generate(PROMPT, custom_generate=call, **names, **options).tolist() == wanted
        hierarchy = call.results[0].hierarchy
        assert hierarchy.exit_layers == exits and dict(hierarchy.sources) == sources


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"num_beams": 2, "do_sample": True}, "num_beams"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "input"),
    ],
)
def test_modes_that_are_not_built(model, options, word: str) -> None:
    call = generate_with(hierarchy="ar")
    with pytest.raises(UsageError, match=word):
        model.generate(
            None if "inputs_embeds" in options else PROMPT,
            custom_generate=call,
            max_new_tokens=3,
            **options,
        )


def test_an_assistant_model_is_refused(model) -> None:
    with pytest.raises(UsageError, match="assistant_model"):
        model.generate(PROMPT, assistant_model=model, custom_generate=generate_with())


def test_a_processor_that_raises_leaves_the_model_usable(model) -> None:
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > PROMPT.shape[1] + 5:
                raise ZeroDivisionError("mine")
            return scores

    options = {"max_new_tokens": 16, "do_sample": False}
    wanted = model.generate(PROMPT, **options).tolist()
    call = generate_with(hierarchy=HISPEC)
    with pytest.raises(ZeroDivisionError, match="mine"):
        model.generate(PROMPT, logits_processor=[Broken()], custom_generate=call, **options)
    assert model.generate(PROMPT, custom_generate=call, **options).tolist() == wanted
