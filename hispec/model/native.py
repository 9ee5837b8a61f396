"""The compiled way of running blocks on a CPU: one call for any range of layers.

``hispec_kernels/cpu/passes.c`` does the arithmetic; here are the addresses it works on. Weights and
cache have the model's dtype, states are fp32 between calls, so that stopping at an exit and going
on rounds nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig
from hispec.model.linear import Layout, Linear
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Lift, Rotary, Token, Words
from hispec.model.records import Answers, Table, shape_of, taps_of, tree_of
from hispec.model.store import cache_dir
from hispec_kernels import cpu


def native_library(
    config: ModelConfig | None, dtype: torch.dtype, device: torch.device
) -> tuple[ctypes.CDLL | None, str]:
    """Returns the compiled library for such a model (any, if None), or None and why not."""
    if device.type != "cpu":
        with suppress(cpu.BuildError):  # for the databases, which are the host's everywhere
            _library()
        return None, "the compiled passes are for CPUs"
    if dtype not in (torch.bfloat16, torch.float32):
        return None, f"the compiled passes do not cover {dtype}"
    if config is not None:
        group = config.num_heads // config.num_kv_heads
        if not cpu.covers(config.hidden_size, config.intermediate_size, config.head_dim, group):
            return None, "the compiled passes cover sizes that are multiples of 32"
    try:
        return _library(), ""
    except cpu.BuildError as error:
        return None, str(error)


@functools.cache
def _library() -> ctypes.CDLL:
    if os.environ.get("HISPEC_NATIVE", "1") == "0":
        raise cpu.BuildError("HISPEC_NATIVE=0")
    library = cpu.load_library(cache_dir() / "native")
    cpu.use(library)
    return library


class NativePasses:
    """Blocks run by the compiled library.

    A row's bits do not depend on its company; ``passes.c`` says why.

    Args:
        config: the model's sizes.
        rotary: its positions.
        dtype: of weights and cache, bf16 or fp32.
        library: from :func:`native_library`.
    """

    name = "compiled"
    state_dtype = torch.float32
    min_width = 1
    asynchronous = False
    prepared = 0

    def __init__(
        self, config: ModelConfig, rotary: Rotary, dtype: torch.dtype, library: ctypes.CDLL
    ) -> None:
        self._config = config
        self._rotary = rotary
        #: Tells this library from others, as their passes take different times.
        self.build = Path(library._name).stem
        #: Of weights, and so of keys and values.
        self.layout: Layout = (
            cpu.LAYOUTS[library.bf16_layout()] if dtype == torch.bfloat16 else "plain"
        )
        #: Of weights that only draft.
        self.draft_layout: Layout = "bytes" if self.layout == "pairs" else self.layout
        kind = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        # By whether weights are bytes.
        kinds = {False: kind, True: "bytes"} if self.layout == "pairs" else {False: kind}
        self._run = {key: getattr(library, f"run_layers_{x}") for key, x in kinds.items()}
        self._project = {key: getattr(library, f"project_{x}") for key, x in kinds.items()}
        self._draft = {key: getattr(library, f"draft_{x}") for key, x in kinds.items()}
        self._best = {key: getattr(library, f"project_best_{x}") for key, x in kinds.items()}
        self._embed = getattr(library, f"embed_{kind}")
        self._store = getattr(library, f"store_rows_{kind}")
        self._move = getattr(library, f"move_slots_{kind}")
        self._scratch = torch.empty(0)
        self._answers = Answers()
        # A cache's layers as the library wants them; the fp32 norms live as long as the table.
        self._tables: weakref.WeakKeyDictionary[KVCache, Table] = weakref.WeakKeyDictionary()
        self._norms: dict[int, tuple[Tensor, Tensor]] = {}

    def run(
        self,
        blocks: Sequence[Block],
        x: Tensor,
        position: int,
        kv: KVCache,
        first: int,
        nodes: Nodes | None = None,
    ) -> Tensor:
        """See :class:`~hispec.model.passes.Passes`."""
        x = x.to(torch.float32, copy=True).contiguous()  # the library works in place
        self._call(blocks, x.data_ptr(), len(x), kv, first, position=position, nodes=nodes)
        return x

    def lift(self, lift: Lift) -> None:
        """See :class:`~hispec.model.passes.Passes`.

        By addresses: the weights have driven torch's own code from the caches, and a slice of a
        tensor takes 0.03 ms here, of a pass of 12.
        """
        blocks, source, targets, position, width, kv, first, nodes = lift
        target = targets[-1][1]
        assert target.dtype == torch.float32 and position + width <= len(target)
        at, size = 4 * position * self._config.hidden_size, 4 * width * self._config.hidden_size
        x = target.data_ptr() + at
        if isinstance(source, Words):
            self._embed_at(source, x)
        elif source is not target:
            ctypes.memmove(x, source.data_ptr() + at, size)
        if blocks:
            taps = taps_of(targets, at)
            self._call(blocks, x, width, kv, first, position=position, nodes=nodes, taps=taps)

    def run_texts(
        self,
        blocks: Sequence[Block],
        x: Tensor,
        positions: Tensor,
        starts: Tensor,
        kv: KVCache,
        first: int = 0,
    ) -> Tensor:
        """Returns the states after ``blocks`` of one new token of each of several texts.

        Args:
            blocks: consecutive ones.
            x: (B, D).
            positions: (B,) int64, each token's place in its text.
            starts: (B,) int64, the cache position at which its text begins, a multiple of 128.
            kv: knows the texts' keys and values at ``starts + 0 … positions - 1``.
            first: the first block's layer in ``kv``.
        """
        rows = torch.stack([positions, starts * self._config.head_dim], -1).contiguous()
        x = x.to(torch.float32, copy=True).contiguous()  # the library works in place
        self._call(blocks, x.data_ptr(), len(x), kv, first, rows=rows.data_ptr())
        return x

    def _call(
        self,
        blocks: Sequence[Block],
        x: int,
        width: int,
        kv: KVCache,
        first: int,
        *,
        position: int = 0,
        rows: int | None = None,
        nodes: Nodes | None = None,
        taps: ctypes.Array[ctypes.c_void_p] | None = None,
    ) -> None:
        """Runs blocks in place over the (W, D) fp32 at the address ``x``; see ``passes.inc.h``."""
        bent = nodes is not None and not nodes.straight(position + width - nodes.root)
        tree = tree_of(nodes) if bent and nodes else None
        table, threads = self._table(kv), torch.get_num_threads()
        scratch = self._room(self._layers_room(width, threads))
        self._run[blocks[0].qkv.layout == "bytes"](
            table.layers(blocks, first),
            len(blocks),
            table.shape,
            x,
            taps,
            width,
            position,
            rows,
            tree,
            self._rotary.cos.data_ptr(),
            self._rotary.sin.data_ptr(),
            scratch,
            threads,
        )

    def embed(self, linear: Linear, tokens: Sequence[Token]) -> Tensor:
        """See :class:`~hispec.model.passes.Passes`; the result is fp32, no id is a tensor."""
        out = torch.empty(len(tokens), self._config.hidden_size)
        self._embed_at(Words(linear, tokens), out.data_ptr())
        return out

    def _embed_at(self, words: Words, out: int) -> None:
        linear, tokens = words
        if min(tokens) < 0 or max(tokens) >= linear.rows:
            raise IndexError(f"token ids must be in [0, {linear.rows - 1}]")
        ids = (ctypes.c_int64 * len(tokens))(*map(int, tokens))
        size = self._config.hidden_size
        step = {"tiles": 32, "pairs": 2}.get(linear.layout, size)
        self._embed(linear.weight.data_ptr(), size, step, ids, len(ids), out)

    def store(self, projected: Tensor, position: int, kv: KVCache, layer: int) -> None:
        """See :class:`~hispec.model.passes.Passes`."""
        projected = projected.to(torch.float32).contiguous()
        self._store(
            kv.keys[layer].data_ptr(),
            kv.values[layer].data_ptr(),
            self._table(kv).shape,
            projected.data_ptr(),
            len(projected),
            position,
            self._rotary.cos.data_ptr(),
            self._rotary.sin.data_ptr(),
        )

    def move(self, kv: KVCache, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See :class:`~hispec.model.passes.Passes`."""
        assert len(sources) == len(targets) <= MAX_WIDTH, "a tree has at most MAX_WIDTH nodes"
        places = np.array([*sources, *targets], np.int64).reshape(2, -1)
        self._move(
            kv.storage.data_ptr(),
            len(kv.keys),
            self._table(kv).shape,
            places[0].ctypes.data,
            places[1].ctypes.data,
            places.shape[1],
            torch.get_num_threads(),
        )

    def project(self, linear: Linear, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """See :class:`Passes`; the result is fp32."""
        width, size = x.shape
        rows = linear.rows
        x = x.to(torch.float32).contiguous()
        out = torch.empty(width, rows)
        threads = torch.get_num_threads()
        norm_pointer = None if norm is None else self._wide(norm).data_ptr()
        bias = None if linear.bias is None else self._wide(linear.bias).data_ptr()
        self._project[linear.layout == "bytes"](
            linear.weight.data_ptr(),
            None if linear.scale is None else linear.scale.data_ptr(),
            bias,
            rows,
            size,
            norm_pointer,
            self._config.rms_norm_eps,
            x.data_ptr(),
            width,
            out.data_ptr(),
            self._room(threads * (width + 16) * size),
            threads,
        )
        return out

    def best(
        self, linear: Linear, x: Tensor, norm: Tensor, asked: Asked, ids: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """See :class:`Passes`; None where noise ranks the ids."""
        if asked.seed is not None:
            return None
        width, size = x.shape
        rows, threads = linear.rows, torch.get_num_threads()
        k = min(asked.k, rows)
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.to(torch.float32).contiguous()
        found, odds = self._answers[width, k]
        # Logits live in memory that is used again: fresh pages cost as much as finding the best.
        room = self._room(width * (rows + 2 + rows // 64) + threads * (width + 16) * size + 16)
        scratch = room + 4 * width * (rows + 2 + rows // 64)
        self._best[linear.layout == "bytes"](
            linear.weight.data_ptr(),
            None if linear.scale is None else linear.scale.data_ptr(),
            rows,
            size,
            self._wide(norm).data_ptr(),
            self._config.rms_norm_eps,
            x.data_ptr(),
            width,
            k,
            asked.temperature if asked.odds else 0.0,
            None if ids is None else ids.data_ptr(),
            found.data_ptr(),
            odds.data_ptr(),
            room,
            scratch + (-scratch) % 64,
            threads,
        )
        return found, odds

    def draft(
        self,
        head: cpu.Head,
        shape: cpu.Shape,
        place: cpu.Place,
        nodes: Nodes,
        asked: Asked,
        *,
        rows: int,
        late: int,
        bytes_: bool,
    ) -> tuple[Tensor, Tensor]:
        """Returns a trained head's best ids and their odds, (T, k) each; see ``draft.inc.h``.

        Args:
            head: its weights.
            shape: the model's, with the strides of the head's own cache.
            place: what to work on.
            nodes: the round's tree.
            asked: what of it, without noise.
            rows: slots the block has not seen.
            late: positions that have become final.
            bytes_: whether the weights are bytes.
        """
        config, threads = self._config, torch.get_num_threads()
        width, columns = place.end - place.first, head.columns
        k = min(asked.k, columns)
        found, odds = self._answers[width, k]
        kv = 4 * late * config.num_kv_heads * config.head_dim
        parts = (
            width * (columns + 2 + columns // 64),
            max(rows, late) * config.hidden_size + kv,
            max(
                self._layers_room(rows, threads),
                threads * (max(rows, late) + 16) * config.hidden_size,
            ),
        )
        aligned = [-(-part // 16) * 16 for part in parts]
        room = self._room(sum(aligned))
        tree = tree_of(nodes)
        self._draft[bytes_](
            head,
            shape,
            place,
            tree,
            None if nodes.straight(place.end - nodes.root) else tree,
            self._rotary.cos.data_ptr(),
            self._rotary.sin.data_ptr(),
            k,
            asked.temperature,
            found.data_ptr(),
            odds.data_ptr(),
            room,
            room + 4 * aligned[0],
            room + 4 * (aligned[0] + aligned[1]),
            threads,
        )
        return found, odds

    def shape(self, kv: KVCache | None) -> cpu.Shape:
        """Returns the model's sizes with the strides of a cache, if there is one."""
        return shape_of(self._config, 0 if kv is None else kv.keys[0].stride(0))

    def record(self, block: Block, kv: KVCache) -> cpu.Layer:
        """Returns the addresses of a block that uses the only layer of a cache."""
        table = self._table(kv)
        table.layers([block], 0)
        return table.first

    def _layers_room(self, width: int, threads: int) -> int:
        """Floats of scratch memory that running layers takes."""
        config = self._config
        per_row = (2 * (config.num_heads + config.num_kv_heads)) * config.head_dim
        per_row += config.intermediate_size + threads * config.hidden_size
        return (width + 16) * per_row

    def _table(self, kv: KVCache) -> Table:
        table = self._tables.get(kv)
        return table or self._tables.setdefault(kv, Table(self._config, kv))

    def _wide(self, vector: Tensor) -> Tensor:
        """The fp32 copy of a small weight, made once."""
        kept = self._norms.get(id(vector))
        if kept is None:
            kept = self._norms[id(vector)] = (vector, vector.float().contiguous())
        return kept[1]

    def _room(self, floats: int) -> int:
        """The address of at least that much scratch memory, aligned to a cache line."""
        if self._scratch.numel() < floats + 16:
            self._scratch = torch.empty(floats + 16)
        address = self._scratch.data_ptr()
        return address + (-address) % 64
