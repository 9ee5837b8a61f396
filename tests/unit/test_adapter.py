"""Adapters that are opened like models: the merged weights, what is refused, what is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.adapters import RANKS, write_adapter
from safetensors.torch import load_file, save_file

from hispec.errors import CheckpointError
from hispec.hierarchy import Hierarchy, Level
from hispec.loading import load
from hispec.model import adapter as adapters
from hispec.model.adapter import Adapter, merge
from hispec.model.checkpoint import open_checkpoint
from hispec.model.exits import FORMAT, SharedHead


def test_the_sum(tiny_llama: Path, tmp_path: Path, cache_home: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny_llama)
    matrices = load_file(folder / "adapter_model.safetensors")
    base, merged = open_checkpoint(tiny_llama), open_checkpoint(folder)
    assert list(merged.tensors()) == list(base.tensors())
    for name in base.tensors():
        wanted = base.tensor(name)
        module = name.removesuffix(".weight")
        if module in RANKS:
            a, b = (
                matrices[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB"
            )
            alpha = 8 if ".0." in module else 2
            wanted = (wanted.double() + alpha / RANKS[module] * (b @ a)).to(wanted.dtype)
            assert not torch.equal(wanted, base.tensor(name))
        assert torch.equal(merged.tensor(name), wanted), name
    assert merged.tokenizer("the cat")["input_ids"] == base.tokenizer("the cat")["input_ids"]


def test_the_sum_is_that_of_peft(tiny_llama: Path, tmp_path: Path, cache_home: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    rank_stabilised = {"use_rslora": True, "rank_pattern": {}, "alpha_pattern": {}}
    for number, changes in enumerate(({}, rank_stabilised)):
        modules = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 5]}
        folder = write_adapter(tmp_path / f"adapter{number}", tiny_llama, **changes, **modules)
        if changes:  # then peft wants one rank
            name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
            tensors = load_file(folder / "adapter_model.safetensors")
            tensors[name.format("A")] = tensors[name.format("A")][:2].clone()
            tensors[name.format("B")] = tensors[name.format("B")][:, :2].clone()
            save_file(tensors, folder / "adapter_model.safetensors")
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
        ours = open_checkpoint(folder)
        for name in ours.tensors():
            torch.testing.assert_close(ours.tensor(name), theirs[name], rtol=1e-5, atol=1e-6)


def test_merged_once_and_again_when_changed(
    tiny_llama: Path, tmp_path: Path, cache_home: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny_llama)
    first = open_checkpoint(folder)
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    again = open_checkpoint(folder)
    assert again.path == first.path and again.fingerprint == first.fingerprint
    assert (again.path / "model.safetensors").stat().st_mtime_ns == stamp
    write_adapter(folder, tiny_llama, lora_alpha=4)
    assert open_checkpoint(folder).fingerprint != first.fingerprint
    (first.path / "model.safetensors").write_bytes(b"torn")
    write_adapter(folder, tiny_llama)
    assert open_checkpoint(folder).fingerprint == first.fingerprint


def test_bf16_sums_do_not_depend_on_order() -> None:
    """Hence a merged model's fingerprint is the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 500, generator=generator).bfloat16().double() for _ in range(2))
    order = torch.randperm(64, generator=generator)
    assert torch.equal(b.T @ a, b[order].T @ a[order])


def test_alias_generates_and_finds_its_hierarchies(
    tiny_llama: Path, tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "exits" / "tiny-layerskip", tiny_llama)
    monkeypatch.setattr(adapters, "SHIPPED", {"tiny-layerskip": folder})
    merged = open_checkpoint("Tiny-LayerSkip")
    record = {
        "format": FORMAT,
        "base": {"model": "tiny-layerskip", "fingerprint": merged.fingerprint},
        "exits": [{"exit_layer": 2, "kind": "own"}],
        "hierarchies": {"layerskip": {"levels": [{"exit_layer": 2, "window": 3}]}},
    }
    (folder / "config.json").write_text(json.dumps(record))
    lm = load("tiny-layerskip", dtype="fp32", exits=folder)
    assert lm.hierarchy("layerskip").levels == (Level(2, 3),)
    assert isinstance(lm.head(2), SharedHead)
    options = {"max_new_tokens": 12, "raw": True}
    tokens = [
        lm.generate("the cat", hierarchy=h, **options).token_ids for h in ("layerskip", Hierarchy())
    ]
    assert tokens[0] == tokens[1]
    with pytest.raises(CheckpointError, match="did you mean tiny-layerskip"):
        open_checkpoint("tiny-layerskp")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"base_model_name_or_path": None}, "which model"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "base of the adapter"),
    ],
)
def test_adapters_that_are_no_plain_sum(
    tiny_llama: Path, tmp_path: Path, cache_home: Path, changes: dict, message: str
) -> None:
    assert message in refusal(write_adapter(tmp_path / "adapter", tiny_llama, **changes))


def test_adapters_that_do_not_fit(tiny_llama: Path, make_llama, cache_home: Path) -> None:
    other = make_llama("other", hidden_size=32)
    folder = write_adapter(cache_home.parent / "adapter", other)
    assert "does not fit" in refusal(folder)
    write_adapter(folder, tiny_llama)
    (folder / "config.json").write_text(json.dumps({"adapter_of": {"fingerprint": "0" * 32}}))
    assert "another base" in refusal(folder)
    (folder / "config.json").unlink()
    save_file({"odd": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert "no LoRA matrix" in refusal(folder)
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal(folder)
    write_adapter(folder, folder)
    assert "itself" in refusal(folder)
    (folder / "adapter_config.json").write_text("[]")
    assert "JSON object" in refusal(folder)


def test_merge_refuses_another_base(tiny_llama: Path, make_llama, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny_llama)
    record = {"adapter_of": {"fingerprint": open_checkpoint(tiny_llama).fingerprint}}
    (folder / "config.json").write_text(json.dumps(record))
    (tmp_path / "out").mkdir()
    merge(Adapter.open(folder), open_checkpoint(tiny_llama), tmp_path / "out")
    with pytest.raises(CheckpointError, match="another base"):
        merge(Adapter.open(folder), open_checkpoint(make_llama("other", seed=5)), tmp_path / "out")
