"""Tiny random Llamas saved as transformers saves them.

The folders carry a byte-level tokenizer with a chat template, so that they go through the command
line like any real checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# Shrunken shapes of the family. Of 320 ids, 261 are used: bytes, 2 merges, 3 special tokens.
TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 258,
    "eos_token_id": 259,
    "pad_token_id": 260,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> Any:
    """Bytes in some order, the merges ``Ġt`` and ``he``, and <|bos|>, <|eos|> and <|pad|>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "Ġt", "he"])}
    backend = Tokenizer(models.BPE(vocab, merges=[("Ġ", "t"), ("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_llama(folder: Path, *, seed: int = 0, shard_bytes: int | None = None, **config: Any):
    """Saves a random Llama of the ``TINY`` shape, changed by ``config``, with its tokenizer.

    Weights are drawn five times wider than transformers' default, so that greedy continuations of
    a random model vary instead of repeating one token.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {**TINY, "initializer_range": 0.1, **config}
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero, which tests nothing
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.generation_config.eos_token_id = settings["eos_token_id"]
    model.save_pretrained(folder, **({"max_shard_size": shard_bytes} if shard_bytes else {}))
    byte_tokenizer().save_pretrained(folder)
    return model
