"""A plan: a hierarchy, and for what it was made.

Its file is a hierarchy's, which ``--hierarchy`` takes, with a block ``plan`` that says for which
weights, exits and machine it was made and what it was made from. Elsewhere another hierarchy may be
the fastest, so a plan that does not fit is not used unless that is asked for. The tokens would be
the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hispec.errors import CheckpointError, UsageError
from hispec.files import write_whole
from hispec.hierarchy import Hierarchy
from hispec.model.device import dtype_name
from hispec.model.measured import machine
from hispec.model.store import cache_dir

if TYPE_CHECKING:
    from hispec.generation import LM

#: What a plan is made for: how each is called where it differs.
FITS = {
    "weights": "the model's weights",
    "exits": "the exits",
    "models": "the separate models",
    "machine": "the machine",
    "passes": "the kind of passes",
    "dtype": "the dtype",
    "numerics": "the numerics",
    "threads": "the number of threads",
}


@dataclass(frozen=True)
class Plan:
    """A hierarchy with its provenance.

    Attributes:
        hierarchy: what to run.
        record: ``made_for`` and whatever else its maker wrote down; JSON.
    """

    hierarchy: Hierarchy
    record: Mapping[str, Any]

    @staticmethod
    def load(path: Path) -> Plan:
        """Returns the plan in a file; a hierarchy that is no plan was made for nothing special.

        Raises:
            UsageError: the file cannot be read or is no hierarchy.
        """
        hierarchy = Hierarchy.load(path)
        record = json.loads(path.read_text()).get("plan", {})
        if not isinstance(record, dict) or not isinstance(record.get("made_for", {}), dict):
            raise UsageError(f"{path}: plan, and made_for in it, must be objects.")
        return Plan(hierarchy, record)

    def save(self, path: Path) -> None:
        """After the call the file holds the plan.

        Raises:
            HispecError: it cannot be written.
        """
        document = {**self.hierarchy.to_json(), "plan": dict(self.record)}
        write_whole(path, json.dumps(document, indent=1) + "\n")

    def misfit(self, lm: LM) -> str:
        """Returns what this plan was made for that is another here, as a phrase; empty if nothing.

        What a file does not say fits anywhere.
        """
        wanted, found = self.record.get("made_for", {}), made_for(lm, self.hierarchy)
        differing = [
            f"{what} ({_short(wanted[key])}, here {_short(found[key])})"
            for key, what in FITS.items()
            if key in wanted and wanted[key] != found[key]
        ]
        return ", ".join(differing)


def made_for(lm: LM, hierarchy: Hierarchy) -> dict[str, Any]:
    """Returns what decides whether a hierarchy is the fastest, for a loaded model."""
    models = [lm.separate(level.model).fingerprint[:12] for level in hierarchy.models]
    return {
        "model": lm.checkpoint.name,
        "weights": lm.checkpoint.fingerprint,
        "exits": lm.exits.fingerprint if lm.exits else None,
        "models": ", ".join(models) or None,
        "machine": machine(lm.model.device),
        "passes": lm.model.narrow.name,
        "dtype": dtype_name(lm.model.dtype),
        "numerics": "exact" if lm.model.exact else "fast",
        "threads": torch.get_num_threads(),
    }


def open_plan(path: Path, lm: LM, *, force: bool = False) -> Hierarchy:
    """Returns the hierarchy of a file, plan or not.

    Args:
        path: the file.
        lm: the model that is to run it.
        force: even if the plan was made for something else.

    Raises:
        UsageError: the file is no hierarchy, or a plan for something else: it says what differs.
    """
    plan = Plan.load(path)
    differs = plan.misfit(lm)
    if differs and not force:
        raise UsageError(
            f"{path} was planned for something else: {differs}. Plan anew with hispec plan, or "
            f"use it anyway with --force-plan."
        )
    return plan.hierarchy


def saved_path(lm: LM) -> Path:
    """Returns where the plan is kept that ``auto`` uses for a model with these exits and dtype."""
    exits = lm.exits.fingerprint if lm.exits else "no-exits"
    name = f"{lm.checkpoint.fingerprint}-{exits}-{dtype_name(lm.model.dtype)}.json"
    return cache_dir() / "plans" / name


def saved_plan(lm: LM, *, force: bool = False) -> Hierarchy | None:
    """Returns the saved plan's hierarchy, None if there is none that fits; says why not."""
    path = saved_path(lm)
    if not path.is_file():
        return None
    try:
        plan = Plan.load(path)
        plan.hierarchy.check(lm.model.config.num_layers)
        differs = plan.misfit(lm)  # opens the separate models it needs
    except (UsageError, CheckpointError) as error:
        print(f"{error} It is ignored; hispec plan makes another.", file=sys.stderr)
        return None
    if differs and not force:
        print(
            f"The saved plan was made for something else: {differs}. It is ignored; hispec plan "
            f"makes another.",
            file=sys.stderr,
        )
        return None
    return plan.hierarchy


def _short(value: Any) -> str:
    text = str(value) if value is not None else "none"
    return text if len(text) <= 80 else text[:12] + "…"
