"""Each GPU kernel against its reference, then against the floor: the bytes it must move.

Inputs are fresh and random, outputs poisoned, references in fp64. A kernel that is wrong is not
timed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hispec.bench.gpu_timing import median_ms, sets_for
from hispec.model.config import ModelConfig
from hispec.model.nodes import MAX_WIDTH
from hispec.model.passes import Rotary
from hispec_kernels import exit_head as reference_head
from hispec_kernels import rotate, swiglu
from hispec_kernels.noise import noisy as reference_noisy
from hispec_kernels.noise import seeded_state

#: ‖found − wanted‖ / ‖wanted‖ above which a kernel is wrong.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Trial:
    """One kernel on one set of inputs.

    Attributes:
        run: starts it.
        found: what it has written.
        wanted: the same by the reference.
        moved: bytes it has to read and write.
    """

    run: Callable[[], object]
    found: Callable[[], Tensor]
    wanted: Callable[[], Tensor]
    moved: int


class Cases:
    """The kernels of one model's decoding step.

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
        self.plan = torch.zeros(plan.LENGTH, dtype=torch.int32, device=device)
        header = [context, width, plan.STRAIGHT]
        self.plan[:3] = torch.tensor(header, dtype=torch.int32, device=device)
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

    def product(self, out: int, size: int, blocks: Any = None) -> Trial:
        """A product on its own."""
        from hispec_kernels.gpu.products import product

        w, x = self.noise(out, size) / size**0.5, self.noise(self.rows, size)
        y, n = self.poison(self.rows, out, dtype=torch.float32), self.width
        return Trial(
            lambda: product(x, w, self.count, y, blocks=blocks),
            lambda: y[:n],
            lambda: x[:n].double() @ w.double().T,
            w.nbytes + x[:n].nbytes + y[:n].nbytes,
        )

    def library_product(self, out: int, size: int) -> Trial:
        """Torch's product at the same fixed width."""
        w, x = self.noise(out, size) / size**0.5, self.noise(self.rows, size)
        y, n = self.poison(self.rows, out), self.width
        return Trial(
            lambda: torch.mm(x, w.T, out=y),
            lambda: y[:n],
            lambda: x[:n].double() @ w.double().T,
            w.nbytes + x[:n].nbytes + y[:n].nbytes,
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

    def add_rms_norm(self) -> Trial:
        """The residual add and norm; x is not moved on, so that every run sees the same."""
        from hispec_kernels.gpu.rms_norm import add_rms_norm

        size, n = self.config.hidden_size, self.width
        x, weight = self.noise(self.rows, size, dtype=torch.float32), self.noise(size)
        h = self.poison(self.rows, size)
        return Trial(
            lambda: add_rms_norm(x, weight, 1e-5, self.count, h, rows=n),
            lambda: h[:n],
            lambda: F.rms_norm(x[:n].double(), (size,), weight.double(), 1e-5),
            x[:n].nbytes + weight.nbytes + h[:n].nbytes,
        )

    def rope_write(self) -> Trial:
        """The rotation of queries; keys and values go the same way."""
        from hispec_kernels.gpu.rope import rope_write

        c, n, at = self.config, self.width, self.context
        everything = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        qkv = self.noise(self.rows, everything, dtype=torch.float32)
        queries = self.poison(self.rows, c.num_heads, c.head_dim)
        keys, values = (self.poison(c.num_kv_heads, at + n, c.head_dim) for _ in range(2))

        def wanted() -> Tensor:
            split = qkv[:n].double().unflatten(1, (-1, c.head_dim))[:, : c.num_heads]
            cos, sin = (t[at : at + n, None].double() for t in (self.cos, self.sin))
            return rotate(split, cos, sin)

        return Trial(
            lambda: rope_write(qkv, self.cos, self.sin, self.plan, queries, keys, values, rows=n),
            lambda: queries[:n],
            wanted,
            n * everything * (4 + self.dtype.itemsize) + 2 * n * c.head_dim * 4,
        )

    def attention(self) -> Trial:
        """A chain's rows over the context."""
        from hispec_kernels.gpu.attention import Partials, decode_attention

        c, n, end = self.config, self.width, self.context + self.width
        keys, values = (self.noise(c.num_kv_heads, end, c.head_dim) for _ in range(2))
        queries = self.noise(self.rows, c.num_heads, c.head_dim)
        out = self.poison(self.rows, c.num_heads, c.head_dim)
        room = Partials(-(-end // 128), self.rows, c.num_heads, c.head_dim, self.device)

        def wanted() -> Tensor:
            group = c.num_heads // c.num_kv_heads
            k, v = (x.double().repeat_interleave(group, 0) for x in (keys, values))
            q = queries[:n].double().transpose(0, 1)
            scores = q @ k.transpose(1, 2) / c.head_dim**0.5  # (H, W, S)
            places = torch.arange(end, device=self.device)
            scores.masked_fill_(places > places[self.context :, None], -math.inf)
            return (scores.softmax(-1) @ v).transpose(0, 1)

        return Trial(
            lambda: decode_attention(
                queries, keys, values, self.plan, room, out, tree=False, rows=n
            ),
            lambda: out[:n],
            wanted,
            keys.nbytes + values.nbytes + 2 * queries[:n].nbytes,
        )

    def exit_head(self) -> Trial:
        """A head down to the three best under noise; compared by their odds."""
        from hispec_kernels.gpu.exit_head import best

        out, size = self.matrices()["head"]
        n, warm = self.width, torch.ones(1, device=self.device)
        w, x = self.noise(out, size) / size**0.5, self.noise(self.rows, size)
        places = torch.arange(self.rows, device=self.device)
        sampling = torch.cat([torch.tensor([seeded_state(7)], device=self.device), places])
        kept: list[Tensor] = []

        def run() -> None:
            kept[:] = [best(x, w, self.count, 3, warm, sampling, rows=n)[1]]

        def wanted() -> Tensor:
            logits = (x[:n].double() @ w.double().T).float()
            return reference_head.best(logits, 3, 1.0, 7, places[:n])[1].double()

        return Trial(run, lambda: kept[0][:n], wanted, w.nbytes + x[:n].nbytes)

    def noisy(self) -> Trial:
        """Noise on a row of logits."""
        from hispec_kernels.gpu.noise import noisy

        logits = self.noise(self.width, self.config.vocab_size, dtype=torch.float32)
        places = torch.arange(self.width, device=self.device)
        kept: list[Tensor] = []

        def run() -> None:
            kept[:] = [noisy(logits, 0.7, 5, places)]

        def wanted() -> Tensor:
            there = reference_noisy(logits.cpu(), 0.7, 5, places.cpu()[:, None])
            return there.double().to(self.device)

        return Trial(run, lambda: kept[0], wanted, 2 * logits.nbytes)

    def all(self) -> Iterator[tuple[str, Callable[[], Trial]]]:
        """Yields every kernel's name and what makes a trial of it."""
        for name, (out, size) in self.matrices().items():
            if name == "gate_up":
                yield "gated_product", self.gated_product
            else:
                yield f"product {name}", partial(self.product, out, size)
            yield f"torch.mm {name}", partial(self.library_product, out, size)
        yield "add_rms_norm", self.add_rms_norm
        yield "rope_write", self.rope_write
        yield "attention", self.attention
        yield "exit_head", self.exit_head
        yield "noisy", self.noisy


def measure(make: Callable[[], Trial], dtype: torch.dtype, ceiling: float) -> dict[str, Any]:
    """Returns a kernel's row: its error, and its time over its floor if it is right.

    Args:
        make: a trial on fresh inputs.
        dtype: whose tolerance holds.
        ceiling: GB/s of the copy.
    """
    trial = make()
    trial.run()
    found, wanted = trial.found().double(), trial.wanted()
    error = float((found - wanted).norm() / wanted.norm())
    row: dict[str, Any] = {"error": error, "right": error <= TOLERANCE[dtype]}
    if row["right"]:
        device = found.device
        trials = [trial, *(make() for _ in range(sets_for(trial.moved, device) - 1))]
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
