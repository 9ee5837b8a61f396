"""Rows of a weight, whatever order it lies in."""

from __future__ import annotations

import pytest
import torch
from helpers.builds import skip_or_fail

from hispec.model.checkpoint import open_checkpoint
from hispec.model.linear import Layout, Linear
from hispec.model.llama import Llama, best_layout
from hispec.model.native import native_library


@pytest.mark.parametrize("layout", ["plain", "tiles", "pairs"])
def test_rows_come_back_as_they_went_in(layout: Layout) -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = Linear(weight, layout=layout)
    rows = [0, 49, 17, 17, 15, 16]
    assert linear.take(torch.tensor(rows)).equal(weight[rows])


def test_weights_in_an_order_that_compiled_passes_do_not_read_go_through_torch(make_llama) -> None:
    checkpoint, device = open_checkpoint(str(make_llama(head_dim=32))), torch.device("cpu")
    library, why = native_library(checkpoint.config, torch.bfloat16, device)
    if library is None:
        skip_or_fail(why)
    assert best_layout(checkpoint.config, torch.bfloat16, device) in ("tiles", "pairs")
    model = Llama.load(checkpoint, torch.bfloat16, device, layout="plain")
    assert model.narrow.name == "torch" and "read" in model.why_not_native
