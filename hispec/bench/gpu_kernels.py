"""Each GPU kernel against its reference, then against the floor: the bytes it must move.

Inputs are fresh and random, outputs poisoned, references in fp64. A kernel that is wrong is not
timed. Here are the kernels of a model's blocks, those behind them in :mod:`hispec.bench.gpu_picks`,
others' in :mod:`hispec.bench.gpu_peers`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hispec.bench.gpu_timing import median_ms, poisoned, sets_for
from hispec.model.config import ModelConfig
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Rotary
from hispec_kernels import rotate, swiglu

#: ‖found − wanted‖ / ‖wanted‖ above which a kernel is wrong.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


#: Bytes that all inputs of a kernel may take.
HELD = 16 << 30


@dataclass
class Trial:
    """One kernel on one set of inputs.

    Attributes:
        run: starts it.
        found: what it has written.
        wanted: the same by the reference.
        moved: bytes it has to read and write.
        exact: whether every bit must be the reference's.
        held: bytes that its inputs take, where that is far more.
    """

    run: Callable[[], object]
    found: Callable[[], Tensor]
    wanted: Callable[[], Tensor]
    moved: int
    exact: bool = False
    held: int = 1


class Cases:
    """The kernels of one model's blocks.

    Args:
        config: the model's sizes.
        width: rows of the pass.
        context: positions before it.
        dtype: of weights and cache.
        device: where they are.
    """

    def __init__(
        self,
        config: ModelConfig,
        width: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        from hispec_kernels.gpu import plan

        self.config, self.width, self.context = config, width, context
        self.dtype, self.device = dtype, device
        self.rows = 16 if width <= 16 else MAX_WIDTH
        self.seed = 0
        self.words: Tensor | None = None  # (V, D)
        self.nodes = Nodes(context)
        for node in range(1, width):
            self.nodes.append((node - 1) // 2)  # each node has two children
        chain = np.zeros(plan.LENGTH, np.int32)
        chain[:3] = context, width, plan.STRAIGHT
        tree = chain.copy()
        tree[2] = context
        tree[plan.DEPTHS : plan.PATHS] = self.nodes.depths_array
        tree[plan.PATHS :] = self.nodes.paths_array.ravel()
        self.plan, self.tree_plan = (torch.from_numpy(x).to(device) for x in (chain, tree))
        self.count = self.plan[1:2]
        self.rotary = Rotary(config, context + MAX_WIDTH)
        self.cos, self.sin = self.rotary.cos.to(device), self.rotary.sin.to(device)

    def noise(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns fresh random numbers."""
        self.seed += 1
        draw = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(shape, generator=draw, device=self.device).to(dtype or self.dtype)

    def poison(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns an output that nothing has written to yet."""
        return torch.full(shape, math.nan, dtype=dtype or self.dtype, device=self.device)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The weights of a step, (out, in) each; ``gate_up`` has 2 I rows."""
        c = self.config
        heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        return {
            "qkv": (heads + 2 * kv, c.hidden_size),
            "output": (c.hidden_size, heads),
            "gate_up": (2 * c.intermediate_size, c.hidden_size),
            "down": (c.hidden_size, c.intermediate_size),
            "head": (c.vocab_size, c.hidden_size),
        }

    def product(self, out: int, size: int, blocks: Any = None, *, bias: bool = False) -> Trial:
        """A product on its own."""
        from hispec_kernels.gpu.products import product

        w, x = self.noise(out, size) / size**0.5, self.noise(self.rows, size)
        y, n = self.poison(self.rows, out, dtype=torch.float32), self.width
        offset = self.noise(out) if bias else None
        return Trial(
            lambda: product(x, w, self.count, y, offset, blocks=blocks),
            lambda: y[:n],
            lambda: x[:n].double() @ w.double().T + (0 if offset is None else offset.double()),
            w.nbytes + x[:n].nbytes + y[:n].nbytes,
        )

    def residual_product(self) -> Trial:
        """The last product of a block, which adds to x in place; later runs go on adding."""
        from hispec_kernels.gpu.products import product

        out, size = self.matrices()["down"]
        w, x = self.noise(out, size) / size**0.5, self.noise(self.rows, size)
        y, n = self.noise(self.rows, out, dtype=torch.float32), self.width
        before = y[:n].double()
        return Trial(
            lambda: product(x, w, self.count, y, residual=y),
            lambda: y[:n],
            lambda: before + x[:n].double() @ w.double().T,
            w.nbytes + x[:n].nbytes + 2 * y[:n].nbytes,
        )

    def gated_product(self) -> Trial:
        """Gate, up and SwiGLU."""
        from hispec_kernels.gpu.products import gated_product

        out, size = self.matrices()["gate_up"]
        w, x = self.noise(out, size) / size**0.5, self.noise(self.rows, size)
        y, n = self.poison(self.rows, out // 2), self.width
        return Trial(
            lambda: gated_product(x, w, self.count, y),
            lambda: y[:n],
            lambda: swiglu(x[:n].double() @ w.double().T),
            w.nbytes + x[:n].nbytes + y[:n].nbytes,
        )

    def add_rms_norm(self, *, add: bool = False) -> Trial:
        """RMSNorm, behind the residual add or alone; where it adds, later runs go on adding."""
        from hispec_kernels.gpu.rms_norm import add_rms_norm

        size, n = self.config.hidden_size, self.width
        x, weight = self.noise(self.rows, size, dtype=torch.float32), self.noise(size)
        delta = self.noise(self.rows, size, dtype=torch.float32) if add else None
        h = self.poison(self.rows, size)
        total = x[:n].double() + (0 if delta is None else delta[:n].double())
        normed = F.rms_norm(total, (size,), weight.double(), 1e-5)
        read = x[:n].nbytes + weight.nbytes
        return Trial(
            lambda: add_rms_norm(x, weight, 1e-5, self.count, h, delta, rows=n),
            lambda: torch.cat([h[:n], x[:n]]) if add else h[:n],
            lambda: torch.cat([normed, total]) if add else normed,
            read + h[:n].nbytes + (2 * x[:n].nbytes if add else 0),
        )

    def embed_rows(self) -> Trial:
        """The embeddings of the plan's ids into a pass's rows."""
        from hispec_kernels.gpu.plan import IDS
        from hispec_kernels.gpu.rows import embed_rows

        vocab, size = self.matrices()["head"]
        if self.words is None:  # one table for all trials: it is far larger than what is read
            self.words = self.noise(vocab, size)
        n, plan, words = self.width, self.plan.clone(), self.words
        self.seed += 1
        draw = torch.Generator(self.device).manual_seed(self.seed)
        ids = torch.randint(vocab, (n,), generator=draw, device=self.device)
        plan[IDS : IDS + n] = ids
        x = self.poison(self.rows, size, dtype=torch.float32)
        run = partial(embed_rows, words, plan, x, rows=n)
        moved = n * size * (words.element_size() + 4)
        return Trial(run, lambda: x[:n], lambda: words[ids].float(), moved, exact=True)

    def copy_rows(self, *, load: bool) -> Trial:
        """States from a boundary's slots into a pass's rows, or back."""
        from hispec_kernels.gpu.rows import load_rows, store_rows

        size, n, at = self.config.hidden_size, self.width, self.context
        fp32, moved = torch.float32, 2 * 4 * self.width * self.config.hidden_size
        if load:
            states, x = (
                self.noise(at + n, size, dtype=fp32),
                self.poison(self.rows, size, dtype=fp32),
            )
            run = partial(load_rows, states, self.plan, x, rows=n)
            return Trial(run, lambda: x[:n], lambda: states[at : at + n], moved, exact=True)
        states = self.poison(at + n, size, dtype=fp32)
        x = self.noise(self.rows, size, dtype=fp32)
        run = partial(store_rows, x, self.plan, states, rows=n)
        return Trial(run, lambda: states[at : at + n], lambda: x[:n], moved, exact=True)

    def add_features(self) -> Trial:
        """What rows receive by their distance from the round's root."""
        from hispec_kernels.gpu.plan import ROOT
        from hispec_kernels.gpu.rows import add_features

        size, n, plan = self.config.hidden_size, self.width, self.tree_plan.clone()
        plan[ROOT] = self.context
        x, given = (self.noise(rows, size, dtype=torch.float32) for rows in (self.rows, 4))
        before = x[:n].clone()
        places = [min(depth, 3) for depth in self.nodes.depths[:n]]

        def run() -> None:
            add_features(x, given, plan, rows=n)

        wanted = before + given[places]
        moved = 4 * size * (2 * n + len(set(places)))
        return Trial(run, lambda: x[:n], lambda: wanted, moved)

    def rope_write(self, *, tree: bool = False) -> Trial:
        """The rotation of queries and keys, and where keys and values go."""
        from hispec_kernels.gpu.rope import rope_write

        c, n, at = self.config, self.width, self.context
        everything = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        qkv = self.noise(self.rows, everything, dtype=torch.float32)
        queries = self.poison(self.rows, c.num_heads, c.head_dim)
        keys, values = (self.poison(c.num_kv_heads, at + n, c.head_dim) for _ in range(2))
        plan = self.tree_plan if tree else self.plan
        places = self.nodes.positions(at, at + n) if tree else list(range(at, at + n))

        def found() -> Tensor:
            written = [x[:, at:].transpose(0, 1) for x in (keys, values)]
            return torch.cat([queries[:n], *written], 1)

        def wanted() -> Tensor:
            split = qkv[:n].double().unflatten(1, (-1, c.head_dim))
            cos, sin = (t[places, None].double() for t in (self.cos, self.sin))
            turned = c.num_heads + c.num_kv_heads
            return torch.cat([rotate(split[:, :turned], cos, sin), split[:, turned:]], 1)

        return Trial(
            lambda: rope_write(qkv, self.cos, self.sin, plan, queries, keys, values, rows=n),
            found,
            wanted,
            n * everything * (4 + self.dtype.itemsize) + 2 * n * c.head_dim * 4,
        )

    def looks(self, *, tree: bool) -> Tensor:
        """Which slots each row looks at, (W, S)."""
        n, at = self.width, self.context
        seen = torch.arange(at + n) <= torch.arange(at, at + n)[:, None]
        for row in range(n if tree else 0):
            seen[row, at:] = False
            seen[row, [at + node for node in self.nodes.path(row)]] = True
        return seen.to(self.device)

    def past(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (R, H, D_h), keys and values (H_kv, S, D_h)."""
        c, end = self.config, self.context + self.width
        keys, values = (self.noise(c.num_kv_heads, end, c.head_dim) for _ in range(2))
        return self.noise(self.rows, c.num_heads, c.head_dim), keys, values

    def attended(self, queries: Tensor, keys: Tensor, values: Tensor, *, tree: bool) -> Tensor:
        """Attention in fp64, (W, H, D_h)."""
        group = self.config.num_heads // self.config.num_kv_heads
        k, v = (x.double().repeat_interleave(group, 0) for x in (keys, values))
        q = queries[: self.width].double().transpose(0, 1)
        scores = q @ k.transpose(1, 2) / self.config.head_dim**0.5  # (H, W, S)
        scores.masked_fill_(~self.looks(tree=tree), -math.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1)

    def attention(self, *, tree: bool = False) -> Trial:
        """A chain's or a tree's rows over the context."""
        from hispec_kernels.gpu.attention import Partials, decode_attention

        c, n, end = self.config, self.width, self.context + self.width
        queries, keys, values = self.past()
        out = self.poison(self.rows, c.num_heads, c.head_dim)
        room = Partials(-(-end // 128), self.rows, c.num_heads, c.head_dim, self.device)
        plan = self.tree_plan if tree else self.plan
        return Trial(
            lambda: decode_attention(queries, keys, values, plan, room, out, tree=tree, rows=n),
            lambda: out[:n],
            lambda: self.attended(queries, keys, values, tree=tree),
            keys.nbytes + values.nbytes + 2 * queries[:n].nbytes,
        )

    def all(self) -> Iterator[tuple[str, Callable[[], Trial]]]:
        """Yields every kernel's name and what makes a trial of it."""
        for name, (out, size) in self.matrices().items():
            if name == "gate_up":
                yield "gated_product", self.gated_product
            else:
                yield f"product {name}", partial(self.product, out, size)
        yield "product down + x", self.residual_product
        yield "rms_norm", self.add_rms_norm
        yield "add_rms_norm", partial(self.add_rms_norm, add=True)
        yield "embed_rows", self.embed_rows
        yield "load_rows", partial(self.copy_rows, load=True)
        yield "store_rows", partial(self.copy_rows, load=False)
        yield "add_features", self.add_features
        yield "rope_write", self.rope_write
        yield "attention", self.attention
        if self.width > 1:
            yield "rope_write tree", partial(self.rope_write, tree=True)
            yield "attention tree", partial(self.attention, tree=True)


def measure(make: Callable[[], Trial], dtype: torch.dtype, ceiling: float) -> dict[str, Any]:
    """Returns a kernel's row: its error, and its time over its floor if it is right.

    Args:
        make: a trial on fresh inputs.
        dtype: whose tolerance holds.
        ceiling: GB/s of the copy.
    """
    with poisoned():
        trial = make()
        trial.run()
    found, wanted = trial.found().double(), trial.wanted().double()
    error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))
    right = torch.equal(found, wanted) if trial.exact else error <= TOLERANCE[dtype]
    row: dict[str, Any] = {"error": error, "right": right}
    if row["right"]:
        device = found.device
        sets = max(1, min(sets_for(trial.moved, device), HELD // trial.held))
        trials = [trial, *(make() for _ in range(sets - 1))]
        row["ms"] = median_ms([one.run for one in trials], device)
        row["floor_ms"] = trial.moved / ceiling / 1e6
        row["ratio"] = row["floor_ms"] / row["ms"]
    return row


def tilings(cases: Cases, ceiling: float) -> Iterator[dict[str, Any]]:
    """Yields the rows of each product cut in other ways; on a GPU alone."""
    from hispec_kernels.gpu.products import Blocks

    for name, (out, size) in cases.matrices().items():
        for n, k, warps, stages in itertools.product((16, 32, 64), (128, 256), (4, 8), (3, 5)):
            cut = Blocks(BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages)
            if n * k * stages * cases.dtype.itemsize > 160 << 10:
                continue  # shared memory
            row = measure(partial(cases.product, out, size, cut), cases.dtype, ceiling)
            yield {"kernel": f"product {name}", "tiling": f"{n}x{k} w{warps} s{stages}", **row}
