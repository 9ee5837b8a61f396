"""LoRA adapters of random matrices, as peft saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANKS = {"model.layers.0.self_attn.q_proj": 4, "model.layers.5.mlp.down_proj": 2}


def write_adapter(folder: Path, base: Path, **changes: Any) -> Path:
    """A random bf16 adapter for a tiny Llama, its two modules of ranks 4 and 2."""
    shapes = {"q_proj": (64, 64), "down_proj": (64, 96)}
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for module, rank in RANKS.items():
        rows, columns = shapes[module.rsplit(".", 1)[-1]]
        for half, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            name = f"base_model.model.{module}.lora_{half}.weight"
            tensors[name] = (torch.randn(shape, generator=generator) * 0.3).bfloat16()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": {r"layers\.(0)\..+": 4},
        "alpha_pattern": {r"layers\.(0)\..+": 8},
        "bias": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder
