"""Exit heads: from the states after ``layers[0:e]`` to logits, and the folder they are kept in.

A head is at most four steps, each left out where its tensors are missing:

    u = states after layer e                    (T, D)
    x = proj u + bias                           an affine map
    x = block(x)                                one Llama block with keys and values of its own
    logits = rms(x, norm) head[vocab_ids]ᵀ      the model's own head, all rows or the frequent ones

A checkpoint trained the LayerSkip way needs none of them: ``SharedHead`` is norm and head as they
are. A head with a block keeps its keys and values in the cache's slots and catches up, when it is
next asked, on those that passed its exit without it.

*Deep context.* Positions p before the root r have been through the whole model, so their final
states h_L(p) are known, and with them what the target has concluded about the past. A block trained
for it reads them twice: as keys and values, and as a feature of the last of them that every row
receives through the map of its distance from the root.

    k(p), v(p) = W_kv rms(proj u(p)) + C_kv rms(h_L(p))                           p < r
    x(t) = proj u(t) + bias + F_j rms(h_L(r − 1))                      t ≥ r, j = min(t − r, K − 1)

So much of what a layer would find out is known already that e may be 0: u is the token's embedding,
and a draft costs the head alone (what EAGLE, arXiv 2401.15077, is to its target).

Heads only draft: nothing they compute reaches the output. So their weights may be less exact than
the model's (``draft_layout``). The compiled library runs a whole head in one call
(:mod:`hispec.model.compiled_head`), a GPU with its layers in one graph (``graphed_head``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hispec.errors import CheckpointError, UsageError
from hispec.hierarchy import Hierarchy, untuned
from hispec.model.adapter import block_of_layer
from hispec.model.block import Block, read_block
from hispec.model.cache import Cache, KVCache
from hispec.model.checkpoint import Checkpoint
from hispec.model.compiled_head import CompiledHead
from hispec.model.device import enough_memory, upload
from hispec.model.graphed_head import GraphedHead
from hispec.model.linear import Linear
from hispec.model.llama import PREFILL_CHUNK, Llama
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Found, Lift, Passes
from hispec.model.tensorfile import TensorFile

FORMAT = "hispec-exits"


class ExitHead(Protocol):
    """What the engine asks of a head.

    Attributes:
        model: whose exit it is.
        exit_layer: e.
        vocab_ids: (V_r,) ids of the logits' columns, or None where the columns are the ids.
    """

    model: Llama
    exit_layer: int
    vocab_ids: Tensor | None

    def logits(self, cache: Cache, first: int, nodes: Nodes) -> Tensor:
        """Returns logits after the slots ``first`` … ``cache.computed[exit_layer] - 1``.

        Args:
            cache: holds this exit's states.
            first: slot of the first row wanted.
            nodes: the round's tree; positions before its root are final.

        Returns:
            (T, V) or (T, V_r).
        """
        ...

    def best(
        self, cache: Cache, first: int, nodes: Nodes, asked: Asked, lifts: Sequence[Lift] = ()
    ) -> Found:
        """Returns each row's best ids and their odds, (T, k) each, best first, until anything runs.

        Where the passes do not go from states to ids in one step, what :meth:`logits` returns.
        ``lifts`` are run before: a GPU does it all in one graph.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forgets what the head itself stored at and past ``length``."""
        ...


class _Head:
    """What heads have in common: norm and vocabulary behind the states that :meth:`_last` finds."""

    proj: Linear | None = None
    block: Block | None = None
    context: tuple[Linear, Linear] | None = None  # states here and final ones → KV
    feature: Linear | None = None
    vocab_ids: Tensor | None = None

    def __init__(self, model: Llama, exit_layer: int) -> None:
        self.model = model
        self.exit_layer = exit_layer
        self.norm = model.norm
        self.head = model.head
        self._whole: CompiledHead | GraphedHead = GraphedHead(self)

    def logits(self, cache: Cache, first: int, nodes: Nodes) -> Tensor:
        """See :class:`ExitHead`."""
        return self.model.narrow.project(self.head, self._last(cache, first, nodes), self.norm)

    def best(
        self, cache: Cache, first: int, nodes: Nodes, asked: Asked, lifts: Sequence[Lift] = ()
    ) -> Found:
        """See :class:`ExitHead`."""
        if found := self._whole.best(cache, first, nodes, asked, lifts):
            return found
        self.model.run(lifts)
        passes, x = self.model.narrow, self._last(cache, first, nodes)
        best = passes.best(self.head, x, self.norm, asked, self.vocab_ids)
        return passes.project(self.head, x, self.norm) if best is None else best

    def _last(self, cache: Cache, first: int, nodes: Nodes) -> Tensor:
        return cache.states[self.exit_layer][first : cache.computed[self.exit_layer]]

    def truncate(self, length: int) -> None:
        """See :class:`ExitHead`."""


class SharedHead(_Head):
    """The model's own norm and vocabulary head at an exit (LayerSkip)."""


