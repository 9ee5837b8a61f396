"""A shallow cut: the first layers of a Llama with its own norm and head, as a model of its own.

Where the norm and head were trained to work at an exit (LayerSkip, ``hispec train --mode lora``),
the layers below it are a small Llama that says what the exit says. It can draft for a target of
the same vocabulary that was not trained so.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from hispec.errors import UsageError
from hispec.model.checkpoint import Checkpoint, expected_shapes
from hispec.model.config import ModelConfig
from hispec.model.store import require_space
from hispec.model.tensorfile import write_tensors


def write_cut(checkpoint: Checkpoint, layers: int, folder: Path) -> None:
    """``folder`` holds the first layers of a model, its norm, head, tokenizer and all else.

    Args:
        checkpoint: the model.
        layers: how many, from 1 to one less than it has.
        folder: an existing folder.

    Raises:
        UsageError: it has not as many layers.
        CheckpointError: a tensor is damaged, or there is no room.
        OSError: the folder cannot be written.
    """
    depth = checkpoint.config.num_layers
    if not 1 <= layers < depth:
        raise UsageError(f"a cut of {checkpoint.name} has 1 to {depth - 1} layers, got {layers}.")
    raw = dict(checkpoint.config.raw)
    raw["num_hidden_layers"] = layers
    specs = [
        (name, checkpoint.files[name].dtype(name), shape)
        for name, shape in expected_shapes(ModelConfig.from_dict(raw)).items()
    ]
    num_bytes = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in specs)
    require_space(folder, num_bytes + (16 << 20), f"{layers} layers of {checkpoint.name}")
    for file in checkpoint.path.iterdir():  # tokenizer, template, generation settings
        if file.is_file() and ".safetensors" not in file.name and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    write_tensors(folder / "model.safetensors", specs, checkpoint.tensor)
