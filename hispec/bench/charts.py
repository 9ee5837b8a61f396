"""Pictures of a report as HTML with inline SVG that follows the width of the page.

Rows are a grid of label, drawing and value. Coordinates along a drawing are percentages, so that
bars stretch with the page while text keeps its size, on a wide screen and on a phone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from hispec.hierarchy import SOURCES

Entry = Mapping[str, Any]

#: What drafts without running the model, in the order of colours; the last two are Lookahead's.
DATABASES = (*SOURCES, "pool", "window")


class Bar(NamedTuple):
    """A bar with its interval."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    kind: str = ""  # CSS class: ours, plain, theirs


def axis_end(entries: Iterable[Entry]) -> float:
    """Returns a round number, at least 1, above all speed-ups and all but absurd intervals."""
    found = [entry for entry in entries if entry["speedup"] is not None]
    value = max([1.0, *(entry["speedup"] for entry in found)])
    high = max([value, *(entry["speedup_high"] or 0.0 for entry in found)])
    top = min(high, 1.6 * value) * 1.04
    step = next(s for s in (0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 50, 100, 1e9) if top / s <= 10)
    return step * -(-top // step)


def bars(rows: Sequence[Bar], end: float, mark: float | None = 1.0) -> str:
    """Returns one row a bar, with a whisker for the interval and a line at ``mark``.

    Args:
        rows: from top to bottom.
        end: the value at the right end of the drawing.
        mark: where to draw the line that all are compared with.
    """
    return f'<div class="bars">{"".join(_bar(row, end, mark) for row in rows)}</div>'


def _bar(row: Bar, end: float, mark: float | None) -> str:
    def at(value: float) -> str:
        return f"{min(100 * value / end, 100):.2f}%"

    drawing = ""
    text = "failed"
    if row.value is not None:
        text = f"{row.value:.2f}"
        drawing = f'<rect class="bar {row.kind}" x="0" y="5" width="{at(row.value)}" height="14"/>'
        if row.low is not None and row.high is not None and row.low < row.high:
            low, high = at(row.low), at(row.high)
            drawing += (
                f'<g class="whisker"><line x1="{low}" x2="{high}" y1="12" y2="12"/>'
                f'<line x1="{low}" x2="{low}" y1="8" y2="16"/>'
                f'<line x1="{high}" x2="{high}" y1="8" y2="16"/></g>'
            )
    if mark is not None:
        drawing += f'<line class="mark" x1="{at(mark)}" x2="{at(mark)}" y1="0" y2="24"/>'
    hint = ""
    if row.low is not None and row.high is not None:
        hint = f"<title>{escape(row.label)}: {text} [{row.low:.2f}, {row.high:.2f}]</title>"
    return (
        f'<div class="label">{escape(row.label)}</div>'
        f'<svg height="24" width="100%" role="img">{hint}{drawing}</svg>'
        f'<div class="value">{text}</div>'
    )


def stacks(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], unit: str) -> str:
    """Returns one row a stack: segments side by side, all rows on one scale.

    Args:
        rows: label and segments (name, amount, colour class).
        unit: of the amounts.
    """
    end = max((sum(amount for _, amount, _ in parts) for _, parts in rows), default=0.0) or 1.0
    lines = []
    for label, parts in rows:
        drawing, left = "", 0.0
        for name, amount, kind in parts:
            width = 100 * amount / end
            drawing += (
                f'<rect class="{kind}" x="{left:.2f}%" y="4" width="{width:.2f}%" height="16">'
                f"<title>{escape(name)}: {amount:.2f} {unit}</title></rect>"
            )
            left += width
        total = sum(amount for _, amount, _ in parts)
        lines.append(
            f'<div class="label">{escape(label)}</div>'
            f'<svg height="24" width="100%" role="img">{drawing}</svg>'
            f'<div class="value">{total:.1f}</div>'
        )
    return f'<div class="bars">{"".join(lines)}</div>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Returns coloured squares with their names; entries are (name, colour class)."""
    keys = "".join(
        f'<span class="key"><svg width="12" height="12"><rect class="{kind}" width="12" '
        f'height="12" rx="2"/></svg> {escape(name)}</span>'
        for name, kind in entries
    )
    return f'<p class="legend">{keys}</p>'


def heat(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    corner: str = "",
    end: float = 1.0,
    start: float = 0.0,
    text: str = "{:.0%}",
    best: tuple[int, int] | None = None,
) -> str:
    """Returns a table whose cells are the darker the larger their value.

    Args:
        columns: heads.
        rows: label and values; None is left empty.
        corner: what rows and columns are.
        end: the value of the darkest colour.
        start: the value of the lightest.
        text: how a value is written.
        best: (row, column) to be framed.
    """
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = ""
    for y, (label, values) in enumerate(rows):
        cells = ""
        for x, value in enumerate(values):
            if value is None:
                cells += "<td></td>"
                continue
            share = min(max((value - start) / ((end - start) or 1.0), 0.0), 1.0)
            classes = ("deep " if share > 0.55 else "") + ("best" if best == (y, x) else "")
            cells += (
                f'<td class="cell {classes.strip()}" style="--share:{100 * share:.0f}%">'
                f"{text.format(value)}</td>"
            )
        body += f"<tr><th>{escape(label)}</th>{cells}</tr>"
    return (
        f'<div class="wide"><table class="heat"><tr><th>{escape(corner)}</th>{head}</tr>'
        f"{body}</table></div>"
    )


def level_class(name: str, exits: Sequence[str]) -> str:
    """Returns the colour class of a level or source: exits from the shallowest up."""
    if name in exits:
        return f"exit{min(exits.index(name), 3)}"
    if name in DATABASES:
        return f"source{DATABASES.index(name) % len(SOURCES)}"
    return {"target": "target", "prefill": "prefill"}.get(name, "rest")


def exit_names(methods: Mapping[str, Any]) -> list[str]:
    """Returns the names of all exits any method used, from the shallowest up."""
    names = {
        level["name"]
        for entry in methods.values()
        for level in entry["levels"]
        if level["name"].startswith("exit ")
    }
    return sorted(names, key=lambda name: int(name.split()[1]))
