"""The compiled passes against fp64, and against themselves: no row may know its company.

Each shape is run by the library as this processor gets it and as lesser ones do: without AMX tiles,
with AVX2 alone, and with less. And as greater ones do: with AMX written out in C. Sizes are the
awkward ones: groups of 1 to 16 query heads, heads of 32 to 256, sums of 32s that are no multiple of
64, vocabularies that fill no tile.
"""

from __future__ import annotations

import functools
import math
import platform
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.builds import skip_or_fail
from torch import Tensor

from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig
from hispec.model.linear import Layout, Linear
from hispec.model.native import NativePasses
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Rotary
from hispec.model.store import cache_dir
from hispec.model.torch_passes import TorchPasses
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
#: Relative to the largest value. bf16 rounds keys, values and every operand.
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
    "narrow": ["-march=x86-64-v2"],
    "emulated tiles": ["-D__AMX_BF16__", "-include", str(Path(__file__).parent / "amx.h")],
}


@functools.cache
def library(build: str) -> Any:
    if BUILDS[build] and platform.machine() != "x86_64":
        pytest.skip("for x86-64 processors")
    try:
        with mock.patch.object(cpu, "_FLAGS", cpu._FLAGS + BUILDS[build]):
            loaded = cpu.load_library(cache_dir() / "native")
    except cpu.BuildError as error:
        skip_or_fail(str(error))
    assert build != "emulated tiles" or cpu.LAYOUTS[loaded.bf16_layout()] == "tiles"
    return loaded


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
        self.rotary = Rotary(self.config, CAPACITY)
        self.passes = NativePasses(self.config, self.rotary, dtype, self.library)
        self.layout = self.passes.layout
        self.blocks = [weights.block(self.layout) for weights in self.weights]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def cache(self, junk: float = 0.0, capacity: int = CAPACITY) -> KVCache:
        config = self.config
        device = torch.device("cpu")
        kv = KVCache(2, config.num_kv_heads, config.head_dim, capacity, self.dtype, device)
        for cells in (*kv.keys, *kv.values):
            cells.copy_(junk * torch.randn(cells.shape))
        return kv

    def by_position(self, kv: KVCache) -> tuple[Tensor, Tensor]:
        """All layers' keys and values, (L, H_kv, S, D_h) each."""
        keys, values = kv.storage.unbind(1)
        return self.passes.by_position(keys, "keys"), self.passes.by_position(values, "values")

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


#: Tiles are for bf16 alone.
KINDS = [(x, y) for x in DTYPES for y in BUILDS if (x, y) != ("fp32", "emulated tiles")]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind).replace(" ", "-"))
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def build(kind: tuple[str, str]) -> str:
    return kind[1]


@pytest.fixture
def dtype(kind: tuple[str, str]) -> torch.dtype:
    return DTYPES[kind[0]]


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
    before = [cells.clone() for cells in setup.by_position(dirty)]
    assert torch.equal(setup.run((120, 17), dirty), setup.run((120, 17), clean))
    for cells, old in zip(setup.by_position(dirty), before, strict=True):
        assert torch.equal(cells[:, :, 137:], old[:, :, 137:])


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
            mine[:, start : start + room] = its[:, :room]  # whole panels, whatever their order
        row = setup.x[text : text + 1]
        wanted.append(setup.passes.run(setup.blocks, row, length, alone, 0))
    positions, places = torch.tensor(lengths), torch.tensor(starts)
    rows = setup.x[: len(lengths)]
    for count in (1, 3):
        with threads(count):
            found = setup.passes.run_texts(setup.blocks, rows, positions, places, together)
        assert torch.equal(found, torch.cat(wanted)), f"{count} threads"


def random_tree(root: int, generator: random.Random) -> Nodes:
    """A tree of 1 to MAX_WIDTH nodes: near a chain, bushy or in between."""
    nodes, reach = Nodes(root), generator.choice((1, 3, 8, MAX_WIDTH))
    for node in range(1, generator.randint(1, MAX_WIDTH)):
        nodes.append(generator.randrange(max(0, node - reach), node))
    return nodes


@pytest.mark.parametrize("shape", ["smollm2", "gqa", "mha of 128", "group of 5"])
@pytest.mark.parametrize("root", [0, 1, 31, 100, 127, 129, 300])
def test_nodes_of_a_tree_equal_plain_decoding_of_their_paths(
    shape: str, root: int, dtype: torch.dtype, build: str
) -> None:
    setup = Setup(shape, dtype, build)
    generator = random.Random(root)
    past = setup.random(root, setup.config.hidden_size).float()
    for _ in range(3):
        nodes = random_tree(root, generator)
        rows = setup.random(len(nodes), setup.config.hidden_size).float()
        # Passes append nodes below earlier ones; the first may begin before the root.
        early = generator.randint(0, min(root, 5))
        cache = setup.cache(junk=10.0)
        if root > early:
            setup.passes.run(setup.blocks, past[: root - early], 0, cache, 0)
        slots, found = torch.cat([past[root - early :], rows]), []
        start = 0
        while start < len(slots):
            stop = min(len(slots), start + generator.randint(1 if start else early + 1, MAX_WIDTH))
            found.append(
                setup.passes.run(
                    setup.blocks, slots[start:stop], root - early + start, cache, 0, nodes
                )
            )
            start = stop
        states = torch.cat(found)[early:]
        plain = setup.cache()
        if root:
            setup.passes.run(setup.blocks, past, 0, plain, 0)
        leaves = sorted(set(range(len(nodes))) - set(nodes.parents[1:]))
        for leaf in leaves:
            path = nodes.path(leaf)
            wanted = setup.passes.run(setup.blocks, rows[path], root, plain, 0)
            assert torch.equal(states[path], wanted), (nodes.parents, leaf)


