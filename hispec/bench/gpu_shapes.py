"""Decoding of Llama shapes with random weights: what a step costs, against reading its bytes.

Random weights time like trained ones. A shape too large for the card cycles a few distinct layers,
more than any cache holds, so that a step still reads as many bytes as the whole model has.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hispec.bench.gpu_library import decoding_on, fast_passes
from hispec.bench.gpu_timing import Spans
from hispec.model.block import Block
from hispec.model.config import ModelConfig
from hispec.model.gpu import GpuPasses, gpu_passes
from hispec.model.linear import Linear
from hispec.model.llama import Llama, weight_bytes
from hispec.model.nodes import MAX_WIDTH
from hispec.model.passes import Passes
from hispec.planner.acceptance import Acceptance
from hispec.planner.cost_table import TARGET, CostTable, filled
from hispec.planner.shortest_path import Chain, shortest
from hispec.planner.simulator import forecast
from hispec.planner.timing import plain_pass

#: name → V, D, I, L, H, H_kv, D_h, tied, distinct layers
SHAPES = {
    "tiny": (97, 32, 48, 3, 4, 2, 8, True, 3),
    "135M": (49152, 576, 1536, 30, 9, 3, 64, True, 30),
    "1B": (128256, 2048, 8192, 16, 32, 8, 64, True, 16),
    "8B": (128256, 4096, 14336, 32, 32, 8, 128, False, 32),
    "70B": (128256, 8192, 28672, 80, 64, 8, 128, False, 4),
}
WIDTHS = (1, 2, 4, 8, 16, 32)
ACCEPTANCE = (0.4, 0.6, 0.8)


def shape(name: str, positions: int) -> ModelConfig:
    """Returns the sizes of one of ``SHAPES``."""
    vocab, hidden, inner, layers, heads, kv_heads, size, tied, _ = SHAPES[name]
    return ModelConfig(
        *(vocab, hidden, inner, layers, heads, kv_heads, size, 1e-5, positions, tied),
        attention_bias=False,
        mlp_bias=False,
        rope={"rope_type": "default", "rope_theta": 500000.0},
    )


def random_llama(name: str, dtype: torch.dtype, device: torch.device, positions: int) -> Llama:
    """Returns a shape's model with random weights, on the GPU's passes where those run."""
    config = shape(name, positions)
    draw = torch.Generator(device).manual_seed(0)

    def linear(out: int, size: int) -> Linear:
        weight = torch.empty(out, size, dtype=dtype, device=device)
        return Linear(weight.normal_(std=size**-0.5, generator=draw))

    def ones() -> torch.Tensor:
        return torch.ones(config.hidden_size, dtype=dtype, device=device)

    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    distinct = [
        Block(
            ones(),
            linear(heads + 2 * kv, config.hidden_size),
            linear(config.hidden_size, heads),
            ones(),
            linear(2 * config.intermediate_size, config.hidden_size),
            linear(config.hidden_size, config.intermediate_size),
        )
        for _ in range(SHAPES[name][-1])
    ]
    blocks = [distinct[layer % len(distinct)] for layer in range(config.num_layers)]
    words = linear(config.vocab_size, config.hidden_size)
    head = words if config.tie_word_embeddings else linear(config.vocab_size, config.hidden_size)
    model = Llama(config, words, blocks, ones(), head)
    if device.type == "cpu":  # Triton's interpreter, where it is on
        passes, _ = gpu_passes(config, model.rotary, dtype, device, blocks[0], head)
        model.narrow = passes or model.narrow
    return model


class Steps:
    """Times passes of a model behind a context.

    Args:
        model: the model.
        context: positions before the pass.
        repeats: timed calls; the median counts.
    """

    def __init__(self, model: Llama, context: int, repeats: int) -> None:
        self.model, self.context, self.repeats = model, context, repeats
        self._cache = model.new_cache([model.config.num_layers])
        self._kv = self._cache.kv
        self._kv.storage.normal_(std=0.5)

    def ms(self, width: int, start: int, stop: int, *, head: bool) -> float:
        """Returns the time of a pass over ``layers[start:stop]``, with picks where ``head``."""
        model, times = self.model, []
        x = torch.randn(width, model.config.hidden_size, device=model.device)
        for repeat in range(self.repeats + 3):
            started = self._now()
            states = model.run_layers(x, start, stop, self.context, self._kv)
            if head:
                model.logits(states).argmax(-1).tolist()  # sync: as a round ends
            if repeat >= 3 or self.repeats == 1:  # compiled, captured, replayed once
                times.append(self._now() - started)
        return sorted(times)[len(times) // 2] * 1e3

    def plain_ms(self, ways: Sequence[Passes]) -> list[float]:
        """Returns the time of a plain step on each of these passes, which take turns."""
        times: list[list[float]] = [[] for _ in ways]
        for repeat in range(self.repeats + 3):
            for passes, taken in zip(ways, times, strict=True):
                with decoding_on(self.model, passes):
                    started = self._now()
                    self._step()
                    if repeat >= 3 or self.repeats == 1:
                        taken.append(self._now() - started)
        return [sorted(taken)[len(taken) // 2] * 1e3 for taken in times]

    def device_ms(self, passes: Passes) -> float | None:
        """Returns the part of a plain step that the device spends in the graphs of these passes."""
        if not isinstance(passes, GpuPasses):
            return None
        spans = Spans(self.model.device)
        with decoding_on(self.model, passes), passes.graphs.watched(spans.mark):
            for _ in range(self.repeats):
                self._step()
        return spans.seconds() / self.repeats * 1e3

    def _step(self) -> None:
        """What the engine asks of a model for a token of plain decoding."""
        plain_pass(self.model, self.context, self._cache)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def rows_agree(model: Llama) -> dict[str, Any]:
    """Returns whether a pass over a tree's worth of rows has the bits of rows one by one.

    What the passes compute is held against kernels' references elsewhere; here is the whole pass,
    at the model's own sizes. Triton's interpreter multiplies by a library that rounds by shape, so
    without a GPU rows need not be the same bits, only near.
    """
    layers, width = model.config.num_layers, 5
    x = torch.randn(width, model.config.hidden_size, device=model.device)
    together, alone = (model.new_cache([layers], 256).kv for _ in range(2))
    wide = model.run_layers(x, 0, layers, 0, together)
    rows = [model.run_layers(x[at : at + 1], 0, layers, at, alone) for at in range(width)]
    found = model.logits(torch.cat(rows))
    wanted = model.logits(wide)
    bound = 1e-5 if model.dtype == torch.float32 else 2e-2
    near = float((found - wanted).norm() / wanted.norm()) <= bound
    right = torch.equal(found, wanted) if model.device.type == "cuda" else near
    right = right and bool(wanted.isfinite().all())
    return {"right": right, "differ": int((found != wanted).any(-1).sum())}


def step_bytes(model: Llama, context: int) -> int:
    """Returns the bytes a plain step reads: all weights but the embedding's, and the cache."""
    config = model.config
    cells = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return weight_bytes(config, model.dtype, tied=True) + context * cells * model.dtype.itemsize


