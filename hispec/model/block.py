"""The weights of one transformer block, as every way of running it wants them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hispec.model.config import ModelConfig
from hispec.model.linear import Layout, Linear


class Block:
    """One block: query/key/value fused, gate and up fused."""

    __slots__ = ("attention_norm", "down", "gate_up", "mlp_norm", "output", "qkv")

    def __init__(
        self,
        attention_norm: Tensor,
        qkv: Linear,
        output: Linear,
        mlp_norm: Tensor,
        gate_up: Linear,
        down: Linear,
    ) -> None:
        self.attention_norm = attention_norm  # (D,)
        self.qkv = qkv  # D → (H + 2 H_kv) D_h
        self.output = output  # H D_h → D
        self.mlp_norm = mlp_norm  # (D,)
        self.gate_up = gate_up  # D → 2 I
        self.down = down  # I → D


def read_block(
    read: Callable[[str], Tensor],
    prefix: str,
    config: ModelConfig,
    layout: Layout = "plain",
) -> Block:
    """Returns the block whose tensors carry transformers' names under ``prefix``, fused.

    Args:
        read: returns a tensor by name, in the dtype and on the device wanted.
        prefix: such as ``model.layers.3.``.
        config: says which projections have biases.
        layout: of the weights; see :mod:`hispec.model.linear`.
    """

    def fused(*names: str, bias: bool) -> Linear:
        weights = [read(f"{prefix}{name}.weight") for name in names]
        offsets = [read(f"{prefix}{name}.bias") for name in names] if bias else []
        if len(names) == 1:  # shared with whoever holds it
            return Linear(weights[0], offsets[0] if bias else None, layout)
        return Linear(torch.cat(weights), torch.cat(offsets) if bias else None, layout)

    attention, mlp = "self_attn.", "mlp."
    return Block(
        read(f"{prefix}input_layernorm.weight"),
        fused(*(f"{attention}{x}_proj" for x in "qkv"), bias=config.attention_bias),
        fused(f"{attention}o_proj", bias=config.attention_bias),
        read(f"{prefix}post_attention_layernorm.weight"),
        fused(f"{mlp}gate_proj", f"{mlp}up_proj", bias=config.mlp_bias),
        fused(f"{mlp}down_proj", bias=config.mlp_bias),
    )
