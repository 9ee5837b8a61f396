"""The compiled products by themselves, and the best ids of a vocabulary head.

Vocabularies fill no tile.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.compiled import PAIRED, TOLERANCE, Setup, from_bytes, near, threads

from hispec.model.linear import Linear
from hispec.model.passes import Asked


@pytest.mark.parametrize("build", PAIRED)
@pytest.mark.parametrize("rows", [1, 16, 33, 261])
@pytest.mark.parametrize("size", [32, 576])
def test_products_of_bytes(rows: int, size: int, build: str) -> None:
    setup = Setup("least", torch.bfloat16, build)
    bias, norm, x = setup.random(rows), setup.random(size), setup.random(67, size).float()
    linear = Linear(setup.random(rows, size) / math.sqrt(size), bias, "bytes")
    whole = setup.passes.project(linear, x, norm)
    scaled = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.double()
    near(whole, scaled @ from_bytes(linear).T + bias.double(), TOLERANCE[torch.bfloat16])
    for width in (1, 3, 16, 17, 32):
        assert torch.equal(
            setup.passes.project(linear, x[5 : 5 + width], norm), whole[5 : 5 + width]
        )


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("layout", ["own", "draft"])
def test_the_best_ids_of_a_head_are_those_of_its_logits(
    dtype: torch.dtype, build: str, layout: str, ids: bool
) -> None:
    setup = Setup("least", dtype, build)
    passes = setup.passes
    weight, norm, x = setup.random(261, 96) / 10, setup.random(96), setup.random(5, 96).float()
    linear = Linear(weight, layout=passes.layout if layout == "own" else passes.draft_layout)
    names = torch.randperm(1000, generator=setup.generator)[:261] if ids else None
    logits = passes.project(linear, x, norm)
    for k, temperature in ((1, 1.0), (8, 0.7), (300, 1.3)):
        asked = Asked(k, temperature, None, range(5))
        found = passes.best(linear, x, norm, asked, names)
        assert found is not None
        columns = logits.sort(stable=True, descending=True).indices
        wanted = columns[:, :k] if names is None else names[columns[:, :k]]
        assert torch.equal(found[0], wanted)
        odds = (logits / temperature).softmax(-1).gather(-1, columns[:, :k])
        torch.testing.assert_close(found[1], odds, rtol=1e-4, atol=1e-7)
    assert passes.best(linear, x, norm, Asked(1, 1.0, 5, range(5)), names) is None


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 48, 261])
@pytest.mark.parametrize("size", [32, 96, 576])
def test_products_of_any_rows_and_widths(
    rows: int, size: int, dtype: torch.dtype, build: str
) -> None:
    setup = Setup("least", dtype, build)
    weight, bias, norm = setup.random(rows, size), setup.random(rows), setup.random(size)
    x = setup.random(67, size).float()
    linear = Linear(weight / math.sqrt(size), bias, setup.layout)
    w, b = (weight / math.sqrt(size)).double(), bias.double()
    for scale in (None, norm):
        wide = x.double()
        if scale is not None:
            wide = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale.double()
        whole = setup.passes.project(linear, x, scale)
        near(whole, wide @ w.T + b, TOLERANCE[dtype])
        for width in (1, 3, 16, 17, 31, 32, 33):
            for first in (0, 5, 67 - width):
                found = setup.passes.project(linear, x[first : first + width], scale)
                assert torch.equal(found, whole[first : first + width]), (width, first)
        with threads(3):
            assert torch.equal(setup.passes.project(linear, x, scale), whole)
