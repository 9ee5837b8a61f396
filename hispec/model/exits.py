"""Exit heads: from the states after ``layers[0:e]`` to logits, and the folder they are kept in.

A head is at most four steps, each left out where its tensors are missing:

    u = states after layer e                    (T, D)
    x = proj u + bias                           an affine map
    x = block(x)                                one Llama block with keys and values of its own
    logits = rms(x, norm) head[vocab_ids]ᵀ      the model's own head, all rows or the frequent ones

A checkpoint trained the LayerSkip way needs none of them: ``SharedHead`` is norm and head as they
are. A head with a block keeps its keys and values under the cache's positions and catches up, when
it is next asked, on the positions that passed its exit without it.

*Deep context.* Positions p before the root r have been through the whole model, so their final
states h_L(p) are known, and with them what the target has concluded about the past. A block trained
for it reads them twice: as keys and values, and as a feature of the last of them that every row
receives through the map of its distance from the root.

    k(p), v(p) = W_kv rms(proj u(p)) + C_kv rms(h_L(p))                           p < r
    x(t) = proj u(t) + bias + F_j rms(h_L(r − 1))                      t ≥ r, j = min(t − r, K − 1)

Heads only draft: nothing they compute reaches the output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hispec.errors import CheckpointError, UsageError
from hispec.hierarchy import Hierarchy
from hispec.model.block import Block, read_block
from hispec.model.cache import Cache, KVCache
from hispec.model.checkpoint import Checkpoint
from hispec.model.linear import Linear
from hispec.model.llama import PREFILL_CHUNK, Llama
from hispec.model.passes import MAX_WIDTH, Passes
from hispec.model.tensorfile import TensorFile
from hispec_kernels import rms_norm

FORMAT = "hispec-exits"


class ExitHead(Protocol):
    """What the engine asks of a head.

    Attributes:
        exit_layer: e.
        vocab_ids: (V_r,) ids of the logits' columns, or None where the columns are the ids.
    """

    exit_layer: int
    vocab_ids: Tensor | None

    def logits(self, cache: Cache, first: int, root: int) -> Tensor:
        """Returns logits after the positions ``first`` … ``cache.computed[exit_layer] - 1``.

        Args:
            cache: holds this exit's states.
            first: absolute position of the first row wanted.
            root: absolute position of the round's root; positions before it are final.

        Returns:
            (T, V) or (T, V_r).
        """
        ...

    def truncate(self, length: int) -> None:
        """Forgets what the head itself stored at and past ``length``."""
        ...


class SharedHead:
    """The model's own norm and vocabulary head at an exit (LayerSkip)."""

    vocab_ids: Tensor | None = None

    def __init__(self, model: Llama, exit_layer: int) -> None:
        self.model = model
        self.exit_layer = exit_layer

    def logits(self, cache: Cache, first: int, root: int) -> Tensor:
        """See :class:`ExitHead`."""
        return self.model.logits(
            cache.states[self.exit_layer][first : cache.computed[self.exit_layer]]
        )

    def truncate(self, length: int) -> None:
        """Nothing is stored."""


