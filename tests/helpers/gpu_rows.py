"""Rows for kernels, and outputs that are poisoned before a call."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.interpreter import exact_arithmetic
from hispec.model.nodes import Nodes
from hispec_kernels.gpu import plan as plan_layout

exact_arithmetic()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Relative to the largest value.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
POISON = float("nan")


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def bad(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, POISON, dtype=dtype, device=DEVICE)


def count(width: int) -> Tensor:
    return torch.tensor([width], dtype=torch.int32, device=DEVICE)


def rows_for(width: int) -> int:
    return 16 if width <= 16 else 32


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    error = float((found.double() - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance, error


def untouched(rest: Tensor) -> None:
    assert rest.isnan().all(), "wrote to rows that are not there"


def plan_of(position: int, width: int, nodes: Nodes | None) -> Tensor:
    plan = torch.full((plan_layout.LENGTH,), 7, dtype=torch.int32)
    plan[0], plan[1] = position, width
    plan[2] = plan_layout.STRAIGHT if nodes is None else nodes.root
    if nodes is not None:
        plan[36:68] = torch.from_numpy(nodes.depths_array)
        plan[68:] = torch.from_numpy(nodes.paths_array).flatten()
    return plan.to(DEVICE)
