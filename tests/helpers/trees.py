"""Random draft trees, and what plain decoding makes of each of their branches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from helpers.lms import cells_by_position
from hispec.generation import LM
from hispec.model.cache import Cache
from hispec.model.nodes import MAX_WIDTH, Nodes


def grow(draw: random.Random, nodes: Nodes, count: int) -> None:
    """Adds ``count`` nodes: mostly chains, some bushes, as rounds do."""
    bushy = draw.choice((0.1, 0.4, 1.0))
    for _ in range(count):
        newest = len(nodes) - 1
        nodes.append(draw.randrange(newest + 1) if draw.random() < bushy else newest)


def random_tree(draw: random.Random, root: int, count: int = 0) -> Nodes:
    nodes = Nodes(root)
    grow(draw, nodes, (count or draw.randint(2, MAX_WIDTH)) - 1)
    return nodes


def random_kept(draw: random.Random, nodes: Nodes) -> list[int]:
    """Some of the nodes, each with its ancestors; sometimes a path, sometimes a prefix."""
    way = draw.random()
    if way < 0.3:
        return nodes.path(draw.randrange(len(nodes)))
    if way < 0.5:
        return list(range(draw.randint(1, len(nodes))))
    kept, chance = [0], draw.choice((0.5, 0.9))
    for node in range(1, len(nodes)):
        if nodes.parents[node] in kept and draw.random() < chance:
            kept.append(node)
    return kept


def run_tree(lm: LM, cache: Cache, tokens: Sequence[int], nodes: Nodes, draw: random.Random) -> int:
    """Runs all layers over the tree, in passes over random rows and layers; returns the visits."""
    visits, upto = 0, nodes.root + len(nodes)
    while cache.length < upto:
        boundary = draw.choice(cache.boundaries)
        reach = draw.randint(cache.computed[boundary], upto)
        visits += lm.model.advance(cache, tokens, reach, boundary, nodes=nodes)
    return visits


def leaves(nodes: Nodes) -> list[int]:
    """The nodes that have no child."""
    parents = set(nodes.parents[1:])
    return [node for node in range(len(nodes)) if node not in parents]


def stored(lm: LM, cache: Cache, slots: Sequence[int]) -> list[Tensor]:
    """States at every boundary and every layer's keys and values in these slots."""
    cells = [layer[:, list(slots)] for layer in cells_by_position(lm, cache.kv)]
    return [*(cache.states[boundary][list(slots)] for boundary in cache.boundaries), *cells]


def branches(
    lm: LM, cache: Cache, tokens: Sequence[int], nodes: Nodes
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yields each branch's nodes and what is stored when its tokens are decoded one at a time.

    Args:
        lm: a model.
        cache: knows ``tokens[:nodes.root]``; left so.
        tokens: by slot.
        nodes: the tree.
    """
    root = nodes.root
    for leaf in leaves(nodes):
        path = nodes.path(leaf)
        text = [*tokens[:root], *(tokens[root + node] for node in path)]
        for upto in range(root + 1, len(text) + 1):
            lm.model.advance(cache, text, upto, cache.boundaries[-1])
        yield path, stored(lm, cache, range(root, len(text)))
        cache.truncate(root)


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)
