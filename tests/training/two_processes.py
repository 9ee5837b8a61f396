"""Trains small heads for a few steps and saves their weights: run under torch.distributed.run."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from training.exit_setup import make_cache, make_exits

from hispec.model.checkpoint import open_checkpoint
from hispec_training.loop import Recipe, Trainer


def main(model: str, work: str, out: str) -> None:
    accelerator = Accelerator(cpu=True)
    checkpoint = open_checkpoint(model)
    with accelerator.main_process_first():
        cache = make_cache(Path(work) / "cache", checkpoint)
    exits = make_exits(checkpoint, cache)
    recipe = Recipe(
        steps=5, batch_targets=64, accumulate=2, warmup_steps=1, autocast=False, save_every=2
    )
    Trainer(exits, cache, None, recipe, Path(work), accelerator).run()
    if accelerator.is_main_process:
        assert accelerator.num_processes == int(__import__("os").environ.get("WORLD_SIZE", 1))
        torch.save({name: p.detach() for name, p in exits.named_parameters()}, out)


main(*sys.argv[1:])
