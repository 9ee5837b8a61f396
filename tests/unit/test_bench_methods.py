"""Methods: the shared prefill changes no token, counts add up, baselines leave no trace."""

from __future__ import annotations

import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.bench import save_agreeing_llama

from hispec.bench import roster
from hispec.bench.baselines import HF, HFModel, LlamaCpp, restored
from hispec.bench.methods import Engine, Question, Workbench
from hispec.errors import UsageError
from hispec.generation import LM
from hispec.hierarchy import AR, Hierarchy, Level
from hispec.loading import load

PROMPT = [7, 3, 9, 11, 250, 31, 7, 3, 9]
LIMIT = 40
HIERARCHIES = {
    "ar": AR,
    "layerskip": Hierarchy((Level(2, 4),), "layerskip"),
    "hispec": Hierarchy((Level(2, 2), Level(4, 4)), "hispec"),
    "three": Hierarchy((Level(1, 1), Level(2, 2), Level(4, 3)), "three"),
}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = save_agreeing_llama(tmp_path_factory.mktemp("agreeing") / "llama")
    return load(folder, dtype="fp32", device="cpu")


def plain(lm: LM, limit: int = LIMIT) -> list[int]:
    return lm.generate(PROMPT, hierarchy="ar", max_new_tokens=limit).token_ids


def test_a_shared_prefill_changes_no_token(lm: LM) -> None:
    bench, methods = roster.engines(lm, {k: h for k, h in HIERARCHIES.items() if k != "ar"})
    question = Question(PROMPT, LIMIT)
    wanted = plain(lm)
    names = [method.name for method in methods]
    assert names[0] == "ar" and set(HIERARCHIES) <= set(names)
    # Twice and in both directions, so that each starts after every other.
    for method in [*methods, *reversed(methods), methods[1]]:
        if method.settings["exact"]:
            assert method(question).token_ids == wanted, method.name
    assert bench.prefill_s > 0
    assert methods[-1](Question(PROMPT[:4], LIMIT)).token_ids != wanted  # another question


@pytest.mark.parametrize("name", HIERARCHIES)
def test_counts_are_those_of_generate(lm: LM, name: str) -> None:
    hierarchy = HIERARCHIES[name]
    bench = Workbench(lm, [1, 2, 4])
    found = Engine(bench, name, hierarchy)(Question(PROMPT, LIMIT))
    result = lm.generate(PROMPT, hierarchy=hierarchy, max_new_tokens=LIMIT)
    assert found.token_ids == result.token_ids
    assert (found.passes, found.layer_visits) == (result.passes, result.layer_visits)
    assert [level["drafted"] for level in found.levels] == [x.drafted for x in result.levels]
    assert [level["accepted"] for level in found.levels] == [x.accepted for x in result.levels]
    assert found.bytes_read > 0


@pytest.mark.parametrize("name", [name for name in HIERARCHIES if name != "ar"])
def test_every_token_has_the_level_it_came_from(lm: LM, name: str) -> None:
    bench = Workbench(lm, [1, 2, 4])
    found = Engine(bench, name, HIERARCHIES[name])(Question(PROMPT, LIMIT))
    assert len(found.origins) == len(found.token_ids)
    tally = Counter(found.origins)
    assert tally["prefill"] == 1
    assert tally["target"] == found.passes  # one pick of its own a pass
    handed_up = [level for level in found.levels if level["name"] != "target"][-1]
    assert sum(tally.values()) - 1 - tally["target"] == handed_up["accepted"]
    assert set(tally) <= {"prefill", "target", *(level["name"] for level in found.levels)}
    assert len(set(tally)) > 2, "no exit drafted a token that stood: the test shows nothing"


def test_plain_decoding_reads_all_weights_once_a_token(lm: LM) -> None:
    bench = Workbench(lm, [])
    found = Engine(bench, "ar", AR)(Question(PROMPT, 5))
    config = lm.model.config
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    matrices = config.hidden_size * (attention + 3 * config.intermediate_size)
    weights = config.num_layers * matrices + config.vocab_size * config.hidden_size
    assert found.bytes_read == found.passes * weights * 4
    assert found.origins == ["prefill", *["target"] * (len(found.token_ids) - 1)]


