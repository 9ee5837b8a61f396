"""The kernels behind a model's blocks: heads, noise, ranking, and what a round does with its tree.

And a plain step put together from all of them: what each kernel loses against its floor, and what
none of them accounts for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hispec.bench.gpu_kernels import Cases, Trial, measure
from hispec.drafter import RANKS, SHOWN
from hispec_kernels import compact as reference_compact
from hispec_kernels import exit_head as reference_head
from hispec_kernels.follow import follow as reference_follow
from hispec_kernels.noise import noisy as reference_noisy
from hispec_kernels.noise import seeded_state
from hispec_kernels.top_k import _top_k as reference_top_k

#: A trained head's vocabulary, and its maps of distances from the root.
REDUCED, MAPS = 8192, 4
#: A step's time over its floor below which its kernels are listed.
LISTED = 0.85


class Picks(Cases):
    """All kernels of a round; see :class:`~hispec.bench.gpu_kernels.Cases`."""

    def exit_head(self, k: int, *, seed: int | None = None, reduced: bool = False) -> Trial:
        """A head down to its best ids; compared by their odds, and by the odds of those ids.

        Args:
            k: how many ids a row.
            seed: of the noise that ranks them; None is without.
            reduced: over the frequent ids alone.
        """
        from hispec_kernels.gpu.exit_head import best

        vocab, size = self.matrices()["head"]
        n, warm = self.width, torch.ones(1, device=self.device)
        out = min(vocab // 2, REDUCED) if reduced else vocab
        ids = torch.arange(out, device=self.device) * 2 + 1 if reduced else None
        w, x = self.noise(out, size) / size**0.5, self.noise(self.rows, size)
        places = torch.arange(self.rows, device=self.device)
        sampling = None
        if seed is not None:
            sampling = torch.tensor([seeded_state(seed), *range(self.rows)], device=self.device)
        kept: list[Tensor] = []

        def run() -> None:
            kept[:] = best(x, w, self.count, k, warm, sampling, ids, rows=n)

        def wanted() -> Tensor:
            logits = (x[:n].double() @ w.double().T).float()
            odds = reference_head.best(logits, k, 1.0, seed, places[:n], ids)[1]
            columns = kept[0][:n] if ids is None else (kept[0][:n] - 1) // 2
            named = logits.softmax(-1).gather(-1, columns.clamp(0, out - 1))
            return torch.cat([odds, named], 1)

        return Trial(run, lambda: torch.cat([kept[1][:n]] * 2, 1), wanted, w.nbytes + x[:n].nbytes)

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

    def top_k(self) -> Trial:
        """The likeliest ids of rows of logits, of which many are equal."""
        from hispec_kernels.gpu.top_k import top_k

        logits = self.noise(self.width, self.config.vocab_size, dtype=torch.float32)
        logits = (logits * 8).round() / 8
        kept: list[Tensor] = []

        def run() -> None:
            kept[:] = top_k(logits, SHOWN)

        def wanted() -> Tensor:
            return torch.cat([x.double() for x in reference_top_k(logits, SHOWN)])

        moved = logits.nbytes + self.width * SHOWN * 12
        return Trial(run, lambda: torch.cat([x.double() for x in kept]), wanted, moved, True)

    def follow(self) -> Trial:
        """The walk down a tree whose every pick is the first of two children."""
        from hispec_kernels.gpu.follow import follow

        parents = torch.tensor(self.nodes.parents, device=self.device)
        tokens = torch.arange(self.width, device=self.device) + 7
        picks = torch.arange(self.width, device=self.device) * 2 + 8  # the token of node 2 i + 1
        kept: list[Tensor] = []

        def run() -> None:
            kept[:] = follow(tokens, parents, picks)

        def wanted() -> Tensor:
            path, token = reference_follow(*(x.cpu() for x in (tokens, parents, picks)))
            return torch.cat([path, torch.tensor([len(path), token])]).to(self.device)

        def found() -> Tensor:
            path, end = kept
            return torch.cat([path[: min(int(end[0]), self.width)], end])

        return Trial(run, found, wanted, 4 * tokens.nbytes + 16, True)

    def compact(self) -> Trial:
        """Every other node of a tree goes; the slots they leave are filled in all layers."""
        from hispec_kernels.gpu.compact import compact

        c, n, at = self.config, self.width, self.context
        cells = self.noise(c.num_layers, 2, c.num_kv_heads, at + n, c.head_dim)
        kept = list(range(0, n, 2))[1:]
        moves = np.array([[at + node for node in kept], range(at + 1, at + 1 + len(kept))])
        sources, targets = torch.from_numpy(moves).to(self.device)
        count = torch.tensor([len(kept)], device=self.device)
        before = cells[..., at - 1 :, :].clone()

        def wanted() -> Tensor:
            moved = before.clone()
            reference_compact(moved, sources - at + 1, targets - at + 1)
            return moved

        return Trial(
            lambda: compact(cells, sources, targets, count),
            lambda: cells[..., at - 1 :, :],
            wanted,
            2 * len(kept) * (cells.nbytes // (at + n)),
            exact=True,
            held=cells.nbytes,
        )

    def all(self) -> Iterator[tuple[str, Callable[[], Trial]]]:
        """Yields every kernel's name and what makes a trial of it."""
        yield from super().all()
        size, kv = self.config.hidden_size, self.config.num_kv_heads * self.config.head_dim
        yield "product of a trained head + bias", partial(self.product, size, size, bias=True)
        yield "product of its feature", partial(self.product, MAPS * size, size)
        yield "product of its context", partial(self.product, 2 * kv, size)
        yield "exit_head of it", partial(self.exit_head, RANKS, reduced=True)
        yield "exit_head of it, noise", partial(self.exit_head, RANKS, seed=7, reduced=True)
        yield "exit_head", partial(self.exit_head, SHOWN)
        yield "exit_head, noise", partial(self.exit_head, RANKS, seed=7)
        yield "noisy", self.noisy
        yield "top_k", self.top_k
        yield "follow", self.follow
        if self.width > 2:
            yield "compact", self.compact

    def step(self) -> Iterator[tuple[str, int, Callable[[], Trial]]]:
        """Yields the kernels of a plain step: name, how often it runs, what makes a trial of it."""
        layers, sizes = self.config.num_layers, self.matrices()
        yield "embed_rows", 1, self.embed_rows
        yield "store_rows", 1, partial(self.copy_rows, load=False)
        yield "rms_norm", layers + 1, self.add_rms_norm
        yield "product qkv", layers, partial(self.product, *sizes["qkv"])
        yield "rope_write", layers, self.rope_write
        yield "attention", layers, self.attention
        yield "product output", layers, partial(self.product, *sizes["output"])
        yield "add_rms_norm", layers, partial(self.add_rms_norm, add=True)
        yield "gated_product", layers, self.gated_product
        yield "product down + x", layers, self.residual_product
        yield "exit_head", 1, partial(self.exit_head, SHOWN)


