"""The engine on the GPU's passes: the reference's tokens, and one look a round."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.gpu_llama import (
    CONFIG,
    DEVICE,
    random_llama,
    replaying,
)

from hispec.drafter import Drafter
from hispec.engine import Decoder
from hispec.hierarchy import Hierarchy, Level
from hispec.model.exits import SharedHead
from hispec.model.gpu import GpuPasses
from hispec.model.graphs import Graphs
from hispec.model.level import Exit
from hispec.model.llama import Llama
from hispec.model.torch_passes import TorchPasses
from hispec.sampling import Sampling
from hispec.sources.context import Context
from hispec.tree import UNREAD, Tree


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
        drafter = Drafter([Context()], hierarchy) if hierarchy.sources else None
        if drafter:
            drafter.begin(tokens)
        decoder = Decoder(levels, tokens, hierarchy, picker, drafter=drafter)
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


DRAFTED = {
    "chain": Hierarchy((Level(1, 2),)),
    "trees": Hierarchy((), sources=(("context", 6),), nodes=6),
    "ranked trees": Hierarchy((Level(2, 2, ranks=True),), sources=(("context", 6),), nodes=6),
}


@pytest.fixture(scope="module")
def half() -> tuple[Llama, list[int]]:
    with torch.inference_mode():
        model = random_llama(torch.float16)
    return model, decode(model, Hierarchy(), Sampling(), 14)


@pytest.mark.parametrize("hierarchy", DRAFTED.values(), ids=DRAFTED)
def test_graphs_in_half_precision_yield_plain_decoding_s_tokens(
    half: tuple[Llama, list[int]], hierarchy: Hierarchy
) -> None:
    model, plain = half
    passes = model.narrow
    assert isinstance(passes, GpuPasses)
    with mock.patch.object(passes.graphs, "on", True), replaying() as captured:
        assert decode(model, hierarchy, Sampling(), len(plain)) == plain
    assert captured, "some shapes came back"


def test_a_pass_that_builds_or_captures_is_no_price(half: tuple[Llama, list[int]]) -> None:
    model, plain = half
    passes, run = model.narrow, Decoder.run
    assert isinstance(passes, GpuPasses)
    usual, priced = list[bool](), list[int]()

    def counted(decoder: Decoder, level: Any) -> Any:
        before = len(captured), passes.prepared
        found = run(decoder, level)
        usual.append((len(captured), passes.prepared) == before)
        return found

    with (
        mock.patch.object(passes, "graphs", Graphs(DEVICE)),
        mock.patch.object(Decoder, "run", counted),
        mock.patch.object(Drafter, "took", lambda _, level, rows, seconds: priced.append(rows)),
        replaying() as captured,
    ):
        passes.graphs.on = True
        narrow = Hierarchy((), sources=(("context", 1),), nodes=1)
        assert decode(model, narrow, Sampling(), len(plain)) == plain
    assert not usual[0] and captured, "first the kernels are built, then a graph is captured"
    assert len(priced) == sum(usual) > 0


def test_the_host_looks_at_a_round_once(fp32: Llama) -> None:
    seen: list[int] = []
    read = Tree.read

    def counted(tree: Tree, beside: torch.Tensor | None = None) -> list[list[int]]:
        seen.append(tree.tokens.count(UNREAD))
        assert beside is not None, "the picks are looked at with the drafts"
        return read(tree, beside)

    hierarchy, count = Hierarchy((Level(1, 3),)), 12
    with mock.patch.object(Tree, "read", counted):
        drafted = decode(fp32, hierarchy, Sampling(), count)
    assert drafted == decode(fp32, Hierarchy(), Sampling(), count)
    assert seen[0] == 3, "a whole window is drafted before any of it is read"
    assert 0 not in seen[:-1], "every look is at a round's whole window"
    assert len(seen) < count, "some were accepted"
