"""A tiny model of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_llama import save_tiny_llama
from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("hf") / "llama"
    save_tiny_llama(folder, seed=3)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
