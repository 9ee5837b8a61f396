"""Samples of ``custom_generate``: seeds, hierarchies, and the order of transformers' rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hf import HISPEC, LAYERSKIP, PROMPT, Backwards
from helpers.tiny_llama import byte_tokenizer

from hispec.hf import generate_with
from hispec.processors import build
from hispec.sampling import Sampling


def sampled(model, seed: int, hierarchy: Any = "ar", **options: Any) -> list[list[int]]:
    call = generate_with(hierarchy=hierarchy, seed=seed)
    options = {"max_new_tokens": 16, "do_sample": True, **options}
    return model.generate(PROMPT, custom_generate=call, **options).tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.4, "top_k": 12, "min_p": 0.02, "typical_p": 0.95},
        {"repetition_penalty": 1.2, "top_k": 50},
    ],
)
def test_samples_do_not_depend_on_the_hierarchy(model, settings) -> None:
    for seed in range(3):
        wanted = sampled(model, seed, **settings)
        assert sampled(model, seed, LAYERSKIP, **settings) == wanted
        assert sampled(model, seed, HISPEC, **settings) == wanted
    assert sampled(model, 1, **settings) != sampled(model, 2, **settings)


def test_a_seed_gives_the_same_text_as_without_transformers(model, tmp_path) -> None:
    import hispec

    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    lm = hispec.load(tmp_path, dtype="fp32", device="cpu")
    for settings in ({"temperature": 0.7, "top_k": 0}, {"temperature": 0.8, "top_p": 0.9}):
        text = lm.generate(PROMPT[0].tolist(), max_new_tokens=16, seed=5, **settings)
        given = {"top_k": 0, **settings}
        assert sampled(model, 5, **given)[0][PROMPT.shape[1] :] == text.token_ids


def test_torch_fixes_the_seed_where_none_is_given(model) -> None:
    texts = []
    for torch_seed in (1, 1, 2):
        torch.manual_seed(torch_seed)
        call = generate_with()
        options = {"max_new_tokens": 16, "do_sample": True, "num_return_sequences": 2}
        texts.append(model.generate(PROMPT, custom_generate=call, **options).tolist())
        assert call.results[0].seed is not None
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1], "two samples of one prompt have noise of their own"


def test_the_order_of_rules_is_transformers(model) -> None:
    from transformers import GenerationConfig

    settings: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[3], [4, 5]],
        "forced_bos_token_id": 7,
        "forced_eos_token_id": 8,
        "suppress_tokens": [10],
        "begin_suppress_tokens": [11],
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "typical_p": 0.9,
    }
    config = GenerationConfig(
        do_sample=True, min_new_tokens=4, max_length=40, eos_token_id=259, **settings
    )
    model._prepare_special_tokens(config, device="cpu")
    own = Backwards()
    wanted = model._get_logits_processor(config, 11, PROMPT, logits_processor=[own], device="cpu")
    found = build(Sampling(processors=[own], **settings), 11, 320, (259,), 4, 29)
    assert [type(rule) for rule in found] == [type(rule) for rule in wanted]
    scores = torch.randn(1, 320)
    for length in (11, 14, 39):
        ids = torch.randint(320, (1, length))
        mine, theirs = scores.clone(), wanted(ids, scores.clone())
        for rule in found:
            mine = rule(ids, mine)
        assert torch.equal(mine, theirs)