def step_rows(cases: Picks, step_ms: float, ceiling: float) -> list[dict[str, Any]]:
    """Returns where a plain step's time goes, what loses most against its floor first.

    Each kernel is timed by itself, as often as a step runs it. The last row is what they do not
    account for: gaps between kernels, copies, the host's launching and its look at the pick, and
    programs that a graph starts for rows and splits which one row at this place does not need.

    Args:
        cases: of width 1.
        step_ms: the measured step.
        ceiling: GB/s of the copy.
    """
    assert cases.width == 1, "a plain step has one row"
    rows: list[dict[str, Any]] = []
    for name, times, make in cases.step():
        found = measure(make, cases.dtype, ceiling)
        if not found["right"]:
            rows.append({"op": name, "times": times, "right": False})
            continue
        ms, floor = times * found["ms"], times * found["floor_ms"]
        rows.append({"op": name, "times": times, "ms": ms, "floor_ms": floor})
    rest = step_ms - sum(row.get("ms", 0.0) for row in rows)
    rows.append({"op": "all else", "times": 1, "ms": rest, "floor_ms": 0.0})
    for row in rows:
        if "ms" in row:
            row["ratio"] = row["floor_ms"] / row["ms"] if row["ms"] > 0 else None
            row["lost_ms"] = row["ms"] - row["floor_ms"]
            row["share"] = row["ms"] / step_ms
    *ops, other = rows
    return [*sorted(ops, key=lambda row: -row.get("lost_ms", float("inf"))), other]
