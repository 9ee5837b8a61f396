"""Costs of models and machines that are not at hand, from sizes and data sheets.

Decoding one text reads every weight once a pass and the keys and values of its context, so a layer
takes its bytes over the memory's bandwidth; rows are free until their arithmetic takes longer than
that. Overheads are not modelled and bandwidth is never reached in full, so times are lower bounds;
speed-ups are ratios, in which both mostly cancel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hispec.hierarchy import MAX_WIDTH
from hispec.planner.cost_table import TARGET, CostTable

#: bf16.
ITEM_BYTES = 2


@dataclass(frozen=True)
class Device:
    """A machine.

    Attributes:
        name: as its maker calls it.
        bytes_per_s: of its memory.
        flops: dense bf16, a second.
        source: where both figures are from.
    """

    name: str
    bytes_per_s: float
    flops: float
    source: str


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, as in its config."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """Weights of one block's matrices."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (attention + 3 * self.intermediate_size)


DEVICES = {
    "a100": Device("A100 SXM 80 GB", 2.039e12, 312e12, "NVIDIA A100 data sheet, 2021"),
    "h100": Device("H100 SXM 80 GB", 3.35e12, 989e12, "NVIDIA H100 data sheet, 2023"),
    "h200": Device("H200 SXM 141 GB", 4.8e12, 989e12, "NVIDIA H200 data sheet, 2024"),
}

SHAPES = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49_152),
    "llama-2-7b": Shape(32, 4096, 11_008, 32, 32, 128, 32_000),
    "llama-3-8b": Shape(32, 4096, 14_336, 32, 8, 128, 128_256),
    "llama-3-70b": Shape(80, 8192, 28_672, 64, 8, 128, 128_256),
}


@dataclass(frozen=True)
class Head:
    """What an exit's head reads.

    Attributes:
        vocab_size: of its vocabulary; 0 for the model's whole one.
        blocks: Llama blocks of its own.
    """

    vocab_size: int = 0
    blocks: int = 0


def cost_table(
    shape: Shape,
    device: Device,
    exits: Mapping[int, Head],
    *,
    context: int = 512,
    devices: int = 1,
    models: Mapping[str, Shape] | None = None,
) -> CostTable:
    """Returns what passes of a model take at least.

    Args:
        shape: the model's.
        device: what runs it.
        exits: heads by layer.
        context: positions before a pass.
        devices: so many share the weights, as if each had its part at no cost of communication.
        models: separate models that may draft, by name.
    """

    def seconds(weights: float, cells: float = 0.0) -> list[float]:
        """By rows; ``cells`` are the keys' and values' elements that are read once."""
        read = (weights + cells) * ITEM_BYTES / device.bytes_per_s / devices
        return [0.0] + [
            max(read, 2 * weights * rows / device.flops / devices)
            for rows in range(1, MAX_WIDTH + 1)
        ]

    def cells(of: Shape) -> float:
        return 2.0 * context * of.num_kv_heads * of.head_dim

    def whole(of: Shape) -> list[float]:
        weights = of.num_layers * of.layer_weights + of.vocab_size * of.hidden_size
        return seconds(weights, of.num_layers * cells(of))

    heads = {}
    for exit_layer, head in sorted(exits.items()):
        rows = head.vocab_size or shape.vocab_size
        weights = rows * shape.hidden_size + head.blocks * shape.layer_weights
        heads[f"exit {exit_layer}"] = seconds(weights, head.blocks * cells(shape))
    heads[TARGET] = seconds(shape.vocab_size * shape.hidden_size)
    depths = {f"exit {exit_layer}": exit_layer for exit_layer in sorted(exits)}
    return CostTable(
        {**depths, TARGET: shape.num_layers},
        [0.0] * (MAX_WIDTH + 1),
        seconds(shape.layer_weights, cells(shape)),
        heads,
        models_s={name: whole(of) for name, of in (models or {}).items()},
        context=context,
    )
