"""CUDA graphs: what is captured, what it serves, and what happens without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.gpu_llama import (
    random_rows,
    replaying,
    run,
)
from torch import Tensor

from hispec.model import graphs
from hispec.model.gpu import GpuPasses
from hispec.model.graphs import Step
from hispec.model.llama import Llama
from hispec.model.nodes import Nodes
from hispec.model.passes import Asked


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

    with passes.graphs.kernel_by_kernel():
        wanted = everything()
    passes._of_heads.clear()
    with mock.patch.object(passes.graphs, "on", True), replaying() as captured:
        found = everything()
    passes._of_heads.clear()
    assert len(captured) == 3  # chains, trees, and the head
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@torch.inference_mode()
def test_a_graph_moves_the_states_of_its_own_boundaries(fp32: Llama) -> None:
    """Texts take turns, in caches of their own and with other boundaries."""
    passes, texts = fp32.narrow, ([3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9])
    kept = ([1, 3], [1, 3], [3], [1, 3], [0, 3], [0, 3])
    ways, texts = ([1, 3], [1, 3], [3], [3], [0, 3], [3]), (*texts, *[texts[0]] * 3)
    assert isinstance(passes, GpuPasses)

    def everything() -> list[Tensor]:
        caches = [fp32.new_cache(boundaries) for boundaries in kept]
        for upto in (1, 2, 4):  # by kernels, captured, replayed
            for cache, tokens, way in zip(caches, texts, ways, strict=True):
                for boundary in way:
                    fp32.advance(cache, tokens, upto, boundary)
        return [cache.states[b][:4] for cache in caches for b in cache.boundaries]

    with passes.graphs.kernel_by_kernel():
        wanted = everything()
    with mock.patch.object(passes.graphs, "on", True), replaying() as captured:
        found = everything()
    assert len(captured) == 9  # a range of layers and its boundaries each; the embeddings alone
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not torch.equal(wanted[0], wanted[2]) and not torch.equal(wanted[1], wanted[4])
    *states, words, first, again, second = wanted
    assert torch.equal(states[0], states[5]) and torch.equal(states[1], states[6])
    assert torch.equal(words, again) and torch.equal(words, fp32.embed(texts[0][:4]).float())
    assert torch.equal(first, states[1]) and torch.equal(second, states[1])


@torch.inference_mode()
def test_ids_that_a_graph_leaves_are_those_it_was_asked_for(fp32: Llama) -> None:
    """Over one table of ids or another, and where the same is run kernel by kernel."""
    passes, x = fp32.narrow, random_rows(1)
    assert isinstance(passes, GpuPasses)
    asked = Asked(2, 1.0, None, range(1, 2))
    table = torch.arange(100, 100 + fp32.head.rows, device=x.device)

    def best(ids: Tensor | None = None) -> list[int]:
        found = passes.best(fp32.head, x, fp32.norm, asked, ids)
        assert found is not None
        return found[0][0].tolist()

    passes._of_heads.clear()
    with mock.patch.object(passes.graphs, "on", True), replaying() as captured:
        wanted = [best() for _ in range(3)][-1]
        assert [best(table) for _ in range(3)][-1] == [100 + token for token in wanted]
        assert len(captured) == 2
        with passes.graphs.kernel_by_kernel():
            assert best() == wanted
        assert best() == wanted and best(table) == [100 + token for token in wanted]
        assert len(captured) == 2
    passes._of_heads.clear()


def test_graphs_are_for_what_comes_back_and_can_be_switched_off(monkeypatch) -> None:
    done: list[bool] = []
    known: dict[Any, Any] = {}
    ours = graphs.Graphs(torch.device("cuda"))
    assert ours.on
    with replaying() as captured:
        for _ in range(3):
            ours.run(known, [Step("a", done.append)])
        ours.run(known, [Step("b", done.append)])
    assert done == [False, True, True, False]
    assert len(captured) == 1
    monkeypatch.setenv("HISPEC_GRAPHS", "0")
    assert not graphs.Graphs(torch.device("cuda")).on


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.\nGPU 0 has"),
            "no memory left for CUDA graphs, which need 2.50 GiB more, so passes run kernel by "
            "kernel, which is slower: lower --context.",
        ),
        (
            RuntimeError("operation not permitted when stream is capturing\nCompile with"),
            "no CUDA graphs here (operation not permitted when stream is capturing), so passes run "
            "kernel by kernel, which is slower.",
        ),
    ],
)
def test_what_cannot_be_captured_runs_kernel_by_kernel(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Capture:
        """As torch's: what is not allowed makes ending the capture fail, too."""

        def __init__(self, *_: Any, **__: Any) -> None:
            current.append("capture")

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    ours, current, done = graphs.Graphs(torch.device("cuda")), ["default"], list[bool]()

    def work(whole: bool) -> None:
        done.append(whole)
        if whole:
            raise error

    with (
        mock.patch.object(torch.cuda, "graph_pool_handle", lambda: (0, 0)),
        mock.patch.object(torch.cuda, "CUDAGraph", object),
        mock.patch.object(torch.cuda, "graph", Capture, create=True),
        mock.patch.object(torch.cuda, "current_stream", lambda: current[-1]),
        mock.patch.object(torch.cuda, "set_stream", current.append),
    ):
        known: dict[Any, Any] = {}
        for _ in range(3):
            ours.run(known, [Step("a", work)])
    assert done == [False, True, False, False]
    assert current == ["default", "capture", "default"], "nothing else runs in the capture's stream"
    assert capsys.readouterr().err == f"hispec: {said}\n"


def test_graphs_share_a_pool_and_are_captured_once() -> None:
    graph, pools = mock.Mock(), list[Any]()

    @contextmanager
    def capture(_: Any, *, pool: Any, capture_error_mode: str) -> Iterator[None]:
        pools.append(pool)
        yield

    ours, done = graphs.Graphs(torch.device("cuda")), list[bool]()
    with (
        mock.patch.object(torch.cuda, "graph_pool_handle", mock.Mock(side_effect=["pool"])),
        mock.patch.object(torch.cuda, "CUDAGraph", lambda: graph),
        mock.patch.object(torch.cuda, "graph", capture, create=True),
        mock.patch.object(torch.cuda, "current_stream", mock.Mock()),
    ):
        known: dict[Any, Any] = {}
        with pytest.raises(ValueError, match="once"):
            ours.run(known, [Step("a", mock.Mock(side_effect=ValueError("once")))])
        assert not known, "what has not run is not captured: its kernels may not be built"
        for _ in range(3):
            ours.run(known, [Step("a", done.append)])
            ours.run(known, [Step("b", done.append)])
    assert done == [False, False, True, True]
    assert graph.replay.call_count == 2 * 2 and pools == ["pool", "pool"]
