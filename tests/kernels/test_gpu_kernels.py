"""The Triton kernels against their references in fp64, in the interpreter where there is no GPU.

Outputs are poisoned before every call: what a kernel leaves unwritten shows, and what it writes
outside of its rows too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from helpers.gpu_rows import (
    DEVICE,
    DTYPES,
    POISON,
    TOLERANCE,
    bad,
    count,
    near,
    noise,
    plan_of,
    rows_for,
    untouched,
)
from torch import Tensor

from hispec.model.nodes import Nodes
from hispec_kernels import compact as reference_compact
from hispec_kernels import follow as reference_follow
from hispec_kernels import swiglu
from hispec_kernels.gpu import attention, rope
from hispec_kernels.gpu.attention import Partials, decode_attention
from hispec_kernels.gpu.compact import compact
from hispec_kernels.gpu.follow import follow
from hispec_kernels.gpu.products import Blocks, gated_product, product
from hispec_kernels.gpu.rms_norm import add_rms_norm
from hispec_kernels.gpu.rope import rope_write
from hispec_kernels.rope import rotate


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


# ------------------------------------------------------------------ products and norms


@pytest.mark.parametrize(
    ("width", "out", "size"),
    [(1, 5, 16), (3, 130, 300), (16, 96, 33), (17, 130, 48), (17, 20, 256)],
)
def test_product(width: int, out: int, size: int, dtype: torch.dtype) -> None:
    rows = rows_for(width)
    x, w = bad(rows, size, dtype=dtype), noise(out, size, dtype=dtype, seed=1)
    x[:width] = noise(width, size, dtype=dtype)
    bias, residual = noise(out, dtype=dtype, seed=2), bad(rows, out)
    residual[:width] = noise(width, out, seed=3)
    wanted = x[:width].double() @ w.double().T
    y = bad(rows, out)
    product(x, w, count(width), y)
    near(y[:width], wanted, TOLERANCE[dtype])
    untouched(y[width:])
    kept = residual.clone()
    product(x, w, count(width), residual, bias, residual)
    near(residual[:width], wanted + bias.double() + kept[:width].double(), TOLERANCE[dtype])
    untouched(residual[width:])
    for first in {0, width // 2, width - 1}:  # a row's bits do not depend on its company
        alone, found = bad(16, size, dtype=dtype), bad(16, out)
        alone[0] = x[first]
        product(alone, w, count(1), found)
        assert torch.equal(found[0], y[first])


@pytest.mark.parametrize(
    ("width", "inner", "size"),
    [(1, 5, 16), (3, 150, 48), (16, 5, 48), (17, 150, 16), (3, 40, 300), (17, 20, 256)],
)
def test_gated_product(width: int, inner: int, size: int, dtype: torch.dtype) -> None:
    rows = rows_for(width)
    x, w = bad(rows, size, dtype=dtype), noise(2 * inner, size, dtype=dtype, seed=1)
    x[:width] = noise(width, size, dtype=dtype)
    bias = noise(2 * inner, dtype=dtype, seed=2)
    for offset in (None, bias):
        wide = x[:width].double() @ w.double().T + (0 if offset is None else offset.double())
        y = bad(rows, inner, dtype=dtype)
        gated_product(x, w, count(width), y, offset)
        near(y[:width], swiglu(wide), TOLERANCE[dtype])
        untouched(y[width:])
        alone, found = bad(16, size, dtype=dtype), bad(16, inner, dtype=dtype)
        alone[0] = x[width - 1]
        gated_product(alone, w, count(1), found, offset)
        assert torch.equal(found[0], y[width - 1])


@pytest.mark.parametrize(("width", "size"), [(1, 1), (3, 33), (16, 576), (17, 100)])
def test_add_rms_norm(width: int, size: int, dtype: torch.dtype) -> None:
    rows = rows_for(width)
    x, delta = bad(rows, size), bad(rows, size)
    x[:width], delta[:width] = noise(width, size), noise(width, size, seed=1)
    weight = noise(size, dtype=dtype, seed=2)
    before = x.clone()
    for change in (None, delta):
        wide = x[:width].double() + (0 if change is None else change[:width].double())
        wanted = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        h = bad(rows, size, dtype=dtype)
        add_rms_norm(x, weight, 1e-5, count(width), h, change)
        near(h[:width], wanted, TOLERANCE[dtype])
        untouched(h[width:])
    assert torch.equal(x[:width], before[:width] + delta[:width])
    untouched(x[width:])


@pytest.mark.parametrize("size", [128, 200])
@pytest.mark.parametrize("width", [3, 17])
def test_products_cut_as_on_a_gpu(width: int, size: int, dtype: torch.dtype) -> None:
    cut = Blocks(BLOCK_N=16, BLOCK_K=64, num_warps=4, num_stages=1)  # several programs and steps
    rows = rows_for(width)
    x, w = bad(rows, size, dtype=dtype), noise(40, size, dtype=dtype, seed=1)
    x[:width] = noise(width, size, dtype=dtype)
    wide = x[:width].double() @ w.double().T
    y, gated = bad(rows, 40), bad(rows, 20, dtype=dtype)
    product(x, w, count(width), y, blocks=cut)
    gated_product(x, w, count(width), gated, blocks=cut)
    near(y[:width], wide, TOLERANCE[dtype])
    near(gated[:width], swiglu(wide), TOLERANCE[dtype])
    untouched(y[width:])
    untouched(gated[width:])


# ------------------------------------------------------------------ rows of a pass


def random_tree(root: int, size: int, seed: int) -> Nodes:
    draw, nodes = random.Random(seed), Nodes(root)
    for node in range(1, size):
        nodes.append(draw.randrange(max(0, node - 3), node))
    return nodes


def slots_seen(slot: int, nodes: Nodes | None) -> list[int]:
    """The slots a row looks at, by position."""
    if nodes is None or slot < nodes.root:
        return list(range(slot + 1))
    path = nodes.path(slot - nodes.root)
    return [*range(nodes.root), *(nodes.root + node for node in path)]


SHAPES = {"9/3": (9, 3, 64), "32/8": (32, 8, 16), "mha of 6": (2, 2, 6), "16/1": (16, 1, 32)}


@pytest.mark.parametrize(
    ("shape", "position", "width", "tree"),
    [
        *(("9/3", 0, 1, 0), ("9/3", 40, 3, 3), ("9/3", 20, 16, 5)),
        *(("32/8", 63, 1, 1), ("32/8", 15, 3, 9), ("32/8", 48, 16, 0)),
        ("mha of 6", 40, 16, 16),
    ],
)
def test_rope_write(shape: str, position: int, width: int, tree: int, dtype: torch.dtype) -> None:
    heads, kv_heads, size = SHAPES[shape]
    nodes = random_tree(position + width - tree, tree, 1) if tree else None
    rows, capacity = rows_for(width), 64
    qkv = bad(rows, (heads + 2 * kv_heads) * size)
    qkv[:width] = noise(width, qkv.shape[1])
    frequencies = 100.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(capacity, dtype=torch.float64), frequencies)
    cos = torch.cat([angles.cos()] * 2, -1).float().to(DEVICE)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).float().to(DEVICE)
    queries = bad(rows, heads, size, dtype=dtype)
    keys, values = (bad(kv_heads, capacity, size, dtype=dtype) for _ in range(2))
    rope_write(qkv, cos, sin, plan_of(position, width, nodes), queries, keys, values)
    end = position + width
    places = nodes.positions(position, end) if nodes else list(range(position, end))
    split = qkv[:width].double().unflatten(1, (-1, size))
    turned = rotate(split, cos[places, None].double(), sin[places, None].double())
    near(queries[:width], turned[:, :heads], TOLERANCE[dtype])
    untouched(queries[width:])
    near(
        keys[:, position:end].transpose(0, 1),
        turned[:, heads : heads + kv_heads],
        TOLERANCE[dtype],
    )
    near(values[:, position:end].transpose(0, 1), split[:, heads + kv_heads :], TOLERANCE[dtype])
    for cells in (keys, values):
        untouched(cells[:, :position])
        untouched(cells[:, end:])


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    position: int,
    width: int,
    nodes: Nodes | None,
    spare: int = 0,
) -> Tensor:
    """The kernel's rows, with room for ``spare`` splits more than are needed."""
    heads, size = queries.shape[1:]
    rows = rows_for(width)
    padded = bad(rows, heads, size, dtype=queries.dtype)
    padded[:width] = queries
    out = bad(rows, heads, size, dtype=queries.dtype)
    partials = Partials((position + width - 1) // 128 + 1 + spare, rows, heads, size, DEVICE)
    for part in (partials.peaks, partials.sums, partials.mixed):
        part.fill_(POISON)
    plan = plan_of(position, width, nodes)
    decode_attention(padded, keys, values, plan, partials, out, tree=nodes is not None)
    untouched(out[width:])
    return out[:width]


def attention_by_hand(
    queries: Tensor, keys: Tensor, values: Tensor, position: int, nodes: Nodes | None
) -> Tensor:
    """The same in fp64, a row and a head at a time."""
    width, heads, size = queries.shape
    group = heads // keys.shape[0]
    out = torch.zeros(width, heads, size, dtype=torch.float64, device=DEVICE)
    for row in range(width):
        seen = slots_seen(position + row, nodes)
        for head in range(heads):
            k, v = (x[head // group, seen].double() for x in (keys, values))
            out[row, head] = (k @ queries[row, head].double() / math.sqrt(size)).softmax(0) @ v
    return out


def cells(kv_heads: int, size: int, known: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A cache of whole buckets; behind the ``known`` positions lie huge leftovers."""
    capacity = 512 * (1 + known // 512)
    keys = noise(kv_heads, capacity, size, dtype=dtype, seed=1)
    values = noise(kv_heads, capacity, size, dtype=dtype, seed=2)
    keys[:, known:], values[:, known:] = 1e4, -1e4
    return keys, values


@pytest.mark.parametrize(
    ("shape", "position", "width"),
    [
        # Round the borders of splits and of buckets: 128, 512, 1,024.
        *(("9/3", at, 1) for at in (0, 127, 128, 511)),
        *(("9/3", 383, 2), ("9/3", 510, 3), ("9/3", 120, 16), ("9/3", 120, 17)),
        *(("32/8", 512, 1), ("32/8", 126, 3), ("32/8", 510, 3)),
        *(("32/8", 0, 16), ("32/8", 120, 16)),
        *(("mha of 6", 126, 1), ("mha of 6", 1023, 1)),
        *(("mha of 6", 1022, 3), ("mha of 6", 1017, 16), ("16/1", 255, 3)),
    ],
)
def test_attention_of_chains(shape: str, position: int, width: int, dtype: torch.dtype) -> None:
    heads, kv_heads, size = SHAPES[shape]
    keys, values = cells(kv_heads, size, position + width, dtype)
    queries = noise(width, heads, size, dtype=dtype)
    found = attend(queries, keys, values, position, width, None)
    near(found, attention_by_hand(queries, keys, values, position, None), TOLERANCE[dtype])
    # As plain decoding: a row at a time, and with room for a longer cache.
    for row in {0, width - 1}:
        alone = attend(queries[row : row + 1], keys, values, position + row, 1, None, spare=1)
        assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize(
    ("shape", "root", "size", "early"),
    [
        *(("9/3", 0, 6, 0), ("9/3", 511, 3, 0), ("9/3", 128, 16, 0)),
        *(("32/8", 127, 3, 0), ("32/8", 120, 16, 1), ("mha of 6", 250, 20, 2)),
    ],
)
def test_attention_of_trees(
    shape: str, root: int, size: int, early: int, dtype: torch.dtype
) -> None:
    heads, kv_heads, dim = SHAPES[shape]
    nodes = random_tree(root, size, root)
    early = min(early, root, 32 - size)
    position, width = root - early, size + early
    keys, values = cells(kv_heads, dim, root + size, dtype)
    queries = noise(width, heads, dim, dtype=dtype)
    found = attend(queries, keys, values, position, width, nodes)
    near(found, attention_by_hand(queries, keys, values, position, nodes), TOLERANCE[dtype])
    for row in {0, width // 2, width - 1}:  # as if its branch had been decoded plainly
        seen = slots_seen(position + row, nodes)
        straight, mixed = (torch.zeros_like(x) for x in (keys, values))
        straight[:, : len(seen)], mixed[:, : len(seen)] = keys[:, seen], values[:, seen]
        alone = attend(queries[row : row + 1], straight, mixed, len(seen) - 1, 1, None)
        assert torch.equal(alone[0], found[row]), row


@pytest.mark.parametrize("root", [3, 639])
def test_rows_cut_as_on_a_gpu(root: int, dtype: torch.dtype) -> None:
    heads, kv_heads, size = SHAPES["9/3"]
    nodes = random_tree(root, 4, root)
    keys, values = cells(kv_heads, size, root + 4, dtype)
    queries = noise(4, heads, size, dtype=dtype)
    qkv, table = noise(4, (heads + 2 * kv_heads) * size), noise(2 * 644, size, seed=4)
    cos, sin = table.view(2, 644, size)

    def everything() -> list[Tensor]:
        turned = bad(16, heads, size, dtype=dtype)
        stored = [bad(kv_heads, 644, size, dtype=dtype) for _ in range(2)]
        rope_write(qkv, cos, sin, plan_of(root, 4, nodes), turned, *stored)
        written = torch.cat([x[:, root : root + 4] for x in stored])
        return [attend(queries, keys, values, root, 4, nodes, spare=2), turned[:4], written]

    wanted = everything()
    with (
        mock.patch.object(attention, "_cut", lambda *_: (1, 4)),
        mock.patch.object(rope, "_cut", lambda *_: rope._HEADS),
    ):
        found = everything()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ------------------------------------------------------------------ trees


@pytest.mark.parametrize("seed", range(6))
def test_follow(seed: int) -> None:
    draw = random.Random(seed)
    nodes = random_tree(0, (1, 2, 5, 12, 20, 32)[seed], seed)
    taken: set[tuple[int, int]] = set()
    tokens = [draw.randrange(9)]
    for parent in nodes.parents[1:]:
        free = [t for t in range(40) if (parent, t) not in taken]
        tokens.append(draw.choice(free[:3]))
        taken.add((parent, tokens[-1]))
    picks = [draw.randrange(40) for _ in tokens]
    for node in range(1, len(tokens)):
        if draw.random() < 0.7:
            picks[nodes.parents[node]] = tokens[node]
    arrays = [torch.tensor(x) for x in (tokens, nodes.parents, picks)]
    wanted, token = reference_follow(*arrays)
    path, end = follow(*(x.to(DEVICE) for x in arrays))
    assert (path[: int(end[0])].tolist(), int(end[1])) == (wanted.tolist(), int(token))


@pytest.mark.parametrize(("kept", "real"), [((0, 2, 3, 5, 6), 5), ((0, 1, 4), 3), ((0, 9), 1)])
def test_compact(kept: Sequence[int], real: int, dtype: torch.dtype) -> None:
    root, storage = 20, noise(2, 2, 3, 64, 6, dtype=dtype)
    before = storage.clone()
    moves = [(root + node, root + new) for new, node in enumerate(kept) if new != node][:real]
    sources, targets = (torch.tensor(x, device=DEVICE) for x in zip(*moves, strict=True))
    wanted = before.clone()
    reference_compact(wanted, sources, targets)
    assert all(torch.equal(wanted[..., b, :], before[..., a, :]) for a, b in moves)
    compact(storage, sources, targets, torch.tensor([len(moves)], device=DEVICE))
    assert torch.equal(storage, wanted)
    compact(storage, sources, targets, torch.tensor([0], device=DEVICE))
    assert torch.equal(storage, wanted)
