"""Separate models as levels: what is refused, and the commands that make and take them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.bench import save_agreeing_llama, write_prompts
from helpers.tiny_llama import save_tiny_llama

import hispec
from hispec.bench import roster
from hispec.bench.methods import Question
from hispec.bench.recorder import head_bytes, layer_bytes
from hispec.cli import main
from hispec.errors import CheckpointError, UsageError
from hispec.hierarchy import AR, Hierarchy, Level
from hispec.model import ready
from hispec.model.checkpoint import open_checkpoint
from hispec.model.exits import FORMAT
from hispec.model.llama import Llama
from hispec.planner.acceptance import OWN, Acceptance, Key
from hispec.planner.calibrate import models_cost
from hispec.planner.cost_table import TARGET
from hispec.planner.costs import cost_table
from hispec.planner.replay import replay
from hispec.planner.shadow import Shadow


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_agreeing_llama(tmp_path_factory.mktemp("separate") / "target")


@pytest.fixture(scope="module")
def cut(target: Path) -> Path:
    """Written by the command itself."""
    out = target.with_name("cut")
    assert main(["export", "--model", str(target), "--cut", "3", "--out", str(out)]) == 0
    return out


def refusal(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


def changed(model: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model whose tokenizer.json is changed."""
    shutil.copytree(model, folder)
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return folder


# ------------------------------------------------------------------ what is refused


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(
    target: Path, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(document: dict[str, Any]) -> None:
        vocab = document["model"]["vocab"]
        low, high = (next(t for t, i in vocab.items() if i == wanted) for wanted in (40, 90))
        vocab[low], vocab[high] = 90, 40

    other = changed(cut, tmp_path / "swapped", swap)
    vocab = open_checkpoint(target).tokenizer.convert_ids_to_tokens([40, 90])
    monkeypatch.setattr(Llama, "load", None)  # it is refused before weights are read
    message = refusal(hispec.load, target, levels=[other])
    assert f"token 40 is {vocab[1]!r} to the first and {vocab[0]!r} to the second" in message
    assert str(other) in message and str(target) in message


def test_a_token_that_only_one_has(target: Path, cut: Path, tmp_path: Path) -> None:
    def add(document: dict[str, Any]) -> None:
        extra = {**document["added_tokens"][-1], "id": 261, "content": "<|more|>"}
        document["added_tokens"].append(extra)

    other = changed(cut, tmp_path / "more", add)
    message = refusal(hispec.load, target, levels=[other])
    assert "token 261 is '<|more|>' to the first and no token to the second" in message


def test_another_vocabulary_is_refused(target: Path, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "padded", vocab_size=384)
    message = refusal(hispec.load, target, levels=[tmp_path / "padded"])
    assert "has a vocabulary of 384 ids" in message and "one of 320" in message


def test_also_where_a_hierarchy_names_it(target: Path, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "padded", vocab_size=384)
    lm = hispec.load(target, dtype="fp32", device="cpu")
    hierarchy = Hierarchy((Level(0, 2, model=str(tmp_path / "padded")),))
    assert "a vocabulary of 384 ids" in refusal(lm.stream, [1, 2], hierarchy=hierarchy)
    with pytest.raises(CheckpointError, match="There is no folder"):
        lm.stream([1, 2], hierarchy=Hierarchy((Level(0, 2, model="/none/at/all"),)))


def test_a_model_without_a_tokenizer_is_refused(target: Path, cut: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    model.name_or_path = model.config._name_or_path = str(tmp_path)
    hierarchy = Hierarchy((Level(0, 2, model=str(cut)),))
    call = hispec.generate_with(hierarchy=hierarchy)
    assert "has no tokenizer" in refusal(
        model.generate, torch.tensor([[5, 6]]), custom_generate=call, max_new_tokens=4
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cut", "6"), "has 1 to 5 layers, got 6"),
        (("--cut", "0"), "has 1 to 5 layers, got 0"),
        (("--cut", "2", "--hierarchy", "hd"), "Drop --hierarchy and --no-weights"),
        (("--cut", "2", "--no-weights"), "Drop --hierarchy and --no-weights"),
    ],
)
def test_cuts_that_are_refused(target: Path, tmp_path: Path, arguments, words, capsys) -> None:
    command = ["export", "--model", str(target), "--out", str(tmp_path / "out"), *arguments]
    assert main(command) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_for_the_hub_carries_no_other_model(target: Path, tmp_path: Path, capsys) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"levels": [{"model": "small", "window": 2}]}')
    command = ["export", "--model", str(target), "--out", str(tmp_path / "out")]
    assert main([*command, "--hierarchy", str(plan)]) == 2
    assert "names a separate model" in capsys.readouterr().err


# ------------------------------------------------------------------ a cut


def test_a_cut_is_the_model_up_to_there(target: Path, cut: Path) -> None:
    whole, part = open_checkpoint(target), open_checkpoint(cut)
    assert part.config.num_layers == 3
    assert part.config.raw == {**whole.config.raw, "num_hidden_layers": 3}
    assert part.eos_token_ids == whole.eos_token_ids
    assert part.tokenizer.chat_template == whole.tokenizer.chat_template
    for name in part.tensors():
        assert torch.equal(part.tensor(name), whole.tensor(name))
    assert len(list(part.tensors())) == 3 * 9 + 3