def test_moved_slots_hold_what_plain_decoding_would(dtype: torch.dtype, build: str) -> None:
    setup = Setup("gqa", dtype, build)
    nodes = Nodes(100)
    for parent in (0, 0, 2, 1, 3, 5):
        nodes.append(parent)
    path = nodes.path(6)  # 0, 2, 3, 5, 6
    tree, plain = setup.cache(junk=10.0), setup.cache(junk=10.0)
    for cache in (tree, plain):
        setup.run((100,), cache)
    rows = setup.x[100 : 100 + len(nodes)]
    setup.passes.run(setup.blocks, rows, 100, tree, 0, nodes)
    setup.passes.move(tree, [100 + node for node in path[1:]], range(101, 100 + len(path)))
    setup.passes.run(setup.blocks, rows[path], 100, plain, 0)
    for found, wanted in zip(setup.by_position(tree), setup.by_position(plain), strict=True):
        assert torch.equal(found[:, :, : 100 + len(path)], wanted[:, :, : 100 + len(path)])


def from_bytes(linear: Linear) -> Tensor:
    """The weights, (out, in), that bytes stand for."""
    assert linear.scale is not None
    levels = linear.weight.transpose(1, 2).flatten(2).flatten(0, 1)[: linear.rows]
    return (levels.double() - 64) * linear.scale[: linear.rows, None]


#: Those that keep bf16 in pairs, which is what bytes are read like.
PAIRED = ("no tiles", "avx2")


@pytest.mark.parametrize("build", PAIRED)
@pytest.mark.parametrize("shape", ["gqa", "smollm2", "mha of 128", "group of 5", "head of 256"])
def test_blocks_of_bytes_are_those_of_their_weights(shape: str, build: str) -> None:
    setup = Setup(shape, torch.bfloat16, build)
    assert setup.passes.draft_layout == "bytes"
    setup.blocks = [weights.block("bytes") for weights in setup.weights]
    for weights, block in zip(setup.weights, setup.blocks, strict=True):
        for name, (weight, bias) in weights.linears.items():
            taken = from_bytes(getattr(block, name))
            assert (taken - weight).abs().amax() <= weight.abs().amax() / 100
            weights.linears[name] = (taken, bias)
    first = setup.run(CHUNKINGS[0])
    near(first, setup.reference(), TOLERANCE[torch.bfloat16])
    for widths in CHUNKINGS[1:]:
        assert torch.equal(setup.run(widths), first), widths
    with threads(3):
        assert torch.equal(setup.run(CHUNKINGS[1]), first)


@pytest.mark.parametrize("build", PAIRED)
@pytest.mark.parametrize("rows", [1, 16, 33, 261])
@pytest.mark.parametrize("size", [32, 576])
def test_products_of_bytes(rows: int, size: int, build: str) -> None:
    setup = Setup("least", torch.bfloat16, build)
    bias, norm, x = setup.random(rows), setup.random(size), setup.random(67, size).float()
    linear = Linear(setup.random(rows, size) / math.sqrt(size), bias, "bytes")
    whole = setup.passes.project(linear, x, norm)
    scaled = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.double()
    near(whole, scaled @ from_bytes(linear).T + bias.double(), TOLERANCE[torch.bfloat16])
    for width in (1, 3, 16, 17, 32):
        assert torch.equal(
            setup.passes.project(linear, x[5 : 5 + width], norm), whole[5 : 5 + width]
        )


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("layout", ["own", "draft"])
def test_the_best_ids_of_a_head_are_those_of_its_logits(
    dtype: torch.dtype, build: str, layout: str, ids: bool
) -> None:
    setup = Setup("least", dtype, build)
    passes = setup.passes
    weight, norm, x = setup.random(261, 96) / 10, setup.random(96), setup.random(5, 96).float()
    linear = Linear(weight, layout=passes.layout if layout == "own" else passes.draft_layout)
    names = torch.randperm(1000, generator=setup.generator)[:261] if ids else None
    logits = passes.project(linear, x, norm)
    for k, temperature in ((1, 1.0), (8, 0.7), (300, 1.3)):
        asked = Asked(k, temperature, None, range(5))
        found = passes.best(linear, x, norm, asked, names)
        assert found is not None
        columns = logits.sort(stable=True, descending=True).indices
        wanted = columns[:, :k] if names is None else names[columns[:, :k]]
        assert torch.equal(found[0], wanted)
        odds = (logits / temperature).softmax(-1).gather(-1, columns[:, :k])
        torch.testing.assert_close(found[1], odds, rtol=1e-4, atol=1e-7)
    assert passes.best(linear, x, norm, Asked(1, 1.0, 5, range(5)), names) is None


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
    for cells, plain_cells in zip(setup.by_position(found), wanted.storage.unbind(1), strict=True):
        if build == "narrow":  # which rounds products by themselves, as torch does not
            near(cells[1].float(), plain_cells[1].double(), TOLERANCE[dtype])
        else:
            assert torch.equal(cells[1], plain_cells[1])
