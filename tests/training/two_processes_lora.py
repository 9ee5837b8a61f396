"""Trains LoRA updates for a few steps and saves them: run alone and by a launcher, to compare.

Usage: two_processes_lora.py MODEL CACHE WORK OUT
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from training.exit_setup import make_cache

from hispec.model.checkpoint import open_checkpoint
from hispec_training.adapt import LoraRecipe, LoraTrainer
from hispec_training.adapter import LoraShape, Student, add_lora


def main() -> None:
    model, cache_folder, work, out = map(Path, sys.argv[1:])
    accelerator = Accelerator(cpu=True)
    checkpoint = open_checkpoint(model)
    with accelerator.main_process_first():
        cache = make_cache(cache_folder, checkpoint)
    student = Student(add_lora(checkpoint, (1, 3), LoraShape(8, 2), torch.float32, seed=0))
    recipe = LoraRecipe(
        exits=(1, 3), steps=6, batch_tokens=150, accumulate=2, autocast=False, curriculum="all"
    )
    trainer = LoraTrainer(student, cache, cache, recipe, work, accelerator)
    history = trainer.run()
    if accelerator.is_main_process:
        state = dict(zip(trainer.names, trainer.parameters, strict=True))
        state = {name: p.detach() for name, p in state.items()}
        losses = [row["loss_3"] for row in history.losses]
        torch.save({**state, "losses": torch.tensor(losses)}, out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