def test_transformers_reads_it(cut: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32).eval()
    lm = hispec.load(cut, dtype="fp32", device="cpu")
    prompt = torch.tensor([[5, 6, 7]])
    wanted = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    assert lm.generate([5, 6, 7], max_new_tokens=12).token_ids == wanted


def test_a_cut_where_nothing_was_trained_says_so(
    target: Path, tiny_llama: Path, tmp_path: Path, cache_home: Path, capsys
) -> None:
    command = ["export", "--model", str(target), "--cut", "2", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "out")
    assert "--mode lora --exits 2" in said.err
    # hispec train --mode lora leaves an adapter and, beside it, a record of the exits it is for.
    adapter = write_adapter(tmp_path / "adapter", tiny_llama)
    exits = [{"exit_layer": 2, "kind": "own"}]
    record = {"format": FORMAT, "base": {"fingerprint": "any"}, "exits": exits}
    (adapter / "config.json").write_text(json.dumps(record))
    for layers in (2, 3):
        out = str(tmp_path / f"cut{layers}")
        assert main(["export", "--model", str(adapter), "--cut", str(layers), "--out", out]) == 0
        assert ("--mode lora" in capsys.readouterr().err) == (layers == 3)
        assert open_checkpoint(out).config.num_layers == layers


# ------------------------------------------------------------------ commands


def answer(target: Path, capsys, *more: str) -> tuple[dict[str, Any], str]:
    command = ["generate", "--model", str(target), "--prompt", "hello there", "--dtype", "fp32"]
    assert main([*command, "--max-new-tokens", "24", "--json", "--no-learn", *more]) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_generate(target: Path, cut: Path, tmp_path: Path, capsys) -> None:
    plain, _ = answer(target, capsys, "--hierarchy", "ar")
    level = ("--level", str(cut))
    for hierarchy, names in (
        ("ar", ["model cut", "target"]),
        ("hispec", ["model cut", "exit 1", "exit 2", "target"]),
        ("auto", ["model cut", "target"]),
    ):
        found, err = answer(target, capsys, *level, "--stats", "--hierarchy", hierarchy)
        assert found["token_ids"] == plain["token_ids"]
        assert [x["name"] for x in found["levels"]] == names
        assert found["hierarchy"]["levels"][0]["model"] == str(cut)
        assert "model cut" in err
        # what is reported can be given back
        (tmp_path / "plan.json").write_text(json.dumps(found["hierarchy"]))
        again, _ = answer(target, capsys, "--hierarchy", str(tmp_path / "plan.json"))
        assert again["hierarchy"] == found["hierarchy"]
        assert again["block_efficiency"] == found["block_efficiency"]
    assert plain["hierarchy"]["levels"] == []
    sampled = ("--temperature", "1", "--seed", "7")
    wanted, _ = answer(target, capsys, "--hierarchy", "ar", *sampled)
    found, _ = answer(target, capsys, "--hierarchy", "ar", *level, *sampled)
    assert found["token_ids"] == wanted["token_ids"]


def test_the_target_itself(target: Path, capsys) -> None:
    found, _ = answer(target, capsys, "--level", str(target), "--hierarchy", "ar")
    (draft, _) = found["levels"]
    assert draft["accepted"] == draft["drafted"] > 0


def test_a_short_context_is_said(target: Path, cut: Path, tmp_path: Path, capsys) -> None:
    short = tmp_path / "short"
    shutil.copytree(cut, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 48}))
    level = ("--hierarchy", "ar", "--level", str(short))
    plain, _ = answer(target, capsys, "--hierarchy", "ar")
    found, err = answer(target, capsys, *level)
    assert found["token_ids"] == plain["token_ids"]
    assert found["levels"][0]["passes"] > 0
    assert "outgrew the context of model short (48 tokens)" in err
    _, err = answer(target, capsys, "--hierarchy", "ar", "--level", str(cut))
    assert "outgrew" not in err


def test_its_cache_is_no_longer_than_the_target_s(target: Path, cut: Path) -> None:
    lm = hispec.load(target, levels=[cut], context=40, dtype="fp32", device="cpu")
    separate = lm.separate(str(cut))
    assert separate.context == 40
    assert separate.cache.capacity == separate.model.capacity == lm.model.capacity


def test_each_model_says_where_it_has_no_kernels(
    target: Path, cut: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready, "without_kernels", lambda _, name: f"{name} is slow")
    lm = hispec.load(target, dtype="fp32", device="cpu")
    lm.separate(str(cut))
    lm.separate(str(cut))
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{target} is slow", f"{cut} is slow"]


