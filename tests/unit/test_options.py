"""Settings that mean nothing or contradict each other are named, before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hispec.arguments import sampling_of
from hispec.cli import main
from hispec.commands.options import model_path
from hispec.errors import UsageError
from hispec.loading import load
from hispec.model import adapter, bundled
from hispec.model.checkpoint import open_checkpoint
from hispec.sampling import Sampling, stream_seed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", "-1"), ("temperature", "0 or more")),
        (("--temperature", "nan"), ("temperature",)),
        (("--temperature", "1", "--top-p", "0"), ("top_p", "(0, 1]")),
        (("--temperature", "1", "--top-p", "1.2"), ("top_p", "1.2")),
        (("--temperature", "1", "--min-p", "-0.1"), ("min_p", "[0, 1]")),
        (("--temperature", "1", "--top-k", "-3"), ("top_k", "-3")),
        (("--top-p", "0.9"), ("top_p=0.9", "temperature 0")),
        (("--top-k", "5"), ("top_k=5", "temperature 0")),
        (("--repetition-penalty", "0"), ("repetition_penalty", "more than 0")),
        (("--presence-penalty", "3"), ("presence_penalty", "[-2, 2]")),
        (("--no-repeat-ngram-size", "-1"), ("no_repeat_ngram_size",)),
        (("--min-new-tokens", "9", "--max-new-tokens", "8"), ("min_new_tokens=9", "8")),
        (("--max-new-tokens", "0"), ("max_new_tokens", "at least 1")),
        (("--stop", ""), ("stop",)),
        (("--bad-word", ""), ("--bad-word",)),
        (("--bad-word", "\udcff"), ("--bad-word", "UTF-8")),
        (("--stop", "\udcff"), ("--stop", "UTF-8")),
        (("--n", "3"), ("--n 3", "temperature")),
        (("--n", "0", "--temperature", "1"), ("--n 0",)),
        (("--temprature", "1"), ("--temperature",)),
        (("--seed", "x"), ("--seed",)),
        (("--out", "x"), ("--out", "--prompts")),
        (("--logprobs",), ("--logprobs", "--json")),
    ],
)
def test_command_line(arguments, words, capsys) -> None:
    assert main(["generate", "--model", "/none", "--prompt", "hello", *arguments]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert "/none" not in said, "the model was looked for first"


@pytest.mark.parametrize("command", ["generate", "bench", "train", "distill"])
def test_help_names_every_alias(command, capsys) -> None:
    aliases = bundled.aliases()
    assert aliases == [*bundled.MODELS, *adapter.SHIPPED] and len(aliases) > 1
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert set(aliases) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("opener", [load, open_checkpoint])
def test_docstrings_name_every_alias(opener) -> None:
    assert all(f"``{alias}``" in opener.__doc__ for alias in bundled.aliases())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"temprature": 0.5}, "temperature"),
        ({"max_tokens": 5}, "max_new_tokens"),
        ({"stop_strings": ["x"]}, "stop"),
        ({"num_return_sequences": 2}, "samples"),
        ({"do_sample": True, "temperature": 0}, "do_sample=True"),
        ({"do_sample": False, "temperature": 0.7}, "do_sample=False"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1.0, "seed": 1.5}, "seed"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"forced_eos_token_id": 5, "suppress_tokens": [5]}, "forced_eos_token_id 5"),
        ({"forced_bos_token_id": 5, "bad_words_ids": [[5]]}, "forced_bos_token_id 5"),
        ({"processors": ["x"]}, "processor"),
    ],
)
def test_keyword_arguments(options, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        sampling_of(options)


def test_what_they_add_up_to() -> None:
    assert sampling_of({}) == Sampling()
    assert sampling_of({"do_sample": True, "seed": 3}) == Sampling(1.0, 3)
    assert sampling_of({"do_sample": False, "num_beams": 1}) == Sampling()
    assert sampling_of({"temperature": 0.5, "top_p": 0.9}) == Sampling(0.5, top_p=0.9)
    with pytest.raises(UsageError, match="top_p"):
        sampling_of({"top_p": 0.9}, Sampling(1.0))


def test_seeds_are_drawn_and_split() -> None:
    assert Sampling().seeded().seed is None  # greedy needs none
    drawn = {Sampling(1.0).seeded().seed for _ in range(50)}
    assert len(drawn) == 50 and None not in drawn
    assert Sampling(1.0, 7).seeded().seed == 7
    assert stream_seed(7, 0) == 7
    streams = [stream_seed(seed, index) for seed in range(200) for index in range(200)]
    assert len(set(streams)) == len(streams)
    assert all(0 <= x < 2**64 for x in streams)


def test_samples_and_seed_on_the_command_line(tiny_llama: Path, capsys) -> None:
    base = ["generate", "--model", str(tiny_llama), "--prompt", "hello", "--dtype", "fp32"]
    base += ["--temperature", "1", "--max-new-tokens", "12", "--json"]
    assert main(base) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert f"--seed {document['seed']} repeats" in said.err
    again = [*base, "--seed", str(document["seed"]), "--logprobs", "--top-p", "1.0"]
    assert main(again) == 0
    repeated = json.loads(capsys.readouterr().out)
    assert repeated["token_ids"] == document["token_ids"]
    assert len(repeated["logprobs"]) == 12 and all(x <= 0 for x in repeated["logprobs"])
    assert main([*again, "--n", "3"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert samples[0]["token_ids"] == document["token_ids"]
    assert len({tuple(sample["token_ids"]) for sample in samples}) == 3
    assert samples[0]["metrics"]["num_cached_tokens"] == 0
    assert samples[1]["metrics"]["num_cached_tokens"] == samples[1]["num_prompt_tokens"]


def test_a_bad_word_is_not_written(tiny_llama: Path, capsys) -> None:
    base = ["generate", "--model", str(tiny_llama), "--prompt", "hello", "--dtype", "fp32"]
    base += ["--max-new-tokens", "12", "--json"]
    assert main(base) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    word = next(c for c in text if c.isascii() and c.isprintable() and c != " ")
    assert main([*base, "--bad-word", word]) == 0
    other = json.loads(capsys.readouterr().out)["text"]
    assert word in text and word not in other


def test_a_model_that_is_a_folder_is_named_from_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "cut8").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_path("models/cut8") == str(tmp_path / "models" / "cut8")
    assert model_path("someone/model") == "someone/model"
