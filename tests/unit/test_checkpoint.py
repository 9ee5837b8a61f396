"""Opening checkpoints: what is read equals what was saved, and bad input is one clear sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import VARIANTS, refusal
from helpers.tiny_llama import TINY, save_tiny_llama

from hispec.errors import CheckpointError
from hispec.model.checkpoint import expected_shapes, open_checkpoint
from hispec.model.tensorfile import TensorFile, write_tensors


def edit_json(path: Path, **changes) -> None:
    """Sets keys of a JSON file; ``None`` removes one."""
    data = json.loads(path.read_text())
    for key, value in changes.items():
        data.pop(key, None)
        if value is not None:
            data[key] = value
    path.write_text(json.dumps(data))


# Folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_what_transformers_saved(variant: str, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path, **VARIANTS[variant])
    checkpoint = open_checkpoint(tmp_path)
    assert (variant == "sharded") == (len(list(tmp_path.glob("*.safetensors"))) > 1)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert set(checkpoint.tensors()) == set(state) == set(expected_shapes(checkpoint.config))
    for name, tensor in state.items():
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name
    assert "model.norm.weight" in checkpoint
    assert "lm_head.bias" not in checkpoint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_dtypes_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(3, 5).to(dtype)
    write_tensors(tmp_path / "t.safetensors", [("a", dtype, (3, 5))], lambda name: tensor)
    assert torch.equal(TensorFile(tmp_path / "t.safetensors").read("a"), tensor)


def test_written_files_are_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.arange(5),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7.0),
    }
    specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_tensors(tmp_path / "t.safetensors", specs, tensors.__getitem__)
    loaded = load_file(tmp_path / "t.safetensors")
    ours = TensorFile(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys() == ours.entries.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(ours.read(name), tensor)


def test_a_tensor_read_twice_is_two_tensors(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    first = checkpoint.tensor("model.norm.weight")
    first.zero_()
    assert checkpoint.tensor("model.norm.weight").any()


def test_fingerprint_names_the_weights_and_nothing_else(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "one")
    save_tiny_llama(tmp_path / "sharded", shard_bytes=60_000)
    save_tiny_llama(tmp_path / "other", seed=1)
    one, sharded, other = (open_checkpoint(tmp_path / n) for n in ("one", "sharded", "other"))
    assert one.fingerprint == sharded.fingerprint
    assert one.fingerprint != other.fingerprint

    # one changed value in the middle of one tensor
    edited = tmp_path / "edited"
    shutil.copytree(tmp_path / "one", edited)
    entry = one.files["model.norm.weight"].entries["model.norm.weight"]
    with open(edited / "model.safetensors", "r+b") as file:
        file.seek(entry.start + entry.num_bytes // 2)
        file.write(b"\x01\x02")
    assert open_checkpoint(edited).fingerprint != one.fingerprint


def test_generation_config_decides_what_ends_a_text(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    edit_json(folder / "generation_config.json", eos_token_id=[259, 260])
    assert open_checkpoint(folder).eos_token_ids == (259, 260)
    edit_json(folder / "generation_config.json", eos_token_id=None)
    assert open_checkpoint(folder).eos_token_ids == (TINY["eos_token_id"],)
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=[1, 2])
    assert open_checkpoint(folder).eos_token_ids == (1, 2)


def test_tokenizer_equals_autotokenizer(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = open_checkpoint(tiny_llama).tokenizer, AutoTokenizer.from_pretrained(tiny_llama)
    text = "héllo <|eos|> 12\n"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == text
    assert ours.special_tokens_map == theirs.special_tokens_map
    chat = [{"role": "user", "content": "hi"}]
    rendered = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>hi<|eos|><|assistant|>"


def test_config_understands_both_generations_of_transformers(
    make_llama: Callable[..., Path],
) -> None:
    folder = make_llama()
    new = open_checkpoint(folder).config
    old = {"type": "linear", "factor": 2.0}
    edit_json(
        folder / "config.json",
        rope_parameters=None,
        rope_theta=5000.0,
        rope_scaling=old,
        num_key_value_heads=None,
        head_dim=None,
        architectures=None,
    )
    # weights of the GQA model do not fit MHA, which is what a missing field means
    assert "calls for [64, 64]" in refusal(folder)
    edit_json(folder / "config.json", num_key_value_heads=2)
    config = open_checkpoint(folder).config
    assert config.rope == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    assert replace(config, rope=new.rope) == new


# Refusals -----------------------------------------------------------------------------------------


def test_no_such_model(tmp_path: Path) -> None:
    assert "no folder" in refusal(tmp_path / "nothing")
    assert "no file" in refusal(tmp_path / "nothing.gguf")
    assert "did you mean smollm2-135m?" in refusal("smolm2-135m")
    assert "'llamma'" in refusal("llamma")


@pytest.mark.parametrize("offline", ["1", ""])
def test_hub_id_without_network(offline: str, monkeypatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("a long story\nin several lines")

    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal("meta-llama/Llama-3.2-1B")
    assert "meta-llama/Llama-3.2-1B is not in the hub cache" in message
    assert ("HF_HUB_OFFLINE is set" if offline else "no network") in message


def test_hub_id_is_downloaded_without_other_formats(
    monkeypatch, tiny_llama: Path, tmp_path: Path
) -> None:
    import huggingface_hub

    asked = {}

    def download(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(tiny_llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("some/llama", revision="v2")
    assert (checkpoint.name, checkpoint.path) == ("some/llama", tiny_llama)
    assert (asked["name"], asked["revision"]) == ("some/llama", "v2")
    assert not any(pattern.endswith((".bin", ".pth")) for pattern in asked["allow_patterns"])
    assert checkpoint.revision is None, "no commit can be told"
    commit = tmp_path / "snapshots" / "abc123"
    shutil.copytree(tiny_llama, commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(commit))
    assert open_checkpoint("some/llama").revision == "abc123"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"num_hidden_layers": 0}, "below 1"),
        ({"num_attention_heads": "many"}, "many"),
        ({"hidden_size": None}, "hidden_size"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'factor'"),
    ],
)
def test_configs_that_are_refused(
    changes: dict, expected: str, make_llama: Callable[..., Path]
) -> None:
    folder = make_llama()
    edit_json(folder / "config.json", **changes)
    message = refusal(folder)
    assert expected in message
    assert str(folder) in message


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_truncated_json(keep: int, make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes()[:keep])
    assert "config.json" in refusal(folder)


def test_folders_that_are_no_models(tmp_path: Path, make_llama: Callable[..., Path]) -> None:
    assert "no config.json" in refusal(tmp_path)
    folder = make_llama()
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "save_pretrained" in refusal(folder)
    assert "folder it lies in" in refusal(folder / "config.json")


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_truncated_safetensors(keep: int, make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors is truncated or damaged" in refusal(folder)


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 8, b"\x40" + b"\x00" * 7 + b"[" * 100, b"PK\x03\x04" * 9]
)
def test_garbage_safetensors(garbage: bytes, make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    path = folder / "model.safetensors"
    path.write_bytes(garbage + path.read_bytes()[len(garbage) :])
    assert "model.safetensors is truncated or damaged" in refusal(folder)


def test_a_file_that_shrinks_after_opening(make_llama: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(make_llama())
    path = checkpoint.path / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        for name in checkpoint.tensors():
            checkpoint.tensor(name)


def test_missing_and_misshapen_tensors(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    edit_json(folder / "config.json", num_hidden_layers=7)
    assert "lacks the tensor model.layers.6.input_layernorm.weight" in refusal(folder)
    edit_json(folder / "config.json", num_hidden_layers=6, vocab_size=321)
    message = refusal(folder)
    assert "model.embed_tokens.weight" in message
    assert "[320, 64]" in message
    assert "[321, 64]" in message
    edit_json(folder / "config.json", vocab_size=320)
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.9"):
        open_checkpoint(folder).tensor("model.layers.9.mlp.up_proj.weight")


def test_an_untied_head_must_be_there(make_llama: Callable[..., Path]) -> None:
    folder = make_llama(tie_word_embeddings=True)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert "lm_head.weight" in refusal(folder)


def test_missing_shard_and_damaged_index(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, shard_bytes=60_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    assert shard.name in refusal(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text()[:50])
    assert "model.safetensors.index.json" in refusal(tmp_path)
    index.write_text("{}")
    assert "weight_map" in refusal(tmp_path)


def test_damaged_tokenizer(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    checkpoint = open_checkpoint(folder)  # the weights are fine
    with pytest.raises(CheckpointError, match=r"tokenizer of .* cannot be read"):
        _ = checkpoint.tokenizer
