"""The compiled passes as this processor gets them, and as lesser and greater ones do.

Without AMX tiles, with AVX2 alone, and with less; with AMX or dot products of pairs written out in
C. Sizes are the awkward ones: groups of 1 to 16 query heads, heads of 32 to 256, sums of 32s that
are no multiple of 64.
"""

from __future__ import annotations

import functools
import math
import platform
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from helpers.builds import skip_or_fail
from helpers.cells import by_position
from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig
from hispec.model.linear import Layout, Linear
from hispec.model.native import NativePasses
from hispec.model.passes import Rotary
from hispec.model.store import cache_dir
from hispec_kernels import cpu

_LAYOUT = {"no tiles": "pairs", "emulated tiles": "tiles", "emulated dots": "pairs"}
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


def _include(header: str) -> list[str]:
    path = Path(__file__).parent.parent / "kernels" / header
    # A build is made again when its flags change.
    return ["-include", str(path), f"-DHEADER={zlib.crc32(path.read_bytes())}"]


#: name → flags after the usual ones
_ALL_BUILDS = {
    "native": [],
    "no tiles": ["-mno-amx-tile", "-mno-amx-bf16"],
    "avx512": ["-march=skylake-avx512"],
    "avx2": ["-march=haswell"],
    "narrow": ["-march=x86-64-v2"],
    "emulated tiles": ["-D__AMX_BF16__", *_include("amx.h")],
    "emulated dots": ["-march=haswell", "-O1", *_include("dots.h")],
}


def _distinct() -> dict[str, list[str]]:
    """The builds that differ from this processor's own, and that it can run."""
    if platform.machine() != "x86_64":
        return {"native": []}
    wanted = {
        "no tiles": ("amx_tile",),
        "avx512": ("avx512_bf16",),
        "avx2": ("avx512",),
        "emulated dots": ("avx2",),
    }
    return {
        name: flags
        for name, flags in _ALL_BUILDS.items()
        if all(getattr(torch.cpu, f"_is_{x}_supported")() for x in wanted.get(name, ()))
    }


BUILDS = _distinct()
#: Those that keep bf16 in pairs, which is what bytes are read like.
PAIRED = [x for x in BUILDS if x in ("no tiles", "avx512", "avx2", "emulated dots")]
if "no tiles" not in BUILDS:
    PAIRED.append("native")


@functools.cache
def library(build: str) -> Any:
    try:
        with mock.patch.object(cpu, "_FLAGS", cpu._FLAGS + BUILDS[build]):
            loaded = cpu.load_library(cache_dir() / "native")
    except cpu.BuildError as error:
        skip_or_fail(str(error))
    if build in _LAYOUT:
        assert cpu.LAYOUTS[loaded.bf16_layout()] == _LAYOUT[build]
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
        layout = self.passes.layout
        return by_position(keys, "keys", layout), by_position(values, "values", layout)

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


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    error = float((found.double() - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance, error


def from_bytes(linear: Linear) -> Tensor:
    """The weights, (out, in), that bytes stand for."""
    assert linear.scale is not None
    levels = linear.weight.transpose(1, 2).flatten(2).flatten(0, 1)[: linear.rows]
    return (levels.double() - 64) * linear.scale[: linear.rows, None]
