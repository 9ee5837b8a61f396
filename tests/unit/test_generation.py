"""Generation end to end on a tiny model: text, stops, limits, prompts and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.lms import chain, open_lm, save_model

import hispec
from hispec.errors import UsageError
from hispec.generation import LM
from hispec.hierarchy import Hierarchy
from hispec.model.ready import without_kernels
from hispec.sampling import Sampling

EXITS = chain((1, 3), (3, 5))
SAMPLED = Sampling(1.0, seed=4)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return open_lm(save_model(tmp_path_factory.mktemp("model") / "gqa", "gqa"))


def refusal(function: Callable, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_gpu_without_kernels_is_said_in_one_line(lm: LM) -> None:
    reason = "Triton is not installed (pip install triton)"
    model = mock.Mock(device=torch.device("cuda"), why_not_native=reason)
    line = without_kernels(model, "small")
    assert line.startswith(f"hispec: no GPU kernels for small ({reason}); ")
    assert "\n" not in line
    model.why_not_native = ""
    assert without_kernels(model, "small") == ""
    assert without_kernels(lm.model, "small") == ""


def test_a_shorter_context_bounds_prompts_and_cache(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "gqa", "gqa")
    short = hispec.load(folder, dtype="fp32", device="cpu", context=40)
    assert short.model.capacity == 512 < 1024 == short.checkpoint.config.max_positions
    assert "context holds 40" in refusal(short.stream, [1] * 40)
    assert short.generate([1] * 38, max_new_tokens=9).num_tokens == 2
    assert "in [2, 1024]" in refusal(hispec.load, folder, dtype="fp32", device="cpu", context=1025)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED])
@pytest.mark.parametrize("hierarchy", ["ar", "layerskip", EXITS])
def test_the_stream_is_the_text(lm: LM, hierarchy, sampling: Sampling) -> None:
    options = {"hierarchy": hierarchy, "max_new_tokens": 60, "sampling": sampling, "raw": True}
    stream = hispec.stream(lm, "Once upon", **options)
    pieces = list(stream)
    whole = hispec.generate(lm, "Once upon", **options)
    assert "".join(pieces) == stream.result.text == whole.text
    assert whole.text == lm.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    assert all(pieces)
    # Random bytes are rarely whole characters; what a piece ends in is one, but for the last.
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_a_stop_string_cuts_the_text_of_every_hierarchy_alike(lm: LM) -> None:
    options = {"max_new_tokens": 80, "sampling": SAMPLED, "raw": True}
    whole = lm.generate("x", hierarchy="ar", **options)
    letters = [i for i, letter in enumerate(whole.text[:-3]) if letter != "\ufffd"]
    tried = 0
    for at in letters[5:40:3]:
        stop = whole.text[at : at + 3]
        if "\ufffd" in stop:
            continue
        tried += 1
        for hierarchy in ("ar", EXITS):
            result = lm.generate("x", hierarchy=hierarchy, stop=[stop, "never seen"], **options)
            assert result.finish_reason == "stop"
            assert result.text == whole.text[: whole.text.index(stop)]
            assert result.token_ids == whole.token_ids[: result.num_tokens]
            assert stop in lm.tokenizer.decode(result.token_ids)
            assert stop not in lm.tokenizer.decode(result.token_ids[:-1])
    assert tried >= 2, "the random text has too few letters: choose another seed"
    same = lm.generate("x", stop="never seen", **options)
    assert (same.text, same.finish_reason) == (whole.text, "length")


def test_the_end_token_is_an_id_and_no_text(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    # Hot enough that any token comes soon. 259 is <|eos|>.
    options = {"max_new_tokens": 40, "hierarchy": EXITS}
    seed = next(
        seed
        for seed in range(200)
        if 259 in lm.generate([1, 2], sampling=Sampling(9.0, seed), **options).token_ids[:-1]
    )
    monkeypatch.setattr(lm, "eos", frozenset({259}))
    result = lm.generate([1, 2], sampling=Sampling(9.0, seed), **options)
    assert result.finish_reason == "eos"
    assert result.token_ids.index(259) == result.num_tokens - 1 < 39
    assert "<|eos|>" not in result.text


def test_prompts(lm: LM) -> None:
    chat = "<|user|>hi<|eos|><|assistant|>"
    ids = lm.tokenizer(chat)["input_ids"]
    assert 259 in ids
    assert lm.encode("hi") == ids
    assert lm.encode([{"role": "user", "content": "hi"}]) == ids
    assert lm.encode("hi", raw=True) == lm.tokenizer("hi")["input_ids"]
    assert lm.encode([5, 6]) == [5, 6]
    assert lm.encode((5, 6)) == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "the prompt is empty. Give at least one character."),
        ([], "the prompt has no tokens. Give at least one."),
        ([1, 320], "token id 320 is not in [0, 319], the vocabulary."),
        ([-1], "token id -1 is not in [0, 319]"),
        ([1] * 1024, "the prompt has 1024 tokens and the model's context holds 1024."),
        ("long " * 1000, "Shorten it to at most 1023."),
    ],
)
def test_prompts_that_are_refused(lm: LM, prompt, words: str) -> None:
    assert words in refusal(lm.generate, prompt)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": -3}, "got -3"),
        ({"hierarchy": "hispek"}, "Did you mean 'hispec'?"),
        ({"hierarchy": "none.json"}, "cannot read hierarchy none.json"),
        ({"hierarchy": chain((6, 2))}, "must be in [0, 5] for this 6-layer model, got 6"),
    ],
)
def test_options_that_are_refused_before_any_work(lm: LM, options, words: str) -> None:
    assert words in refusal(lm.stream, [1, 2], **options)


def test_a_hierarchy_from_a_file(lm: LM, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"levels": [{"exit_layer": 2, "window": 3}]}))
    result = lm.generate([1, 2], hierarchy=str(path), max_new_tokens=5)
    assert [level.name for level in result.levels] == ["exit 2", "target"]
    assert result.hierarchy.name == "mine"


def test_auto_is_the_databases_where_no_exits_were_measured(lm: LM) -> None:
    assert lm.hierarchy() == lm.hierarchy("hd")


def test_the_json_document(lm: LM) -> None:
    result = lm.generate([1, 2], hierarchy=EXITS, max_new_tokens=12)
    document = json.loads(json.dumps(result.to_json()))
    assert document["token_ids"] == result.token_ids
    assert document["finish_reason"] == "length"
    assert document["num_tokens"] == 12
    assert document["num_prompt_tokens"] == 2
    assert document["block_efficiency"] == result.committed / result.passes
    assert document["layer_visits_per_token"] == result.layer_visits / result.committed
    assert (document["dtype"], document["device"], document["numerics"]) == ("fp32", "cpu", "exact")
    assert [level["name"] for level in document["levels"]] == ["exit 1", "exit 3", "target"]
    assert {"name", "drafted", "accepted", "passes"} <= document["levels"][0].keys()
    assert document["prefill_s"] > 0
    assert document["tok_per_s"] == pytest.approx(11 / document["decode_s"])
    assert Hierarchy.from_json(document["hierarchy"]) == EXITS


def test_an_interrupted_text_keeps_what_there_was(lm: LM) -> None:
    stream = lm.stream([1, 2], hierarchy=EXITS, max_new_tokens=40, sampling=SAMPLED)
    assert stream.result.finish_reason == "interrupted"
    assert stream.result.num_tokens == 0, "something ran before the first piece was asked for"
    pieces = [next(iter(stream)) for _ in range(4)]
    assert "".join(pieces) == stream.result.text
    assert stream.result.finish_reason == "interrupted"
    assert stream.result.num_tokens >= 4


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_load(lm: LM, numerics: str, cache_home: Path) -> None:
    loaded = hispec.load(lm.checkpoint.path, dtype="fp32", device="cpu", numerics=numerics)
    result = loaded.generate([1, 2, 3], max_new_tokens=8, hierarchy="layerskip")
    assert result.numerics == numerics
    assert result.token_ids == loaded.generate([1, 2, 3], max_new_tokens=8).token_ids
    assert loaded.eos == {259}


def test_load_refuses_before_it_reads(lm: LM, tmp_path: Path) -> None:
    path = lm.checkpoint.path
    assert "unknown numerics 'loose'" in refusal(hispec.load, path, numerics="loose")
    assert "unknown dtype 'int8'" in refusal(hispec.load, path, dtype="int8")
    assert "unknown device 'tpu'" in refusal(hispec.load, path, device="tpu")
    assert "it has no config.json" in refusal(hispec.load, path, exits=tmp_path)
