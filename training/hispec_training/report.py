"""Progress while training, and the report after it: curves as PNG, tables as Markdown."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hispec_training.checkpoints import History


class Progress:
    """Steps on stderr: a bar on a terminal, a line every half minute elsewhere.

    Args:
        steps: In all; rows may know better.
        accelerator: Whose trackers get every row; None for none.
    """

    def __init__(self, steps: int, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator
        self._said, self._steps = 0.0, steps
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, unit="step", file=sys.stderr)

    def add(self, row: Mapping[str, float]) -> None:
        """One more row of the history."""
        if self.accelerator is not None:
            values = {k: v for k, v in row.items() if k not in ("step", "steps")}
            self.accelerator.log(values, int(row["step"]))
        shown = {k: f"{v:.3f}" for k, v in row.items() if k[:4] in ("loss", "top1", "righ")}
        text = " ".join(f"{k}={v}" for k, v in shown.items())
        if self._bar is not None:
            self._bar.n = int(row["step"])
            self._bar.total = int(row.get("steps", self._bar.total))
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._said > 30 or any(k.startswith("top1") for k in row):
            self._said = time.monotonic()
            self._steps = int(row.get("steps", self._steps))
            line = f"step {row['step']:.0f}/{self._steps} {row['seconds']:.0f}s {text}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """The bar is finished."""
        if self._bar is not None:
            self._bar.close()


def make_accelerator(args: argparse.Namespace, **more: Any) -> Accelerator:
    """Returns the accelerator of a training command; the work folder is its project's.

    Args:
        args: With ``out`` and ``report_to``.
        more: For the accelerator.
    """
    from accelerate import Accelerator

    log_with = None if args.report_to == "none" else args.report_to
    return Accelerator(log_with=log_with, project_dir=str(args.out / "work"), **more)


@contextmanager
def reported(recipe: Any, report_to: str, accelerator: Accelerator) -> Iterator[Progress]:
    """Inside, steps are shown and sent to the tracker, if there is one.

    Args:
        recipe: A dataclass with ``steps``; the tracker gets its fields.
        report_to: The tracker, or ``none``.
        accelerator: Of the run.
    """
    tracker = None if report_to == "none" else accelerator
    if tracker is not None:
        tracker.init_trackers("hispec", config={k: str(v) for k, v in vars(recipe).items()})
    progress = Progress(recipe.steps, tracker)
    try:
        yield progress
    finally:
        progress.close()
        # Not end_training: that ends the processes' group too, and they have yet to save together.
        for one in tracker.trackers if tracker is not None else ():
            one.finish()


def write_report(
    folder: Path, history: History, acceptance: Mapping[int, Mapping[str, Any]]
) -> None:
    """``curves.png``, ``history.jsonl`` and ``acceptance.json`` are in the folder.

    Args:
        folder: Created.
        history: Of the run.
        acceptance: Table of each exit.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [*history.losses, *history.held_out]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "acceptance.json").write_text(json.dumps(dict(acceptance), indent=2) + "\n")
    draw_curves(folder / "curves.png", history)


def draw_curves(path: Path, history: History) -> None:
    """Loss and agreement over steps, one colour per exit, as a PNG.

    Args:
        path: The file.
        history: With at least one step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    exits = sorted({int(k[5:]) for row in history.losses for k in row if k.startswith("loss_")})
    for number, e in enumerate(exits):
        color = f"C{number}"
        steps = [row["step"] for row in history.losses]
        left.plot(
            steps, _smooth([row[f"loss_{e}"] for row in history.losses]), color, label=f"exit {e}"
        )
        values = _smooth([row[f"right_{e}"] for row in history.losses])
        right.plot(steps, values, color, alpha=0.4, label=f"exit {e}, training")
        steps = [row["step"] for row in history.held_out]
        values = [row[f"top1_{e}"] for row in history.held_out]
        right.plot(steps, values, color, marker="o", label=f"exit {e}, held out")
    left.set(xlabel="step", ylabel="loss (nats per target)", title="Loss")
    right.set(xlabel="step", ylabel="agreement with the target's pick", title="Agreement")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def _smooth(values: list[float], keep: float = 0.95) -> list[float]:
    """Exponential moving average, unbiased at the start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
