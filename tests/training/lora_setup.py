"""A small adaptation of the tiny model, its recipe and its trainer: what the LoRA tests share."""

import dataclasses

import torch

from hispec_training.adapt import LoraRecipe, LoraTrainer
from hispec_training.adapter import LoraShape, Student, add_lora

EXITS = (1, 3)
SHAPE = LoraShape(rank=8, deep_rank=2, alpha=1.0)
RECIPE = LoraRecipe(
    exits=EXITS, steps=6, batch_tokens=150, warmup_steps=2, eval_every=3, save_every=2,
    autocast=False,
)  # fmt: skip


def make_student(checkpoint, shape=SHAPE, exits=EXITS):
    return Student(add_lora(checkpoint, exits, shape, torch.float32, seed=0))


def make_trainer(checkpoint, cache, folder, **recipe):
    changed = dataclasses.replace(RECIPE, **recipe)
    return LoraTrainer(make_student(checkpoint), cache, cache, changed, folder)
