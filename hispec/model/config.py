"""The shape of a Llama, read from ``config.json`` in either of its spellings.

A plain record, so that loading a model does not import transformers' modelling code (over two
seconds). Frequencies of the rope types that are more than a formula come from transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hispec.errors import CheckpointError


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one Llama; see DESIGN's shape letters beside each.

    Attributes:
        rope: ``rope_type``, ``rope_theta`` and what that type needs, in transformers 5's spelling.
        max_positions: the longest context the model was made for, in tokens.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # H_kv
    head_dim: int  # D_h
    rms_norm_eps: float
    max_positions: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: Mapping[str, Any]
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> ModelConfig:
        """Returns the record for a parsed ``config.json``.

        Raises:
            CheckpointError: not a Llama, a field is missing, or sizes contradict each other.
        """
        kind = raw.get("model_type")
        if kind != "llama":
            named = ", ".join(raw.get("architectures") or []) or kind or "an unnamed model"
            raise CheckpointError(
                f"this is {named}, not a Llama: hispec runs checkpoints with "
                f"model_type 'llama' (Llama 1-3.x, TinyLlama, SmolLM2, CodeLlama)."
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(
                f"hidden_act is {raw['hidden_act']!r}; Llama's MLP uses 'silu' and no other is "
                f"built."
            )
        try:
            heads = int(raw["num_attention_heads"])
            hidden = int(raw["hidden_size"])
            rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
            rope.setdefault("rope_type", rope.pop("type", "default"))
            rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
            for name in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor"):
                if rope.get(name) is not None:
                    rope[name] = float(rope[name])
            config = ModelConfig(
                vocab_size=int(raw["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(raw["intermediate_size"]),
                num_layers=int(raw["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or hidden // heads),
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                max_positions=_context(raw, rope),
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                attention_bias=bool(raw.get("attention_bias", False)),
                mlp_bias=bool(raw.get("mlp_bias", False)),
                rope=rope,
                eos_token_ids=token_ids(raw.get("eos_token_id")),
                bos_token_id=raw.get("bos_token_id"),
                raw=raw,
            )
        except KeyError as missing:
            raise CheckpointError(f"config.json lacks {missing}, which a Llama needs.") from None
        except (TypeError, ValueError) as wrong:
            raise CheckpointError(
                f"config.json holds a value of the wrong kind: {wrong}."
            ) from None
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                     "num_kv_heads", "head_dim", "max_positions"):  # fmt: skip
            if getattr(config, name) < 1:
                raise CheckpointError(
                    f"config.json holds a size below 1: {name} is {getattr(config, name)}."
                )
        if config.num_heads % config.num_kv_heads:
            raise CheckpointError(
                f"config.json: {config.num_heads} query heads do not divide over "
                f"{config.num_kv_heads} KV heads."
            )
        return config


def token_ids(value: Any) -> tuple[int, ...]:
    """Returns the ids that a field names: none, one, or a list of them.

    Raises:
        TypeError: it is something else.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise TypeError(f"{value!r} is not a token id")
    return tuple(ids)


def _context(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """The longest context, in tokens.

    longrope has one set of frequencies up to its original length and another beyond; a cache of
    rotated keys cannot switch, so the original length is where we stop.
    """
    longest = int(raw.get("max_position_embeddings", 2048))
    if rope["rope_type"] != "longrope":
        return longest
    original = rope.get("original_max_position_embeddings") or raw.get(
        "original_max_position_embeddings"
    )
    return min(longest, int(original)) if original else longest


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Returns the inverse frequencies and the factor on cosines and sines.

    Returns:
        (D_h / 2,) fp32, and a float (1 but for yarn and longrope).

    Raises:
        CheckpointError: a rope type that transformers does not know either.
    """
    rope, size = config.rope, config.head_dim
    base = float(rope["rope_theta"])
    plain = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    kind = rope["rope_type"]
    if kind == "default" or (kind == "dynamic"):
        # Dynamic NTK stretches only beyond max_positions, where we do not go.
        return plain, 1.0
    if kind == "linear":
        return plain / float(rope["factor"]), 1.0
    if kind == "llama3":
        return _llama3(plain, rope), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # 0.5 s: rare types only
    from transformers.models.llama.configuration_llama import LlamaConfig

    if kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(sorted({"default", "dynamic", "linear", "llama3", *ROPE_INIT_FUNCTIONS}))
        raise CheckpointError(f"rope_type {kind!r} is not one of: {known}.")
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](LlamaConfig(**config.raw), torch.device("cpu"))
    return frequencies, float(factor)


def _llama3(plain: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's schedule: long wavelengths are stretched, short ones kept, the rest blended."""
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    wavelength = 2 * math.pi / plain
    blend = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return plain / factor * (1 - blend) + plain * blend
