"""The compiled passes against fp64, and against themselves: no row may know its company."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.compiled import (
    CHUNKINGS,
    PAIRED,
    SHAPES,
    TOLERANCE,
    Setup,
    from_bytes,
    near,
    threads,
)

from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.torch_passes import TorchPasses


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_equal_fp64_whatever_the_widths(shape: str, dtype: torch.dtype, build: str) -> None:
    setup = Setup(shape, dtype, build)
    first = setup.run(CHUNKINGS[0])
    near(first, setup.reference(), TOLERANCE[dtype])
    for widths in CHUNKINGS[1:]:
        assert torch.equal(setup.run(widths), first), widths
    for count in (2, 3, 5):
        with threads(count):
            assert torch.equal(setup.run(CHUNKINGS[2]), first), f"{count} threads"


@pytest.mark.parametrize("shape", ["smollm2", "group of 7", "head of 96"])
def test_a_pass_writes_its_own_positions_and_reads_none_behind(
    shape: str, dtype: torch.dtype, build: str
) -> None:
    setup = Setup(shape, dtype, build)
    clean, dirty = setup.cache(), setup.cache(junk=100.0)
    before = [cells.clone() for cells in setup.by_position(dirty)]
    assert torch.equal(setup.run((120, 17), dirty), setup.run((120, 17), clean))
    for cells, old in zip(setup.by_position(dirty), before, strict=True):
        assert torch.equal(cells[:, :, 137:], old[:, :, 137:])


@pytest.mark.parametrize("shape", ["smollm2", "gqa", "mha of 128", "group of 5", "group of 16"])
def test_rows_of_several_texts_equal_each_text_alone(
    shape: str, dtype: torch.dtype, build: str
) -> None:
    setup = Setup(shape, dtype, build)
    lengths = (0, 1, 127, 128, 130, 255, 31, 5, 16, 64, 33, 200, 15, 2, 100, 3, 90)
    rooms = [-(-(length + 1) // 128) * 128 for length in lengths]
    together = setup.cache(junk=9.0, capacity=sum(rooms))
    starts, wanted = [], []
    for text, (length, room) in enumerate(zip(lengths, rooms, strict=True)):
        start = sum(rooms[:text])
        starts.append(start)
        alone = setup.cache()
        if length:
            setup.run((length,), alone)
        for mine, its in zip(
            (*together.keys, *together.values), (*alone.keys, *alone.values), strict=True
        ):
            mine[:, start : start + room] = its[:, :room]  # whole panels, whatever their order
        row = setup.x[text : text + 1]
        wanted.append(setup.passes.run(setup.blocks, row, length, alone, 0))
    positions, places = torch.tensor(lengths), torch.tensor(starts)
    rows = setup.x[: len(lengths)]
    for count in (1, 3):
        with threads(count):
            found = setup.passes.run_texts(setup.blocks, rows, positions, places, together)
        assert torch.equal(found, torch.cat(wanted)), f"{count} threads"


def random_tree(root: int, generator: random.Random) -> Nodes:
    """A tree of 1 to MAX_WIDTH nodes: near a chain, bushy or in between."""
    nodes, reach = Nodes(root), generator.choice((1, 3, 8, MAX_WIDTH))
    for node in range(1, generator.randint(1, MAX_WIDTH)):
        nodes.append(generator.randrange(max(0, node - reach), node))
    return nodes


@pytest.mark.parametrize("shape", ["smollm2", "gqa", "mha of 128", "group of 5"])
@pytest.mark.parametrize("root", [0, 1, 31, 100, 127, 129, 300])
def test_nodes_of_a_tree_equal_plain_decoding_of_their_paths(
    shape: str, root: int, dtype: torch.dtype, build: str
) -> None:
    setup = Setup(shape, dtype, build)
    generator = random.Random(root)
    past = setup.random(root, setup.config.hidden_size).float()
    for _ in range(3):
        nodes = random_tree(root, generator)
        rows = setup.random(len(nodes), setup.config.hidden_size).float()
        # Passes append nodes below earlier ones; the first may begin before the root.
        early = generator.randint(0, min(root, 5))
        cache = setup.cache(junk=10.0)
        if root > early:
            setup.passes.run(setup.blocks, past[: root - early], 0, cache, 0)
        slots, found = torch.cat([past[root - early :], rows]), []
        start = 0
        while start < len(slots):
            stop = min(len(slots), start + generator.randint(1 if start else early + 1, MAX_WIDTH))
            found.append(
                setup.passes.run(
                    setup.blocks, slots[start:stop], root - early + start, cache, 0, nodes
                )
            )
            start = stop
        states = torch.cat(found)[early:]
        plain = setup.cache()
        if root:
            setup.passes.run(setup.blocks, past, 0, plain, 0)
        leaves = sorted(set(range(len(nodes))) - set(nodes.parents[1:]))
        for leaf in leaves:
            path = nodes.path(leaf)
            wanted = setup.passes.run(setup.blocks, rows[path], root, plain, 0)
            assert torch.equal(states[path], wanted), (nodes.parents, leaf)


def test_moved_slots_hold_what_plain_decoding_would(dtype: torch.dtype, build: str) -> None:
    setup = Setup("gqa", dtype, build)
    nodes = Nodes(100)
    for parent in (0, 0, 2, 1, 3, 5):
        nodes.append(parent)
    path = nodes.path(6)  # 0, 2, 3, 5, 6
    tree, plain = setup.cache(junk=10.0), setup.cache(junk=10.0)
    for cache in (tree, plain):
        setup.run((100,), cache)
    rows = setup.x[100 : 100 + len(nodes)]
    setup.passes.run(setup.blocks, rows, 100, tree, 0, nodes)
    setup.passes.move(tree, [100 + node for node in path[1:]], range(101, 100 + len(path)))
    setup.passes.run(setup.blocks, rows[path], 100, plain, 0)
    for found, wanted in zip(setup.by_position(tree), setup.by_position(plain), strict=True):
        assert torch.equal(found[:, :, : 100 + len(path)], wanted[:, :, : 100 + len(path)])


@pytest.mark.parametrize("build", PAIRED)
@pytest.mark.parametrize("shape", ["gqa", "smollm2", "mha of 128", "group of 5", "head of 256"])
def test_blocks_of_bytes_are_those_of_their_weights(shape: str, build: str) -> None:
    setup = Setup(shape, torch.bfloat16, build)
    assert setup.passes.draft_layout == "bytes"
    setup.blocks = [weights.block("bytes") for weights in setup.weights]
    for weights, block in zip(setup.weights, setup.blocks, strict=True):
        for name, (weight, bias) in weights.linears.items():
            taken = from_bytes(getattr(block, name))
            assert (taken - weight).abs().amax() <= weight.abs().amax() / 100
            weights.linears[name] = (taken, bias)
    first = setup.run(CHUNKINGS[0])
    near(first, setup.reference(), TOLERANCE[torch.bfloat16])
    for widths in CHUNKINGS[1:]:
        assert torch.equal(setup.run(widths), first), widths
    with threads(3):
        assert torch.equal(setup.run(CHUNKINGS[1]), first)


@pytest.mark.parametrize("shape", ["gqa", "head of 96"])
def test_stored_keys_and_values_lie_where_a_pass_reads_them(
    shape: str, dtype: torch.dtype, build: str
) -> None:
    setup = Setup(shape, dtype, build)
    config = setup.config
    projected = setup.random(70, 2 * config.num_kv_heads * config.head_dim)
    found, wanted = setup.cache(), setup.cache()
    plain = TorchPasses(config, setup.rotary, dtype, torch.device("cpu"), exact=True)
    setup.passes.store(projected, 90, found, 1)
    plain.store(projected, 90, wanted, 1)
    for cells, plain_cells in zip(setup.by_position(found), wanted.storage.unbind(1), strict=True):
        if build in ("narrow", "emulated dots"):  # which round products by themselves
            near(cells[1].float(), plain_cells[1].double(), TOLERANCE[dtype])
        else:
            assert torch.equal(cells[1], plain_cells[1])
