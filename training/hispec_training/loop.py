"""The training loop of the exit heads: steps, schedule, checkpoints.

Joint training of several exits is separate training side by side: they share the batch and
nothing else, losses add up, gradients are clipped head by head. So each head's weights are the
same whoever trains beside it.

A step is a function of the weights, the optimizer's state and the step's number. A checkpoint
holds these three and appears by one rename; a run killed at any moment and resumed ends with the
weights it would have had.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from hispec.errors import UsageError
from hispec_training.batches import MAX_ROUND, Batch, collate, draw_roots, step_seed
from hispec_training.batches import training_batches as stream
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
from hispec_training.evaluate import evaluate
from hispec_training.exits import Exits
from hispec_training.shard_cache import Texts


@dataclass(frozen=True)
class Recipe:
    """How the heads are trained.

    Attributes:
        steps: Optimizer steps.
        batch_targets: Padded response positions of one batch, over all processes.
        accumulate: Batches a step adds up.
        lr: Peak learning rate.
        warmup_steps: Linear rise; the fall to zero is a cosine over the rest.
        weight_decay: On matrices.
        soft: Weight of the target's distribution against its pick, in [0, 1].
        dropout: Of the final states heads look at: they name a training text so exactly that heads
            learn texts by heart (0.65 on texts seen three times, 0.28 on others).
        clip: Largest gradient norm of one head.
        max_round: Longest round drawn.
        seed: Of order and rounds.
        eval_every: Steps between looks at the held-out texts.
        save_every: Steps between checkpoints.
        eval_texts: Held-out texts looked at while training.
        autocast: Compute in bf16.
    """

    steps: int
    batch_targets: int = 2048
    accumulate: int = 1
    lr: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    soft: float = 0.5
    dropout: float = 0.0
    clip: float = 1.0
    max_round: int = MAX_ROUND
    seed: int = 0
    eval_every: int = 250
    save_every: int = 250
    eval_texts: int = 64
    autocast: bool = True


def make_optimizer(exits: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only."""
    trained = [p for p in exits.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def whole(value: Tensor) -> float:
    """Returns a number that may lie in shards."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


class Trainer:
    """One run.

    Args:
        exits: The heads, at their starting values.
        cache: Training texts.
        held_out: Texts to watch; may be empty.
        recipe: How.
        folder: For checkpoints.
        accelerator: Of the launched processes; a plain one if None.
        on_step: Called with each row of the history.
        minutes: Make the recipe's steps so few that they take about so long.
    """

    def __init__(
        self,
        exits: Exits,
        cache: Texts,
        held_out: Texts | None,
        recipe: Recipe,
        folder: Path,
        accelerator: Accelerator | None = None,
        on_step: Callable[[dict[str, float]], None] | None = None,
        minutes: float | None = None,
    ) -> None:
        self.limit = None if minutes is None else TimeLimit(minutes)
        self.exits, self.cache, self.held_out = exits, cache, held_out
        self.recipe, self.folder = recipe, folder
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        if self.accelerator.scaler is not None:
            raise UsageError(
                "exits train in fp32 or bf16: gradients that fp16 scales cannot be clipped. Leave "
                "--mixed_precision at no."
            )
        self.on_step = on_step
        self.history = History()
        for head in exits.heads.values():
            head.dropout = recipe.dropout
        self.step = 0
        self.elapsed_s = 0.0
        optimizer = make_optimizer(exits, recipe)
        self.model, self.optimizer = self.accelerator.prepare(exits, optimizer)
        # Tuples of parameters, taken once the wrapper has put its own in place.
        self.groups = [
            [p for n, p in self.model.named_parameters() if f"heads.{e}." in n and p.requires_grad]
            for e in exits.specs
        ]

    def run(self) -> History:
        """Trains to the recipe's last step from wherever the run stands.

        Raises:
            HispecError: If the loss stops being a number or the disk is full; the last good state
                is in the folder.
        """
        recipe, start = self.recipe, time.perf_counter() - self.elapsed_s
        batches = stream(
            self.cache, recipe.batch_targets, recipe.seed, self.step * recipe.accumulate
        )
        while self.step < self.recipe.steps:
            row = self._one_step(batches)
            self.elapsed_s = time.perf_counter() - start
            row |= {"step": self.step, "seconds": round(self.elapsed_s, 2)}
            self.history.losses.append(row)
            self.recipe = bounded(self.recipe, self.limit, self.history, self.accelerator)
            row["steps"] = self.recipe.steps
            if self.on_step is not None and self.accelerator.is_main_process:
                self.on_step(row)
            last = self.step == self.recipe.steps
            if self.held_out is not None and (last or self.step % recipe.eval_every == 0):
                self._look()
            if last or self.step % recipe.save_every == 0:
                self.save(CHECKPOINT)
        return self.history

    def weights(self) -> dict[str, Tensor]:
        """Returns the heads' parameters and buffers, whole; empty but in the main process."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.model, options=options)

    def save(self, name: str) -> None:
        """The state stands in the folder under ``name``; an interrupted write leaves the old one.

        Raises:
            HispecError: If the disk is full.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = get_state_dict(self.model, self.optimizer, options=options)
        if self.accelerator.is_main_process:
            state = {
                "weights": weights,
                "optimizer": moments,
                "step": self.step,
                "elapsed_s": self.elapsed_s,
                "recipe": asdict(self.recipe),
                "minutes": self.limit and self.limit.minutes,
                "specs": [spec.to_dict() for spec in self.exits.specs.values()],
                "history": asdict(self.history),
            }
            write_checkpoint(self.folder / name, state)
        self.accelerator.wait_for_everyone()

    def resume(self, name: str = CHECKPOINT) -> bool:
        """The run stands where the checkpoint left it; False if there is none.

        Raises:
            HispecError: If the checkpoint is of another recipe or cannot be read.
        """
        path = self.folder / name
        if not path.exists():
            return False
        state = read_checkpoint(path)
        specs = [spec.to_dict() for spec in self.exits.specs.values()]
        self.recipe = resumed(self.recipe, self.limit, state)
        check_same_run(path, asdict(self.recipe), state["recipe"], state["specs"] == specs, "heads")
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["weights"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self.history = History(**state["history"])
        return True

    def _one_step(self, batches: Iterator[tuple[int, list[int]]]) -> dict[str, float]:
        recipe, world = self.recipe, self.accelerator.num_processes
        parts = [next(batches) for _ in range(recipe.accumulate)]
        # Known from the cache, so that no process has to ask the others.
        targets = sum(self.cache.response_lengths[i] for _, texts in parts for i in texts)
        sums = torch.zeros(len(self.exits.specs), 2, dtype=torch.float64)
        for number, (_, texts) in enumerate(parts):
            mine = texts[self.accelerator.process_index :: world]
            batch, weight = self._batch(mine or texts[:1]), float(bool(mine))
            # What is dropped is a function of the step, so that a resumed run drops the same.
            torch.manual_seed(step_seed(recipe.seed, self.step) + number)
            last = number == len(parts) - 1
            # Gradients of a step are exchanged once, with its last batch.
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with torch.autocast(
                    self.accelerator.device.type, torch.bfloat16, enabled=recipe.autocast
                ):
                    guesses = self.model(batch, recipe.soft)
                total = sum(guess.loss for guess in guesses.values())
                # The wrapper averages gradients over processes; the loss is a sum over them.
                self.accelerator.backward(total * (weight * world / targets))
            for i, guess in enumerate(guesses.values()):
                right = (guess.picks == batch.pick).sum()
                sums[i] += weight * torch.stack([guess.loss.detach(), right]).double().cpu()
        if world > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device)).cpu()
        values = (sums / targets).tolist()  # sync:
        norms = [nn.utils.clip_grad_norm_(parameters, recipe.clip) for parameters in self.groups]
        # A loss may be a number whose gradient is none.
        if not all(map(math.isfinite, [loss for loss, _ in values] + [whole(x) for x in norms])):
            self.optimizer.zero_grad()
            self.save(CHECKPOINT)
            raise diverged(self.folder / CHECKPOINT, self.step + 1, recipe.lr)
        lr = learning_rate(recipe.lr, recipe.warmup_steps, recipe.steps, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        row: dict[str, float] = {"targets": targets, "lr": lr}
        for e, (loss, right) in zip(self.exits.specs, values, strict=True):
            row |= {f"loss_{e}": loss, f"right_{e}": right}
        return row

    def _batch(self, indices: Sequence[int]) -> Batch:
        """The batch of some texts, the rounds drawn from (seed, step, text)."""
        texts, roots = self.cache.texts(indices), []
        for index, text in zip(indices, texts, strict=True):
            generator = torch.Generator()
            generator.manual_seed(step_seed(self.recipe.seed, self.step) * 1_000_033 + index)
            roots.append(draw_roots(text.first, len(text.pick), generator, self.recipe.max_round))
        return collate(texts, roots, self.exits.layers).to(self.accelerator.device)

    def _look(self) -> None:
        """Notes the agreement on held-out texts."""
        assert self.held_out is not None
        # By all processes: heads may be sharded over them.
        tallies = evaluate(
            self.exits,
            self.held_out,
            limit=self.recipe.eval_texts,
            autocast=self.recipe.autocast,
        )
        if self.accelerator.is_main_process:
            row: dict[str, float] = {"step": self.step, "seconds": round(self.elapsed_s, 2)}
            row |= {f"top1_{e}": tally.top1 for e, tally in tallies.items()}
            row |= {f"run4_{e}": tally.mean_run(4) for e, tally in tallies.items()}
            self.history.held_out.append(row)
            if self.on_step is not None:
                self.on_step(row)
