"""The training loop of ``lora`` mode: early-exit losses, and a pull back to the original.

A step takes some cached answers of the original and runs the adapted layers as deep as its losses
need. The exits of the curriculum learn the original's picks through the shared norm and head; some
of the texts go on to the last layer, where the divergence from the original's distribution is
added, at some positions of prompts and answers alike. What stops at the deepest exit costs a third
of a full pass, which on a CPU decides how much text is seen. Every step has texts of both kinds: a
full pass every few steps instead, weighing as much more, shakes the optimizer.

A step is a function of the weights, the optimizer's state and the step's number, so a run killed
at any moment and resumed ends with the weights it would have had. Processes share a batch's texts
and add up their gradients; the updates are small, so one sum of one flat tensor does it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from hispec_training.adapter import Student, lora_parameters
from hispec_training.checkpoints import (
    CHECKPOINT,
    History,
    TimeLimit,
    bounded,
    check_same_run,
    diverged,
    learning_rate,
    read_checkpoint,
    resumed,
    write_checkpoint,
)
from hispec_training.curriculum import drop_rates, dropped_layers, exit_weights, exits_at
from hispec_training.divergence import divergence
from hispec_training.losses import sparse_cross_entropy, sparse_targets
from hispec_training.padded import collate, kept_count, text_batches
from hispec_training.shard_cache import Texts
from hispec_training.shards import cut

# Settings that do not change the weights, so that a resumed run may change them.
_FREE = frozenset({"eval_every", "save_every", "eval_texts"})


@dataclass(frozen=True)
class LoraRecipe:
    """How the updates are trained.

    Attributes:
        exits: With a loss.
        steps: Optimizer steps.
        batch_tokens: Padded tokens of one batch, over all processes.
        accumulate: Batches a step adds up.
        lr: Peak learning rate.
        warmup_steps: Linear rise; the fall to zero is a cosine over the rest.
        soft: Weight of the original's distribution against its pick, in [0, 1].
        curriculum: ``all``, ``rotate`` or ``gradual``.
        exit_scale: How much more deeper exits weigh.
        layer_dropout: Chance of the last layer to be left out; lower layers have less.
        keep: Weight of the divergence from the original.
        keep_share: Share of a batch's texts that go on to the last layer.
        keep_fraction: Share of positions with a divergence in those.
        clip: Largest gradient norm.
        seed: Of order, positions and dropped layers.
        eval_every: Steps between looks at the held-out texts.
        save_every: Steps between checkpoints.
        eval_texts: Held-out texts looked at while training.
        autocast: Compute in bf16.
    """

    exits: tuple[int, ...]
    steps: int
    batch_tokens: int = 4096
    accumulate: int = 1
    lr: float = 1e-3
    warmup_steps: int = 20
    soft: float = 0.5
    curriculum: str = "all"
    exit_scale: float = 0.0
    layer_dropout: float = 0.0
    keep: float = 2.0
    keep_share: float = 0.5
    keep_fraction: float = 0.25
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 100
    save_every: int = 100
    eval_texts: int = 48
    autocast: bool = True


class LoraTrainer:
    """One run.

    Args:
        student: The base with updates, at their starting values.
        cache: The original's answers, with its final states.
        held_out: Texts to watch; may be None.
        recipe: How.
        folder: For checkpoints.
        accelerator: Of the launched processes; a plain one if None.
        on_step: Called with each row of the history.
        save_minutes: Also write a checkpoint when the last one is this old.
        minutes: Make the recipe's steps so few that they take about so long.
    """

    def __init__(
        self,
        student: Student,
        cache: Texts,
        held_out: Texts | None,
        recipe: LoraRecipe,
        folder: Path,
        accelerator: Accelerator | None = None,
        on_step: Callable[[dict[str, float]], None] | None = None,
        save_minutes: float = 10.0,
        minutes: float | None = None,
    ) -> None:
        self.limit = None if minutes is None else TimeLimit(minutes)
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        self.student = student.to(self.accelerator.device)
        self.cache, self.held_out = cache, held_out
        self.recipe, self.folder, self.on_step = recipe, folder, on_step
        self.history = History()
        self.step, self.elapsed_s = 0, 0.0
        self.names = sorted(n for n, p in student.named_parameters() if p.requires_grad)
        self.parameters = lora_parameters(student)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0
        )
        self._head = student.head.to(torch.bfloat16 if recipe.autocast else torch.float32)
        self._row_of = torch.arange(len(self._head), device=self.accelerator.device)
        self._rates = drop_rates(student.num_layers, recipe.layer_dropout)
        self._save_s, self._saved = 60 * save_minutes, time.monotonic()

    def run(self) -> History:
        """Trains to the recipe's last step from wherever the run stands.

        Raises:
            HispecError: The loss stops being a number or the disk is full; the last good state is
                in the folder.
        """
        recipe, start = self.recipe, time.perf_counter() - self.elapsed_s
        batches = self._batches(self.step * recipe.accumulate)
        while self.step < self.recipe.steps:
            row = self._one_step([next(batches) for _ in range(recipe.accumulate)])
            self.elapsed_s = time.perf_counter() - start
            row |= {"step": self.step, "seconds": round(self.elapsed_s, 2)}
            self.history.losses.append(row)
            self.recipe = bounded(self.recipe, self.limit, self.history, self.accelerator)
            row["steps"] = self.recipe.steps
            self._tell(row)
            last = self.step == self.recipe.steps
            if self.held_out is not None and (last or self.step % recipe.eval_every == 0):
                self._look()
            stale = time.monotonic() - self._saved > self._save_s
            if last or stale or self.step % recipe.save_every == 0:
                self.save()
        return self.history

    def save(self) -> None:
        """The state stands in the folder; an interrupted write leaves the one before.

        Raises:
            HispecError: The disk is full.
        """
        self._saved = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        state = {
            "weights": {
                n: p.detach().cpu() for n, p in zip(self.names, self.parameters, strict=True)
            },
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "recipe": asdict(self.recipe),
            "minutes": self.limit and self.limit.minutes,
            "history": asdict(self.history),
        }
        write_checkpoint(self.folder / CHECKPOINT, state)

    def resume(self) -> bool:
        """The run stands where the checkpoint left it; False if there is none.

        Raises:
            HispecError: The checkpoint is of another recipe or cannot be read.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            return False
        state = read_checkpoint(path)
        self.recipe = resumed(self.recipe, self.limit, state)
        same = sorted(state["weights"]) == self.names
        check_same_run(path, asdict(self.recipe), state["recipe"], same, "ranks", _FREE)
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self.history = History(**state["history"])
        return True

    def _batches(self, start: int) -> Iterator[list[int]]:
        """Batches from number ``start`` on, without end."""
        epoch = number = 0
        while True:
            batches = text_batches(self.cache, self.recipe.batch_tokens, self.recipe.seed, epoch)
            yield from batches[max(0, start - number) :]
            number += len(batches)
            epoch += 1

    def _one_step(self, parts: list[list[int]]) -> dict[str, float]:
        recipe, world = self.recipe, self.accelerator.num_processes
        exits = exits_at(self.step, recipe.steps, recipe.exits, recipe.curriculum)
        dropped = dropped_layers(self._rates, recipe.seed, self.step)
        # Known from the cache, so that no process has to ask the others.
        texts = [i for part in parts for i in part]
        targets = sum(self.cache.response_lengths[i] for i in texts)
        onward = {i for part in parts for i in self._onward(part)}
        kept = sum(kept_count(self.cache.lengths[i], recipe.keep_fraction) for i in onward)
        shares = exit_weights(exits, recipe.exit_scale)
        sums = torch.zeros(2 * len(exits) + 1, dtype=torch.float64)
        for part in parts:
            if mine := part[self.accelerator.process_index :: world]:
                total, counts = self._losses(mine, onward, shares, dropped, targets, kept)
                self.accelerator.backward(total)
                sums += counts
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                          for p in self.parameters])  # fmt: skip
        if world > 1:
            flat = self.accelerator.reduce(flat, "sum")
            sums = self.accelerator.reduce(sums.to(flat.device), "sum").cpu()
        lr = learning_rate(recipe.lr, recipe.warmup_steps, recipe.steps, self.step)
        row: dict[str, float] = {"targets": targets, "lr": lr}
        for i, e in enumerate(exits):
            row |= {f"loss_{e}": float(sums[2 * i]), f"right_{e}": float(sums[2 * i + 1])}
        if onward:
            row["kl"] = float(sums[-1])
        norm = flat.norm()
        if not (math.isfinite(float(sums.sum())) and math.isfinite(float(norm))):  # sync:
            self.optimizer.zero_grad()
            self.save()
            raise diverged(self.folder / CHECKPOINT, self.step + 1, recipe.lr)
        flat *= min(1.0, recipe.clip / (float(norm) + 1e-6))
        for parameter, grad in zip(
            self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = grad.view_as(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return row

    def _onward(self, texts: Sequence[int]) -> list[int]:
        """Which texts of a batch go on to the last layer: as many each step, in turn."""
        if self.recipe.keep == 0:
            return []
        count = math.ceil(len(texts) * self.recipe.keep_share)
        places = (self.step + j * len(texts) // count for j in range(count))
        return [texts[place % len(texts)] for place in places]

    def _losses(
        self,
        indices: list[int],
        onward: set[int],
        shares: dict[int, float],
        dropped: frozenset[int],
        targets: int,
        kept: int,
    ) -> tuple[Tensor, Tensor]:
        """This process's share of the step's loss, and of (loss, right) per exit and the KL."""
        recipe, student = self.recipe, self.student
        device = self.accelerator.device
        seed = recipe.seed * 1_000_003 + self.step
        last = student.num_layers
        batch = collate(self.cache, indices, last, onward, recipe.keep_fraction, seed)
        wanted = sparse_targets(
            batch.pick.to(device),
            batch.top_ids.to(device),
            batch.top_logits.to(device),
            self._row_of,
            recipe.soft,
        )
        counts = torch.zeros(2 * len(shares) + 1, dtype=torch.float64)
        rows = [row for row, index in enumerate(indices) if index in onward]
        chosen = batch.chosen.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.autocast):
            states = student(batch.ids.to(device), shares, dropped)
            total = torch.zeros((), device=device)
            for i, (e, share) in enumerate(shares.items()):
                x = student.normed(states[e][chosen])  # (N, D)
                loss, picks = sparse_cross_entropy(x, self._head, *wanted)
                total = total + loss * (share / targets)
                counts[2 * i] = loss.detach().double() / targets
                counts[2 * i + 1] = (picks == batch.pick.to(device)).sum().double() / targets
            if rows:
                top = max(shares)
                h = student.run(states[top][rows], top, (last,), dropped)[last]
                x = student.normed(h[batch.kept[rows].to(device)])  # (M, D)
                original = student.normed(batch.final.to(x))
                kl = divergence(x, original, self._head)
                total = total + kl * (recipe.keep / kept)
                counts[-1] = kl.detach().double() / kept
        return total, counts

    @torch.no_grad()
    def _look(self) -> None:
        """Notes how often each exit's pick is the original's on held-out texts."""
        if not self.accelerator.is_main_process:
            return
        assert self.held_out is not None
        recipe, device = self.recipe, self.accelerator.device
        texts = range(min(recipe.eval_texts, len(self.held_out)))
        levels = (*recipe.exits, self.student.num_layers)
        right, seen = dict.fromkeys(levels, 0), 0
        for part in cut(list(texts), self.held_out.lengths, recipe.batch_tokens):
            batch = collate(self.held_out, part, self.student.num_layers)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.autocast):
                states = self.student(batch.ids.to(device), levels)
                for e in levels:
                    x = self.student.normed(states[e][batch.chosen.to(device)])
                    picks = [(y @ self._head.T).argmax(-1) for y in x.to(self._head).split(1024)]
                    right[e] += int((torch.cat(picks) == batch.pick.to(device)).sum())
            seen += len(batch.pick)
        row: dict[str, float] = {"step": self.step, "seconds": round(self.elapsed_s, 2)}
        row |= {f"top1_{e}": right[e] / max(1, seen) for e in levels}
        self.history.held_out.append(row)
        self._tell(row)

    def _tell(self, row: dict[str, float]) -> None:
        if self.on_step is not None and self.accelerator.is_main_process:
            self.on_step(row)
