"""What the tests of the passes run on: a dtype and a build, a tiny Llama on the GPU's."""

from __future__ import annotations

import importlib.util
import platform
from typing import TYPE_CHECKING

import pytest
import torch

pytest.register_assert_rewrite("helpers.compiled")
from helpers.compiled import BUILDS, DTYPES  # noqa: E402

if TYPE_CHECKING:
    from hispec.model.llama import Llama

# Where hispec[dev] has Triton, its absence fails.
_TRITON = (platform.system(), platform.machine()) == ("Linux", "x86_64")
if not _TRITON and importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_gpu_*.py"]

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


@pytest.fixture(scope="module")
def fp32() -> Llama:
    from helpers.gpu_llama import random_llama  # needs Triton

    with torch.inference_mode():
        return random_llama(torch.float32)
