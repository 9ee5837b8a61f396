"""Trees: a node is what plain decoding of its path would have made of it, bit for bit.

Whatever stands between its slots, however its rows were cut into passes, and whatever was dropped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from helpers.laws import equal_caches, random_prompt
from helpers.lms import recording
from helpers.trees import (
    branches,
    grow,
    random_kept,
    random_tree,
    run_tree,
    same,
    stored,
)
from torch import Tensor

from hispec.bench.methods import numerics
from hispec.generation import LM
from hispec.model.cache import Cache
from hispec.model.exits import ExitHead
from hispec.model.llama import Llama
from hispec.model.nodes import MAX_WIDTH, Nodes

KINDS = ("torch fp32", "torch bf16", "compiled fp32", "compiled bf16", "avx2 fp32", "avx2 bf16")
#: Before, at and behind the borders of attention: 32, 128 and 512 positions.
ROOTS = (0, 1, 20, 31, 107, 128, 250, 490, 512)
BOUNDARIES = ([6], [2, 6], [1, 2, 4, 6], [3, 6])


def trees_are_branches(lm: LM, root: int, seed: int, boundaries: list[int]) -> None:
    """A tree's states, keys and values are those of its branches decoded one by one."""
    draw, model = random.Random(seed), lm.model
    tokens = random_prompt(seed, root + MAX_WIDTH)
    with torch.inference_mode():
        cache, alone = (model.new_cache(boundaries) for _ in range(2))
        for one in (cache, alone):
            model.prefill(one, tokens[:root])
        for count in (2, 3, 4, 8, MAX_WIDTH):
            nodes = random_tree(draw, root, count)
            run_tree(lm, cache, tokens, nodes, draw)
            for path, wanted in branches(lm, alone, tokens, nodes):
                slots = [root + node for node in path]
                same(stored(lm, cache, slots), wanted)
                last = model.logits(cache.states[boundaries[-1]][slots])
                assert torch.equal(last, model.logits(wanted[len(boundaries) - 1]))
            cache.truncate(root)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("root", ROOTS)
def test_a_tree_is_its_branches(zoo, kind: str, root: int) -> None:
    trees_are_branches(zoo("gqa", kind), root, root, BOUNDARIES[root % 4])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in ("tied mha", "biases")
        for kind in KINDS
        # the compiled passes cover multiples of 32
        if name != "tied mha" or kind.startswith("torch")
    ],
)
def test_a_tree_is_its_branches_in_other_models(zoo, name: str, kind: str) -> None:
    lm = zoo(name, kind)
    trees_are_branches(lm, 250, 3, [2, lm.model.config.num_layers])


