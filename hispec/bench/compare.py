"""Several runs side by side: the same methods on other prompts, machines or commits."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from hispec.bench import charts, page
from hispec.bench.markdown import NOTHING, interval, label, number, table

Document = dict[str, Any]

#: What is listed where runs differ in it; the rest of their records is in their own reports.
_TOLD = ("model", "weights", "exits", "prompts", "number_of_prompts", "max_new_tokens", "repeats")
_MADE = ("commit", "dtype", "device", "gpu", "cpu", "threads", "torch", "transformers", "date")


def markdown(documents: Mapping[str, Document]) -> str:
    """Returns the comparison in Markdown.

    Args:
        documents: summaries by the names of their runs.
    """
    parts = [table(*_conditions(documents)), table(*_speeds(documents))]
    return "\n\n".join(parts) + "\n"


def html(documents: Mapping[str, Document]) -> str:
    """Returns the comparison as a page."""
    methods = _methods(documents)
    end = charts.axis_end(e for found in documents.values() for e in found["methods"].values())
    shared = [m for m in methods if sum(m in d["methods"] for d in documents.values()) > 1]
    panels = ""
    for method in shared or methods:
        bars = []
        for run, document in documents.items():
            entry = document["methods"].get(method)
            if entry:
                low, high = entry["speedup_low"], entry["speedup_high"]
                kind = page.kind_of(method)
                bars.append(charts.Bar(run, entry["speedup"], low, high, kind))
        title = escape(_label(documents, method))
        panels += f'<div class="panel"><h3>{title}</h3>{charts.bars(bars, end)}</div>'
    sections = [
        "<h1>Runs side by side</h1>",
        page.section("What differs", "", page.table(*_conditions(documents))),
        page.section(
            "Speed-up",
            "Each over the fastest plain decoding of its own run. Whiskers: 95 % bootstrap "
            "interval over prompts; dashed line: 1.",
            f'<div class="panels">{panels}</div>',
        ),
        page.section("In numbers", "", page.table(*_speeds(documents))),
    ]
    return page.page("hispec bench: runs side by side", sections)


def _methods(documents: Mapping[str, Document]) -> list[str]:
    return list(dict.fromkeys(name for found in documents.values() for name in found["methods"]))


def _label(documents: Mapping[str, Document], method: str) -> str:
    return next(label(d, method) for d in documents.values() if method in d["methods"])


def _speeds(documents: Mapping[str, Document]) -> tuple[list[str], list[list[str]]]:
    """Heads and one row a method: speed-ups and tokens a second in every run."""
    rows = []
    for method in _methods(documents):
        row = [_label(documents, method)]
        for document in documents.values():
            entry = document["methods"].get(method)
            if not entry or entry["speedup"] is None:
                row.append(NOTHING)
                continue
            row.append(
                f"{interval(entry, 'speedup')}, {number(entry['total_speedup'], 2)} with prefill, "
                f"{entry['tok_per_s']:.1f} tok/s"
            )
        rows.append(row)
    return ["method", *documents], rows


def _conditions(documents: Mapping[str, Document]) -> tuple[list[str], list[list[str]]]:
    """Heads and one row for each condition in which the runs differ."""
    rows = []
    for part, keys in (("settings", _TOLD), ("provenance", _MADE)):
        for key in keys:
            values = [str(found[part].get(key, NOTHING)) for found in documents.values()]
            if len(set(values)) > 1:
                rows.append([key.replace("_", " "), *values])
    rows.append(["answers", *(str(found["answers"]) for found in documents.values())])
    return ["", *documents], rows
