"""Models that transformers loaded, seen as ours: their weights, and exits that belong to them."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from hispec.errors import CheckpointError
from hispec.generation import LM
from hispec.loading import open_lm
from hispec.model.checkpoint import open_checkpoint
from hispec.model.exits import Exits, shipped_exits
from hispec.model.module import ModuleWeights

_loaded: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Any, LM]]] = weakref.WeakKeyDictionary()


def loaded_lm(
    model: Any, *, exits: str | Path | None = None, exact: bool = True, share: bool = False
) -> LM:
    """Returns our view of a transformers model, made anew when its weights have changed.

    Raises:
        CheckpointError: it cannot be run; see :class:`ModuleWeights`.
        UsageError: there are no exits in the folder given.
    """
    weights = ModuleWeights(model)
    stamp = weights.stamp()
    views = _loaded.setdefault(model, {})
    key = (str(exits), exact, share)
    if key not in views or views[key][0] != stamp:
        views.pop(key, None)  # the old weights first: both may not fit
        lm = open_lm(
            weights.as_checkpoint(),
            _find_exits(weights, exits),
            weights.dtype,
            weights.device,
            exact=exact,
            layout="plain" if share else None,
        )
        views[key] = stamp, lm
    return views[key][1]


def _find_exits(weights: ModuleWeights, given: str | Path | None) -> Exits | None:
    if given is not None:
        return Exits.open(Path(given))
    if (weights.path / "exits" / "config.json").exists():
        return Exits.open(weights.path / "exits")
    if not (weights.path / "config.json").exists():
        return None
    try:
        return shipped_exits(open_checkpoint(weights.path))
    except CheckpointError:
        return None  # the folder is another's by now; exits only draft
