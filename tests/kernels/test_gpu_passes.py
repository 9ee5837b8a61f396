"""The GPU's passes end to end on a tiny Llama, in Triton's interpreter where there is no GPU.

Graphs are stood in for by what they promise: work captured once is done again as it was captured,
on whatever the static buffers hold by then.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from helpers.interpreter import exact_dots

from hispec.engine import Decoder
from hispec.errors import HispecError, UsageError
from hispec.hierarchy import Hierarchy, Level
from hispec.model import graphs, llama
from hispec.model.block import Block
from hispec.model.cache import KVCache
from hispec.model.config import ModelConfig
from hispec.model.exits import SharedHead
from hispec.model.gpu import GpuPasses, gpu_passes
from hispec.model.level import Exit
from hispec.model.linear import Linear
from hispec.model.llama import Llama
from hispec.model.nodes import Nodes
from hispec.model.passes import Asked
from hispec.model.torch_passes import TorchPasses
from hispec.sampling import Sampling
from hispec.tree import UNREAD, Tree
from hispec_kernels import exit_head, gpu

exact_dots()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}
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


def random_llama(dtype: torch.dtype) -> Llama:
    """A random model whose last two layers change little, so that exits are often right."""
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
    model = Llama(CONFIG, words, blocks, 1 + noise(32, std=0.1), words)
    passes, why = gpu_passes(CONFIG, model.rotary, dtype, DEVICE, blocks[0])
    assert passes is not None, why
    model.narrow, model.why_not_native = passes, ""
    return model


@pytest.fixture(params=DTYPES, scope="module")
def model(request: pytest.FixtureRequest) -> Llama:
    with torch.inference_mode():
        return random_llama(DTYPES[request.param])


@pytest.fixture(scope="module")
def fp32() -> Llama:
    with torch.inference_mode():
        return random_llama(torch.float32)


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


# ------------------------------------------------------------------ passes


@torch.inference_mode()
def test_states_are_the_references_whatever_the_widths(model: Llama) -> None:
    start, x = 125, random_rows(6)
    first = run(model, x, (5, 1), past_of(model, start), start)
    torch_passes = TorchPasses(CONFIG, model.rotary, model.dtype, DEVICE, exact=True)
    wanted = torch_passes.run(model.blocks, x.to(model.dtype), start, past_of(model, start), 0)
    error = float((first - wanted).abs().max() / wanted.abs().max())
    assert error <= TOLERANCE[model.dtype], error
    assert torch.equal(run(model, x, (1, 3, 2), past_of(model, start), start), first)


@torch.inference_mode()
def test_ranges_of_layers_add_up(fp32: Llama) -> None:
    x = random_rows(5)
    wanted = run(fp32, x, (5,))
    kv = fp32.new_cache([3]).kv
    for start, stop in ((0, 1), (1, 3)):
        x = fp32.run_layers(x, start, stop, 0, kv)
    assert torch.equal(x, wanted)


@torch.inference_mode()
def test_nodes_of_a_tree_equal_plain_decoding_of_their_paths(fp32: Llama) -> None:
    root = 126
    nodes, rows = Nodes(root), random_rows(7, seed=1)
    for parent in (0, 0, 1, 2, 3, 5):
        nodes.append(parent)
    tree, plain = past_of(fp32, root), past_of(fp32, root)
    x = fp32.run_layers(rows[:4], 0, 3, root, tree, nodes=nodes)
    x = torch.cat([x, fp32.run_layers(rows[4:], 0, 3, root + 4, tree, nodes=nodes)])
    for leaf in (6, 4):
        path = nodes.path(leaf)
        assert torch.equal(x[path], run(fp32, rows[path], (1,) * len(path), plain, root))
    path = nodes.path(6)
    moves = [(root + node, root + new) for new, node in enumerate(path) if new != node]
    fp32.narrow.move(tree, *zip(*moves, strict=True))
    run(fp32, rows[path], (len(path),), plain, root)
    end = root + len(path)
    assert torch.equal(tree.storage[:, :, :, :end], plain.storage[:, :, :, :end])


@torch.inference_mode()
def test_products_of_any_width(model: Llama) -> None:
    x, norm = random_rows(37), model.norm
    whole = model.narrow.project(model.head, x, norm)
    wide = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.double()
    wanted = wide @ model.head.weight.double().T
    assert float((whole - wanted).abs().max() / wanted.abs().max()) <= TOLERANCE[model.dtype]
    for width, first in ((1, 36), (3, 30), (17, 20)):
        found = model.narrow.project(model.head, x[first : first + width], norm)
        assert torch.equal(found, whole[first : first + width]), width
    plain = model.narrow.project(model.blocks[0].qkv, x[:2])
    assert plain.shape == (2, 64)


@torch.inference_mode()
@pytest.mark.parametrize("seed", [None, 5])
def test_a_heads_best_ids_are_those_of_its_logits(fp32: Llama, seed: int | None) -> None:
    passes, x, norm = fp32.narrow, random_rows(3), fp32.norm
    assert isinstance(passes, GpuPasses)
    logits = passes.project(fp32.head, x, norm)
    ids = torch.arange(53, device=DEVICE).flip(0) * 3
    with mock.patch.object(passes._graphs, "on", True), replaying() as captured:
        for temperature, at in ((0.7, 4), (1.3, 9), (0.9, 30)):
            positions = list(range(at, at + 3))
            asked = Asked(2, temperature, seed, positions)
            found = passes.best(fp32.head, x, norm, asked, ids)
            places = torch.tensor(positions, device=DEVICE)
            wanted = exit_head.best(logits, 2, temperature, seed, places, ids)
            assert torch.equal(found[0], wanted[0])
            torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-7)
    assert len(captured) == 1
    passes._of_heads.clear()


@torch.inference_mode()
def test_stored_keys_and_values_are_those_of_torch(model: Llama) -> None:
    projected = random_rows(6).to(model.dtype)
    found, wanted = (model.new_cache([3]).kv for _ in range(2))
    plain = TorchPasses(CONFIG, model.rotary, model.dtype, DEVICE, exact=True)
    for passes, kv in ((model.narrow, found), (plain, wanted)):
        passes.store(projected, 90, kv, 1)
    assert torch.equal(found.storage, wanted.storage)


@torch.inference_mode()
def test_a_graph_serves_its_whole_bucket(fp32: Llama) -> None:
    """Other rows, places and trees than it was captured with, and nothing of them kept."""
    passes = fp32.narrow
    assert isinstance(passes, GpuPasses)
    x, rows = random_rows(4), random_rows(7, seed=2)
    nodes = Nodes(4)
    for parent in (0, 0, 1, 2, 3, 5):
        nodes.append(parent)

    def everything() -> list[Tensor]:
        kv = fp32.new_cache([3]).kv
        found = [run(fp32, x, (1, 2, 1), kv)]
        for start, stop in ((0, 2), (2, 5), (5, 7)):
            at = 4 + start
            found.append(fp32.run_layers(rows[start:stop], 0, 3, at, kv, nodes=nodes))
        found += [passes.project(fp32.head, x[:n], fp32.norm) for n in (1, 4, 2)]
        return found

    with passes.kernel_by_kernel():
        wanted = everything()
    passes._of_heads.clear()
    with mock.patch.object(passes._graphs, "on", True), replaying() as captured:
        found = everything()
    passes._of_heads.clear()
    assert len(captured) == 3  # chains, trees, and the head
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_graphs_are_for_what_comes_back_and_can_be_switched_off(monkeypatch) -> None:
    done: list[bool] = []
    known: dict[Any, Any] = {}
    ours = graphs.Graphs(torch.device("cuda"))
    assert ours.on
    with replaying() as captured:
        for _ in range(3):
            ours.run(known, "a", done.append)
        ours.run(known, "b", done.append)
    assert done == [False, True, True, False]
    assert len(captured) == 1
    monkeypatch.setenv("HISPEC_GRAPHS", "0")
    assert not graphs.Graphs(torch.device("cuda")).on


# ------------------------------------------------------------------ the engine on them


def decode(model: Llama, hierarchy: Hierarchy, sampling: Sampling, count: int) -> list[int]:
    tokens = [random.Random(1).randrange(53) for _ in range(9)]
    length = len(tokens)
    boundaries = [*hierarchy.exit_layers, 3]
    picker = sampling.picker(length, vocab_size=53)
    with torch.inference_mode():
        cache = model.new_cache(boundaries)
        model.prefill(cache, tokens)
        tokens.append(
            picker.picks(
                model.logits(cache.states[3][length - 1 : length]), [length], lambda _: tokens
            )[0]
        )
        levels = [Exit(model, cache, b, SharedHead(model, b)) for b in boundaries]
        decoder = Decoder(levels, tokens, hierarchy, picker)
        while len(tokens) < length + count:
            decoder.round(length + count - len(tokens))
    return tokens[length:]


SAMPLINGS = {
    "greedy": Sampling(),
    "T=0.8": Sampling(0.8, seed=3),
    "top 9": Sampling(0.8, seed=3, top_k=9),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_engine_yields_the_references_tokens(fp32: Llama, sampling: Sampling) -> None:
    ours, count = fp32.narrow, 6
    plain = decode(fp32, Hierarchy(), sampling, count)
    speculative = decode(fp32, Hierarchy((Level(1, 2), Level(2, 3))), sampling, count)
    assert speculative == plain
    fp32.narrow = TorchPasses(CONFIG, fp32.rotary, fp32.dtype, DEVICE, exact=True)
    try:
        assert decode(fp32, Hierarchy(), sampling, count) == plain
    finally:
        fp32.narrow = ours


def test_the_host_looks_at_a_round_once(fp32: Llama) -> None:
    seen: list[int] = []
    read = Tree.read

    def counted(tree: Tree) -> None:
        seen.append(tree.tokens.count(UNREAD))
        read(tree)

    hierarchy, count = Hierarchy((Level(1, 3),)), 12
    with mock.patch.object(Tree, "read", counted):
        drafted = decode(fp32, hierarchy, Sampling(), count)
    assert drafted == decode(fp32, Hierarchy(), Sampling(), count)
    assert seen[0] == 3, "a whole window is drafted before any of it is read"
    assert 0 not in seen[:-1], "every look is at a round's whole window"
    assert len(seen) < count, "some were accepted"


# ------------------------------------------------------------------ what is not there


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 7}, "even head sizes"),
        ({"head_dim": 130}, "head sizes up to 128"),
        ({"heads": 34}, "16 query heads a KV head, not 17"),
        ({"vocabulary": 2**21}, "vocabularies up to"),
        ({"hidden": 2**16}, "hidden sizes up to"),
        ({"dtype": torch.float64}, "float64"),
        ({}, ""),
    ],
)
def test_what_the_kernels_cover(changes: dict[str, Any], words: str) -> None:
    sizes = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocabulary": 100}
    found = gpu.uncovered(**{**sizes, "dtype": torch.float32, **changes})
    assert words in found
    assert bool(found) == bool(changes)


def test_where_the_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not = gpu.why_not.__wrapped__  # not the remembered answer
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    assert why_not(cuda) == "T4 has compute capability 7.5; the kernels need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert why_not(cuda) == ""
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    assert why_not(cuda) == "Triton is not installed (pip install triton)"
    assert "mps" in why_not(torch.device("mps")) or "Triton" in why_not(torch.device("mps"))


@torch.inference_mode()
def test_a_build_that_fails_is_a_reason(fp32: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.setattr(GpuPasses, "probe", fail)
    found = gpu_passes(CONFIG, fp32.rotary, torch.float32, DEVICE, fp32.blocks[0])
    assert found == (
        None,
        "Triton cannot build the kernels here: Failed to find C compiler.",
    )


@torch.inference_mode()
def test_out_of_memory_says_what_was_needed(fp32: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run(fp32, random_rows(2), (2,))

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(llama, "Cache", fail)
        words = r"a cache for 480 tokens of context needs \d+\.\d GiB.*shorter --context"
        with pytest.raises(HispecError, match=words):
            fp32.new_cache([3])
    assert torch.equal(run(fp32, random_rows(2), (2,)), wanted), "the model stays usable"


def test_no_memory_for_graphs_means_no_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    ours = graphs.Graphs(torch.device("cuda"))
    done: list[bool] = []

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with (
        mock.patch.object(torch.cuda, "graph_pool_handle", lambda: (0, 0)),
        mock.patch.object(torch.cuda, "CUDAGraph", object),
        mock.patch.object(torch.cuda, "graph", out_of_memory, create=True),
    ):
        known: dict[Any, Any] = {}
        for _ in range(3):
            ours.run(known, "a", done.append)
    assert done == [False, False, False]
    assert capsys.readouterr().err.count("no memory left for CUDA graphs") == 1


def test_a_context_the_model_does_not_have_is_refused() -> None:
    checkpoint = mock.Mock(config=CONFIG)
    for context in (0, 481):
        with pytest.raises(UsageError, match=r"context must be in \[2, 480\]"):
            Llama.load(checkpoint, torch.float32, torch.device("cpu"), context=context)
