"""One answer, token by token, coloured by the level or source that proposed each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from hispec.bench import charts
from hispec.bench.folder import Row

#: An answer shorter than this shows little.
_ENOUGH = 24


def token_views(document: dict[str, Any], rows: Sequence[Row]) -> str:
    """Returns the views of one answer by every method of ours that drafts, the fastest open."""
    drafting = [
        name
        for name, entry in document["methods"].items()
        if any(level["drafted"] for level in entry["levels"])
        or any(source["proposed"] for source in entry.get("sources", []))
    ]
    drafting.sort(key=lambda name: -(document["methods"][name]["speedup"] or 0))
    shown = {
        name: {row["item"]: row for row in rows if row["method"] == name and "origins" in row}
        for name in drafting
    }
    views, exits = "", charts.exit_names(document["methods"])
    item = _choose([found for found in shown.values() if found])
    for name, found in shown.items():
        if item in found:
            views += _view(name, found[item], exits, opened=not views)
    if not views:
        return ""
    return (
        "<section><h2>Where each token came from</h2>"
        f'<p class="said">The answer to {escape(str(item))}. A coloured token was drafted by '
        "a database or an exit and confirmed by the target; an uncoloured one is the target's own "
        f"pick and cost a full pass.</p>{views}</section>"
    )


def _choose(found: Sequence[dict[str, Row]]) -> str | None:
    """The first answer long enough that all methods have; else the longest."""
    if not found:
        return None
    common = [item for item in found[0] if all(item in others for others in found)]
    lengths = {item: found[0][item]["num_tokens"] for item in common}
    enough = (item for item in common if lengths[item] >= _ENOUGH)
    return next(enough, max(lengths, key=lambda key: lengths[key], default=None))


def _view(name: str, row: Row, exits: Sequence[str], *, opened: bool) -> str:
    spans = ""
    for piece, origin in zip(row["pieces"], row["origins"], strict=True):
        kind = charts.level_class(origin, exits)
        text = escape(piece).replace("\n", "↵\n")
        spans += f'<span class="token {kind}" title="{escape(origin)}">{text}</span>'
    tally: Counter[str] = Counter(row["origins"])
    keys = [
        (f"{level}: {tally[level]}", charts.level_class(level, exits))
        for level in [*charts.DATABASES, *exits, "target"]
        if tally[level]
    ]
    return (
        f"<details{' open' if opened else ''}><summary>{escape(name)}: {row['num_tokens']} tokens "
        f"in {row['passes']} full passes</summary>{charts.legend(keys)}"
        f'<div class="answer">{spans}</div></details>'
    )
