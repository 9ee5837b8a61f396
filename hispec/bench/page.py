"""The page of a report: one HTML file that needs nothing else, readable at any width."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from hispec.bench import charts, markdown
from hispec.bench.folder import Row
from hispec.bench.tokens import token_views

Document = dict[str, Any]
STYLE = Path(__file__).parent.parent / "data" / "report.css"
FEW = 12  # differing answers listed before the rest is folded away


def render(document: Document, rows: Sequence[Row]) -> str:
    """Returns the page of a run.

    Args:
        document: its summary.
        rows: its raw rows, for the view of one answer.
    """
    made, entries = document["provenance"], document["methods"]
    sections = [
        f"<h1>{escape(short_name(made['model']))}: methods side by side</h1>",
        _headline(document),
        section(
            "Speed-up",
            "Ratio of total decode times to the fastest plain decoding of our own, same prompts, "
            "per decoded token; with prefill in the table below. Whiskers: 95 % bootstrap interval "
            "over prompts; dashed line: 1.",
            charts.bars(_bars(document, entries), charts.axis_end(entries.values())),
        ),
        _methods(document),
        _categories(document),
        _acceptance(document),
        _sources(document),
        _time(document),
        token_views(document, rows),
        _differences(document),
        _rouge(document),
        _conditions(document),
    ]
    return page(f"hispec bench: {short_name(made['model'])}", sections)


def page(title: str, sections: Sequence[str]) -> str:
    """Returns a whole HTML document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{''.join(part for part in sections if part)}</main></body></html>\n"
    )


def section(title: str, explanation: str, content: str) -> str:
    """Returns a titled part of the page."""
    said = f'<p class="said">{escape(explanation)}</p>' if explanation else ""
    return f"<section><h2>{escape(title)}</h2>{said}{content}</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table that scrolls sideways where it does not fit; the first column is a label."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + f"<th>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(c)}</td>" for c in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def short_name(model: str) -> str:
    """Returns the last part of a model's name or path."""
    return model.rstrip("/").split("/")[-1]


def kind_of(name: str) -> str:
    """Returns the colour class of a method."""
    if name in ("ar", "ar-fast"):
        return "plain"
    return "theirs" if name.startswith(("hf", "llama-cpp")) else "ours"


def _bars(document: Document, entries: Document) -> list[charts.Bar]:
    bars = []
    for name, entry in entries.items():
        bounds = entry["speedup_low"], entry["speedup_high"]
        label = markdown.label(document, name)
        bars.append(charts.Bar(label, entry["speedup"], *bounds, kind_of(name)))
    return bars


def _headline(document: Document) -> str:
    ours = {
        name: entry
        for name, entry in document["methods"].items()
        if kind_of(name) == "ours" and entry["speedup"] is not None
    }
    lines = [escape(line) for line in markdown.conditions(document).replace("`", "").split("\n")]
    notes = markdown.footnotes(document).replace("`", "").replace("**", "")
    items = "".join(f"<li>{escape(line[2:])}</li>" for line in notes.split("\n") if line)
    best = ""
    if ours:
        name = max(ours, key=lambda key: ours[key]["speedup"])
        entry = ours[name]
        same = document["answers"] - entry["mismatched_prompts"]
        best = (
            f'<p class="best"><strong>{entry["speedup"]:.2f}x</strong> {escape(name)} over plain '
            f"decoding ({markdown.number(entry['total_speedup'], 2)}x with prefill), "
            f"{entry['tok_per_s']:.0f} tokens a second, {same} of "
            f"{document['answers']} answers identical token for token</p>"
        )
    said = "".join(f"<p>{line.replace('**', '')}</p>" for line in lines)
    return f"{best}<div class='conditions'>{said}</div><ul>{items}</ul>"


def _methods(document: Document) -> str:
    head, rows = markdown.method_rows(document)
    return section("In numbers", "", table(head, rows))


