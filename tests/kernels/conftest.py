"""What the tests of the compiled passes run on: a dtype and a build."""

from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite("helpers.compiled")
from helpers.compiled import BUILDS, DTYPES  # noqa: E402

#: Tiles and dots are for bf16 alone.
KINDS = [(x, y) for x in DTYPES for y in BUILDS if x == "bf16" or not y.startswith("emulated")]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind).replace(" ", "-"))
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def build(kind: tuple[str, str]) -> str:
    return kind[1]


@pytest.fixture
def dtype(kind: tuple[str, str]) -> torch.dtype:
    return DTYPES[kind[0]]
