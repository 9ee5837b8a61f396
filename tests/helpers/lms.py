"""Tiny models whose exits are worth something, and the plainest decoding there is.

In a random Llama every layer matters as much as any other, so an exit's pick equals the target's by
luck alone and acceptance is 0. Here the layers from ``quiet_from`` on add only ``loudness`` times
what they would: exits agree often, but not always, and every path of a round is taken.
"""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.builds import skip_or_fail
from helpers.cells import by_position
from helpers.tiny_llama import save_tiny_llama
from hispec.generation import LM
from hispec.hierarchy import Hierarchy
from hispec.hierarchy import Level as ExitLevel
from hispec.model import llama, native
from hispec.model.cache import KVCache
from hispec.model.checkpoint import Checkpoint, open_checkpoint
from hispec.model.cut import write_cut
from hispec.model.device import DTYPES
from hispec.model.exits import FORMAT, Exits
from hispec.model.llama import PREFILL_CHUNK, Llama
from hispec.model.native import NativePasses
from hispec.model.numerics import find_min_width
from hispec.model.passes import Lift
from hispec.model.store import cache_dir
from hispec.model.torch_passes import TorchPasses
from hispec.sampling import Sampling
from hispec_kernels import cpu

#: Shapes of the family; ``quiet_from`` and ``loudness`` are ours, the rest is transformers' config.
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {"quiet_from": 2, "loudness": 0.2, "head_dim": 32, "max_position_embeddings": 1024},
    "tied mha": {
        "quiet_from": 1,
        "loudness": 0.15,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
    },
    "biases": {
        "quiet_from": 3,
        "loudness": 0.2,
        "hidden_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "attention_bias": True,
        "mlp_bias": True,
        "max_position_embeddings": 1024,
    },
    "long": {"num_hidden_layers": 1, "head_dim": 64, "max_position_embeddings": 2304},
    "loud": {"num_hidden_layers": 5, "head_dim": 32, "max_position_embeddings": 1024},
    "echo": {"quiet_from": 2, "loudness": 0.0, "head_dim": 32, "max_position_embeddings": 1024},
}


@dataclass(frozen=True)
class HeadKind:
    """What a random exit head is made of; all False is a norm of its own."""

    affine: bool = False
    block: bool = False
    deep: bool = False
    feature: bool = False
    reduced: bool = False


HEAD_KINDS = {
    "norm": HeadKind(),
    "affine reduced": HeadKind(affine=True, reduced=True),
    "block": HeadKind(affine=True, block=True),
    "deep reduced": HeadKind(block=True, deep=True, reduced=True),
    "deep": HeadKind(affine=True, block=True, deep=True, feature=True),
}


def save_model(folder: Path, name: str, **changes: Any) -> Path:
    """Saves one of ``MODELS`` and returns its folder."""
    config = {**MODELS[name], **changes}
    quiet_from, loudness = config.pop("quiet_from", None), config.pop("loudness", 1.0)
    save_tiny_llama(folder, **config)
    if quiet_from is not None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for key in tensors:
            if ".o_proj." in key or ".down_proj." in key:
                tensors[key] *= loudness if int(key.split(".")[2]) >= quiet_from else 1.0
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def open_lm(
    folder: Path, dtype: str = "fp32", exits: Exits | None = None, passes: str = "torch"
) -> LM:
    """Returns the model as ``hispec.load`` would, but for the width class file and end tokens.

    Args:
        folder: from :func:`save_model`.
        dtype: ``fp32`` or ``bf16``.
        exits: from :func:`save_exits`.
        passes: ``torch``; ``compiled``, for this processor; or ``avx2``, compiled for an older one.
            The test is skipped where there is no compiler or it is another kind of processor.
    """
    checkpoint = open_checkpoint(folder)
    with torch.inference_mode(), _library(passes):
        model = Llama.load(checkpoint, DTYPES[dtype], torch.device("cpu"))
        if passes != "torch" and model.why_not_native:
            skip_or_fail(model.why_not_native)
        assert isinstance(model.narrow, TorchPasses) == (passes == "torch")
        model.narrow.min_width = find_min_width(model)
    lm = LM(checkpoint, model, exits)
    lm.eos = frozenset()  # a random model ends its texts at random
    return lm


@contextmanager
def _library(passes: str) -> Iterator[None]:
    """What ``native_library`` finds while a model is loaded."""
    if passes == "torch":
        with mock.patch.object(llama, "native_library", lambda *_: (None, "not asked for")):
            yield
    elif passes == "avx2":
        with mock.patch.object(native, "_library", _avx2_library):
            yield
    else:
        yield


