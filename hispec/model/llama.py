"""A Llama that runs any range of its layers over new positions of one cache.

    x₀ = embed(tokens)
    layer i:  x += o(attention(rope(qkv(norm x))));   x += down(swiglu(gate_up(norm x)))

How rows become states is the business of :mod:`hispec.model.passes`; here is which rows and layers
run. Raising a boundary's watermark (:mod:`hispec.model.cache`) runs what lies between it and the
boundary below, from the states stored there.

A prompt is prefilled in wide passes over chunks at fixed positions; everything after it runs in
narrow passes whose rows round alike whatever their company. So a position's keys, values and logits
depend on nothing but the tokens up to it, and plain decoding and speculation yield the same bits.
Where bf16 weights lie in tiles the compiled passes run both; otherwise torch runs prefill.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hispec.model.block import Block, read_block
from hispec.model.cache import Cache, KVCache
from hispec.model.checkpoint import Checkpoint
from hispec.model.config import ModelConfig
from hispec.model.linear import Layout, Linear, onednn_available
from hispec.model.native import NativePasses, native_library
from hispec.model.passes import MAX_WIDTH, Passes, Rotary, TorchPasses
from hispec_kernels.attention import BUCKET

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
        why_not_native: why ``narrow`` is not the compiled way; empty if it is.
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
        library, self.why_not_native = native_library(config, self.dtype, self.device)
        self.narrow: Passes
        if library is not None and self.layout != "onednn":
            self.narrow = NativePasses(config, self.rotary, self.dtype, library)
        else:
            self.narrow = self._torch_passes()
        # Without tiles the compiled products are no match for a library's at a prompt's widths.
        self.wide = self.narrow if self.layout == "tiles" else self._torch_passes()

    # ------------------------------------------------------------------ loading

    @staticmethod
    def load(
        checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, exact: bool = True
    ) -> Llama:
        """Returns the checkpoint's model in ``dtype`` on ``device``.

        One block is read at a time, so at most one block's weights exist twice.

        Raises:
            CheckpointError: a tensor is missing, damaged, or of another shape than the config says.
        """
        config = checkpoint.config
        layout = best_layout(config, dtype, device)

        def read(name: str) -> Tensor:
            return checkpoint.tensor(name).to(device=device, dtype=dtype)

        tied = config.tie_word_embeddings
        words = read("model.embed_tokens.weight")
        head = Linear(words if tied else read("lm_head.weight"), layout=layout)
        embedding = head if tied and layout != "onednn" else Linear(words)
        del words
        blocks = [
            read_block(read, f"model.layers.{i}.", config, layout) for i in range(config.num_layers)
        ]
        return Llama(config, embedding, blocks, read("model.norm.weight"), head, exact=exact)

    def _torch_passes(self) -> TorchPasses:
        return TorchPasses(self.config, self.rotary, self.dtype, self.device, exact=self.exact)

    def new_cache(self, boundaries: Sequence[int]) -> Cache:
        """Returns an empty cache for the model's whole context, states kept at ``boundaries``."""
        return Cache(
            boundaries,
            self.config.num_kv_heads,
            self.config.head_dim,
            self.config.hidden_size,
            self.capacity,
            self.dtype,
            self.device,
            state_dtype=self.narrow.state_dtype,
        )

    def weight_bytes(self) -> int:
        """Returns the bytes the weights take."""
        config = self.config
        heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
        block = config.hidden_size * (heads + 3 * config.intermediate_size + 2)
        copies = 1 if self.embedding is self.head else 2
        vocabulary = copies * config.vocab_size * config.hidden_size
        return (config.num_layers * block + vocabulary) * self.dtype.itemsize

    # ------------------------------------------------------------------ passes

    def advance(
        self, cache: Cache, tokens: Sequence[int], upto: int, boundary: int, *, wide: bool = False
    ) -> int:
        """Raises the watermark of ``boundary`` to ``upto``; returns the layer visits it took.

        Positions that lack the state of a lower boundary are lifted through the layers below first.

        Args:
            cache: knows ``tokens[:cache.computed[b]]`` up to each boundary b.
            tokens: ids from position 0 on, at least ``upto`` of them.
            upto: absolute position, exclusive.
            boundary: one of ``cache.boundaries``.
            wide: a prefill's pass.
        """
        visits, below = 0, 0
        for level in cache.boundaries:
            start = cache.computed[level]
            if start < upto:
                rows = (
                    self.embed(tokens[start:upto])
                    if below == 0
                    else cache.states[below][start:upto]
                )  # (W, D)
                rows = self.run_layers(rows, below, level, start, cache.kv, wide=wide)
                cache.states[level][start:upto] = rows
                cache.computed[level] = upto
                visits += (upto - start) * (level - below)
            if level == boundary:
                break
            below = level
        return visits

    def prefill(self, cache: Cache, tokens: Sequence[int]) -> int:
        """Runs all layers over the tokens the cache does not know yet; returns the layer visits.

        Chunks end at multiples of ``PREFILL_CHUNK``, so their shapes depend on positions alone.
        """
        visits = 0
        while cache.length < len(tokens):
            end = min(len(tokens), (cache.length // PREFILL_CHUNK + 1) * PREFILL_CHUNK)
            visits += self.advance(cache, tokens, end, cache.boundaries[-1], wide=True)
        return visits

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Returns (T, D)."""
        return self.embedding.take(torch.tensor(tokens, dtype=torch.int64, device=self.device))

    def run_layers(
        self, x: Tensor, start: int, stop: int, position: int, kv: KVCache, *, wide: bool = False
    ) -> Tensor:
        """Returns the states after ``layers[start:stop]``, their keys and values stored.

        Args:
            x: (T, D), states after ``layers[0:start]`` of positions ``position``,
                ``position + 1``, …
            start: first layer.
            stop: one past the last layer.
            position: absolute position of the first row.
            kv: holds these layers' keys and values for all earlier positions.
            wide: a prefill's pass; otherwise T is at most ``MAX_WIDTH``.

        Returns:
            (T, D).
        """
        assert wide or x.shape[0] <= MAX_WIDTH, "a narrow pass takes MAX_WIDTH rows"
        passes = self.wide if wide else self.narrow
        return passes.run(self.blocks[start:stop], x, position, kv, start)

    def logits(self, x: Tensor) -> Tensor:
        """Returns the vocabulary logits (T, V) of states after the last layer (T, D)."""
        return self.narrow.project(self.head, x, self.norm)


def best_layout(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Layout:
    """Returns the layout of weights that decoding reads fastest on this device."""
    library, _ = native_library(config, dtype, device)
    if library is not None:
        return "tiles" if dtype == torch.bfloat16 and library.bf16_tiles() else "plain"
    return "onednn" if onednn_available(device, dtype) else "plain"