def test_chat(target: Path, cut: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for more in ((), ("--level", str(cut))):
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\nand\n"))
        command = ["chat", "--model", str(target), "--dtype", "fp32", "--max-new-tokens", "20"]
        assert main([*command, "--hierarchy", "ar", "--stats", *more]) == 0
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out
    assert said[1].err.count("model cut ") == 2 * 2, "the hierarchy's line and the level's"


def test_bench_runs_every_hierarchy_with_it_and_without(target: Path, cut: Path) -> None:
    lm = hispec.load(target, dtype="fp32", device="cpu")
    _, methods = roster.build(lm, ["hispec", "hd"], levels=[str(cut)])
    ours = [method for method in methods if method.name != "ar-fast"]
    names = [method.name for method in ours]
    assert names == ["ar", "hispec", "hd", "ar+cut", "hispec+cut", "hd+cut"]
    for ids in ([5, 6, 7, 8] * 4, list(range(60))):
        question = Question(ids, 24)
        with torch.inference_mode():
            outcomes = {method.name: method(question) for method in ours}
            again = ours[3](question)
        assert len({tuple(x.token_ids) for x in outcomes.values()}) == 1
        found = outcomes["ar+cut"]
        assert [level["name"] for level in found.levels] == ["model cut", "target"]
        assert set(found.origins) == {"prefill", "model cut", "target"}
        level, own = found.levels[0], lm.separate(str(cut)).model
        a_pass = 3 * layer_bytes(own.config, 4) + head_bytes(own, lm.separate(str(cut)).head)
        plain = outcomes["ar"].bytes_read // outcomes["ar"].passes
        assert found.bytes_read == found.passes * plain + level["passes"] * a_pass
        assert again.levels[0]["layer_visits"] == found.levels[0]["layer_visits"]
    message = refusal(roster.build, lm, ["hd"], levels=[str(cut), str(cut)])
    assert "two levels are called model cut" in message


def test_inside_transformers(target: Path, cut: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    prompt = torch.tensor([[5, 9, 33, 70, 71], [9, 33, 70, 71, 5]])
    options = {"max_new_tokens": 20, "do_sample": False}
    wanted = model.generate(prompt, **options).tolist()
    call = hispec.generate_with(hierarchy=Hierarchy((Level(0, 3, model=str(cut)), Level(4, 4))))
    assert model.generate(prompt, custom_generate=call, **options).tolist() == wanted
    assert all(result.levels[0].accepted for result in call.results)


# ------------------------------------------------------------------ plans


def test_a_replay_knows_what_it_would_have_drafted(target: Path, cut: Path) -> None:
    lm = hispec.load(target, dtype="fp32", device="cpu")
    prompt, name = [5, 9, 40, 41, 7], "model cut"
    answer = lm.generate(prompt, hierarchy=AR, max_new_tokens=40).token_ids
    shadow, acceptance = Shadow(lm, [4], prompt, answer, [str(cut)]), Acceptance()
    shadow.count(acceptance)
    assert shadow.names == [name, "exit 4"]
    costs = replace(
        cost_table(lm.model, {4: lm.head(4)}, 64), models_s=models_cost(lm, [str(cut)], 64)
    )
    draft = Hierarchy((Level(0, 3, model=str(cut)),), "cut")
    result = lm.generate(prompt, hierarchy=draft, max_new_tokens=40, learn=False)
    done = replay(lm, draft, [shadow], costs, acceptance)
    assert done.tokens == result.committed
    assert done.passes == {level.name: level.passes for level in result.levels}
    spent = done.parts[name] / done.passes[name]
    assert costs.pass_s(name, 0, 1) * 0.99 <= spent <= costs.pass_s(name, 0, 3) * 1.01
    count = acceptance.total(Key(name, TARGET, OWN))
    assert 0 < count.stood <= count.seen and acceptance.total(Key(name, "exit 4", OWN)).seen


def test_plan_weighs_it(
    target: Path, cut: Path, tmp_path: Path, cache_home: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the measured run's folder goes there
    write_prompts(tmp_path / "prompts.jsonl")
    command = ["plan", "--model", str(target), "--level", str(cut), "--dtype", "fp32"]
    command += ["--device", "cpu", "--prompts", str(tmp_path / "prompts.jsonl")]
    command += ["--max-new-tokens", "8", "--repeats", "1", "--out", str(tmp_path / "plan.json")]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert len(record["costs"]["models_s"]["model cut"]) == 33
    with_it = [
        entry["hierarchy"]
        for entry in record["alternatives"]
        if any(level.get("model") == str(cut) for level in entry["hierarchy"]["levels"])
    ]
    assert "tree12+cutx2" in {hierarchy["name"] for hierarchy in with_it}
    assert any(
        len(hierarchy["levels"]) == 1 and not hierarchy.get("sources") for hierarchy in with_it
    ), "the search over chains found some with it, too"
    assert "model cut" in (tmp_path / "plan.html").read_text()
    # What is run from the plan does not get the level twice.
    lm = hispec.load(target, dtype="fp32", device="cpu", levels=[cut])
    models = lm.hierarchy(str(tmp_path / "plan.json")).models
    assert [level.model for level in models].count(str(cut)) == 1
