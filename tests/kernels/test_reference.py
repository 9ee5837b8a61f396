"""Each operation of ``hispec_kernels`` against a naive computation in fp64, at odd shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hispec_kernels import decode_attention, rms_norm, rope_write, rotate, swiglu

#: dtype → relative tolerance: a few units in the last place of the largest term.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    error = float((found.double() - wanted).abs().max())
    assert error <= TOLERANCE[dtype] * float(wanted.abs().max()), error


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 33), (5, 64), (2, 3, 100), (256, 576)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, eps = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1), 1e-5
    wide = x.double()
    wanted = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    near(rms_norm(x, weight, eps), wanted, dtype)


def test_rms_norm_needs_its_eps() -> None:
    x = torch.full((1, 8), 1e-4)
    assert torch.allclose(rms_norm(x, torch.ones(8), 1e-8), torch.full((1, 8), 0.5**0.5))
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


@dtypes
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 5, 96), (32, 3072)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up = random(*shape, dtype=dtype)
    kept = gate_up.clone()
    half = shape[-1] // 2
    gate, up = gate_up.double()[..., :half], gate_up.double()[..., half:]
    near(swiglu(gate_up), gate / (1 + (-gate).exp()) * up, dtype)
    assert torch.equal(gate_up, kept), "the input was changed"


def turned(x: list[float], position: float, theta: float) -> list[float]:
    """Rotates pairs (d, d + D_h/2) by position / theta^(2d / D_h), one complex number at a time."""
    half = len(x) // 2
    out = [0.0] * len(x)
    for d in range(half):
        angle = position / theta ** (2 * d / len(x))
        z = complex(x[d], x[d + half]) * complex(math.cos(angle), math.sin(angle))
        out[d], out[d + half] = z.real, z.imag
    return out


def tables(positions: list[int], size: int, theta: float, dtype: torch.dtype):
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.tensor(positions, dtype=torch.float64), frequencies)
    cos = torch.cat([angles.cos()] * 2, -1)[:, None].to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], -1)[:, None].to(dtype)
    return cos, sin


@dtypes
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 10), (4, 64)])
def test_rotate(heads: int, size: int, dtype: torch.dtype) -> None:
    positions = [0, 1, 17, 300]
    x = random(4, heads, size, dtype=dtype)
    kept = x.clone()
    cos, sin = tables(positions, size, 10000.0, dtype)
    wanted = torch.tensor(
        [
            [turned(x[row, head].tolist(), at, 10000.0) for head in range(heads)]
            for row, at in enumerate(positions)
        ],
        dtype=torch.float64,
    )
    near(rotate(x, cos, sin), wanted, dtype)
    assert torch.equal(rotate(x[:1], cos[:1], sin[:1]), x[:1]), "position 0 turns nothing"
    assert torch.equal(x, kept), "the input was changed"


@dtypes
@pytest.mark.parametrize(("kv_heads", "group", "width"), [(1, 1, 1), (2, 3, 5), (3, 1, 2)])
def test_rope_write(kv_heads: int, group: int, width: int, dtype: torch.dtype) -> None:
    size, start, heads = 6, 4, kv_heads * group
    qkv = random(width, heads + 2 * kv_heads, size, dtype=dtype)
    cos, sin = tables(list(range(start, start + width)), size, 100.0, dtype)
    queries = torch.zeros(kv_heads, width, group, size, dtype=dtype)
    keys = torch.full((kv_heads, 12, size), 7.0, dtype=dtype)
    values = torch.full((kv_heads, 12, size), 8.0, dtype=dtype)
    end = start + width
    rope_write(qkv, cos, sin, queries, keys[:, start:end], values[:, start:end])
    wide = qkv.double()
    for row in range(width):
        for head in range(kv_heads):
            for member in range(group):
                source = wide[row, head * group + member].tolist()
                wanted = torch.tensor(turned(source, start + row, 100.0)).double()
                near(queries[head, row, member], wanted, dtype)
            wanted = torch.tensor(turned(wide[row, heads + head].tolist(), start + row, 100.0))
            near(keys[head, start + row], wanted.double(), dtype)
            assert torch.equal(values[head, start + row], qkv[row, heads + kv_heads + head])
    for cache, filling in ((keys, 7.0), (values, 8.0)):
        assert (cache[:, :start] == filling).all(), "wrote before its rows"
        assert (cache[:, end:] == filling).all(), "wrote behind its rows"


@dtypes
@pytest.mark.parametrize("size", [2, 8, 64, 100])
@pytest.mark.parametrize(("rows", "span"), [(1, 1), (3, 5), (8, 256), (40, 130), (16, 1000)])
def test_decode_attention(rows: int, span: int, size: int, dtype: torch.dtype) -> None:
    kv_heads, scale = 2, 1 / math.sqrt(size)
    queries = random(kv_heads, rows, size, dtype=dtype)
    keys = random(kv_heads, span, size, dtype=dtype, seed=1)
    values = random(kv_heads, span, size, dtype=dtype, seed=2)
    visible = torch.arange(span)[None] <= torch.arange(rows)[:, None] * (span - 1) // max(rows, 2)
    mask = torch.zeros(rows, span, dtype=dtype).masked_fill_(~visible, -torch.inf)
    wanted = torch.zeros(kv_heads, rows, size, dtype=torch.float64)
    for head in range(kv_heads):
        for row in range(rows):
            seen = visible[row].nonzero().flatten()
            scores = keys[head, seen].double() @ queries[head, row].double() * scale
            weights = scores.exp() / scores.exp().sum()
            wanted[head, row] = weights @ values[head, seen].double()
    near(decode_attention(queries, keys, values, mask, scale), wanted, dtype)


@dtypes
def test_what_masked_positions_hold_does_not_matter(dtype: torch.dtype) -> None:
    queries, keys = random(2, 8, 16, dtype=dtype), random(2, 256, 16, dtype=dtype, seed=1)
    values = random(2, 256, 16, dtype=dtype, seed=2)
    mask = torch.zeros(8, 256, dtype=dtype)
    mask[:, 100:] = -torch.inf
    wanted = decode_attention(queries, keys, values, mask, 0.25)
    keys[:, 100:], values[:, 100:] = 1e4, -1e4
    assert torch.equal(decode_attention(queries, keys, values, mask, 0.25), wanted)