def test_logits_after_an_answer_are_plain_decodings(lm: LM) -> None:
    bench = Workbench(lm, [2])
    question, wanted = Question(PROMPT, LIMIT), plain(lm)
    for length in (0, 1, 35):
        assert int(bench.logits_after(question, wanted[:length]).argmax()) == wanted[length]


def test_numerics_are_put_back(lm: LM) -> None:
    bench = Workbench(lm, [])
    fast = Engine(bench, "ar-fast", AR, exact=False)
    assert len(fast(Question(PROMPT, 4)).token_ids) == 4
    with pytest.raises(IndexError):
        fast(Question([10**6], 4))
    assert lm.model.exact and getattr(lm.model.narrow, "exact", True)


# ---------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def hf(lm: LM) -> HFModel:
    return HFModel(lm)


@pytest.mark.parametrize(
    ("options", "assistant"),
    [
        ({}, {}),
        ({"prompt_lookup_num_tokens": 5}, {}),
        (
            {"assistant_early_exit": 2},
            {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"},
        ),
    ],
    ids=["hf", "prompt-lookup", "early-exit"],
)
def test_transformers_answers_the_same_in_fp32(
    lm: LM, hf: HFModel, options: dict[str, Any], assistant: dict[str, Any]
) -> None:
    found = HF(hf, "x", options, assistant)(Question(PROMPT, LIMIT))
    assert found.token_ids == plain(lm)
    assert 1 <= found.first <= 6
    assert found.prefill_s > 0 and found.decode_s > 0
    assert found.committed == len(found.token_ids) - found.first
    if not options:
        assert found.passes == LIMIT - 1
        assert found.layer_visits == (LIMIT - 1) * lm.model.config.num_layers
    else:
        (draft,) = found.levels
        assert 0 < draft["accepted"] < draft["drafted"]
        assert found.passes < LIMIT - 1
    if assistant:  # at most three drafts a pass: the length is set where it counts
        assert draft["drafted"] <= 3 * found.passes


def test_an_exception_leaves_transformers_model_whole(lm: LM, hf: HFModel) -> None:
    model = hf.model
    config, layers = model.generation_config, model.config.num_hidden_layers
    early = HF(hf, "x", {"assistant_early_exit": 2}, {"num_assistant_tokens": 3})

    def fail(*arguments: Any) -> None:
        if model.config.num_hidden_layers != layers:
            raise RuntimeError("in the middle of a draft")

    handle = model.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        early(Question(PROMPT, LIMIT))
    handle.remove()
    assert model.config.num_hidden_layers == layers
    assert model.generation_config is config
    assert HF(hf, "hf")(Question(PROMPT, LIMIT)).token_ids == plain(lm)


def test_restored_puts_back_what_it_changed(hf: HFModel) -> None:
    model = hf.model
    before = model.generation_config
    with pytest.raises(ValueError), restored(model, object()):
        model.config.num_hidden_layers = 1
        raise ValueError
    assert model.generation_config is before
    assert model.config.num_hidden_layers == 6


# ---------------------------------------------------------------------- names


def test_names_become_methods(lm: LM, tmp_path: Path) -> None:
    Path(tmp_path / "mine.json").write_text('{"levels": [{"exit_layer": 3, "window": 2}]}')
    names = ["hf", "hispec", "ar", "hispec", str(tmp_path / "mine.json"), "ar-fast"]
    _, methods = roster.build(lm, names)
    assert [method.name for method in methods] == ["ar", "ar-fast", "hf", "hispec", "mine"]
    assert methods[-1].settings["hierarchy"]["levels"] == [{"exit_layer": 3, "window": 2}]


def test_unknown_names_are_refused_with_a_suggestion(lm: LM, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown method 'hispeck'\. Did you mean 'hispec'"):
        roster.build(lm, ["hispeck"])
    with pytest.raises(UsageError, match="cannot read hierarchy"):
        roster.build(lm, [str(tmp_path / "none.json")])
    (tmp_path / "hispec.json").write_text('{"levels": []}')
    with pytest.raises(UsageError, match="two methods are named hispec"):
        roster.build(lm, ["hispec", str(tmp_path / "hispec.json")])


def test_an_early_exit_without_a_shared_head_says_so(tiny_llama: Path, lm: LM) -> None:
    loud = load(tiny_llama, dtype="fp32", device="cpu")
    _, methods = roster.build(loud, ["hf-early-exit"])
    used = methods[-1].settings["transformers"]["assistant_early_exit"]
    with mock.patch.object(loud, "exits", types.SimpleNamespace(own=(used,))):
        roster.explain_early_exit(loud, methods, list(range(200)))
    assert "no exits" not in methods[-1].note, "it was trained to share the head"
    roster.explain_early_exit(loud, methods, list(range(200)))
    assert "no exits that share the head" in methods[-1].note
    _, methods = roster.build(lm, ["hf-early-exit"])
    roster.explain_early_exit(lm, methods, list(range(200)))
    assert "no exits" not in methods[-1].note
    ids = list(range(200))  # more rows than a narrow pass takes
    assert roster.shared_head_agreement(lm, 5, ids) > roster.shared_head_agreement(lm, 1, ids)


@pytest.mark.parametrize(
    ("preset", "trained", "wanted"), [(0, (0, 4), 4), (3, (1, 3), 3), (0, (0,), 2)]
)
def test_transformers_drafts_from_an_exit_that_has_run_layers(
    lm: LM, monkeypatch: pytest.MonkeyPatch, preset: int, trained: tuple[int, ...], wanted: int
) -> None:
    best = {"layerskip": Hierarchy((Level(preset, 3, ranks=True),), "layerskip")}
    monkeypatch.setattr(lm, "exits", types.SimpleNamespace(exit_layers=trained, best=best))
    _, methods = roster.build(lm, ["hf-early-exit"])
    options = methods[-1].settings["transformers"]
    assert options["assistant_early_exit"] == wanted
    assert options["num_assistant_tokens"] == 3
    assert methods[-1].note.startswith(f"exit {wanted}, 3 tokens a draft")
    assert ("cannot draft at layerskip's exit 0" in methods[-1].note) == (preset != wanted)


def test_no_early_exit_without_layers_to_run() -> None:
    config = types.SimpleNamespace(num_layers=1)
    shallow: Any = types.SimpleNamespace(model=types.SimpleNamespace(config=config), exits=None)
    with pytest.raises(UsageError, match="hf-early-exit needs an exit of at least 1"):
        roster.early_exit(shallow, 0)


# ---------------------------------------------------------------------- llama.cpp


def test_llama_cpp_needs_its_package_and_a_gguf(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package llama-cpp-python"):
        roster.build(lm, ["llama-cpp"])
    monkeypatch.setattr(roster.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="runs a GGUF file"):
        roster.build(lm, ["llama-cpp"])


@pytest.mark.parametrize("lookup", [False, True])
def test_llama_cpp_stops_where_we_do(
    lm: LM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lookup: bool
) -> None:
    opened: list[dict[str, Any]] = []

    class Llama:
        def __init__(self, path: str, **options: Any) -> None:
            opened.append(options)

        def reset(self) -> None: ...

        def generate(self, tokens: list[int], *, temp: float, reset: bool) -> Any:
            assert tokens == PROMPT and temp == 0.0 and reset
            yield from range(1000)

    package = types.ModuleType("llama_cpp")
    package.Llama = Llama  # type: ignore[attr-defined]
    speculative = types.ModuleType("llama_cpp.llama_speculative")
    speculative.LlamaPromptLookupDecoding = lambda num_pred_tokens: "draft"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", speculative)
    method = LlamaCpp(tmp_path / "m.Q4_1.gguf", frozenset({5}), 256, lookup=lookup)
    assert method.note.startswith("llama-cpp-python on 4-bit weights, Q4_1, not on the weights of")
    assert method(Question(PROMPT, LIMIT)).token_ids == [0, 1, 2, 3, 4, 5]
    assert method(Question(PROMPT, 3)).token_ids == [0, 1, 2]
    assert len(opened) == 1 and opened[0]["n_threads"] == torch.get_num_threads()
    assert (opened[0]["draft_model"] == "draft") == lookup