@functools.cache
def _avx2_library() -> Any:
    if platform.machine() != "x86_64":
        raise cpu.BuildError("not an x86-64 processor")
    flags = [flag.replace("-march=native", "-march=haswell") for flag in cpu._FLAGS]
    with mock.patch.object(cpu, "_FLAGS", flags):
        return cpu.load_library(cache_dir() / "native")


def cells_by_position(lm: LM, kv: KVCache) -> list[Tensor]:
    """Returns every layer's keys, then every layer's values, as (H_kv, S, D_h)."""
    passes = lm.model.narrow
    if not isinstance(passes, NativePasses):
        return [*kv.keys, *kv.values]
    return [
        *(by_position(keys, "keys", passes.layout) for keys in kv.keys),
        *(by_position(values, "values", passes.layout) for values in kv.values),
    ]


def save_exits(
    folder: Path, checkpoint: Checkpoint, kinds: dict[int, HeadKind], seed: int = 0
) -> Exits:
    """Saves random exit heads that stay close to the model's own norm and head."""
    folder.mkdir(parents=True)
    config, draw = checkpoint.config, torch.Generator().manual_seed(seed)
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def noise(*shape: int, std: float = 0.1) -> Tensor:
        return torch.randn(shape, generator=draw) * std

    for exit_layer, kind in kinds.items():
        norm = checkpoint.tensor("model.norm.weight")
        tensors = {"norm.weight": norm + noise(width, std=0.02)}
        if kind.affine:
            tensors["proj.weight"] = torch.eye(width) + noise(width, width, std=0.01)
            tensors["proj.bias"] = noise(width, std=0.01)
        if kind.reduced:  # in no order at all
            ids = torch.randperm(config.vocab_size, generator=draw)
            tensors["vocab_ids"] = ids[: config.vocab_size * 9 // 10]
        if kind.block:
            tensors |= {
                "block.input_layernorm.weight": 1 + noise(width),
                "block.self_attn.q_proj.weight": noise(queries, width),
                "block.self_attn.k_proj.weight": noise(keys, width),
                "block.self_attn.v_proj.weight": noise(keys, width),
                "block.self_attn.o_proj.weight": noise(width, queries, std=0.03),
                "block.post_attention_layernorm.weight": 1 + noise(width),
                "block.mlp.gate_proj.weight": noise(inner, width),
                "block.mlp.up_proj.weight": noise(inner, width),
                "block.mlp.down_proj.weight": noise(width, inner, std=0.03),
            }
        if kind.deep:
            tensors |= {
                "block.context_layernorm.weight": 1 + noise(width),
                "block.context_k_proj.weight": noise(keys, width),
                "block.context_v_proj.weight": noise(keys, width),
            }
        if kind.feature:
            tensors["feature_layernorm.weight"] = 1 + noise(width)
            tensors["feature_proj.weight"] = noise(3 * width, width, std=0.01)  # 3 distances
        save_file(tensors, folder / f"exit_{exit_layer}.safetensors")
    record = {
        "format": FORMAT,
        "base": {"model": checkpoint.name, "fingerprint": checkpoint.fingerprint},
        "exits": [{"exit_layer": exit_layer} for exit_layer in kinds],
    }
    (folder / "config.json").write_text(json.dumps(record))
    return Exits.open(folder)


def chain(*levels: tuple[int, int]) -> Hierarchy:
    """Returns the hierarchy of (exit_layer, window) pairs."""
    return Hierarchy(tuple(ExitLevel(*level) for level in levels))


def separate(lm: LM, kind: str, layers: int = 3, context: int = 0) -> str:
    """Opens a separate model for ``lm`` and returns its path: its own first layers, run as it runs.

    Args:
        lm: its model.
        kind: as the zoo's.
        layers: as many as it has: the target itself.
        context: positions, if not as many as the target's.
    """
    path = lm.checkpoint.path
    if layers < lm.model.config.num_layers or context:
        path = path.with_name(f"{path.name} {layers} {context}")
    if not path.exists():
        path.mkdir()
        write_cut(lm.checkpoint, layers, path)
        config = json.loads((path / "config.json").read_text())
        config["max_position_embeddings"] = context or config["max_position_embeddings"]
        (path / "config.json").write_text(json.dumps(config))
    with _library(kind.split()[0]):
        lm.separate(str(path))
    return str(path)


def over(hierarchy: Hierarchy, model: str, window: int, *, ranks: bool = False) -> Hierarchy:
    """Returns the hierarchy with a separate model below its levels."""
    return replace(hierarchy, levels=(ExitLevel(0, window, ranks, model), *hierarchy.levels))


def plain(lm: LM, prompt: Sequence[int], count: int, sampling: Sampling | None = None) -> list[int]:
    """Returns ``count`` tokens of plain decoding: no engine, no cache object, no stream."""
    sampling = sampling or Sampling()
    model, tokens = lm.model, list(prompt)
    layers = model.config.num_layers
    kv = model.new_cache([layers]).kv
    picker = sampling.picker(len(prompt), vocab_size=model.config.vocab_size)
    with torch.inference_mode():
        for start in range(0, len(tokens), PREFILL_CHUNK):
            x = model.embed(tokens[start : start + PREFILL_CHUNK])
            x = model.run_layers(x, 0, layers, start, kv, wide=True)
        while True:
            tokens.append(picker.picks(model.logits(x[-1:]), [len(tokens)], lambda _: tokens)[0])
            if len(tokens) == len(prompt) + count:
                return tokens[len(prompt) :]
            x = model.run_layers(model.embed(tokens[-1:]), 0, layers, len(tokens) - 1, kv)


class Recorder:
    """Watches a model's passes: which layers ran for the token in each slot.

    Attributes:
        passes: (start layer, stop layer, slot, rows) of every call, in order.
        done: slot → the number of layers that have run for what stands there now.
        visits: (token, layer) pairs run.
    """

    def __init__(self) -> None:
        self.passes: list[tuple[int, int, int, int]] = []
        self.done: dict[int, int] = {}
        self.visits = 0

    def note(self, start: int, stop: int, slot: int, rows: int) -> None:
        self.passes.append((start, stop, slot, rows))
        for place in range(slot, slot + rows):
            done = self.done.get(place, 0)
            assert done == start, (
                f"layers {start} to {stop} ran for the token at {place}, of which {done} were done"
            )
            self.done[place] = stop
            self.visits += stop - start

    def truncate(self, length: int) -> None:
        self.done = {slot: layers for slot, layers in self.done.items() if slot < length}

    def keep(self, root: int, kept: Sequence[int]) -> None:
        stay = [self.done.get(root + node, 0) for node in kept]
        self.truncate(root)
        self.done |= dict(enumerate(stay, root))


@contextmanager
def recording(lm: LM) -> Iterator[Recorder]:
    """Records the passes of ``lm``'s model and what its cache drops."""
    lm._cache = None  # a fresh one, so that nothing is known from before
    lm._known.clear()
    with watching(lm.model) as recorder:
        yield recorder
    lm._cache = None  # it still reports here
    lm._truncate(0)


@contextmanager
def recording_separate(lm: LM, path: str) -> Iterator[Recorder]:
    """Records the passes of one of ``lm``'s separate models and what its cache drops."""
    separate = lm.separate(path)
    with watching(separate.model) as recorder:
        fresh = separate.model.new_cache([separate.boundary])
        with mock.patch.object(separate, "cache", fresh):
            yield recorder
    separate.cache.truncate(0)


@contextmanager
def watching(model: Llama) -> Iterator[Recorder]:
    """Records a model's passes and what caches that it makes meanwhile drop."""
    recorder = Recorder()
    run_layers, run = model.run_layers, model.run
    new_cache, keep = model.new_cache, model.keep

    def watched_run(
        x: Tensor, start: int, stop: int, position: int, kv: Any, **options: Any
    ) -> Tensor:
        recorder.note(start, stop, position, x.shape[0])
        return run_layers(x, start, stop, position, kv, **options)

    def watched_lifts(lifts: Sequence[Lift], **options: Any) -> None:
        for lift in lifts:
            recorder.note(lift.first, lift.first + len(lift.blocks), lift.position, lift.width)
            run([lift], **options)

    def watched_cache(boundaries: Sequence[int], positions: int | None = None) -> Any:
        cache = new_cache(boundaries, positions)
        forget, reset = cache.truncate, cache.reset

        def watched_truncate(length: int) -> None:
            recorder.truncate(length)
            forget(length)

        def watched_reset(boundaries: Sequence[int]) -> None:
            recorder.truncate(0)
            reset(boundaries)

        cache.truncate, cache.reset = watched_truncate, watched_reset
        return cache

    def watched_keep(cache: Any, root: int, kept: Sequence[int]) -> None:
        recorder.keep(root, kept)
        keep(cache, root, kept)

    with (
        mock.patch.object(model, "keep", watched_keep),
        mock.patch.object(model, "run_layers", watched_run),
        mock.patch.object(model, "run", watched_lifts),
        mock.patch.object(model, "new_cache", watched_cache),
    ):
        yield recorder
