"""Rows of a pass: where they come from and go to, and what they receive; see test_gpu_kernels."""

from __future__ import annotations

import pytest
import torch
from helpers.gpu_rows import DEVICE, DTYPES, bad, noise, plan_of, untouched

from hispec.model.nodes import Nodes
from hispec_kernels.gpu import plan as plan_layout
from hispec_kernels.gpu.rows import add_features, embed_rows, load_rows, store_rows


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.mark.parametrize("size", [1, 33, 576, 1500])
@pytest.mark.parametrize("width", [1, 3, 16])
def test_rows_between_states_and_a_pass(size: int, width: int) -> None:
    slot, states, x = 40, noise(64, size), noise(16, size)
    plan = torch.tensor([slot, width], dtype=torch.int32, device=DEVICE)
    wanted = torch.cat([states[slot : slot + width], x[width:]])
    load_rows(states, plan, x)
    assert torch.equal(x, wanted)
    before, rows = states.clone(), noise(16, size)
    before[slot : slot + width] = rows[:width]
    store_rows(rows, plan, states, rows=width)
    assert torch.equal(states, before)


def test_rows_are_rounded_as_they_are_loaded(dtype: torch.dtype) -> None:
    states, x = noise(64, 33), bad(16, 33, dtype=dtype)
    load_rows(states, torch.tensor([7, 5], dtype=torch.int32, device=DEVICE), x, rows=5)
    assert torch.equal(x[:5], states[7:12].to(dtype))
    untouched(x[5:])


@pytest.mark.parametrize("size", [1, 33, 576, 1500])
@pytest.mark.parametrize("tree", [False, True])
def test_features_by_distance_from_the_root(size: int, tree: bool) -> None:
    """Rows before the root have the first feature, rows far below it the last."""
    nodes = Nodes(40)
    for parent in (0, 0, 1, 3, 4) if tree else range(5):
        nodes.append(parent)
    slot, width = 38, 8
    plan = plan_of(slot, width, nodes if tree else None)
    plan[plan_layout.ROOT] = nodes.root
    x, features = noise(16, size, seed=1), noise(3, size, seed=2)
    places = [min(max(at - 40, 0), 2) for at in nodes.positions(slot, slot + width)]
    assert set(places) == {0, 1, 2}
    wanted = x.clone()
    wanted[:width] += features[places]
    add_features(x, features, plan, rows=width)
    assert torch.equal(x, wanted)


@pytest.mark.parametrize(("width", "size"), [(1, 1), (3, 33), (16, 576), (2, 1500)])
def test_embeddings_of_a_pass(width: int, size: int, dtype: torch.dtype) -> None:
    words, x = noise(50, size, dtype=dtype), noise(16, size)
    plan = plan_of(40, width, None)
    ids = torch.randint(50, (width,), generator=torch.Generator().manual_seed(width)).to(DEVICE)
    plan[plan_layout.IDS : plan_layout.IDS + width] = ids
    wanted = torch.cat([words[ids].float(), x[width:]])
    embed_rows(words, plan, x)
    assert torch.equal(x, wanted)