class TrainedHead:
    """A head with weights of its own; see the module's text for the mathematics.

    Args:
        model: the model whose exit it is.
        exit_layer: e.
        tensors: by the names of the exits folder.
        head_rows: returns rows of the model's vocabulary head, (V_r, D), by id.
    """

    def __init__(
        self,
        model: Llama,
        exit_layer: int,
        tensors: Mapping[str, Tensor],
        head_rows: Callable[[Tensor], Tensor],
    ) -> None:
        self.model = model
        self.exit_layer = exit_layer

        def read(name: str) -> Tensor:
            return tensors[name].to(device=model.device, dtype=model.dtype)

        def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
            return Linear(weight, bias, model.layout)

        self.proj: Linear | None = None
        if "proj.weight" in tensors:
            bias = read("proj.bias") if "proj.bias" in tensors else None
            self.proj = linear(read("proj.weight"), bias)
        self.norm = read("norm.weight") if "norm.weight" in tensors else model.norm
        self.vocab_ids: Tensor | None = None
        self.head = model.head
        if "vocab_ids" in tensors:
            self.vocab_ids = tensors["vocab_ids"].to(device=model.device, dtype=torch.int64)
            self.head = linear(head_rows(self.vocab_ids))
        self.block: Block | None = None
        self.context: Linear | None = None  # final states → keys and values
        self.kv: KVCache | None = None
        self.known = 0  # positions in kv
        self.final = 0  # of these, leading ones made from final states
        if "block.self_attn.q_proj.weight" in tensors:
            config = replace(  # with the block's own biases, whatever the model's layers have
                model.config,
                attention_bias="block.self_attn.q_proj.bias" in tensors,
                mlp_bias="block.mlp.gate_proj.bias" in tensors,
            )
            self.block = read_block(read, "block.", config, model.layout)
            if "block.context_k_proj.weight" in tensors:
                pairs = (
                    torch.cat([read(f"block.self_attn.{x}_proj.weight") for x in "kv"]),
                    torch.cat([read(f"block.context_{x}_proj.weight") for x in "kv"]),
                )
                self.context = linear(torch.cat(pairs, dim=1))  # 2 D → 2 H_kv D_h
                self.context_norm = read("block.context_layernorm.weight")
        self.feature: Linear | None = None
        if "feature_proj.weight" in tensors:
            self.feature = linear(read("feature_proj.weight"))
            self.feature_norm = read("feature_layernorm.weight")
        self._feature_of: tuple[int, Tensor] = (-1, torch.empty(0))  # a root and what it receives

    def logits(self, cache: Cache, first: int, root: int) -> Tensor:
        """See :class:`ExitHead`. A block first catches up on what it has not seen."""
        states = cache.states[self.exit_layer]
        end = cache.computed[self.exit_layer]
        self._receive(cache, root)
        if self.block is None:
            x = self._enter(states[first:end], first)
        else:
            x = self._through_block(cache, states, first, end, root)
        return self.model.narrow.project(self.head, x, self.norm)

    def truncate(self, length: int) -> None:
        """See :class:`ExitHead`."""
        self.known = min(self.known, length)
        self.final = min(self.final, length)
        if self._feature_of[0] > length:
            self._feature_of = (-1, torch.empty(0))

    def _passes(self, rows: int) -> Passes:
        return self.model.narrow if rows <= MAX_WIDTH else self.model.wide

    def _project(self, u: Tensor) -> Tensor:
        return u if self.proj is None else self._passes(u.shape[0]).project(self.proj, u)

    def _receive(self, cache: Cache, root: int) -> None:
        """Fetches the round's feature, once a root."""
        if self.feature is not None and self._feature_of[0] != root:
            deep = cache.states[self.model.config.num_layers][root - 1 : root]
            rows = self.model.narrow.project(self.feature, deep, self.feature_norm)  # (1, K D)
            self._feature_of = (root, rows.view(-1, deep.shape[1]))

    def _enter(self, u: Tensor, position: int) -> Tensor:
        """The block's input at ``position`` and after, none before the root."""
        x = self._project(u)
        if self.feature is None:
            return x
        root, rows = self._feature_of
        offsets = torch.arange(position - root, position - root + len(x), device=x.device)
        return x + rows[offsets.clamp(0, len(rows) - 1)]

    def _through_block(
        self, cache: Cache, states: Tensor, first: int, end: int, root: int
    ) -> Tensor:
        """Returns the block's output at ``first`` … ``end - 1``, its KV complete up to ``end``."""
        if self.kv is None:
            model, config = self.model, self.model.config
            self.kv = KVCache(
                1, config.num_kv_heads, config.head_dim, model.capacity, model.dtype, model.device
            )
        if self.context is not None:
            final = min(root, cache.length)
            if self.final < final:
                self._write_context(cache, self.final, final)
                self.final = final
        start = min(max(self.known, self.final), first)
        while end - start > PREFILL_CHUNK:  # a prompt it has not seen
            stop = min(first, start + PREFILL_CHUNK)
            self._run_block(states[start:stop], start)
            start = stop
        x = self._run_block(states[start:end], start)
        self.known = end
        return x[first - start :]

    def _run_block(self, u: Tensor, position: int) -> Tensor:
        assert self.block is not None and self.kv is not None
        return self._passes(u.shape[0]).run(
            [self.block], self._enter(u, position), position, self.kv, 0
        )

    def _write_context(self, cache: Cache, start: int, end: int) -> None:
        """After the call keys and values at ``start`` … ``end - 1`` are those of final states."""
        assert self.context and self.kv and self.block
        model, eps = self.model, self.model.config.rms_norm_eps
        shallow = self._project(cache.states[self.exit_layer][start:end])
        deep = cache.states[model.config.num_layers][start:end]
        both = [
            rms_norm(x.float(), norm.float(), eps)
            for x, norm in ((shallow, self.block.attention_norm), (deep, self.context_norm))
        ]
        kv = self._passes(end - start).project(self.context, torch.cat(both, -1))
        model.narrow.store(kv, start, self.kv, 0)


