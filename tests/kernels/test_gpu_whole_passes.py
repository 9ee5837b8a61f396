"""A level's pass is one graph, whatever its head is made of, with the bits of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.gpu_llama import open_gpu_lm, replaying
from helpers.lms import HEAD_KINDS, chain, save_exits, save_model

from hispec.engine import Decoder
from hispec.generation import LM
from hispec.hierarchy import Hierarchy, Level
from hispec.model.checkpoint import open_checkpoint
from hispec.model.graphed_head import GraphedHead
from hispec.model.graphs import Graphs
from hispec.model.sender import Message
from hispec.sampling import Sampling

PROMPT, COUNT = list(range(3, 12)), 8
RANKING = (Level(0, 2, ranks=True), Level(2, 3, ranks=True))
TREES = Hierarchy(RANKING, "trees", (("context", 6),), 6, adaptive=False)
STRICT = chain((0, 2), (2, 3))
HEADS = [("deep", "deep reduced"), ("block", "affine reduced"), ()]


@pytest.fixture(scope="module", params=HEADS, ids=["deep", "block and affine", "own"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = save_model(tmp_path_factory.mktemp("whole") / "llama", "tied mha")
    if not request.param:
        return open_gpu_lm(folder)
    kinds = {e: HEAD_KINDS[kind] for e, kind in zip((0, 2), request.param, strict=True)}
    return open_gpu_lm(
        folder, save_exits(folder.with_name("exits"), open_checkpoint(folder), kinds)
    )


@contextmanager
def counting() -> Iterator[dict[str, list[int]]]:
    """Inside, counts by level pass: graphs that run, and messages that are sent."""
    counts: dict[str, list[int]] = {"graphs": [], "messages": []}
    run, send, pass_over = Graphs.run, Message.send, Decoder.pass_over

    def counted(what: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            if counts[what]:
                counts[what][-1] += 1
            return original(*args)

        return call

    def passed(*args: Any) -> Any:
        for row in counts.values():
            row.append(0)
        return pass_over(*args)

    with (
        mock.patch.object(Graphs, "run", counted("graphs", run)),
        mock.patch.object(Message, "send", counted("messages", send)),
        mock.patch.object(Decoder, "pass_over", passed),
    ):
        yield counts


def answer(lm: LM, hierarchy: Hierarchy, **options: Any) -> list[int]:
    settings = {"max_new_tokens": COUNT, "learn": False, **options}
    return lm.generate(PROMPT, hierarchy=hierarchy, **settings).token_ids


@pytest.mark.parametrize("hierarchy", [STRICT, TREES], ids=["strict", "trees"])
def test_a_pass_is_one_graph_told_in_one_message(lm: LM, hierarchy: Hierarchy) -> None:
    wanted = answer(lm, chain())
    with counting() as counts:
        assert answer(lm, hierarchy) == wanted
    assert len(counts["graphs"]) > 3
    assert set(counts["graphs"]) == set(counts["messages"]) == {1}


def test_a_head_in_a_graph_is_the_head_step_by_step(lm: LM) -> None:
    check_heads(lm, [STRICT, TREES], Sampling())


def test_so_it_is_under_noise(lm: LM) -> None:
    check_heads(lm, [STRICT], Sampling(0.8, seed=7), max_new_tokens=4)


def check_heads(
    lm: LM, hierarchies: Sequence[Hierarchy], sampling: Sampling, **options: Any
) -> None:
    """Each pass of an exit, from captured graphs, is compared with a fresh head's steps."""
    passes, compared = lm.model.narrow, 0

    def checked(head: Any) -> Any:
        whole = head._whole
        assert isinstance(whole, GraphedHead)

        def best(cache: Any, first: int, nodes: Any, asked: Any, lifts: Any) -> Any:
            nonlocal compared
            found = whole.best(cache, first, nodes, asked, lifts)
            assert found is not None
            found = found[0].clone(), found[1].clone()  # they hold until the next graph
            fresh = head
            if lm.exits:
                fresh = lm.exits.head(head.exit_layer, lm.model, lm.checkpoint)
            with passes.graphs.kernel_by_kernel():
                x = fresh._last(cache, first, nodes)
                steps = passes.best(head.head, x, head.norm, asked, head.vocab_ids)
            assert torch.equal(found[0], steps[0])
            # Up to rounding: a fresh head takes the prompt in wider passes.
            torch.testing.assert_close(found[1], steps[1], rtol=1e-4, atol=1e-6)
            compared += 1
            return found

        return mock.patch.object(head, "_whole", mock.Mock(best=best))

    with passes.graphs.kernel_by_kernel():
        wanted = answer(lm, chain(), sampling=sampling, **options)
    with ExitStack() as stack:
        captured = stack.enter_context(replaying())
        stack.enter_context(mock.patch.object(passes.graphs, "on", True))
        for exit_layer in (0, 2):
            stack.enter_context(checked(lm.head(exit_layer)))
        for hierarchy in hierarchies:
            assert answer(lm, hierarchy, sampling=sampling, **options) == wanted
    assert compared > 3 and len(captured) > 1
    lm._cache = None  # and with it the graphs
    passes._of_heads.clear()
