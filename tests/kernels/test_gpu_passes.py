"""The GPU's passes on a tiny Llama, against torch's and against themselves."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers.gpu_llama import (
    CONFIG,
    DEVICE,
    DTYPES,
    TOLERANCE,
    past_of,
    random_llama,
    random_rows,
    replaying,
    run,
)

from hispec.model.gpu import GpuPasses
from hispec.model.llama import Llama
from hispec.model.nodes import Nodes
from hispec.model.passes import Asked
from hispec.model.torch_passes import TorchPasses
from hispec_kernels import exit_head


@pytest.fixture(params=DTYPES, scope="module")
def model(request: pytest.FixtureRequest) -> Llama:
    with torch.inference_mode():
        return random_llama(DTYPES[request.param])


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
def test_a_second_tile_of_rows_changes_nothing(model: Llama) -> None:
    start, x = 120, random_rows(20)
    first = run(model, x, (20,), past_of(model, start), start)
    assert torch.equal(run(model, x, (3, 17), past_of(model, start), start), first)


@torch.inference_mode()
def test_contexts_grow_from_bucket_to_bucket() -> None:
    model = random_llama(torch.float32, max_positions=1200)
    theirs = TorchPasses(model.config, model.rotary, model.dtype, DEVICE, exact=True)
    ours, reference = past_of(model, 1100), past_of(model, 1100)
    passes = model.narrow
    assert isinstance(passes, GpuPasses)
    passes.graphs.on = True
    with replaying() as captured:
        for start in (500, 700, 1100) * 2:  # in 4, 8 and all splits
            x = random_rows(3, seed=start)
            wanted = theirs.run(model.blocks, x, start, reference, 0)
            found = model.run_layers(x, 0, 3, start, ours)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(captured) == 3, "a graph a bucket"


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
    with mock.patch.object(passes.graphs, "on", True), replaying() as captured:
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