@dataclass(frozen=True)
class Exits:
    """A folder of trained exits: what its ``config.json`` says.

    Attributes:
        path: the folder.
        base: ``model``, ``revision`` and ``fingerprint`` of the checkpoint they were trained on.
        exit_layers: ascending.
        best: hierarchies measured best with these exits, by preset name.
        record: the whole document.
    """

    path: Path
    base: Mapping[str, Any]
    exit_layers: tuple[int, ...]
    best: Mapping[str, Hierarchy]
    record: Mapping[str, Any]

    @staticmethod
    def open(path: Path) -> Exits:
        """Returns the folder's record.

        Raises:
            UsageError: there is no such folder, or it holds no exits.
            CheckpointError: its config is damaged.
        """
        config = path / "config.json"
        if not config.is_file():
            raise UsageError(
                f"no exits in {path}: it has no config.json. Give a folder that hispec train wrote."
            )
        try:
            record = json.loads(config.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{config} cannot be read: {error}.") from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise UsageError(f"{config} does not describe exits (format {FORMAT!r} expected).")
        try:
            layers = tuple(sorted(int(x["exit_layer"]) for x in record["exits"]))
            best = {
                name: Hierarchy.from_json(value, name)
                for name, value in record.get("hierarchies", {}).items()
            }
            return Exits(path, dict(record["base"]), layers, best, record)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{config} is damaged: {error}.") from None

    def check_base(self, checkpoint: Checkpoint, *, force: bool = False) -> None:
        """Raises ``UsageError`` if these exits belong to other weights, unless forced."""
        wanted = self.base.get("fingerprint")
        if wanted != checkpoint.fingerprint and not force:
            raise UsageError(
                f"the exits in {self.path} were trained on {self.base.get('model')} "
                f"(weights {str(wanted)[:12]}), not on {checkpoint.name} "
                f"(weights {checkpoint.fingerprint[:12]}). Use that model, or train exits for this "
                f"one."
            )

    def head(self, exit_layer: int, model: Llama, checkpoint: Checkpoint) -> TrainedHead:
        """Returns the head at one of ``exit_layers``.

        Raises:
            CheckpointError: its file is missing, damaged, or does not fit the model.
        """
        file = TensorFile(self.path / f"exit_{exit_layer}.safetensors")
        tensors = {name: file.read(name) for name in file.entries}

        def head_rows(ids: Tensor) -> Tensor:
            if model.config.tie_word_embeddings:
                return model.embedding.take(ids)
            rows = checkpoint.tensor("lm_head.weight")[ids.cpu()]
            return rows.to(device=model.device, dtype=model.dtype)

        try:
            return TrainedHead(model, exit_layer, tensors, head_rows)
        except (KeyError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{file.path} does not fit this model: {error}.") from None


def shipped_exits(checkpoint: Checkpoint) -> Exits | None:
    """Returns the exits that come with hispec for these very weights, or None."""
    for config in sorted((Path(__file__).parent.parent / "exits").glob("*/config.json")):
        exits = Exits.open(config.parent)
        if exits.base.get("fingerprint") == checkpoint.fingerprint:
            return exits
    return None
