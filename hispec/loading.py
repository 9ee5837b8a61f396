"""From a name to a loaded model: weights, exits, databases and models below that fit each other."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from hispec.errors import UsageError
from hispec.generation import LM
from hispec.model.checkpoint import Checkpoint, open_checkpoint
from hispec.model.config import ModelConfig
from hispec.model.device import Choice, choose
from hispec.model.exits import Exits, shipped_exits
from hispec.model.level import check_vocabulary
from hispec.model.linear import Layout
from hispec.model.native import native_library
from hispec.model.ready import ready
from hispec.model.store import cache_dir
from hispec_kernels import cpu


def load(
    model: str | Path,
    *,
    exits: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    numerics: str = "exact",
    force_exits: bool = False,
    force_plan: bool = False,
    corpus: str | Path | None = None,
    context: int | None = None,
    levels: Sequence[str | Path] = (),
) -> LM:
    """Returns a model ready to generate.

    Args:
        model: a hub id, a folder (of a LoRA adapter, too), a ``.gguf`` file, ``smollm2-135m`` or
            ``smollm2-135m-layerskip`` (the same, adapted as LayerSkip does).
        exits: a folder of trained exits; those shipped for these weights are found by themselves.
        dtype: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        device: ``auto``, ``cpu`` or ``cuda``.
        numerics: ``exact``: every hierarchy yields the very tokens of plain decoding. ``fast``: up
            to rounding ties.
        force_exits: use exits trained on other weights; the output stays right, the speed may not.
        force_plan: use plans made for other exits or another machine.
        corpus: an n-gram store of any text, from ``hispec ngrams build``; drafts as ``corpus``.
        context: the most tokens a text may have; by default what the model was made for. On a GPU
            the cache takes memory for all of it.
        levels: smaller models of the same vocabulary, named as ``model``, from the lowest up: every
            hierarchy given by name has them below its levels (:meth:`Hierarchy.over`).

    Raises:
        UsageError: an argument names something that does not exist or does not fit.
        CheckpointError: the model cannot be found, read or understood.
        HispecError: it does not fit into the GPU's memory.
        DatabaseError: the corpus store cannot be read or belongs to another tokenizer.
    """
    if numerics not in ("exact", "fast"):
        raise UsageError(f"unknown numerics {numerics!r}. Use exact or fast.")
    choose(device, dtype)  # what is not there is refused before anything is begun
    _compile_meanwhile()
    checkpoint = open_checkpoint(str(model))
    choice = choose_for(checkpoint.config, device, dtype)
    if exits is None:
        trained = shipped_exits(checkpoint)
    else:
        trained = Exits.open(Path(exits))
        trained.check_base(checkpoint, force=force_exits)
    for level in levels:  # before weights are read
        check_vocabulary(open_checkpoint(str(level)), checkpoint)
    return open_lm(
        checkpoint,
        trained,
        choice.dtype,
        choice.device,
        exact=numerics == "exact",
        corpus=Path(corpus) if corpus else None,
        context=context,
        below=[str(level) for level in levels],
        force_plan=force_plan,
    )


def _compile_meanwhile() -> None:
    """Has the passes compiled, which takes seconds once, while a model is fetched or converted.

    Compiled, no more: whether they are used is decided, and a failure told, where they are needed.
    """

    def build() -> None:
        with suppress(Exception):
            cpu.load_library(cache_dir() / "native")

    if os.environ.get("HISPEC_NATIVE", "1") != "0":
        threading.Thread(target=build, daemon=True).start()


def choose_for(config: ModelConfig | None, device: str = "auto", dtype: str = "auto") -> Choice:
    """Returns what ``--device`` and ``--dtype`` mean for a model on this machine.

    As :func:`~hispec.model.device.choose`, but for CPUs without bf16 arithmetic: there, too, bf16
    is half the bytes to read, if the compiled passes, which widen it on the way, cover the model
    (or are there at all, if it is None).

    Raises:
        UsageError: an unknown name, a device that is not there, a dtype it cannot compute in.
    """
    choice = choose(device, dtype)
    if choice.device.type != "cpu" or dtype != "auto" or choice.dtype is torch.bfloat16:
        return choice
    library, _ = native_library(config, torch.bfloat16, choice.device)
    if library is None:
        return choice
    return Choice(choice.device, torch.bfloat16, f"{choice.reason}, the compiled passes widen it")


def open_lm(
    checkpoint: Checkpoint,
    exits: Exits | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    exact: bool = True,
    layout: Layout | None = None,
    corpus: Path | None = None,
    context: int | None = None,
    below: Sequence[str] = (),
    force_plan: bool = False,
) -> LM:
    """Returns a checkpoint's model ready to generate.

    ``layout`` and ``context`` as in :meth:`Llama.load`.
    """
    llama = ready(checkpoint, dtype, device, exact=exact, layout=layout, context=context)
    return LM(checkpoint, llama, exits, corpus, below, force_plan=force_plan)
