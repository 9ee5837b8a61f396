"""A Llama that runs any range of its layers over new positions of one cache.

    x₀ = embed(tokens);   layer i:  x += o(attention(rope(qkv(norm x))));   x += down(swiglu(gate_up(norm x)))

How rows become states is the business of :mod:`hispec.model.passes`; here is which rows and layers
run. Raising a boundary's watermark (:mod:`hispec.model.cache`) runs what lies between it and the
boundary below, from the states stored there.

A prompt is prefilled by torch in chunks at fixed positions; everything after it runs in narrow passes
whose rows round alike whatever their company. So a position's keys, values and logits depend on
nothing but the tokens up to it, and plain decoding and speculation yield the same bits.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hispec.model.block import Block, read_block
from hispec.model.cache import Cache, KVCache
from hispec.model.checkpoint import Checkpoint
from hispec.model.config import ModelConfig
from hispec.model.linear import Linear
from hispec.model.passes import MAX_WIDTH, NativePasses, Passes, Rotary, TorchPasses
from hispec.model.store import cache_dir
from hispec_kernels import cpu
from hispec_kernels.attention import BUCKET

#: Tokens a prefill pass takes, at absolute positions, whatever the hierarchy.
PREFILL_CHUNK = 256


class Llama:
    """A loaded Llama: weights in this device's layout and the passes over them.

    Attributes:
        config: its sizes.
        embedding: (V, D).
        blocks: L of them.
        norm: (D,), before the vocabulary head.
        head: D → V.
        wide: runs prefill, any number of rows.
        narrow: runs everything else, up to ``MAX_WIDTH`` rows; ``wide`` itself where nothing is compiled.
        why_not_native: why ``narrow`` is not the compiled path, or None if it is.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
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
        self.exact = exact
        self.dtype = embedding.dtype
        self.device = embedding.device
        self.capacity = -(-(config.max_positions + MAX_WIDTH) // BUCKET) * BUCKET
        rotary = Rotary(config, self.capacity)
        self.wide = TorchPasses(config, rotary, self.dtype, self.device, exact=exact)
        self.narrow: Passes = self.wide
        library, self.why_not_native = native_library(config, self.dtype, self.device)
        if library is not None and not head.packed:
            self.narrow = NativePasses(config, rotary, self.dtype, library)

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
        # The compiled passes read weights as they are stored; oneDNN wants its own order.
        pack = native_library(config, dtype, device)[0] is None

        def read(name: str) -> Tensor:
            return checkpoint.tensor(name).to(device=device, dtype=dtype)

        embedding = read("model.embed_tokens.weight")
        tied = config.tie_word_embeddings
        head = Linear(embedding if tied else read("lm_head.weight"), pack=pack)
        blocks = [
            read_block(read, f"model.layers.{i}.", config, pack=pack)
            for i in range(config.num_layers)
        ]
        return Llama(config, embedding, blocks, read("model.norm.weight"), head, exact=exact)

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
        # A tied head that is packed for oneDNN is a second copy of the embedding.
        copies = 1 if config.tie_word_embeddings and not self.head.packed else 2
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
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
        return F.embedding(ids, self.embedding)

    def run_layers(
        self, x: Tensor, start: int, stop: int, position: int, kv: KVCache, *, wide: bool = False
    ) -> Tensor:
        """Returns the states after ``layers[start:stop]``, their keys and values stored.

        Args:
            x: (T, D), states after ``layers[0:start]`` of positions ``position``, ``position + 1``, …
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


def native_library(config: ModelConfig, dtype: torch.dtype, device: torch.device):  # noqa: ANN201
    """Returns the compiled library for such a model, or None and the reason."""
    if device.type != "cpu":
        return None, "it is for CPUs"
    if dtype not in (torch.bfloat16, torch.float32):
        return None, f"it does not cover {dtype}"
    group = config.num_heads // config.num_kv_heads
    if not cpu.covers(config.hidden_size, config.intermediate_size, config.head_dim, group):
        return None, "it covers sizes that are multiples of 32"
    try:
        return _library(), None
    except cpu.BuildError as error:
        return None, str(error)


@functools.cache
def _library():  # noqa: ANN202
    if os.environ.get("HISPEC_NATIVE", "1") == "0":
        raise cpu.BuildError("HISPEC_NATIVE=0")
    return cpu.load_library(cache_dir() / "native")