class TrainedHead(_Head):
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
        super().__init__(model, exit_layer)

        def read(name: str) -> Tensor:
            return tensors[name].to(device=model.device, dtype=model.dtype)

        def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
            return Linear(weight, bias, model.draft_layout)

        if "proj.weight" in tensors:
            bias = read("proj.bias") if "proj.bias" in tensors else None
            self.proj = linear(read("proj.weight"), bias)
        if "norm.weight" in tensors:
            self.norm = read("norm.weight")
        if "vocab_ids" in tensors:
            self.vocab_ids = tensors["vocab_ids"].to(device=model.device, dtype=torch.int64)
            self.head = linear(head_rows(self.vocab_ids))
        self.kv: KVCache | None = None
        self.known = 0  # slots in kv
        self.final = 0  # of these, leading ones made from final states
        if "block.self_attn.q_proj.weight" in tensors:
            config = replace(  # with the block's own biases, whatever the model's layers have
                model.config,
                attention_bias="block.self_attn.q_proj.bias" in tensors,
                mlp_bias="block.mlp.gate_proj.bias" in tensors,
            )
            self.block = read_block(read, "block.", config, model.draft_layout)
            if "block.context_k_proj.weight" in tensors:
                self.context = (  # D → 2 H_kv D_h each
                    linear(torch.cat([read(f"block.self_attn.{x}_proj.weight") for x in "kv"])),
                    linear(torch.cat([read(f"block.context_{x}_proj.weight") for x in "kv"])),
                )
                self.context_norm = read("block.context_layernorm.weight")
        if "feature_proj.weight" in tensors:
            self.feature = linear(read("feature_proj.weight"))
            self.feature_norm = read("feature_layernorm.weight")
        self.feature_of: tuple[int, Tensor] = (-1, torch.empty(0))  # a root and what it receives
        self._whole = CompiledHead.of(self) or self._whole

    def _last(self, cache: Cache, first: int, nodes: Nodes) -> Tensor:
        """The states before norm and vocabulary. A block first catches up on what is new to it."""
        states = cache.states[self.exit_layer]
        end = cache.computed[self.exit_layer]
        self._receive(cache, nodes.root)
        if self.block is None:
            return self._enter(states[first:end], first, nodes)
        return self._through_block(cache, states, first, end, nodes)

    def truncate(self, length: int) -> None:
        """See :class:`ExitHead`."""
        self.known = min(self.known, length)
        self.final = min(self.final, length)
        if self.feature_of[0] > length:
            self.feature_of = (-1, torch.empty(0))

    def _passes(self, rows: int) -> Passes:
        return self.model.narrow if rows <= MAX_WIDTH else self.model.wide

    def _project(self, u: Tensor) -> Tensor:
        return u if self.proj is None else self._passes(u.shape[0]).project(self.proj, u)

    def _receive(self, cache: Cache, root: int) -> None:
        """Fetches the round's feature, once a root."""
        if self.feature is not None and self.feature_of[0] != root:
            deep = cache.states[self.model.config.num_layers][root - 1 : root]
            rows = self.model.narrow.project(self.feature, deep, self.feature_norm)  # (1, K D)
            self.feature_of = (root, rows.view(-1, deep.shape[1]))

    def _enter(self, u: Tensor, start: int, nodes: Nodes) -> Tensor:
        """The block's input at the slots ``start`` and after."""
        x = self._project(u)
        if self.feature is None:
            return x
        _, rows = self.feature_of
        last, root = len(rows) - 1, nodes.root
        places = [min(max(at - root, 0), last) for at in nodes.positions(start, start + len(x))]
        if len(places) == 1:
            return x + rows[places[0]]
        return x + rows[upload(np.array(places), rows.device)]

    def _through_block(
        self, cache: Cache, states: Tensor, first: int, end: int, nodes: Nodes
    ) -> Tensor:
        """Returns the block's output at ``first`` … ``end - 1``, its KV complete up to ``end``."""
        self.memory()
        if self.context is not None:
            final = min(nodes.root, cache.length)
            while self.final < final:
                upto = min(final, self.final + PREFILL_CHUNK)
                self._write_context(cache, self.final, upto)
                self.final = upto
        start = min(max(self.known, self.final), first)
        while end - start > PREFILL_CHUNK:  # a prompt it has not seen
            stop = min(first, start + PREFILL_CHUNK)
            self._run_block(states[start:stop], start, nodes)
            start = stop
        x = self._run_block(states[start:end], start, nodes)
        self.known = end
        return x[first - start :]

    def memory(self) -> KVCache:
        """Returns the block's own keys and values."""
        if self.kv is None:
            model, config = self.model, self.model.config
            heads, size = config.num_kv_heads, config.head_dim
            needed = 2 * heads * size * model.capacity * model.dtype.itemsize
            what = f"the cache of the head at exit {self.exit_layer}"
            with enough_memory(what, needed, "give a shorter --context, or leave the exit out"):
                self.kv = KVCache(1, heads, size, model.capacity, model.dtype, model.device)
        return self.kv

    def _run_block(self, u: Tensor, start: int, nodes: Nodes) -> Tensor:
        assert self.block is not None and self.kv is not None
        x = self._enter(u, start, nodes)
        return self._passes(len(u)).run([self.block], x, start, self.kv, 0, nodes)

    def _write_context(self, cache: Cache, start: int, end: int) -> None:
        """After the call keys and values at ``start`` … ``end - 1`` are those of final states."""
        assert self.context and self.kv and self.block
        model, passes = self.model, self._passes(end - start)
        shallow = self._project(cache.states[self.exit_layer][start:end])
        deep = cache.states[model.config.num_layers][start:end]
        kv = passes.project(self.context[0], shallow, self.block.attention_norm)
        kv = kv + passes.project(self.context[1], deep, self.context_norm)
        model.narrow.store(kv, start, self.kv, 0)


