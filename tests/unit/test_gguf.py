"""GGUF files: converted once, to the very weights and tokens, or refused in one sentence."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import VARIANTS, refusal
from helpers.gguf_files import dequantized, write_gguf
from helpers.tiny_llama import TINY, byte_tokenizer, save_tiny_llama

from hispec.errors import HispecError
from hispec.model import gguf, store
from hispec.model.checkpoint import cache_dir, open_checkpoint


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


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path: Path, cache_home: Path) -> None:
    path, name = tmp_path / "model.gguf", b"blk.0.ffn_up.weight"
    write_gguf(path, save_tiny_llama(tmp_path / "original"), byte_tokenizer())
    data = bytearray(path.read_bytes())
    at = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of sizes and the sizes
    f32, i32 = 0, 26  # as long, but no weights
    assert data[at] == f32
    data[at] = i32
    path.write_bytes(data)
    assert f"stores {name.decode()} as I32, which cannot be dequantized here" in refusal(path)
    assert not list(cache_home.rglob("config.json"))