def plain_rows(
    name: str, model: Llama, context: int, repeats: int, ceiling: float
) -> list[dict[str, Any]]:
    """Returns the rows of plain decoding: exact, then on passes that are fast and not exact.

    ``device_ms`` is what of a step runs in graphs, the rest the host's; ``eager_ms`` the exact step
    kernel by kernel instead. ``cost`` is what exactness takes of a step more than the fastest other
    way does, as a share of that one's.
    """
    steps, narrow = Steps(model, context, repeats), model.narrow
    ways = [narrow, *fast_passes(model)]
    times = steps.plain_ms(ways)
    eager = times[0]
    if isinstance(narrow, GpuPasses):
        with narrow.graphs.kernel_by_kernel():
            (eager,) = steps.plain_ms([narrow])
    floor = step_bytes(model, context) / ceiling / 1e6
    cost = times[0] / min(times[1:]) - 1
    return [
        {
            "shape": name,
            "context": context,
            "passes": passes.name,
            "numerics": "exact" if passes is narrow else "fast",
            "ms": ms,
            "device_ms": steps.device_ms(passes),
            "eager_ms": eager if passes is narrow else None,
            "floor_ms": floor,
            "ratio": floor / ms,
            "tok_per_s": 1e3 / ms,
            "cost": cost if passes is narrow else None,
        }
        for passes, ms in zip(ways, times, strict=True)
    ]


def curve_rows(name: str, model: Llama, context: int, repeats: int) -> list[dict[str, Any]]:
    """Returns measured passes by range and width, and what the planner makes of them.

    Exits at an eighth and a quarter, with the model's own head; acceptance is the same at every
    level, and synthetic. The last way is the fastest that the planner finds.
    """
    layers, steps = model.config.num_layers, Steps(model, context, repeats)
    low, middle = max(1, layers // 8), max(2, layers // 4)
    widths = WIDTHS if repeats > 1 else WIDTHS[:2]
    passes: dict[tuple[int, int], dict[int, float]] = {}
    for start, stop in ((0, low), (low, middle), (low, layers), (middle, layers), (0, layers)):
        passes[start, stop] = {width: steps.ms(width, start, stop, head=True) for width in widths}
    rows: list[dict[str, Any]] = [
        {"shape": name, "layers": list(part), "width": width, "ms": ms}
        for part, times in passes.items()
        for width, ms in times.items()
    ]
    costs = table_of(passes[0, low], passes[0, layers], low, middle, layers)
    exits = f"exit {low}", f"exit {middle}"
    ways: dict[str, Chain] = {
        "layerskip 4": ((exits[0], 4),),
        "hispec 2/4": ((exits[0], 2), (exits[1], 4)),
    }
    for rate in ACCEPTANCE:
        edges = (exits, (exits[0], TARGET), (exits[1], TARGET))
        acceptance = Acceptance.constant(dict.fromkeys(edges, rate))
        best = shortest(costs, acceptance, exits)[0].chain
        for way, chain in (*ways.items(), ("planned", best)):
            speedup = forecast(chain, costs, acceptance).speedup
            row = {"shape": name, "way": way, "acceptance": rate, "speedup": speedup}
            rows.append({**row, "chain": " → ".join(f"{x} by {n}" for x, n in chain) or "plain"})
    return rows


def table_of(
    few: Mapping[int, float], whole: Mapping[int, float], low: int, middle: int, layers: int
) -> CostTable:
    """Returns the planner's table, in milliseconds, from passes that end with the head.

    Args:
        few: through ``layers[:low]``, by rows, 1 among them; wider ones cost what the widest does.
        whole: through all, likewise.
        low: the first exit.
        middle: the second.
        layers: L.
    """
    least, most = (filled({**x, MAX_WIDTH: x[max(x)]}) for x in (few, whole))
    each = [max(b - a, 0.0) / (layers - low) for a, b in zip(least, most, strict=True)]
    # What is no layer: the head, and what a pass costs however short.
    head = [max(time - layers * one, 0.0) for time, one in zip(most, each, strict=True)]
    depths = {f"exit {low}": low, f"exit {middle}": middle, TARGET: layers}
    return CostTable(depths, [0.0] * len(each), each, dict.fromkeys(depths, head))
