"""Public data sets as prompts: a few lines each, read from the hub or from a local copy.

A local copy is a folder that ``datasets`` can load or a JSONL file (``.gz`` too) with the fields of
the data set: ``--prompts gsm8k=FOLDER``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hispec.bench.prompts import Prompt
from hispec.errors import HispecError, UsageError
from hispec.jsonl import read_objects, refuse_halves

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """How a data set's rows become prompts.

    Attributes:
        hub_id: where ``datasets`` finds it.
        config: the data set's configuration, if it has several.
        split: the rows that are asked.
        ask: a row's user message.
        category: the group it is reported under, or the field that names it.
        reference: the field that answers it.
        keep: which rows of a local file without splits count.
    """

    hub_id: str
    config: str | None
    split: str
    ask: Callable[[Row], str]
    category: str | Callable[[Row], str]
    reference: str
    keep: Callable[[Row], bool] = lambda row: True


def _dolly(row: Row) -> str:
    context = f"\n\n{row['context']}" if row.get("context") else ""
    return f"{row['instruction']}{context}"


PRESETS = {
    "humaneval": Preset(
        "openai/openai_humaneval",
        None,
        "test",
        lambda row: f"Complete this Python function.\n\n```python\n{row['prompt']}```",
        "coding",
        "canonical_solution",
    ),
    "gsm8k": Preset(
        "openai/gsm8k", "main", "test", lambda row: row["question"], "math_reasoning", "answer"
    ),
    "cnn_dm": Preset(
        "abisee/cnn_dailymail",
        "3.0.0",
        "test",
        lambda row: f"Summarize this article in a few sentences.\n\n{row['article']}",
        "summarization",
        "highlights",
    ),
    "xsum": Preset(
        "EdinburghNLP/xsum",
        None,
        "test",
        lambda row: f"Summarize this article in one sentence.\n\n{row['document']}",
        "summarization",
        "summary",
    ),
    # For tuning: a hold-out that no table reports on.
    "dolly": Preset(
        "databricks/databricks-dolly-15k",
        None,
        "train",
        _dolly,
        lambda row: str(row["category"]),
        "response",
        lambda row: row.get("split", "test") == "test",
    ),
}


def load(name: str, place: str | None = None) -> list[Prompt]:
    """Returns a preset's prompts.

    Args:
        name: a key of ``PRESETS``.
        place: a local folder or JSONL file; the hub by default.

    Raises:
        UsageError: the place does not exist, or a row lacks a field or is malformed.
        HispecError: the data set cannot be loaded.
    """
    preset = PRESETS[name]
    prompts = []
    for number, row in enumerate(_rows(name, preset, place), 1):
        try:
            if not preset.keep(row):
                continue
            refuse_halves(row)
            category = preset.category
            prompts.append(
                Prompt(
                    id=f"{name}-{number}",
                    category=category if isinstance(category, str) else category(row),
                    turns=(preset.ask(row),),
                    references=(str(row[preset.reference]),),
                )
            )
        except UsageError as error:
            raise UsageError(f"row {number} of {place or preset.hub_id}: {error}") from None
        except KeyError as missing:
            raise UsageError(
                f"row {number} of {place or preset.hub_id} has no field {missing}; is it {name}?"
            ) from None
    if not prompts:
        raise UsageError(f"{place or preset.hub_id} has no rows for the preset {name}.")
    return prompts


def _rows(name: str, preset: Preset, place: str | None) -> Iterable[Row]:
    path = Path(place) if place else None
    if path and path.is_file():
        return (row for _, row in read_objects(path))
    if path and not path.is_dir():
        raise UsageError(f"no data for {name} in {place}: it is neither a folder nor a file.")
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise HispecError(
            f"the preset {name} needs the package datasets: pip install 'hispec[bench]'."
        ) from None
    source = (str(path),) if path else (preset.hub_id, *([preset.config] if preset.config else []))
    try:
        return load_dataset(*source, split=preset.split)
    except Exception as error:  # the hub's, the file system's and the builder's errors have no base
        first = str(error).strip().split("\n")[0]
        raise HispecError(
            f"the data set of {name} ({' '.join(source)}) cannot be loaded: {first}. "
            f"Give a local copy: --prompts {name}=FOLDER."
        ) from error
