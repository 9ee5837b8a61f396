"""Finding and opening a Llama checkpoint, whatever the user called it.

A hub id, a folder, a ``.gguf`` file or the name of a model that comes with the package index all
end as the same thing: a local folder with ``config.json``, safetensors and tokenizer files, its
tensors checked by name and shape against the config before any of them is read.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hispec.errors import CheckpointError
from hispec.model.config import ModelConfig, token_ids
from hispec.model.store import cache_dir
from hispec.model.tensorfile import TensorFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Checkpoint", "cache_dir", "expected_shapes", "open_checkpoint", "read_config"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]
_HUB_IGNORED = ["original/*", "consolidated*", "onnx/*", "*/*.safetensors"]
_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is there and fits together.

    Attributes:
        name: What the user gave.
        path: Local folder with config.json, safetensors and tokenizer files.
        config: What config.json says; the whole file is in ``config.raw``.
        files: Tensor name -> the file it lies in.
    """

    name: str
    path: Path
    config: ModelConfig
    files: Mapping[str, TensorFile] = field(repr=False)

    def tensor(self, name: str) -> torch.Tensor:
        """A fresh CPU tensor in the stored dtype.

        Args:
            name: transformers' name, such as ``model.layers.0.mlp.up_proj.weight``.

        Raises:
            CheckpointError: If there is no such tensor or its file is damaged.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.name} has no tensor {name} (looked in {self.path}).")
        return self.files[name].read(name)

    def tensors(self) -> Iterator[str]:
        """The names of all tensors, sorted."""
        return iter(sorted(self.files))

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hex digits that name these weights: equal for equal tensors, however they are sharded.

        Hashes every name, dtype and shape and up to 12 KiB of each tensor. Training moves nearly
        every value, so a sample tells two checkpoints apart in milliseconds.
        """
        digest = hashlib.sha256()
        for name in self.tensors():
            entry = self.files[name].entries[name]
            digest.update(f"{name}|{entry.dtype}|{entry.shape}|".encode())
            digest.update(self.files[name].sample(name))
        return digest.hexdigest()[:32]

    @functools.cached_property
    def generation_config(self) -> dict[str, Any]:
        """The parsed generation_config.json; empty where there is none.

        Raises:
            CheckpointError: If the file is not valid JSON.
        """
        path = self.path / "generation_config.json"
        return _read_json(path, self.name) if path.exists() else {}

    @property
    def revision(self) -> str | None:
        """The commit that a hub's model is at; None for a folder of one's own."""
        return self.path.name if self.path.parent.name == "snapshots" else None

    @functools.cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: generation_config.json's if it names any, else the config's.

        The order of preference is that of transformers' ``generate``.
        """
        ids = self.generation_config.get("eos_token_id")
        if ids is None:
            return self.config.eos_token_ids
        try:
            return token_ids(ids)
        except TypeError as error:
            raise CheckpointError(
                f"generation_config.json of {self.name} holds a wrong eos_token_id: {error}."
            ) from error

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, with its special tokens and chat template.

        Read straight from tokenizer.json where there is one: choosing the class by AutoTokenizer
        costs 0.4 s more in imports and ends with the same tokenizer.

        Raises:
            CheckpointError: If the tokenizer files are missing or damaged.
        """
        tokenizer_class: Any
        if (self.path / "tokenizer.json").exists():
            from transformers import PreTrainedTokenizerFast

            tokenizer_class = PreTrainedTokenizerFast
        elif any(self.path.glob("tokenizer*")):
            from transformers import AutoTokenizer

            tokenizer_class = AutoTokenizer
        else:
            raise CheckpointError(
                f"{self.name} has no tokenizer.json (looked in {self.path}): copy the tokenizer's "
                "files from the model it was made from."
            )
        try:
            return tokenizer_class.from_pretrained(str(self.path))
        except Exception as error:  # tokenizers raises bare Exception for a damaged file
            raise CheckpointError(
                f"The tokenizer of {self.name} in {self.path} cannot be read: {_first_line(error)}."
            ) from error


def open_checkpoint(model: str | Path, *, revision: str | None = None) -> Checkpoint:
    """The checkpoint, local, with every tensor of a Llama of its shape in place.

    Args:
        model: A hub id, a folder (of a LoRA adapter, too), a ``.gguf`` file or an alias
            (``smollm2-135m``, ``smollm2-135m-layerskip``).
        revision: Branch, tag or commit, for a hub id.

    Raises:
        CheckpointError: If there is no such model, it is not a Llama, or it is damaged.
    """
    name = str(model)
    folder = _local_folder(name, revision)
    config_path = folder / "config.json"
    if not config_path.exists():
        raise CheckpointError(f"{folder} has no config.json, so it is not a model folder.")
    config = read_config(_read_json(config_path, name), name)
    checkpoint = Checkpoint(name, folder, config, _tensor_files(folder, name))
    _check_tensors(checkpoint)
    return checkpoint


