"""What a run leaves in its folder so that it can go on: its state, written whole or not at all.

Both training loops share the rules: a step is a function of the weights, the optimizer's state and
the step's number; a checkpoint holds these and the recipe, and appears by one rename; it is resumed
under the same recipe or refused.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hispec.errors import HispecError
from hispec.files import disk_errors, replacing

CHECKPOINT = "checkpoint.pt"
TIMED = 30  # steps after which it is known how many fit into --minutes


@dataclass
class History:
    """What happened, as the report draws it.

    Attributes:
        losses: Rows of step, seconds, targets, lr and each exit's loss and agreement.
        held_out: Rows of step, seconds and each exit's agreement.
    """

    losses: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)


def learning_rate(peak: float, warmup_steps: int, steps: int, step: int) -> float:
    """Returns the rate of step ``step`` (from 0): linear warm-up, then half a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass
class TimeLimit:
    """``--minutes``: once some steps are timed, it is known how many there can be.

    Attributes:
        minutes: From the run's first step on.
        since: Steps that were not this process's.
    """

    minutes: float
    since: int = 0

    def steps(self, history: History, steps: int) -> int | None:
        """Returns how many steps fit, at most ``steps``; None at steps that nothing is learnt from.

        The first half of the steps looked at is not timed: it compiles. Where steps are slow, a
        few have to do. All processes ask at the same steps.
        """
        rows = history.losses[self.since :]
        if len(rows) not in (4, TIMED):
            return None
        now, half = rows[-1]["seconds"], len(rows) // 2
        if len(rows) == 4 and 8 * (now - rows[0]["seconds"]) < 60 * self.minutes:
            return steps  # later is soon enough
        each = (now - rows[half - 1]["seconds"]) / (len(rows) - half)
        done = len(history.losses)
        return max(done + 1, min(steps, done + int((60 * self.minutes - now) / max(each, 1e-9))))


def bounded(
    recipe: Any, limit: TimeLimit | None, history: History, accelerator: Accelerator
) -> Any:
    """Returns the recipe with as many steps as the limit allows, as the first process sees it."""
    fit = limit.steps(history, recipe.steps) if limit else None
    if fit is None:
        return recipe
    steps = agree(accelerator, fit)
    warmup = min(recipe.warmup_steps, max(len(history.losses), steps // 10))
    return replace(recipe, steps=steps, warmup_steps=warmup)


def resumed(recipe: Any, limit: TimeLimit | None, state: Mapping[str, Any]) -> Any:
    """Returns the recipe of a run that goes on under a limit: its checkpoint's number of steps.

    They are fitted anew where the limit is another.
    """
    if limit is None:
        return recipe
    limit.since = len(state["history"]["losses"])
    if state.get("minutes") == limit.minutes and limit.since >= TIMED:
        limit.since = 10**9
    theirs = state["recipe"]
    return replace(recipe, steps=theirs["steps"], warmup_steps=theirs["warmup_steps"])


def agree(accelerator: Accelerator, count: int) -> int:
    """Returns the first process's count to all of them."""
    if accelerator.num_processes == 1:
        return count
    mine = torch.tensor([count if accelerator.is_main_process else 0], device=accelerator.device)
    return int(accelerator.reduce(mine, "sum"))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Returns the state in a checkpoint file.

    Raises:
        HispecError: It cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise HispecError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): delete it and start again."
        ) from error


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """The state stands under ``path`` whole, or the old one still does.

    Raises:
        WriteError: The disk is full or the folder cannot be written.
    """
    buffer = io.BytesIO()  # torch.save to a full disk raises a RuntimeError that names nothing
    torch.save(dict(state), buffer)
    kept = "the one before it is kept" if path.exists() else "there is none before it"
    advice = f"{kept}, so free some room and run again with --resume"
    what = f"checkpoint {path} of step {state['step']}"
    with disk_errors(what, advice), replacing(path, sync=True, alone=True) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def check_same_run(
    path: Path,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    same_parts: bool,
    parts: str,
    free: frozenset[str] = frozenset(),
) -> None:
    """Raises ``HispecError`` if a checkpoint is of another run.

    Args:
        path: Of the checkpoint.
        ours: This run's recipe.
        theirs: The checkpoint's.
        same_parts: Whether what is trained is made of the same parts.
        parts: What to call them.
        free: Settings that do not change the weights.
    """
    changed = sorted(k for k in ours.keys() | theirs if ours.get(k) != theirs.get(k))
    changed = [key for key in changed if key not in free]
    if changed or not same_parts:
        raise HispecError(
            f"{path} belongs to a run with other settings ({', '.join(changed) or parts}): "
            "resume with the same ones, or give another --out."
        )


def diverged(path: Path, step: int, lr: float) -> HispecError:
    """Returns the error of a loss that is not a number; the state before it is in ``path``."""
    return HispecError(
        f"The loss is not a number at step {step}: the weights before it are in {path}; lower --lr "
        f"(now {lr:g}) or look at the data."
    )
