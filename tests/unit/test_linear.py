"""Rows of a weight, whatever order it lies in."""

from __future__ import annotations

import pytest
import torch

from hispec.model.checkpoint import open_checkpoint
from hispec.model.linear import Layout, Linear
from hispec.model.llama import Llama, best_layout


@pytest.mark.parametrize("layout", ["plain", "tiles", "pairs"])
def test_rows_come_back_as_they_went_in(layout: Layout) -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = Linear(weight, layout=layout)
    rows = [0, 49, 17, 17, 15, 16]
    assert linear.take(torch.tensor(rows)).equal(weight[rows])


def test_weights_in_an_order_that_compiled_passes_do_not_read_go_through_torch(tiny_llama) -> None:
    model = Llama.load(
        open_checkpoint(str(tiny_llama)), torch.bfloat16, torch.device("cpu"), layout="plain"
    )
    own = best_layout(model.config, torch.bfloat16, model.device)
    assert (model.narrow.name == "compiled") == (own == "plain")
