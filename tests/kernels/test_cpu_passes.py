"""The compiled passes against fp64, and against themselves: no row may know its company.

Each shape is run by the library as this processor gets it and as lesser ones do: without AMX tiles,
and with AVX2 alone. Sizes are the awkward ones: groups of 1 to 16 query heads, heads of 32 to 256,
sums of 32s that are no multiple of 64, vocabularies that fill no tile.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig
from hispec.model.linear import Layout, Linear
from hispec.model.native import NativePasses
from hispec.model.passes import Rotary, TorchPasses
from hispec.model.store import cache_dir
from hispec_kernels import cpu

CAPACITY = 384
#: name → D, I, H, H_kv, D_h, biases
SHAPES = {
    "least": (32, 32, 1, 1, 32, False),
    "gqa": (64, 96, 4, 2, 32, True),
    "smollm2": (576, 1536, 9, 3, 64, False),
    "mha of 128": (64, 32, 2, 2, 128, False),
    "head of 96": (96, 160, 6, 1, 96, True),
    "head of 256": (32, 64, 1, 1, 256, True),
    "group of 5": (160, 64, 5, 1, 64, False),
    "group of 7": (32, 96, 14, 2, 32, True),
    "group of 8": (64, 64, 8, 1, 32, False),
    "group of 12": (96, 32, 12, 1, 64, False),
    "group of 16": (64, 224, 32, 2, 32, True),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Relative to the largest value. bf16 rounds keys, values and, in tiles, every operand.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
#: Passes that add up to a prefix each; they end before, at and behind the borders 128 and 256.
CHUNKINGS = (
    (256, 32, 1),
    (1, 3, 16, 17, 31, 32, 27, 1, 1, 1, 30, 95, 1, 1, 1, 31),
    (127, 2, 126, 3, 31),
    (100, 28, 16, 16, 33, 63, 33),
)
LENGTH = 289
assert all(sum(widths) == LENGTH for widths in CHUNKINGS)

#: name → flags after the usual ones
BUILDS: dict[str, list[str]] = {
    "native": [],
    "no tiles": ["-mno-amx-tile", "-mno-amx-bf16"],
    "avx2": ["-march=haswell"],
}


@functools.cache
def library(build: str) -> Any:
    if BUILDS[build] and platform.machine() != "x86_64":
        pytest.skip("for x86-64 processors")
    try:
        with mock.patch.object(cpu, "_FLAGS", cpu._FLAGS + BUILDS[build]):
            return cpu.load_library(cache_dir() / "native")
    except cpu.BuildError as error:
        pytest.skip(str(error))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Weights:
    """One block's weights in the model's dtype, row-major."""

    norms: tuple[Tensor, Tensor]
    linears: dict[str, tuple[Tensor, Tensor | None]]

    def block(self, layout: Layout) -> Block:
        made = {name: Linear(w, b, layout) for name, (w, b) in self.linears.items()}
        return Block(
            self.norms[0],
            made["qkv"],
            made["output"],
            self.norms[1],
            made["gate_up"],
            made["down"],
        )


class Setup:
    """A random two-block model of one shape, and what runs it."""

    def __init__(self, shape: str, dtype: torch.dtype, build: str) -> None:
        hidden, inner, heads, kv_heads, dim, biases = SHAPES[shape]
        self.dtype = dtype
        self.config = ModelConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=inner,
            num_layers=2,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            rms_norm_eps=1e-5,
            max_positions=CAPACITY,
            tie_word_embeddings=True,
            attention_bias=biases,
            mlp_bias=biases,
            rope={"rope_type": "default", "rope_theta": 10000.0},
        )
        self.generator = torch.Generator().manual_seed(len(shape) + hidden)
        sizes = {
            "qkv": ((heads + 2 * kv_heads) * dim, hidden),
            "output": (hidden, heads * dim),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }
        self.weights = [
            Weights(
                (1 + 0.1 * self.random(hidden), 1 + 0.1 * self.random(hidden)),
                {
                    name: (
                        self.random(*size) / math.sqrt(size[1]),
                        0.3 * self.random(size[0]) if biases else None,
                    )
                    for name, size in sizes.items()
                },
            )
            for _ in range(2)
        ]
        self.x = self.random(LENGTH, hidden).float()
        self.library = library(build)
        self.layout: Layout = (
            "tiles" if dtype == torch.bfloat16 and self.library.bf16_tiles() else "plain"
        )
        self.blocks = [weights.block(self.layout) for weights in self.weights]
        self.rotary = Rotary(self.config, CAPACITY)
        self.passes = NativePasses(self.config, self.rotary, dtype, self.library)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def cache(self, junk: float = 0.0, capacity: int = CAPACITY) -> KVCache:
        config = self.config
        device = torch.device("cpu")
        kv = KVCache(2, config.num_kv_heads, config.head_dim, capacity, self.dtype, device)
        for cells in (*kv.keys, *kv.values):
            cells.copy_(junk * torch.randn(cells.shape))
        return kv

    def run(self, widths: Sequence[int], kv: KVCache | None = None) -> Tensor:
        """States of ``x``'s first ``sum(widths)`` rows, run in passes of these widths."""
        kv = self.cache() if kv is None else kv
        out, position = [], 0
        for width in widths:
            rows = self.x[position : position + width]
            out.append(self.passes.run(self.blocks, rows, position, kv, 0))
            position += width
        return torch.cat(out)

    def reference(self) -> Tensor:
        """The same in fp64, all rows at once."""
        config, x = self.config, self.x.double()
        dim, kv_heads = config.head_dim, config.num_kv_heads
        group = config.num_heads // kv_heads
        cos, sin = (table[:LENGTH, None].double() for table in (self.rotary.cos, self.rotary.sin))

        def linear(weights: Weights, name: str, y: Tensor) -> Tensor:
            w, b = weights.linears[name]
            return y @ w.double().T + (0 if b is None else b.double())

        def normed(y: Tensor, weight: Tensor) -> Tensor:
            return y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

        def turned(y: Tensor) -> Tensor:
            return y * cos + torch.roll(y, dim // 2, -1) * sin

        for weights in self.weights:
            qkv = linear(weights, "qkv", normed(x, weights.norms[0])).unflatten(1, (-1, dim))
            q, k, v = qkv.split((config.num_heads, kv_heads, kv_heads), dim=1)
            q, k = turned(q).transpose(0, 1), turned(k).transpose(0, 1)  # (H, T, D_h)
            k, v = (y.repeat_interleave(group, 0) for y in (k, v.transpose(0, 1)))
            scores = q @ k.transpose(1, 2) / math.sqrt(dim)
            scores += torch.full((LENGTH, LENGTH), -math.inf, dtype=torch.float64).triu(1)
            mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
            x = x + linear(weights, "output", mixed)
            gate, up = linear(weights, "gate_up", normed(x, weights.norms[1])).chunk(2, -1)
            x = x + linear(weights, "down", gate * gate.sigmoid() * up)
        return x


@pytest.fixture(params=BUILDS, ids=lambda name: name.replace(" ", "-"))
def build(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    error = float((found.double() - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance, error


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_equal_fp64_whatever_the_widths(shape: str, dtype: torch.dtype, build: str) -> None:
    setup = Setup(shape, dtype, build)
    first = setup.run(CHUNKINGS[0])
    near(first, setup.reference(), TOLERANCE[dtype])
    for widths in CHUNKINGS[1:]:
        assert torch.equal(setup.run(widths), first), widths
    for count in (2, 3, 5):
        with threads(count):
            assert torch.equal(setup.run(CHUNKINGS[2]), first), f"{count} threads"


@pytest.mark.parametrize("shape", ["smollm2", "group of 7", "head of 96"])
def test_a_pass_writes_its_own_positions_and_reads_none_behind(
    shape: str, dtype: torch.dtype, build: str
) -> None:
    setup = Setup(shape, dtype, build)
    clean, dirty = setup.cache(), setup.cache(junk=100.0)
    before = [cells.clone() for cells in (*dirty.keys, *dirty.values)]
    assert torch.equal(setup.run((120, 17), dirty), setup.run((120, 17), clean))
    for number, (cells, old) in enumerate(zip((*dirty.keys, *dirty.values), before, strict=True)):
        if setup.layout == "tiles" and number >= 2:
            cells, old = in_positions(cells), in_positions(old)
        assert torch.equal(cells[:, 137:], old[:, 137:])


def in_positions(values: Tensor) -> Tensor:
    """Values in tiles, (H_kv, S / 32, D_h, 32), as (H_kv, S, D_h)."""
    heads, length, size = values.shape
    return values.view(heads, length // 32, size, 32).transpose(2, 3).reshape(values.shape)


@pytest.mark.parametrize("shape", ["smollm2", "gqa", "mha of 128", "group of 5", "group of 16"])
def test_rows_of_several_texts_equal_each_text_alone(
    shape: str, dtype: torch.dtype, build: str
) -> None:
    setup = Setup(shape, dtype, build)
    lengths = (0, 1, 127, 128, 130, 255, 31, 5, 16, 64, 33, 200, 15, 2, 100, 3, 90)
    rooms = [-(-(length + 1) // 128) * 128 for length in lengths]
    together = setup.cache(junk=9.0, capacity=sum(rooms))
    starts, wanted = [], []
    for text, (length, room) in enumerate(zip(lengths, rooms, strict=True)):
        start = sum(rooms[:text])
        starts.append(start)
        alone = setup.cache()
        if length:
            setup.run((length,), alone)
        for mine, its in zip(
            (*together.keys, *together.values), (*alone.keys, *alone.values), strict=True
        ):
            mine[:, start : start + room] = its[:, :room]  # whole tiles, whatever their order
        row = setup.x[text : text + 1]
        wanted.append(setup.passes.run(setup.blocks, row, length, alone, 0))
    positions, places = torch.tensor(lengths), torch.tensor(starts)
    rows = setup.x[: len(lengths)]
    for count in (1, 3):
        with threads(count):
            found = setup.passes.run_texts(setup.blocks, rows, positions, places, together)
        assert torch.equal(found, torch.cat(wanted)), f"{count} threads"


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 48, 261])
@pytest.mark.parametrize("size", [32, 96, 576])
def test_products_of_any_rows_and_widths(
    rows: int, size: int, dtype: torch.dtype, build: str
) -> None:
    setup = Setup("least", dtype, build)
    weight, bias, norm = setup.random(rows, size), setup.random(rows), setup.random(size)
    x = setup.random(67, size).float()
    linear = Linear(weight / math.sqrt(size), bias, setup.layout)
    w, b = (weight / math.sqrt(size)).double(), bias.double()
    for scale in (None, norm):
        wide = x.double()
        if scale is not None:
            wide = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale.double()
        whole = setup.passes.project(linear, x, scale)
        near(whole, wide @ w.T + b, TOLERANCE[dtype])
        for width in (1, 3, 16, 17, 31, 32, 33):
            for first in (0, 5, 67 - width):
                found = setup.passes.project(linear, x[first : first + width], scale)
                assert torch.equal(found, whole[first : first + width]), (width, first)
        with threads(3):
            assert torch.equal(setup.passes.project(linear, x, scale), whole)


@pytest.mark.parametrize("shape", ["gqa", "head of 96"])
def test_stored_keys_and_values_lie_where_a_pass_reads_them(
    shape: str, dtype: torch.dtype, build: str
) -> None:
    setup = Setup(shape, dtype, build)
    config = setup.config
    projected = setup.random(70, 2 * config.num_kv_heads * config.head_dim)
    found, wanted = setup.cache(), setup.cache()
    plain = TorchPasses(config, setup.rotary, dtype, torch.device("cpu"), exact=True)
    setup.passes.store(projected, 90, found, 1)
    plain.store(projected, 90, wanted, 1)
    assert torch.equal(found.keys[1], wanted.keys[1])
    values = found.values[1]
    assert torch.equal(
        in_positions(values) if setup.layout == "tiles" else values, wanted.values[1]
    )
