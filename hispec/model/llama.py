"""A Llama that runs any range of its layers over new positions of one cache.

    x₀ = embed(tokens)
    layer i:  x += o(attention(rope(qkv(norm x))));   x += down(swiglu(gate_up(norm x)))

How rows become states is the business of :mod:`hispec.model.passes`; here is which rows and layers
run. Raising a boundary's watermark (:mod:`hispec.model.cache`) runs what lies between it and the
boundary below, from the states stored there.

A prompt is prefilled in wide passes over chunks at fixed positions; everything after it runs in
narrow passes whose rows round alike whatever their company. So a position's keys, values and logits
depend on nothing but the tokens up to it, and plain decoding and speculation yield the same bits.
Where bf16 weights lie in tiles or pairs the compiled passes run both; otherwise torch runs prefill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from hispec.errors import UsageError
from hispec.model.block import Block, read_block
from hispec.model.cache import Cache, KVCache
from hispec.model.checkpoint import Checkpoint
from hispec.model.config import ModelConfig
from hispec.model.device import enough_memory
from hispec.model.gpu import gpu_passes
from hispec.model.linear import Layout, Linear, onednn_available
from hispec.model.native import NativePasses, native_library
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Lift, Passes, Rotary, Token, Words
from hispec.model.torch_passes import TorchPasses
from hispec_kernels.attention import BUCKET
from hispec_kernels.cpu import LAYOUTS

#: Tokens a prefill pass takes, at absolute positions, whatever the hierarchy.
PREFILL_CHUNK = 256


class Llama:
    """A loaded Llama: weights in this device's layout and the passes over them.

    Attributes:
        config: its sizes.
        embedding: its weight's rows are the token embeddings, (V, D); the head itself where tied.
        blocks: L of them.
        norm: (D,), before the vocabulary head.
        head: D → V.
        layout: of all products' weights; see :mod:`hispec.model.linear`.
        exact: keep to shapes that round alike.
        narrow: runs the passes of decoding, up to ``MAX_WIDTH`` rows.
        wide: runs prefill, any number of rows; the same object where one way does both well.
        why_not_native: why ``narrow`` runs operator by operator; empty if it does not.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Linear,
        blocks: Sequence[Block],
        norm: Tensor,
        head: Linear,
        *,
        exact: bool = True,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.blocks = list(blocks)
        self.norm = norm
        self.head = head
        self.layout = head.layout
        self.exact = exact
        self.dtype = norm.dtype
        self.device = norm.device
        self.capacity = -(-(config.max_positions + MAX_WIDTH) // BUCKET) * BUCKET
        self.rotary = Rotary(config, self.capacity)
        self.narrow, self.why_not_native = self._narrow_passes()
        #: Of weights that only draft.
        self.draft_layout: Layout = getattr(self.narrow, "draft_layout", self.layout)
        # On plain rows the compiled products are no match for a library's at a prompt's widths.
        panels = self.layout in ("tiles", "pairs")
        self.wide = self.narrow if panels else self._torch_passes()

    # ------------------------------------------------------------------ loading

    @staticmethod
    def load(
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        exact: bool = True,
        layout: Layout | None = None,
        context: int | None = None,
    ) -> Llama:
        """Returns the checkpoint's model in ``dtype`` on ``device``.

        One block is read at a time, so at most one block's weights exist twice.

        Args:
            checkpoint: where the weights are.
            dtype: to compute in.
            device: to compute on.
            exact: keep to shapes that round alike.
            layout: of the weights; by default the one read fastest here.
            context: the most tokens a text may have; by default as many as the model was made for.

        Raises:
            CheckpointError: a tensor is missing, damaged, or of another shape than the config says.
            UsageError: the model was not made for such a context.
            HispecError: the weights do not fit into the GPU's memory.
        """
        config = checkpoint.config
        if context is not None:
            if not 1 < context <= config.max_positions:
                raise UsageError(
                    f"context must be in [2, {config.max_positions}] for this model, got {context}."
                )
            config = replace(config, max_positions=context)
        layout = layout or best_layout(config, dtype, device)

        def read(name: str) -> Tensor:
            return checkpoint.tensor(name).to(device=device, dtype=dtype)

        size = weight_bytes(config, dtype, tied=config.tie_word_embeddings)
        advice = "use a smaller model, a narrower --dtype, or --device cpu"
        with enough_memory("the model", size, advice):
            tied = config.tie_word_embeddings
            words = read("model.embed_tokens.weight")
            head = Linear(words if tied else read("lm_head.weight"), layout=layout)
            embedding = head if tied and layout != "onednn" else Linear(words)
            del words
            blocks = [
                read_block(read, f"model.layers.{i}.", config, layout)
                for i in range(config.num_layers)
            ]
            return Llama(config, embedding, blocks, read("model.norm.weight"), head, exact=exact)

    def _narrow_passes(self) -> tuple[Passes, str]:
        """Returns the fastest way to decode on this device; torch's, and why, where that is it."""
        config, dtype, device = self.config, self.dtype, self.device
        if device.type == "cuda":
            what = self.blocks[0], self.head
            kernels, why = gpu_passes(config, self.rotary, dtype, device, *what)
            return kernels or self._torch_passes(), why
        library, why = native_library(config, dtype, device)
        if library is not None:
            native = NativePasses(config, self.rotary, dtype, library)
            if native.layout == self.layout:
                return native, why
            why = f"the compiled passes read {native.layout} weights here"
        return self._torch_passes(), why

    def _torch_passes(self) -> TorchPasses:
        return TorchPasses(self.config, self.rotary, self.dtype, self.device, exact=self.exact)

    def new_cache(self, boundaries: Sequence[int], positions: int | None = None) -> Cache:
        """Returns an empty cache, states kept at ``boundaries``.

        Args:
            boundaries: exits and L.
            positions: room for so many, the widest pass included; by default for the model's whole
                context.

        Raises:
            HispecError: it does not fit into the GPU's memory.
        """
        config = self.config
        capacity = self.capacity if positions is None else -(-positions // BUCKET) * BUCKET
        size = 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.dtype.itemsize
        size += len(boundaries) * config.hidden_size * self.narrow.state_dtype.itemsize
        what = f"a cache for {positions or config.max_positions} tokens of context"
        with enough_memory(what, size * capacity, "give a shorter --context"):
            return Cache(
                boundaries,
                config.num_kv_heads,
                config.head_dim,
                config.hidden_size,
                capacity,
                self.dtype,
                self.device,
                state_dtype=self.narrow.state_dtype,
            )

    def weight_bytes(self) -> int:
        """Returns the bytes the weights take."""
        return weight_bytes(self.config, self.dtype, tied=self.embedding is self.head)

    # ------------------------------------------------------------------ passes

    def advance(
        self,
        cache: Cache,
        tokens: Sequence[Token],
        upto: int,
        boundary: int,
        *,
        nodes: Nodes | None = None,
        wide: bool = False,
    ) -> int:
        """Raises the watermark of ``boundary`` to ``upto``; returns the layer visits it took.

        Slots that lack the state of a lower boundary are lifted through the layers below first.

        Args:
            cache: knows ``tokens[:cache.computed[b]]`` up to each boundary b.
            tokens: ids by slot, from 0 on, at least ``upto`` of them.
            upto: a slot, exclusive.
            boundary: one of ``cache.boundaries``.
            nodes: the tree in the slots from its root on; without one, slots are positions.
            wide: a prefill's pass.
        """
        lifts, visits = self.lifts(cache, tokens, upto, boundary, nodes=nodes)
        with raised(cache, boundary, upto, lifts):
            self.run(lifts, wide=wide)
        return visits

    def lifts(
        self,
        cache: Cache,
        tokens: Sequence[Token],
        upto: int,
        boundary: int,
        *,
        nodes: Nodes | None = None,
    ) -> tuple[list[Lift], int]:
        """Returns what :meth:`advance` runs, to be run with the watermarks :func:`raised`.

        Args:
            cache: as there.
            tokens: likewise.
            upto: likewise.
            boundary: likewise.
            nodes: likewise.

        Returns:
            What :meth:`run` takes, and the layer visits of it all.
        """
        assert len(tokens) >= upto, "a row has a token"
        lifts, visits, below = list[Lift](), 0, 0
        source: Tensor | Words | None = None
        levels = cache.boundaries[: cache.boundaries.index(boundary) + 1]
        # Boundaries that lack the same slots are passed on one way.
        for start, group in groupby(levels, key=cache.computed.__getitem__):
            stops = list(group)
            if start < upto:
                if source is None:
                    source = Words(self.embedding, tokens[start:upto])
                targets = [(stop - below, cache.states[stop]) for stop in stops]
                blocks, width = self.blocks[below : stops[-1]], upto - start
                lifts.append(Lift(blocks, source, targets, start, width, cache.kv, below, nodes))
                visits += width * (stops[-1] - below)
            below, source = stops[-1], cache.states[stops[-1]]
        return lifts, visits

    def prefill(self, cache: Cache, tokens: Sequence[Token]) -> int:
        """Runs all layers over the tokens the cache does not know yet; returns the layer visits.

        Chunks end at multiples of ``PREFILL_CHUNK``, so their shapes depend on positions alone.
        """
        visits = 0
        while cache.length < len(tokens):
            end = min(len(tokens), (cache.length // PREFILL_CHUNK + 1) * PREFILL_CHUNK)
            visits += self.advance(cache, tokens, end, cache.boundaries[-1], wide=True)
        return visits

    def embed(self, tokens: Sequence[Token]) -> Tensor:
        """Returns (T, D)."""
        return self.narrow.embed(self.embedding, tokens)

    def keep(self, cache: Cache, root: int, kept: Sequence[int]) -> None:
        """After the call the cache knows the tree's nodes ``kept`` alone, as if there had been no
        others: they take the slots from ``root`` on, in order.

        Args:
            cache: knows a tree from slot ``root`` on.
            root: the root's slot.
            kept: node numbers, ascending, the root's 0 first and each with its ancestors. Where
                they are the leading nodes, this is ``cache.truncate(root + len(kept))``.
        """
        known = max(cache.computed.values()) - root
        moved = [(node, new) for new, node in enumerate(kept) if new < node < known]
        if moved:
            sources, targets = (
                [root + node for node in nodes] for nodes in zip(*moved, strict=True)
            )
            self.narrow.move(cache.kv, sources, targets)
        cache.keep(root, kept)

    def run(self, lifts: Sequence[Lift], *, wide: bool = False) -> None:
        """Runs what :meth:`lifts` has planned; ``wide`` as a prefill's pass."""
        for lift in lifts:
            assert wide or lift.width <= MAX_WIDTH, "a narrow pass takes MAX_WIDTH rows"
            (self.wide if wide else self.narrow).lift(lift)

    def run_layers(
        self,
        x: Tensor,
        start: int,
        stop: int,
        position: int,
        kv: KVCache,
        *,
        nodes: Nodes | None = None,
        wide: bool = False,
    ) -> Tensor:
        """Returns the states after ``layers[start:stop]``, their keys and values stored.

        Args:
            x: (T, D), states after ``layers[0:start]`` of the slots ``position``,
                ``position + 1``, …
            start: first layer.
            stop: one past the last layer.
            position: slot of the first row.
            kv: holds these layers' keys and values for all earlier slots.
            nodes: the tree in the slots from its root on; without one, slots are positions.
            wide: a prefill's pass; otherwise T is at most ``MAX_WIDTH``.

        Returns:
            (T, D).
        """
        if start == stop:  # an exit before the first layer
            return x
        assert wide or x.shape[0] <= MAX_WIDTH, "a narrow pass takes MAX_WIDTH rows"
        passes = self.wide if wide else self.narrow
        return passes.run(self.blocks[start:stop], x, position, kv, start, nodes)

    def logits(self, x: Tensor) -> Tensor:
        """Returns the vocabulary logits (T, V) of states after the last layer (T, D)."""
        return self.narrow.project(self.head, x, self.norm)


@contextmanager
def raised(cache: Cache, boundary: int, upto: int, lifts: Sequence[Lift]) -> Iterator[None]:
    """Inside, ``lifts`` are run, which the watermarks take for done; they sink if that fails.

    Args:
        cache: whose watermarks rise.
        boundary: up to this one.
        upto: to this slot, exclusive.
        lifts: what :meth:`Llama.lifts` has planned for that.
    """
    try:
        for level in cache.boundaries[: cache.boundaries.index(boundary) + 1]:
            cache.computed[level] = max(cache.computed[level], upto)
        yield
    except BaseException:
        if lifts:
            cache.truncate(lifts[-1].position)  # deeper layers know less
        raise


def weight_bytes(config: ModelConfig, dtype: torch.dtype, *, tied: bool) -> int:
    """Returns the bytes a model's weights take; ``tied`` where head and embedding are one."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    block = config.hidden_size * (heads + 3 * config.intermediate_size + 2)
    vocabulary = (1 if tied else 2) * config.vocab_size * config.hidden_size
    return (config.num_layers * block + vocabulary) * dtype.itemsize


def best_layout(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Layout:
    """Returns the layout of weights that decoding reads fastest on this device."""
    library, _ = native_library(config, dtype, device)
    if library is not None:
        return LAYOUTS[library.bf16_layout()] if dtype == torch.bfloat16 else "plain"
    return "onednn" if onednn_available(device, dtype) else "plain"