def read_config(data: Mapping[str, Any], name: str) -> ModelConfig:
    """The config of a parsed config.json, refused with the model's name if it cannot be run.

    Args:
        data: The parsed file.
        name: What the user gave, for the message.

    Raises:
        CheckpointError: If it is not a plain Llama or a value is missing or makes no sense.
    """
    try:
        config = ModelConfig.from_dict(data)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    quantization = data.get("quantization_config")
    if quantization:
        method = "an unknown method"
        if isinstance(quantization, dict):
            method = quantization.get("quant_method", method)
        raise CheckpointError(
            f"{name} is quantized with {method}, which hispec cannot read: use the checkpoint's "
            "float16 or bfloat16 original, or a GGUF file of it."
        )
    kind = config.rope["rope_type"]
    missing = [key for key in _ROPE_NEEDS.get(kind, ()) if config.rope.get(key) is None]
    if missing:
        raise CheckpointError(
            f"{name}: the rope type {kind!r} in config.json needs {missing[0]!r}, which is missing."
        )
    return config


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors a Llama of this shape is made of, the head included unless it is tied."""
    c = config
    queries = c.num_heads * c.head_dim
    keys = c.num_kv_heads * c.head_dim
    linears = {
        "self_attn.q_proj": (queries, c.hidden_size, c.attention_bias),
        "self_attn.k_proj": (keys, c.hidden_size, c.attention_bias),
        "self_attn.v_proj": (keys, c.hidden_size, c.attention_bias),
        "self_attn.o_proj": (c.hidden_size, queries, c.attention_bias),
        "mlp.gate_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.up_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size, c.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size)
    }
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (c.hidden_size,)
        shapes[prefix + "post_attention_layernorm.weight"] = (c.hidden_size,)
        for linear, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}{linear}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{linear}.bias"] = (rows,)
    shapes["model.norm.weight"] = (c.hidden_size,)
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


def _local_folder(name: str, revision: str | None) -> Path:
    from hispec.model import adapter, bundled

    if not name:
        raise CheckpointError("The model's name is empty: give a folder or a hub id.")
    path = Path(name).expanduser()
    if path.is_dir():
        return adapter.merged_folder(path) if adapter.is_adapter(path) else path.absolute()
    if path.suffix.lower() == ".gguf":
        from hispec.model.converted import convert_cached

        if not path.is_file():
            raise CheckpointError(f"There is no file {name}: check the path.")
        return convert_cached(path.absolute())
    if path.is_file():
        raise CheckpointError(
            f"{name} is a single file; give the folder it lies in (with config.json beside it) or "
            "a .gguf file."
        )
    if name.lower() in bundled.MODELS:
        return bundled.model_folder(name.lower())
    if name.lower() in adapter.SHIPPED:
        return adapter.merged_folder(adapter.SHIPPED[name.lower()])
    if _HUB_ID.fullmatch(name):
        return _hub_folder(name, revision)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise CheckpointError(f"There is no folder {name}: check the path.")
    names = [*bundled.MODELS, *adapter.SHIPPED]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"or use {' or '.join(names)}."
    raise CheckpointError(
        f"There is no model {name!r}: give a folder, a .gguf file or a hub id such as "
        f"meta-llama/Llama-3.2-1B; {hint}"
    )


def _hub_folder(name: str, revision: str | None) -> Path:
    import os

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: accept its licence on huggingface.co/{name} and log in with "
            "`hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no folder {name} here and no model {name} on the hub (or it is private): "
            "check the spelling or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r} on the hub.") from error
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder nor a valid hub id.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "no network"
        raise CheckpointError(
            f"There is no folder {name} here, and {name} is not in the hub cache and cannot be "
            f"downloaded ({why}): download it where there is one, or use smollm2-135m."
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{name} could not be downloaded from the hub: {_first_line(error)}."
        ) from error
    except OSError as error:  # connection errors and full disks
        raise CheckpointError(f"{name} could not be downloaded: {_first_line(error)}.") from error
    return Path(folder)


def _tensor_files(folder: Path, name: str) -> dict[str, TensorFile]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        file = TensorFile(single)
        return dict.fromkeys(file.entries, file)
    if not index.exists():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
            raise CheckpointError(
                f"{name} holds PyTorch weights, but hispec reads safetensors: convert it once with "
                f"AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(FOLDER)."
            )
        raise CheckpointError(f"{name} has no model.safetensors (looked in {folder}).")
    weight_map = _read_json(index, name).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} is damaged (it has no weight_map): download it again.")
    missing = sorted(shard for shard in set(weight_map.values()) if not (folder / shard).exists())
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of {len(set(weight_map.values()))} weight files (first: "
            f"{missing[0]}): download it again."
        )
    shards = {shard: TensorFile(folder / shard) for shard in sorted(set(weight_map.values()))}
    return {tensor: shards[shard] for tensor, shard in weight_map.items()}


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Every tensor the config implies is there, with its shape."""
    for name, shape in expected_shapes(checkpoint.config).items():
        file = checkpoint.files.get(name)
        if file is None or name not in file.entries:
            raise CheckpointError(
                f"{checkpoint.name} lacks the tensor {name} that its config.json calls for (looked "
                f"in {checkpoint.path}): the weights are incomplete or belong to another config."
            )
        found = file.entries[name].shape
        if found != shape:
            raise CheckpointError(
                f"Tensor {name} of {checkpoint.name} has shape {list(found)}, but its config.json "
                f"calls for {list(shape)}: weights and config do not belong together."
            )


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} of {name} is truncated or damaged ({path}): download or save it again."
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object: download or save it again.")
    return data


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
