"""A tiny Llama on the GPU's passes, in Triton's interpreter where there is no GPU.

Graphs are stood in for by what they promise: work captured once is done again as it was captured,
on whatever the static buffers hold by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from helpers.interpreter import exact_arithmetic
from hispec.generation import LM
from hispec.model import graphs
from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.checkpoint import open_checkpoint
from hispec.model.config import ModelConfig
from hispec.model.exits import Exits
from hispec.model.gpu import gpu_passes
from hispec.model.linear import Linear
from hispec.model.llama import Llama

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CONFIG = ModelConfig(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_positions=480,
    tie_word_embeddings=True,
    attention_bias=True,
    mlp_bias=False,
    rope={"rope_type": "default", "rope_theta": 10000.0},
)


def random_llama(dtype: torch.dtype, max_positions: int = CONFIG.max_positions) -> Llama:
    """A random model whose last two layers change little, so that exits are often right."""
    config = replace(CONFIG, max_positions=max_positions)
    exact_arithmetic()
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=draw) * std).to(DEVICE, dtype)

    def linear(out: int, size: int, std: float = 1.0, bias: bool = False) -> Linear:
        return Linear(noise(out, size, std=std * size**-0.5), noise(out) if bias else None)

    blocks = [
        Block(
            1 + noise(32, std=0.1),
            linear(64, 32, bias=True),
            linear(32, 32, (1.0, 0.3, 0.3)[layer], bias=layer == 0),
            1 + noise(32, std=0.1),
            linear(80, 32),
            linear(32, 40, (1.0, 0.3, 0.3)[layer]),
        )
        for layer in range(3)
    ]
    words = Linear(noise(53, 32))
    model = Llama(config, words, blocks, 1 + noise(32, std=0.1), words)
    passes, why = gpu_passes(config, model.rotary, dtype, DEVICE, blocks[0], words)
    assert passes is not None, why
    model.narrow, model.why_not_native = passes, ""
    return model


def open_gpu_lm(folder: Path, exits: Exits | None = None) -> LM:
    """A saved model in fp32 on the GPU's passes; nothing ends its texts."""
    exact_arithmetic()
    checkpoint = open_checkpoint(folder)
    with torch.inference_mode():
        model = Llama.load(checkpoint, torch.float32, DEVICE, layout="plain")
        what = torch.float32, DEVICE, model.blocks[0], model.head
        passes, why = gpu_passes(model.config, model.rotary, *what)
        assert passes is not None, why
        model.narrow, model.why_not_native = passes, ""
    lm = LM(checkpoint, model, exits)
    lm.eos = frozenset()  # a random model ends its texts at random
    return lm


def past_of(model: Llama, length: int) -> KVCache:
    """A cache that knows random keys and values of so many positions."""
    kv = model.new_cache([3]).kv
    draw = torch.Generator().manual_seed(length)
    kv.storage[..., :length, :] = torch.randn(3, 2, 2, length, 8, generator=draw).to(DEVICE)
    return kv


def random_rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn((count, 32), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run(model: Llama, x: Tensor, widths: Sequence[int], kv: Any = None, start: int = 0) -> Tensor:
    kv = model.new_cache([3]).kv if kv is None else kv
    out, position = [], start
    for part in x.split(list(widths)):
        out.append(model.run_layers(part, 0, 3, position, kv))
        position += len(part)
    return torch.cat(out)


@contextmanager
def replaying() -> Iterator[list[Callable[[bool], None]]]:
    """Inside, graphs are captured and replayed in Python; yields what was captured."""
    captured: list[Callable[[bool], None]] = []

    class Replay:
        def __init__(self, work: Callable[[bool], None]) -> None:
            captured.append(work)
            self.replay = lambda: work(True)

    with mock.patch.object(graphs.Graphs, "_capture", lambda self, work: Replay(work)):
        yield captured
