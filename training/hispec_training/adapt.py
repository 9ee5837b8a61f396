"""The training loop of ``lora`` mode: early-exit losses, and a pull back to the original.

A step takes some cached answers of the original and runs the adapted layers as deep as its losses
need. The exits of the curriculum learn the original's picks through the shared norm and head;
every few steps the pass goes on to the last layer, where the divergence from the original's
distribution is added, at some positions of prompts and answers alike. Passes that stop at the
deepest exit cost a third of a full one, which on a CPU decides how much text is seen.

A step is a function of the weights, the optimizer's state and the step's number, so a run killed
at any moment and resumed ends with the weights it would have had. Processes share a batch's texts
and add up their gradients; the updates are small, so one sum of one flat tensor does it.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from hispec.errors import HispecError
from hispec_training.adapter import Student, lora_parameters
from hispec_training.curriculum import drop_rates, dropped_layers, exit_weights, exits_at
from hispec_training.divergence import divergence
from hispec_training.files import write_atomically
from hispec_training.loop import CHECKPOINT, History, read_checkpoint
from hispec_training.losses import sparse_cross_entropy, sparse_targets
from hispec_training.shards import ShardCache, cut

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
        keep_every: Steps from one full pass to the next.
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
    keep_every: int = 2
    keep_fraction: float = 0.25
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 100
    save_every: int = 100
    eval_texts: int = 48
    autocast: bool = True


@dataclass(frozen=True)
class TextBatch:
    """Padded texts.

    Attributes:
        ids: (B, T) int64.
        chosen: (B, T) bool, positions with a target.
        pick: (N,) int64 the original's picks there, row by row.
        top_ids: (N, K) int64.
        top_logits: (N, K) fp32.
        kept: (B, T) bool, positions with a divergence.
        final: (M, D) the original's final states there, before the norm.
    """

    ids: Tensor
    chosen: Tensor
    pick: Tensor
    top_ids: Tensor
    top_logits: Tensor
    kept: Tensor
    final: Tensor


def text_batches(cache: ShardCache, batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Returns a random order of batches of similar length, each at most ``batch_tokens`` padded."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(cache), generator=generator).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), 512):
        window = sorted(order[start : start + 512], key=lambda i: cache.lengths[i])
        batches += cut(window, cache.lengths, batch_tokens)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def kept_count(length: int, fraction: float) -> int:
    """Returns at how many positions of a text the divergence is taken; at least one."""
    return max(1, math.ceil(length * fraction))


def collate(
    cache: ShardCache, indices: Sequence[int], final_layer: int, fraction: float, seed: int
) -> TextBatch:
    """Returns the batch of some texts; the divergence's positions are drawn from (seed, text)."""
    texts = [cache[i] for i in indices]
    shape = (len(texts), max(len(text.ids) for text in texts))
    ids = torch.zeros(shape, dtype=torch.int64)
    chosen, kept = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    final = []
    for row, (index, text) in enumerate(zip(indices, texts, strict=True)):
        length = len(text.ids)
        ids[row, :length] = text.ids
        chosen[row, text.first : text.first + len(text.pick)] = True
        generator = torch.Generator().manual_seed(seed * 1_000_033 + index)
        order = torch.randperm(length, generator=generator)
        places = order[: kept_count(length, fraction)].sort().values
        kept[row, places] = True
        final.append(text.states[final_layer][places])
    return TextBatch(
        ids=ids,
        chosen=chosen,
        pick=torch.cat([text.pick for text in texts]).long(),
        top_ids=torch.cat([text.top_ids for text in texts]).long(),
        top_logits=torch.cat([text.top_logits for text in texts]).float(),
        kept=kept,
        final=torch.cat(final),
    )


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
    """

    def __init__(
        self,
        student: Student,
        cache: ShardCache,
        held_out: ShardCache | None,
        recipe: LoraRecipe,
        folder: Path,
        accelerator: Accelerator | None = None,
        on_step: Callable[[dict[str, float]], None] | None = None,
        save_minutes: float = 10.0,
    ) -> None:
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
        while self.step < recipe.steps:
            row = self._one_step([next(batches) for _ in range(recipe.accumulate)])
            self.elapsed_s = time.perf_counter() - start
            row |= {"step": self.step, "seconds": round(self.elapsed_s, 2)}
            self.history.losses.append(row)
            self._tell(row)
            last = self.step == recipe.steps
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
            "history": asdict(self.history),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.folder / CHECKPOINT, buffer.getvalue())

    def resume(self) -> bool:
        """The run stands where the checkpoint left it; False if there is none.

        Raises:
            HispecError: The checkpoint is of another recipe or cannot be read.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            return False
        state = read_checkpoint(path)
        ours, theirs = asdict(self.recipe), state["recipe"]
        changed = sorted(
            key
            for key in ours.keys() | theirs
            if ours.get(key) != theirs.get(key) and key not in _FREE
        )
        if changed or sorted(state["weights"]) != self.names:
            raise HispecError(
                f"{path} belongs to a run with other settings ({', '.join(changed) or 'ranks'}): "
                "resume with the same ones, or give another --out."
            )
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
        full = recipe.keep > 0 and self.step % recipe.keep_every == 0
        dropped = dropped_layers(self._rates, recipe.seed, self.step)
        # Known from the cache, so that no process has to ask the others.
        texts = [i for part in parts for i in part]
        targets = sum(self.cache.response_lengths[i] for i in texts)
        kept = sum(kept_count(self.cache.lengths[i], recipe.keep_fraction) for i in texts)
        shares = exit_weights(exits, recipe.exit_scale)
        sums = torch.zeros(2 * len(exits) + 1, dtype=torch.float64)
        for part in parts:
            if mine := part[self.accelerator.process_index :: world]:
                total, counts = self._losses(mine, shares, full, dropped, targets, kept)
                self.accelerator.backward(total)
                sums += counts
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                          for p in self.parameters])  # fmt: skip
        if world > 1:
            flat = self.accelerator.reduce(flat, "sum")
            sums = self.accelerator.reduce(sums.to(flat.device), "sum").cpu()
        row: dict[str, float] = {"targets": targets, "lr": learning_rate(recipe, self.step)}
        for i, e in enumerate(exits):
            row |= {f"loss_{e}": float(sums[2 * i]), f"right_{e}": float(sums[2 * i + 1])}
        if full:
            row["kl"] = float(sums[-1])
        norm = flat.norm()
        if not (math.isfinite(float(sums.sum())) and math.isfinite(float(norm))):  # sync:
            self.optimizer.zero_grad()
            self.save()
            raise HispecError(
                f"The loss is not a number at step {self.step + 1}: the weights before it are in "
                f"{self.folder / CHECKPOINT}; lower --lr (now {recipe.lr:g}) or look at the data."
            )
        flat *= min(1.0, recipe.clip / (float(norm) + 1e-6))
        for parameter, grad in zip(
            self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = grad.view_as(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = row["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return row

    def _losses(
        self,
        indices: list[int],
        shares: dict[int, float],
        full: bool,
        dropped: frozenset[int],
        targets: int,
        kept: int,
    ) -> tuple[Tensor, Tensor]:
        """This process's share of the step's loss, and of (loss, right) per exit and the KL."""
        recipe, student = self.recipe, self.student
        device = self.accelerator.device
        seed = recipe.seed * 1_000_003 + self.step
        batch = collate(self.cache, indices, student.num_layers, recipe.keep_fraction, seed)
        wanted = sparse_targets(
            batch.pick.to(device),
            batch.top_ids.to(device),
            batch.top_logits.to(device),
            self._row_of,
            recipe.soft,
        )
        counts = torch.zeros(2 * len(shares) + 1, dtype=torch.float64)
        stops = {*shares, student.num_layers} if full else set(shares)
        chosen = batch.chosen.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.autocast):
            states = student(batch.ids.to(device), stops, dropped)
            total = torch.zeros((), device=device)
            for i, (e, share) in enumerate(shares.items()):
                x = student.normed(states[e][chosen])  # (N, D)
                loss, picks = sparse_cross_entropy(x, self._head, *wanted)
                total = total + loss * (share / targets)
                counts[2 * i] = loss.detach().double() / targets
                counts[2 * i + 1] = (picks == batch.pick.to(device)).sum().double() / targets
            if full:
                x = student.normed(states[student.num_layers][batch.kept.to(device)])  # (M, D)
                original = student.normed(batch.final.to(x))
                kl = divergence(x, original, self._head)
                # A full pass comes once in keep_every steps and stands for all of them.
                total = total + kl * (recipe.keep * recipe.keep_every / kept)
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
            batch = collate(self.held_out, part, self.student.num_layers, 0.0, 0)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.autocast):
                states = self.student(batch.ids.to(device), levels)
                for e in levels:
                    x = self.student.normed(states[e][batch.chosen.to(device)])
                    picks = [(y @ self._head.T).argmax(-1) for y in x.to(self._head).split(1024)]
                    right[e] += int((torch.cat(picks).cpu() == batch.pick).sum())
            seen += len(batch.pick)
        row: dict[str, float] = {"step": self.step, "seconds": round(self.elapsed_s, 2)}
        row |= {f"top1_{e}": right[e] / max(1, seen) for e in levels}
        self.history.held_out.append(row)
        self._tell(row)

    def _tell(self, row: dict[str, float]) -> None:
        if self.on_step is not None and self.accelerator.is_main_process:
            self.on_step(row)


def learning_rate(recipe: LoraRecipe, step: int) -> float:
    """Returns the rate of step ``step`` (from 0): linear warm-up, then half a cosine to zero."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