@dataclass(frozen=True)
class Exits:
    """A folder of trained exits: what its ``config.json`` says.

    Attributes:
        path: the folder.
        base: ``model``, ``revision`` and ``fingerprint`` of the checkpoint they were trained on.
        exit_layers: ascending.
        best: hierarchies by preset name: measured best with these exits, or to begin with.
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
            best = untuned(layers) if layers else {}
            for name, value in record.get("hierarchies", {}).items():
                best[name] = Hierarchy.from_json(value, name)
            return Exits(path, dict(record["base"]), layers, best, record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{config} is damaged: {error}.") from None

    @property
    def own(self) -> tuple[int, ...]:
        """The exits at which the model's own norm and head were trained to work."""
        return tuple(x["exit_layer"] for x in self.record["exits"] if x.get("kind") == "own")

    @cached_property
    def fingerprint(self) -> str:
        """What tells these exits from others: what their config says of them, and their weights.

        Of each tensor a sample is read, as of a checkpoint's.
        """
        said = json.dumps([self.record["base"], self.record["exits"]], sort_keys=True)
        digest = hashlib.sha256(said.encode())
        for path in sorted(self.path.glob("*.safetensors")):
            file = TensorFile(path)
            for name in sorted(file.entries):
                digest.update(f"{path.name} {name}".encode() + file.sample(name))
        return digest.hexdigest()[:16]

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

    def head(self, exit_layer: int, model: Llama, checkpoint: Checkpoint) -> ExitHead:
        """Returns the head at one of ``exit_layers``.

        Raises:
            CheckpointError: its file is missing, damaged, or does not fit the model.
        """
        entry = next(x for x in self.record["exits"] if x["exit_layer"] == exit_layer)
        if exit_layer in self.own:  # the backbone was trained to use the model's own there
            return SharedHead(model, exit_layer)
        file = TensorFile(self.path / f"exit_{exit_layer}.safetensors")
        tensors = {name: file.read(name) for name in file.entries}

        def head_rows(ids: Tensor) -> Tensor:
            if model.config.tie_word_embeddings:
                return model.embedding.take(ids)
            rows = checkpoint.tensor("lm_head.weight")[ids.cpu()]
            return rows.to(device=model.device, dtype=model.dtype)

        try:
            if entry.get("kind") == "lora":
                tensors = block_of_layer(tensors, checkpoint, entry["layer"])
            size = file.path.stat().st_size
            with enough_memory(f"the head at exit {exit_layer}", size, "leave the exit out"):
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