def _categories(document: Document) -> str:
    categories = document["categories"]
    if len(categories) < 2:
        return ""
    entries = document["methods"]
    picked = {
        category: {
            name: entry["by_category"][category]
            for name, entry in entries.items()
            if category in entry["by_category"]
        }
        for category in categories
    }
    end = charts.axis_end(entry for found in picked.values() for entry in found.values())
    panels = ""
    for category, found in picked.items():
        answers = max((entry["prompts"] for entry in found.values()), default=0)
        panels += (
            f'<div class="panel"><h3>{escape(category)} '
            f"<small>{answers} answer{'s' * (answers != 1)}</small></h3>"
            f"{charts.bars(_bars(document, found), end)}</div>"
        )
    return section(
        "Speed-up by category", "All panels share one scale.", f'<div class="panels">{panels}</div>'
    )


def _acceptance(document: Document) -> str:
    panels = ""
    for name, entry in document["methods"].items():
        levels = [level for level in entry["levels"] if level["drafted_at"]]
        if not levels:
            continue
        longest = max(len(level["drafted_at"]) for level in levels)
        rows: list[tuple[str, list[float | None]]] = []
        for level in levels:
            rates: list[float | None] = [
                accepted / drafted if drafted else None
                for drafted, accepted in zip(level["drafted_at"], level["accepted_at"], strict=True)
            ]
            rates += [None] * (longest - len(rates))
            rows.append((level["name"], [*rates, level["acceptance_rate"]]))
        columns = [*map(str, range(1, longest + 1)), "all"]
        panels += (
            f'<div class="panel"><h3>{escape(name)} <small>{entry["block_efficiency"]:.2f} tokens '
            f"a full pass</small></h3>{charts.heat(columns, rows, corner='position')}</div>"
        )
    if not panels:
        return ""
    return section(
        "Acceptance by level and position",
        "Of the tokens a level hands up at each position of its window, the share that the level "
        "above accepts; a token counts only with all those before it.",
        f'<div class="panels">{panels}</div>',
    )


def _sources(document: Document) -> str:
    head, rows = markdown.source_rows(document)
    if not rows:
        return ""
    return section(
        "What each source brought",
        "Nodes a database put into draft trees, and those of them that were committed. A tree has "
        "rivals for every place, so its rate is lower than a chain's.",
        table(head, rows),
    )


def _time(document: Document) -> str:
    entries = {n: e for n, e in document["methods"].items() if e["time_share"]}
    exits = charts.exit_names(document["methods"])
    rows = []
    for name, entry in entries.items():
        per_token = 1000 / entry["tok_per_s"]
        rows.append(
            (
                name,
                [
                    (level, share * per_token, charts.level_class(level, exits))
                    for level, share in entry["time_share"].items()
                ],
            )
        )
    if not rows:
        return ""
    used = {level for entry in entries.values() for level in entry["time_share"]}
    keys = [level for level in [*charts.DATABASES, *exits, "target", "other"] if level in used]
    return section(
        "Where the time goes",
        "Milliseconds a decoded token, by the level whose passes take them (lifting through lower "
        "layers and heads included) or the source that looks up and learns.",
        charts.legend([(level, charts.level_class(level, exits)) for level in keys])
        + charts.stacks(rows, "ms"),
    )


def _differences(document: Document) -> str:
    head, rows = markdown.divergence_rows(document)
    if not rows:
        return section(
            "Token identity", "Every answer of every compared method equals plain decoding's.", ""
        )
    return section(
        "Token identity",
        "The first differing token of every answer that differs from plain decoding's. A tie is a "
        "difference between two logits so close that rounding decides.",
        table(head, rows[:FEW])
        + (_folded(f"{len(rows) - FEW} more", table(head, rows[FEW:])) if rows[FEW:] else ""),
    )


def _rouge(document: Document) -> str:
    head, rows = markdown.rouge_rows(document)
    return section("ROUGE", "F1 against the references.", table(head, rows)) if rows else ""


def _conditions(document: Document) -> str:
    rows = [[key.replace("_", " "), str(value)] for key, value in document["provenance"].items()]
    asked = document["settings"]
    rows += [[key.replace("_", " "), str(asked[key])] for key in asked if key != "methods"]
    rows += [[name, str(value)] for name, value in asked["methods"].items()]
    return section("Conditions", "", _folded("All of them", table(["", ""], rows)))


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"
