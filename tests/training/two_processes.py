"""Trains small heads for a few steps and saves their weights: run under torch.distributed.run."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from training.exit_setup import make_cache, make_exits

from hispec.model.checkpoint import open_checkpoint
from hispec_training.loop import Recipe, Trainer, make_optimizer


def main(model: str, work: str, out: str, way: str = "") -> None:
    accelerator = Accelerator(cpu=True)
    checkpoint = open_checkpoint(model)
    with accelerator.main_process_first():
        cache = make_cache(Path(work) / "cache", checkpoint)
    exits = make_exits(checkpoint, cache)
    recipe = Recipe(
        steps=5, batch_targets=64, accumulate=2, warmup_steps=1, autocast=False, save_every=2,
        eval_every=3,
    )  # fmt: skip
    if way == "sharded":  # accelerate does this on GPUs alone

        def shard(exits: Any, _: Any) -> tuple[Any, Any]:
            for module in (*exits.heads.values(), exits):
                fully_shard(module)
            return exits, make_optimizer(exits, recipe)

        accelerator.prepare = shard
    trainer = Trainer(exits, cache, cache, recipe, Path(work), accelerator)
    history = trainer.run()
    weights = trainer.weights()
    if accelerator.is_main_process:
        assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1))
        assert len(history.held_out) == 2
        torch.save(weights, out)


main(*sys.argv[1:])
