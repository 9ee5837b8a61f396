"""What users do, on a CUDA device: a real one, or the virtual one (``helpers.virtual_gpu``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.interpreter import exact_arithmetic
from helpers.lms import save_model
from helpers.virtual_gpu import NAME

import hispec
from hispec.cli import main
from hispec.engine import Decoder
from hispec.generation import LM
from hispec.hierarchy import Hierarchy, Level
from hispec.model import numerics
from hispec.model.gpu import GpuPasses
from hispec.planner import first_prices

PROMPT, COUNT = [5, 6, 7, 5, 6, 7, 5, 6], 6
WORDS = Hierarchy((), sources=(("context", 6),), nodes=6)
DRAFTED = {
    "databases": WORDS,
    "chain": Hierarchy((Level(1, 2),)),
    "ranked": Hierarchy((Level(1, 2, ranks=True),), sources=(("context", 6),), nodes=6),
}


@pytest.fixture(scope="module", autouse=True)
def quick(request: pytest.FixtureRequest) -> None:
    """Leaves out what tries many passes, where each takes a second."""
    if torch.cuda.get_device_name() != NAME:
        return
    exact_arithmetic()

    def once(kind: str, model: Any, detail: str, passes: Callable[[], Any], **_: Any) -> Any:
        with torch.inference_mode():
            _, tasks = passes()
            next(iter(tasks.values()))()
        return dict.fromkeys(map(int, tasks), 1.0)

    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setattr(numerics, "find_min_width", lambda model: 1)
    patch.setattr(first_prices, "_beside_plain", once)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("gpu") / "llama", "tied mha", num_hidden_layers=2)


@pytest.fixture(scope="module")
def lm(folder: Path) -> LM:
    lm = hispec.load(folder, device="cuda", dtype="fp32")
    assert isinstance(lm.model.narrow, GpuPasses), lm.model.why_not_native
    lm.eos = frozenset()  # a random model ends its texts at random
    return lm


def answer(lm: LM, hierarchy: Hierarchy, **options: Any) -> list[int]:
    given = {"max_new_tokens": COUNT, "learn": False, **options}
    return lm.generate(PROMPT, hierarchy=hierarchy, **given).token_ids


@pytest.mark.parametrize("hierarchy", DRAFTED.values(), ids=DRAFTED)
def test_tokens_are_the_hosts(lm: LM, folder: Path, hierarchy: Hierarchy) -> None:
    host = hispec.load(folder, device="cpu", dtype="fp32")
    host.eos = frozenset()
    assert answer(lm, hierarchy) == answer(host, Hierarchy())


@pytest.mark.skipif(torch.cuda.get_device_name() != NAME, reason="CUDA does not count")
@pytest.mark.parametrize(
    ("name", "most"), [("plain", 1), ("databases", 1), ("chain", 1), ("ranked", 2)]
)
def test_the_host_waits_for_the_device_once_a_round(lm: LM, name: str, most: int) -> None:
    waits, run = list[int](), Decoder.round

    def counted(decoder: Decoder, limit: int) -> list[int]:
        before = torch.ops.virtual_gpu.waited()
        committed = run(decoder, limit)
        waits.append(torch.ops.virtual_gpu.waited() - before)
        return committed

    with mock.patch.object(Decoder, "round", counted):
        answer(lm, DRAFTED.get(name, Hierarchy()))
    assert waits and min(waits) >= 1 and max(waits) <= most


class _Even:
    """A rule with a mask where the scores are."""

    def __init__(self, size: int) -> None:
        self.odd = torch.arange(size, device="cuda") % 2 == 1

    def __call__(self, ids: Any, scores: Any) -> Any:
        return scores.masked_fill(self.odd, -torch.inf)


def test_rules_are_where_the_scores_are(lm: LM) -> None:
    size = lm.model.config.vocab_size
    lm.eos = frozenset({answer(lm, Hierarchy())[0]})
    rules = {
        "min_new_tokens": 3,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[7], [5, 6]],
        "suppress_tokens": [3],
        "processors": [_Even(size)],
    }
    try:
        found = answer(lm, WORDS, **rules)
        assert found == answer(lm, Hierarchy(), **rules)
    finally:
        lm.eos = frozenset()
    assert len(found) > 3 and not any(token % 2 for token in found)


def test_noise_and_warpers(lm: LM) -> None:
    for sampling in ({"top_k": 9, "top_p": 0.9}, {"min_p": 0.01}, {}):
        given = {"temperature": 0.8, "seed": 3, "logprobs": True, **sampling}
        assert answer(lm, WORDS, **given) == answer(lm, Hierarchy(), **given)


def test_a_criterion_sees_ids_where_the_model_is(lm: LM) -> None:
    text = answer(lm, Hierarchy())
    wanted = torch.tensor(PROMPT + text[:3], device="cuda")

    def met(ids: Any, scores: Any) -> bool:
        return ids.shape[1] == len(wanted) and bool((ids[0] == wanted).all())

    assert answer(lm, WORDS, stopping_criteria=[met]) == text[:3]


def test_transformers_generates(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to("cuda")
    ids = torch.tensor([PROMPT], device="cuda")
    given = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    given |= {"return_dict_in_generate": True, "output_scores": True}
    wanted = model.generate(ids, **given)
    ours = hispec.generate_with(hierarchy="hd")
    found = model.generate(ids, **given, custom_generate=ours)
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert found.logprobs.device == ids.device


def test_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "Triton's, in CUDA graphs" in capsys.readouterr().out
    command = ["generate", "--model", str(folder), "--prompt", "abab", "--raw", "--json"]
    assert main([*command, "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["token_ids"]) <= 3 and not err


@pytest.mark.parametrize("mode", ["frozen", "lora"])
def test_exits_are_trained(folder: Path, tmp_path: Path, mode: str) -> None:
    data = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "the " * (n % 5 + 1)} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "exits"
    command = ["train", "--model", str(folder), "--data", str(data), "--out", str(out)]
    command += ["--mode", mode, "--exits", "1", "--steps", "2", "--eval-every", "2"]
    assert main([*command, "--max-length", "48", "--max-new-tokens", "8"]) == 0
    assert (out / "config.json").exists()
