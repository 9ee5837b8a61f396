"""Attention for training on short texts with a CPU, as transformers calls it.

Most training texts are shorter than 300 tokens. There the fused attention's backward is slow on a
CPU (61 ms against 29 for one layer, 16 texts of 128 tokens, bf16): plain products over all
scores win until the scores outgrow the cache, at about 256 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "hispec_short"
LONGEST = 256  # tokens


def register() -> str:
    """Returns the name under which transformers now knows this attention."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, short_attention)
    return NAME


def short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention over whole texts.

    Args:
        module: The attention layer.
        query: (B, H, T, D_h).
        key: (B, H_kv, T, D_h).
        value: (B, H_kv, T, D_h).
        attention_mask: Must be None: rows are padded on the right.
        scaling: D_h^-1/2 if None.
        unused: What transformers passes besides.

    Returns:
        (B, T, H, D_h) and no weights.
    """
    assert attention_mask is None
    batch, heads, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    if query.device.type != "cpu" or length > LONGEST:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2), None
    kv_heads = key.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask = torch.zeros(length, length, dtype=query.dtype).masked_fill(hidden, float("-inf"))
    # The G query heads of a KV head are rows of one product.
    rows = (query * scale).reshape(batch * kv_heads, -1, width)  # (B H_kv, G T, D_h)
    scores = torch.bmm(rows, key.reshape(batch * kv_heads, length, width).transpose(1, 2))
    scores = scores.view(batch, heads, length, length) + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = weights.view(batch * kv_heads, -1, length)  # (B H_kv, G T, T)
    out = torch.bmm(weights, value.reshape(batch * kv_heads, length, width))
    return out.view(batch, heads, length, width).transpose(1, 2), None
