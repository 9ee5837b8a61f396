"""Writes tiny GGUF files the way llama.cpp's converter does, from a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """transformers' tensor name in GGUF's spelling."""
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[stem]}.{kind}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's permutation of q and k: row (half, pair) of a head moves to (pair, half)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    *,
    kind: str = "F32",
    architecture: str = "llama",
    pre: str = "smollm",
    fields: dict[str, int] | None = None,
    rope_freqs: np.ndarray | None = None,
) -> None:
    """A GGUF file of a transformers Llama, its matrices stored as ``kind``."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    c = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    for name, value in (fields or {}).items():
        writer.add_uint32(name, value)

    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    unused = [f"<unused{i}>" for i in range(c.vocab_size - len(tokens))]
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types(
        [3 if i in special else 1 for i in range(len(tokens))] + [5] * len(unused)
    )
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_bos_token_id(c.bos_token_id)
    writer.add_eos_token_id(c.eos_token_id)
    writer.add_pad_token_id(c.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)

    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        weight = tensor.float().numpy()
        if ".q_proj." in name:
            weight = interleave(weight, c.num_attention_heads)
        elif ".k_proj." in name:
            weight = interleave(weight, c.num_key_value_heads)
        weight = np.ascontiguousarray(weight)
        stored = GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        data = quantize(weight, stored)
        writer.add_tensor(gguf_name(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantized(model: Any, kind: str) -> dict[str, torch.Tensor]:
    """The model's tensors after a round trip through ``kind``, rows in transformers' order.

    Quantization works along a row, so it commutes with the order of rows.
    """
    from gguf import GGMLQuantizationType, dequantize
    from gguf.quants import quantize

    stored = GGMLQuantizationType[kind]
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            values = dequantize(quantize(tensor.float().numpy(), stored), stored)
            tensor = torch.from_numpy(np.array(values, dtype=np.float32))
        tensors[name] = tensor
    return tensors