@pytest.mark.parametrize("kind", ["torch fp32", "torch bf16"])
def test_when_narrow_passes_are_padded(zoo, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = zoo("gqa", kind)
    monkeypatch.setattr(lm.model.narrow, "min_width", 5)
    for root in (3, 250, 500):
        trees_are_branches(lm, root, root, [2, 4, 6])


@pytest.mark.parametrize("root", [0, 20, 240])
def test_in_fast_numerics_up_to_rounding(zoo, root: int) -> None:
    lm, draw = zoo("gqa"), random.Random(root)
    tokens = random_prompt(root, root + MAX_WIDTH)
    with torch.inference_mode(), numerics(lm.model, exact=False):
        cache, alone = (lm.model.new_cache([2, 6]) for _ in range(2))
        for one in (cache, alone):
            lm.model.prefill(one, tokens[:root])
        nodes = random_tree(draw, root, 20)
        run_tree(lm, cache, tokens, nodes, draw)
        for path, wanted in branches(lm, alone, tokens, nodes):
            found = stored(lm, cache, [root + node for node in path])
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def decode_trees(
    lm: LM, seed: int, boundaries: list[int]
) -> Iterator[tuple[Cache, list[int], int]]:
    """Random rounds of growing, running and dropping, each of which ends by keeping one branch.

    Yields:
        The cache, the tokens it knows and the layer visits so far, after the prompt and each round.
    """
    draw, model = random.Random(seed), lm.model
    cache = model.new_cache(boundaries)
    tokens = random_prompt(seed, draw.choice((3, 25, 120, 250)))
    visits = model.prefill(cache, tokens)
    yield cache, tokens, visits
    for _ in range(4):
        root = len(tokens)
        tokens.append(draw.randrange(256))
        nodes = Nodes(root)
        for _ in range(6):
            grow(draw, nodes, min(draw.randint(0, 9), MAX_WIDTH - len(nodes)))
            tokens += [draw.randrange(256) for _ in range(root + len(nodes) - len(tokens))]
            boundary = draw.choice(boundaries)
            reach = draw.randint(root, root + len(nodes))
            visits += model.advance(cache, tokens, reach, boundary, nodes=nodes)
            kept = random_kept(draw, nodes) if draw.random() < 0.6 else list(range(len(nodes)))
            known = {
                b: sum(root + node < known for node in kept) for b, known in cache.computed.items()
            }
            model.keep(cache, root, kept)
            assert cache.computed == {b: root + count for b, count in known.items()}
            tokens[root:] = [tokens[root + node] for node in kept]
            nodes.keep(kept)
        visits += run_tree(lm, cache, tokens, nodes, draw)
        path = nodes.path(draw.randrange(len(nodes)))
        model.keep(cache, root, path)
        tokens[root:] = [tokens[root + node] for node in path]
        yield cache, tokens, visits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_what_was_dropped_was_never_there(zoo, kind: str, seed: int) -> None:
    lm, boundaries = zoo("gqa", kind), BOUNDARIES[seed]
    with torch.inference_mode():
        alone = lm.model.new_cache(boundaries)
        for cache, tokens, _ in decode_trees(lm, seed, boundaries):
            if alone.length == 0:
                lm.model.prefill(alone, tokens)
            while alone.length < len(tokens):
                lm.model.advance(alone, tokens, alone.length + 1, boundaries[-1])
            equal_caches(lm, cache, alone)


@pytest.mark.parametrize("seed", range(4))
def test_no_layer_runs_twice_for_a_node(zoo, seed: int) -> None:
    lm = zoo("gqa")
    with torch.inference_mode(), recording(lm) as recorder:  # which asserts it
        for *_, visits in decode_trees(lm, seed, BOUNDARIES[seed]):
            assert visits == recorder.visits


def test_keeping_leading_nodes_moves_nothing(zoo, monkeypatch) -> None:
    model, tokens = zoo("gqa").model, random_prompt(1, 30)
    moves: list[list[int]] = []
    monkeypatch.setattr(model.narrow, "move", lambda kv, *slots: moves.append(slots))
    cache = model.new_cache([2, 6])
    model.prefill(cache, tokens[:20])
    nodes = random_tree(random.Random(1), 20, 10)
    model.advance(cache, tokens, 28, 6, nodes=nodes)
    model.advance(cache, tokens, 30, 2, nodes=nodes)
    model.keep(cache, 20, range(9))
    assert cache.computed == {2: 29, 6: 28}
    model.keep(cache, 20, [0, 1, 2, 9])  # of which node 9 is gone
    assert cache.computed == {2: 23, 6: 23}
    model.keep(cache, 20, [0])
    assert cache.computed == {2: 21, 6: 21}
    assert not moves


def test_a_node_that_an_exit_alone_has_seen_moves(zoo) -> None:
    model, tokens = zoo("gqa").model, random_prompt(1, 30)
    cache = model.new_cache([2, 6])
    nodes = random_tree(random.Random(1), 20, 10)
    kept = nodes.path(9)
    with torch.inference_mode():
        model.prefill(cache, tokens[:20])
        model.advance(cache, tokens, 28, 6, nodes=nodes)
        model.advance(cache, tokens, 30, 2, nodes=nodes)
        state = cache.states[2][29].clone()
        model.keep(cache, 20, kept)
    assert cache.computed == {2: 20 + len(kept), 6: 20 + sum(node < 8 for node in kept)}
    assert torch.equal(cache.states[2][20 + len(kept) - 1], state)


HEADS = ("deep reduced", "block", "deep", "affine reduced")


@pytest.mark.parametrize("kind", ["torch fp32", "compiled fp32"])
@pytest.mark.parametrize("exit_layer", range(1, 5), ids=HEADS)
def test_a_head_drafts_on_a_tree_as_on_its_branches(zoo, kind: str, exit_layer: int) -> None:
    """Up to rounding: heads only draft, so nothing keeps them inside a width class."""
    lm, draw = zoo("gqa", kind, HEADS), random.Random(exit_layer)
    assert lm.exits is not None
    model, boundaries = lm.model, [exit_layer, 6]
    for root in (1, 30, 300):
        tokens = random_prompt(root, root + MAX_WIDTH)
        head, fresh = (lm.exits.head(exit_layer, model, lm.checkpoint) for _ in range(2))
        with torch.inference_mode():
            cache, alone = (model.new_cache(boundaries) for _ in range(2))
            for one in (cache, alone):
                model.prefill(one, tokens[:root])
            nodes = random_tree(draw, root, 20)
            for upto in (4, 11, 20):  # of which the head sees the last rows only
                model.advance(cache, tokens, root + upto, exit_layer, nodes=nodes)
                logits = head.logits(cache, root + upto - 2, nodes)
                for row, node in enumerate(range(upto - 2, upto)):
                    text = [*tokens[:root], *(tokens[root + x] for x in nodes.path(node))]
                    wanted = last_logits(model, fresh, alone, text, root)
                    close(logits[row], wanted)
            kept = random_kept(draw, nodes)
            moved = next((new for new, node in enumerate(kept) if new != node), len(kept))
            model.keep(cache, root, kept)
            head.truncate(root + moved)
            tokens[root:] = [tokens[root + node] for node in kept]
            nodes.keep(kept)
            logits = head.logits(cache, root + len(nodes) - 1, nodes)
            text = [*tokens[:root], *(tokens[root + x] for x in nodes.path(len(nodes) - 1))]
            close(logits[-1], last_logits(model, fresh, alone, text, root))


def last_logits(model: Llama, head: ExitHead, cache: Cache, text: list[int], root: int) -> Tensor:
    """Returns a head's logits after a chain behind ``root``, and forgets it."""
    nodes = Nodes.line(root, len(text) - root)
    model.advance(cache, text, len(text), head.exit_layer, nodes=nodes)
    logits = head.logits(cache, root, nodes)[-1]
    for one in (cache, head):
        one.truncate(root)
    return logits


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
