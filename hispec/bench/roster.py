"""Which methods there are: from the names a user writes to objects that answer."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from hispec.bench import adadecode, lookahead
from hispec.bench.baselines import HF, HFModel, LlamaCpp
from hispec.bench.methods import Clock, Engine, Method, Workbench, numerics
from hispec.errors import UsageError
from hispec.generation import LM
from hispec.hierarchy import AR, MAX_WIDTH, PRESETS, Hierarchy, eighth_and_quarter
from hispec.model.torch_passes import TorchPasses

HF_NAMES = ("hf", "hf-early-exit", "hf-prompt-lookup")
#: Baselines on our engine, and so with its passes, cache and heads.
OWN_NAMES = ("lookahead", "adadecode")
LLAMA_CPP_NAMES = ("llama-cpp", "llama-cpp-lookup")

#: A head that agrees with the target less often than this was not trained to be shared.
_SHARED_HEAD_AGREES = 0.2


def build(
    lm: LM,
    names: Sequence[str],
    gguf: Path | None = None,
    clock: Clock | None = None,
    *,
    exact: bool = True,
    levels: Sequence[str] = (),
) -> tuple[Workbench, list[Method]]:
    """Returns the methods in the order given, plain decoding in all its numerics before them.

    Args:
        lm: loaded with exact numerics.
        names: presets, hierarchy files, or names of baselines; each counts once.
        gguf: what llama.cpp would run.
        clock: times everything; the device's by default.
        exact: the numerics of our methods; plain decoding runs in both anyway.
        levels: separate models: each hierarchy has a second row with them below its levels.

    Raises:
        UsageError: an unknown name, with the nearest known one; or a model of another vocabulary.
    """
    others = [name for name in dict.fromkeys(names) if name not in ("ar", "ar-fast")]
    ours: dict[str, Hierarchy] = {}
    for name in others:
        if name == "adadecode":
            ours[name] = adadecode.exits(lm)
        elif name == "lookahead":
            ours[name] = AR
        elif name not in (*HF_NAMES, *LLAMA_CPP_NAMES):
            ours[name] = _hierarchy(lm, name)
    over = [AR, *(found for name, found in ours.items() if name not in OWN_NAMES)]
    over = [lm.hierarchy(found.over(levels)) for found in over] if levels else []
    bench = Workbench(lm, exits_of(ours.values()), clock)
    hf = HFModel(lm, clock)
    methods = plain_decoding(bench, fast="ar-fast" in names)
    for name in others:
        if name in OWN_NAMES:
            methods.append(_own(bench, name, ours[name], exact=exact))
        elif name in ours:
            row = Path(name).stem if name.endswith(".json") else name
            methods.append(Engine(bench, row, ours[name], exact=exact))
        elif name in LLAMA_CPP_NAMES:
            methods.append(_llama_cpp(lm, name, gguf))
        else:
            methods.append(_hf(lm, hf, name))
    methods += [Engine(bench, found.name, found, exact=exact) for found in over]
    rows = [method.name for method in methods]
    twice = next((row for row in rows if rows.count(row) > 1), None)
    if twice:
        raise UsageError(f"two methods are named {twice}. Rename one of the hierarchy files.")
    return bench, methods


def engines(
    lm: LM, hierarchies: Mapping[str, Hierarchy], *, exact: bool = True
) -> tuple[Workbench, list[Method]]:
    """Returns plain decoding and these hierarchies as methods; see :func:`build`."""
    bench = Workbench(lm, exits_of(hierarchies.values()))
    ours = [Engine(bench, name, found, exact=exact) for name, found in hierarchies.items()]
    return bench, [*plain_decoding(bench), *ours]


def plain_decoding(bench: Workbench, *, fast: bool = False) -> list[Method]:
    """Returns plain decoding in exact numerics, and in fast ones where those are other code.

    Args:
        bench: to decode on.
        fast: in fast numerics anyway.
    """
    methods: list[Method] = [Engine(bench, "ar", AR)]
    if fast or isinstance(bench.lm.model.narrow, TorchPasses):  # compiled passes know one numerics
        methods.append(Engine(bench, "ar-fast", AR, exact=False))
    return methods


def exits_of(hierarchies: Iterable[Hierarchy]) -> list[int]:
    """Returns every exit that any of them uses."""
    return sorted({e for hierarchy in hierarchies for e in hierarchy.exit_layers})


def _hierarchy(lm: LM, name: str) -> Hierarchy:
    known = [*PRESETS, *OWN_NAMES, *HF_NAMES, *LLAMA_CPP_NAMES, "ar-fast"]
    if not name.endswith(".json") and name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"unknown method {name!r}. {hint}Known: {', '.join(known)}, or a hierarchy's JSON file."
        )
    return lm.hierarchy(name)


def _own(bench: Workbench, name: str, hierarchy: Hierarchy, *, exact: bool) -> Engine:
    if name == "lookahead":
        return Engine(
            bench,
            name,
            hierarchy,
            exact=exact,
            note=lookahead.NOTE,
            decoder=lookahead.LookaheadDecoder,
            drafting=lookahead.Lookahead,
            settings={"lookahead": [lookahead.WINDOW, lookahead.NGRAM, lookahead.GUESSES]},
        )
    return Engine(
        bench,
        name,
        hierarchy,
        exact=exact,
        note=adadecode.note(hierarchy),
        decoder=adadecode.AdaDecoder,
        settings={"threshold": adadecode.THRESHOLD},
    )


def _hf(lm: LM, hf: HFModel, name: str) -> HF:
    if name == "hf":
        return HF(hf, name)
    if name == "hf-prompt-lookup":
        return HF(hf, name, {"prompt_lookup_num_tokens": 10})
    # The draft length of our own LayerSkip row, and its exit where transformers can use it.
    level = lm.hierarchy("layerskip").levels[0]
    exit_layer = early_exit(lm, level.exit_layer)
    note = f"exit {exit_layer}, {level.window} tokens a draft"
    if exit_layer != level.exit_layer:
        note += f" (transformers cannot draft at layerskip's exit {level.exit_layer})"
    return HF(
        hf,
        name,
        {"assistant_early_exit": exit_layer},
        {
            "num_assistant_tokens": level.window,
            "num_assistant_tokens_schedule": "constant",
        },
        note,
    )


def early_exit(lm: LM, preferred: int) -> int:
    """Returns the exit that transformers is to draft from: the first of at least 1.

    At exit 0 it would read its head at the embeddings of the tokens, as no layer has run.

    Args:
        lm: the model; its trained exits come next, then the depths of the papers.
        preferred: taken if it can be.

    Raises:
        UsageError: the model is too shallow to be left early.
    """
    layers = lm.model.config.num_layers
    trained = lm.exits.exit_layers if lm.exits else ()
    draft, check = eighth_and_quarter(layers)
    usable = (e for e in (preferred, *trained, check, draft) if 1 <= e < layers)
    found = next(usable, None)
    if found is None:
        raise UsageError(
            f"hf-early-exit needs an exit of at least 1, and this model has {layers} layers only."
        )
    return found


def shared_head_agreement(lm: LM, exit_layer: int, ids: Sequence[int]) -> float:
    """Returns how often the model's own head, read at an exit, picks what the target picks.

    Args:
        lm: the model.
        exit_layer: where it is read.
        ids: a text of at least one token; all its positions count.
    """
    model = lm.model
    with torch.inference_mode(), numerics(model, exact=True):
        cache = model.new_cache([exit_layer, model.config.num_layers])
        model.prefill(cache, ids)
        agreed = 0
        for start in range(0, len(ids), MAX_WIDTH):
            early, final = (
                model.logits(cache.states[boundary][start : len(ids)][:MAX_WIDTH]).argmax(-1)
                for boundary in cache.boundaries
            )
            agreed += int((early == final).sum())
        return agreed / len(ids)


def explain_early_exit(lm: LM, methods: Sequence[Method], ids: Sequence[int]) -> None:
    """Says in the row of ``hf-early-exit`` if this checkpoint has no exits that share the head."""
    for method in methods:
        if method.name == "hf-early-exit":
            exit_layer = method.settings["transformers"]["assistant_early_exit"]
            if lm.exits and exit_layer in lm.exits.own:
                continue  # trained to, on answers: of a prompt's positions it may agree in few
            agreement = shared_head_agreement(lm, exit_layer, ids)
            if agreement < _SHARED_HEAD_AGREES:
                method.note += (
                    f"; this checkpoint has no exits that share the head (agrees with "
                    f"{agreement:.0%} of the target's picks), and transformers can use no others"
                )


def _llama_cpp(lm: LM, name: str, gguf: Path | None) -> LlamaCpp:
    if importlib.util.find_spec("llama_cpp") is None:
        raise UsageError(
            f"{name} needs the package llama-cpp-python: install it or leave the method out."
        )
    if gguf is None:
        raise UsageError(f"{name} runs a GGUF file. Give one as --model, or leave it out.")
    lookup = name == "llama-cpp-lookup"
    return LlamaCpp(gguf, lm.eos, min(lm.model.config.max_positions, 4096), lookup=lookup)


def gguf_of(model: str) -> Path | None:
    """Returns the GGUF file behind what the user gave as the model, if there is one."""
    if model.endswith(".gguf"):
        return Path(model)
    from hispec.model.bundled import MODELS, find_installed

    return find_installed(MODELS[model]) if model in MODELS else None
