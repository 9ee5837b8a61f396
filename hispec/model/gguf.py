"""From a GGUF file to a folder that hispec and transformers both read.

The weights are dequantized with the ``gguf`` package, renamed, and the rows of q and k put back
from llama.cpp's interleaved rotary order into halves. The result equals, bit for bit, what
transformers makes of the same file, in a few seconds and with one tensor in memory at a time.

Float tensors keep their dtype. Quantized ones become float32, which holds every dequantized value
exactly (scale times integer plus offset does not fit bfloat16's 8 bits), or bfloat16 where float32
would pass 4 GiB: at that size disk and load time weigh more than bits far below the quantization
step. Loading SmolLM2-135M as bfloat16 takes 0.3 to 0.5 s longer from float32 than from bfloat16
(one core, files in the page cache).
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hispec.errors import CheckpointError
from hispec.model.config import ModelConfig
from hispec.model.store import require_space
from hispec.model.tensorfile import write_tensors

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

MAX_FLOAT32_BYTES = 4 << 30
TOKENIZER_BYTES = 32 << 20  # more than any Llama's; Llama 3's takes 17 MB

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What a damaged file makes the reader raise: it walks offsets and shapes it takes from the file.
_PARSE_ERRORS = (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error)


def convert(path: Path, folder: Path) -> None:
    """``folder`` holds the model of a GGUF file as config, safetensors and tokenizer.

    Args:
        path: The GGUF file.
        folder: An existing, empty folder.

    Raises:
        CheckpointError: If the file is damaged or holds something other than a plain Llama.
        OSError: If the folder cannot be written.
    """
    print(f"Converting {path.name} to safetensors (once) ...", file=sys.stderr)
    reader = _open(path)
    fields = _Fields(reader, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, tensors, path)
    ModelConfig.from_dict(config)  # refuses nonsense before anything is written
    names = _tensor_names(tensors, config, path)
    total_bytes = 4 * sum(math.prod(map(int, tensors[name].shape)) for name in names)
    quantized_to = torch.float32 if total_bytes <= MAX_FLOAT32_BYTES else torch.bfloat16
    dtypes = {
        names[name]: _FLOATS.get(tensors[name].tensor_type.name, quantized_to) for name in names
    }
    sources = {hf_name: tensors[name] for name, hf_name in names.items()}
    shapes = {
        hf_name: tuple(int(size) for size in reversed(tensor.shape))
        for hf_name, tensor in sources.items()
    }
    done = 0

    def produce(hf_name: str) -> torch.Tensor:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r  {done} of {len(names)} tensors", end="", file=sys.stderr, flush=True)
        tensor = _dequantized(sources[hf_name], path).reshape(shapes[hf_name])
        heads = {
            "q_proj": config["num_attention_heads"],
            "k_proj": config["num_key_value_heads"],
        }.get(hf_name.split(".")[-2])
        if heads:
            tensor = _halves(tensor, heads)
        return tensor.to(dtypes[hf_name])

    specs = [(name, dtypes[name], shapes[name]) for name in sources]
    num_bytes = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in specs)
    require_space(folder, num_bytes + TOKENIZER_BYTES, f"the converted {path.name}")
    write_tensors(folder / "model.safetensors", specs, produce)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    widest = torch.float32 if torch.float32 in dtypes.values() else quantized_to
    matrix_dtypes = {dtypes[name] for name in sources if len(shapes[name]) > 1}
    stored = matrix_dtypes.pop() if len(matrix_dtypes) == 1 else widest
    config["dtype"] = str(stored).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: config[name] for name in special if config.get(name) is not None}
    _write_json(folder / "generation_config.json", generation)
    _write_tokenizer(path, fields, folder)


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file (it does not start with 'GGUF').")
    try:
        with np.errstate(over="ignore"), _plain_maps():
            return GGUFReader(path)
    except _PARSE_ERRORS as error:
        raise CheckpointError(_damaged(path)) from error


@contextmanager
def _plain_maps() -> Iterator[None]:
    """Inside, numpy maps files as plain arrays.

    The reader slices a vocabulary into hundreds of thousands of pieces; of an ``np.memmap`` each
    takes four times as long.
    """
    mapped = np.memmap

    def plain(*arguments: Any, **options: Any) -> np.ndarray:
        return np.asarray(mapped(*arguments, **options))

    setattr(np, "memmap", plain)  # noqa: B010  # a type, to type checkers
    try:
        yield
    finally:
        setattr(np, "memmap", mapped)  # noqa: B010


def _damaged(path: Path) -> str:
    return f"{path} is truncated or damaged: download it again."


class _Fields:
    """The metadata of a GGUF file, looked up with a default."""

    def __init__(self, reader: GGUFReader, path: Path) -> None:
        self._reader = reader
        self._path = path
        self.architecture = self.get("general.architecture")

    def get(self, name: str, default: Any = None) -> Any:
        field = self._reader.get_field(name)
        if field is None:
            return default
        try:
            return field.contents()
        except (*_PARSE_ERRORS, UnicodeDecodeError) as error:
            raise CheckpointError(_damaged(self._path)) from error

    def llama(self, name: str, default: Any = None) -> Any:
        value = self.get(f"llama.{name}", default)
        if isinstance(value, list):
            raise CheckpointError(
                f"{self._path} gives {name} a value for each layer, but hispec runs Llama models "
                "whose layers are alike."
            )
        return value


def _config(fields: _Fields, tensors: dict[str, ReaderTensor], path: Path) -> dict[str, Any]:
    if fields.architecture != "llama":
        raise CheckpointError(
            f"{path} is a {fields.architecture!r} model, but hispec runs Llama models."
        )
    if fields.llama("expert_count", 0):
        raise CheckpointError(
            f"{path} is a mixture of experts, but hispec runs dense Llama models."
        )
    required = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    for hf_name, name in required.items():
        config[hf_name] = fields.llama(name)
        if config[hf_name] is None:
            raise CheckpointError(f"{path} does not say its {name}: download it again.")
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path} has no tensor token_embd.weight: download it again.")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = fields.llama("attention.head_count_kv", heads)
    head_dim = config["hidden_size"] // max(int(heads), 1)
    config["head_dim"] = fields.llama("attention.key_length", head_dim)
    config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    config["hidden_act"] = "silu"
    config["rope_parameters"] = _rope(fields, tensors, config["head_dim"], path)
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
    config["bos_token_id"] = ids["bos"]
    ends = [ids[name] for name in ("eos", "eot") if ids[name] is not None]
    config["eos_token_id"] = ends[0] if len(set(ends)) == 1 else (sorted(set(ends)) or None)
    config["pad_token_id"] = fields.get("tokenizer.ggml.padding_token_id")
    return config


def _rope(
    fields: _Fields, tensors: dict[str, ReaderTensor], head_dim: int, path: Path
) -> dict[str, Any]:
    theta = float(fields.llama("rope.freq_base", 10000.0))
    if fields.llama("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(
            f"{path} rotates only part of each head, which Llama models do not: use another file."
        )
    if "rope_freqs.weight" in tensors:
        factors = _dequantized(tensors["rope_freqs.weight"], path).double()
        return _llama3_rope(factors, theta, head_dim, path)
    kind = fields.llama("rope.scaling.type", "none")
    factor = fields.llama("rope.scaling.factor", fields.llama("rope.scale_linear"))
    if kind == "none" and not fields.get("llama.rope.scale_linear"):
        return {"rope_type": "default", "rope_theta": theta}
    rope = {
        "rope_type": "linear" if kind == "none" else kind,
        "rope_theta": theta,
        "factor": factor,
    }
    original = fields.llama("rope.scaling.original_context_length")
    if kind == "yarn" and original:
        rope["original_max_position_embeddings"] = original
    return rope


def _llama3_rope(factors: torch.Tensor, theta: float, head_dim: int, path: Path) -> dict[str, Any]:
    """Llama 3.1's rope settings from the divisors llama.cpp stores in their place.

    All published models share low 1, high 4 and original length 8192 and differ in the factor,
    which is the divisor of the slowest frequency. The divisors these settings give are compared
    with the stored ones, so a model with others is refused and not run wrongly.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = original * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(
            f"{path} scales its rotary frequencies in a way hispec does not know; use the model's "
            "safetensors instead."
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _tensor_names(tensors: Iterable[str], config: dict[str, Any], path: Path) -> dict[str, str]:
    """GGUF name -> transformers name, for every tensor that is a weight."""
    names = {}
    for name in tensors:
        if name in _TOP:
            names[name] = _TOP[name]
        elif name.startswith("blk."):
            _, layer, rest = name.split(".", 2)
            stem, _, kind = rest.rpartition(".")
            if stem in _BLOCK and kind in ("weight", "bias"):
                names[name] = f"model.layers.{layer}.{_BLOCK[stem]}.{kind}"
            elif stem != "attn_rot_embd":
                raise CheckpointError(
                    f"{path} holds the tensor {name}, which a Llama model does not have: it is "
                    "another architecture under Llama's name."
                )
    return names


def _dequantized(tensor: ReaderTensor, path: Path) -> torch.Tensor:
    """The values as float32 (F16 and BF16 convert back exactly)."""
    from gguf import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path} stores {tensor.name} as {tensor.tensor_type.name}, which cannot be "
            "dequantized here: use a Q4, Q5, Q8, K-quant, F16 or BF16 file of the model."
        ) from error
    except _PARSE_ERRORS as error:
        raise CheckpointError(_damaged(path)) from error
    return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the file is mapped


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from llama.cpp's (pair, half) order to Llama's (half, pair)."""
    rest = weight.shape[1:]
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *rest)
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def _write_tokenizer(path: Path, fields: _Fields, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with _plain_maps():  # which reads the whole file's fields once more
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(f"The tokenizer in {path} cannot be read: {reason}.") from error
    finally:
        logging.set_verbosity(level)
    # transformers falls back to GPT-2's splitting where it does not know the file's own
    if fields.get("tokenizer.ggml.pre") in ("smollm", "starcoder", "refact", "command-r"):
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust side wraps a full disk in a bare Exception
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    # Temporary paths and flags of this call do not belong into the result.
    settings_path = folder / "tokenizer_config.json"
    settings = json.loads(settings_path.read_bytes())
    for name in ("is_local", "local_files_only", "name_or_path", "gguf_file"):
        settings.pop(name, None)
    _write_json(settings_path, settings)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
