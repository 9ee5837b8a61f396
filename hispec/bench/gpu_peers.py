"""Others' kernels for the work of ours, on the same inputs and against the same floors.

torch's are always there. Liger's Triton kernels (https://github.com/linkedin/Liger-Kernel) are
timed where they are installed (``pip install --no-deps liger-kernel``). They are held against the
references, too; one that does not run here has a row that says why. What none of them does, trees
and noise, has no row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hispec.bench.gpu_kernels import Trial, measure
from hispec.bench.gpu_picks import Picks
from hispec_kernels import swiglu

_EPS = 1e-5


class Peers(Picks):
    """What others do of a round; see :class:`~hispec.bench.gpu_kernels.Cases`."""

    def mm(self, out: int, size: int) -> Trial:
        """A product, whose result is rounded to the dtype."""
        w, x = self.noise(out, size) / size**0.5, self.noise(self.rows, size)
        y, n = self.poison(self.rows, out), self.width
        return Trial(
            lambda: torch.mm(x, w.T, out=y),
            lambda: y[:n],
            lambda: x[:n].double() @ w.double().T,
            w.nbytes + x[:n].nbytes + y[:n].nbytes,
        )

    def gated(self, gate: Callable[[Tensor, Tensor], Tensor], products: int) -> Trial:
        """Gate and up in one product or in two, behind them SwiGLU."""
        out, size = self.matrices()["gate_up"]
        w, x = self.noise(out, size) / size**0.5, self.noise(self.width, size)
        parts, kept = w.chunk(products), list[Tensor]()
        wide = [self.poison(self.width, len(part)) for part in parts]

        def run() -> None:
            for part, y in zip(parts, wide, strict=True):
                torch.mm(x, part.T, out=y)
            kept[:] = [gate(*(wide if products == 2 else wide[0].chunk(2, -1)))]

        return Trial(
            run,
            lambda: kept[0],
            lambda: swiglu(x.double() @ w.double().T),
            w.nbytes + x.nbytes + x.shape[0] * out // 2 * self.dtype.itemsize,
        )

    def normed(self, norm: Callable[[Tensor, Tensor], Tensor]) -> Trial:
        """RMSNorm of states in the dtype; ours are fp32, so these move fewer bytes."""
        size = self.config.hidden_size
        x, weight, kept = self.noise(self.width, size), self.noise(size), list[Tensor]()

        def run() -> None:
            kept[:] = [norm(x, weight)]

        return Trial(
            run,
            lambda: kept[0],
            lambda: F.rms_norm(x.double(), (size,), weight.double(), _EPS),
            2 * x.nbytes + weight.nbytes,
        )

    def sdpa(self) -> Trial:
        """Attention: the heads that share keys are rows, and so a chain's rows need a mask."""
        queries, keys, values = self.past()
        n, kv_heads = self.width, self.config.num_kv_heads
        # (1, H_kv, W G, D_h): torch's fused kernels want four dimensions.
        packed = queries[:n].unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)[None]
        group = packed.shape[2] // n
        mask = None if n == 1 else self.looks(tree=False).repeat_interleave(group, 0)
        kept: list[Tensor] = []

        def run() -> None:
            kept[:] = [F.scaled_dot_product_attention(packed, keys[None], values[None], mask)]

        return Trial(
            run,
            lambda: kept[0][0].unflatten(1, (n, group)).transpose(0, 1).flatten(1, 2),
            lambda: self.attended(queries, keys, values, tree=False),
            keys.nbytes + values.nbytes + 2 * packed.nbytes,
        )

    def all(self) -> Iterator[tuple[str, Callable[[], Trial]]]:
        """Yields every kernel's name and what makes a trial of it."""
        for name, (out, size) in self.matrices().items():
            yield f"torch.mm {name}", partial(self.mm, out, size)
        yield "torch.mm, silu, mul", partial(self.gated, lambda gate, up: F.silu(gate) * up, 1)
        yield "torch rms_norm", partial(self.normed, _torch_norm)
        yield "torch sdpa", self.sdpa
        if importlib.util.find_spec("liger_kernel"):
            yield "torch.mm, liger swiglu", partial(self.gated, _liger_gate, 2)
            yield "liger rms_norm", partial(self.normed, _liger_norm)


def measure_peer(make: Callable[[], Trial], dtype: torch.dtype, ceiling: float) -> dict[str, Any]:
    """Does what :func:`~hispec.bench.gpu_kernels.measure` does, or says why the kernel fails."""
    try:
        return measure(make, dtype, ceiling)
    except Exception as error:  # others' code, which may not be made for this device
        return {"error": None, "right": None, "why": (str(error).splitlines() or [""])[0]}


def _torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, _EPS)


def _liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    # y, x, 1 / rms, and how the kernel was cut
    found: Tensor = rms_norm_forward(x, weight, _EPS, 0.0, "llama", None)[0]
    return found


def _liger_gate(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import swiglu_forward

    found: Tensor = swiglu_forward(gate, up)[2]  # behind its inputs
    return found
