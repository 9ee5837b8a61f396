"""The page of a plan: the levels as a graph with costs and acceptance, and the alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

from hispec.bench import charts, page
from hispec.hierarchy import Hierarchy
from hispec.planner.acceptance import OWN, Acceptance, Key
from hispec.planner.cost_table import TARGET, CostTable
from hispec.planner.plan import Plan

WIDTH, NODE, TOP = 1000, 120, 150
#: Alternatives that are shown.
SHOWN = 16
STYLE = """<style>
.graph text { font-size: 13px; fill: var(--ink); text-anchor: middle; }
.graph .note { fill: var(--soft); font-size: 12px; }
.graph .cost { font-size: 12px; }
.graph rect { stroke: var(--line); }
.graph path { fill: none; stroke: var(--line); stroke-width: 1.5; }
.graph .taken { stroke: var(--ours); stroke-width: 3.5; }
.graph rect.taken { stroke: var(--ours); stroke-width: 2.5; }
</style>"""


def render(plan: Plan) -> str:
    """Returns the whole page of a plan that ``hispec plan`` has made."""
    record = plan.record
    made = record["made_for"]
    costs = CostTable.from_json(record["costs"])
    acceptance = Acceptance.from_json(record["acceptance"])
    shown = record["alternatives"][:SHOWN]
    best = next(x for x in record["alternatives"] if x["hierarchy"]["name"] == record["chosen"])
    if best not in shown:
        shown = [*shown[:-1], best]
    sections = [
        f"<h1>{escape(page.short_name(made['model']))}: the plan</h1>{STYLE}",
        _headline(plan, best),
        page.section(
            "Levels",
            "What may draft and check, from the cheapest to the target. Boxes: a pass over one row "
            "and over eight, head included. Arcs: how often a token of the lower level is what the "
            "upper one would have picked, all before it standing, with its 95 % interval. The plan "
            "is the marked path.",
            f'<div class="wide">{graph(plan.hierarchy, costs, acceptance)}</div>',
        ),
        _alternatives(shown, record["chosen"]),
        _parts(shown),
        _rates(acceptance),
    ]
    return page.page(f"hispec plan: {page.short_name(made['model'])}", sections)


def _headline(plan: Plan, best: dict[str, Any]) -> str:
    record = plan.record
    made, measured = record["made_for"], best["measured"]
    known = measured and measured["speedup"]
    speed = f"{known:.2f}x</strong> measured" if known else "1.00x</strong>"
    said = (
        f"{made['model']}, {made['dtype']}, {made['threads']} threads, {made['machine']}. "
        f"{record['rounds']} rounds of {record['prompts']}, {record['date']}."
    )
    return (
        f'<p class="best"><strong>{speed}, {best["predicted_speedup"]:.2f}x predicted: '
        f'{escape(str(plan.hierarchy))}</p><div class="conditions"><p>{escape(said)}</p></div>'
    )


def graph(hierarchy: Hierarchy, costs: CostTable, acceptance: Acceptance) -> str:
    """Returns the levels as boxes in a row and the edges between them as arcs."""
    names = ["databases", *costs.models_s, *costs.depths]
    step = (WIDTH - NODE) / max(len(names) - 1, 1)
    at = {name: NODE / 2 + step * place for place, name in enumerate(names)}
    windows = {level.name: level.window for level in hierarchy.levels}
    taken = [*(["databases"] if hierarchy.nodes and hierarchy.sources else []), *windows, TARGET]
    path = list(pairwise(taken))
    drawn, labels = "", ""
    rise = 42 * min(1.0, 5 / len(names))  # the longest arc stays inside
    for lower in names:
        for upper in names[names.index(lower) + 1 :]:
            chosen = (lower, upper) in path
            count = acceptance.total(Key(lower, upper, OWN))
            if not count.seen and not chosen:
                continue
            span = names.index(upper) - names.index(lower)
            top, middle = TOP - 40 - rise * span, (at[lower] + at[upper]) / 2
            kind = ' class="taken"' if chosen else ""
            drawn += (
                f'<path{kind} d="M {at[lower]:.0f} {TOP} Q {middle:.0f} {top:.0f} '
                f'{at[upper]:.0f} {TOP}"/>'
            )
            label = ""
            if count.seen:
                low, high = count.interval()
                label = f"{count.rate:.2f} [{low:.2f}, {high:.2f}]"
            if chosen and lower in windows:
                label += f", window {windows[lower]}"
            if chosen and lower == "databases":
                label = f"{hierarchy.nodes} nodes"
            labels += f'<text class="note" x="{middle:.0f}" y="{(TOP + top) / 2 - 5:.0f}">'
            labels += f"{label}</text>"
    boxes = ""
    for name in names:
        left, kind = at[name] - NODE / 2, "taken" if name in taken else ""
        colour = {"databases": "source0"}.get(name) or charts.level_class(name, names[1:-1])
        note = f"{1e3 * costs.ask_s:.2f} ms a round"
        if name != "databases":
            first = costs.first_s(name, 0)
            few, more = (1e3 * (first + costs.pass_s(name, 0, rows)) for rows in (1, 8))
            note = f"{few:.1f} to {more:.1f} ms"
        boxes += (
            f'<rect class="{colour} {kind}" x="{left:.0f}" y="{TOP}" width="{NODE}" height="46" '
            f'rx="6"/><text x="{at[name]:.0f}" y="{TOP + 20}">{escape(name)}</text>'
            f'<text class="cost" x="{at[name]:.0f}" y="{TOP + 37}">{note}</text>'
        )
    return (
        f'<svg class="graph" viewBox="-3 0 {WIDTH + 6} {TOP + 60}" width="100%" '
        f'style="min-width:620px" role="img">{drawn}{boxes}{labels}</svg>'
    )


def _alternatives(shown: Sequence[dict[str, Any]], chosen: str) -> str:
    rows = []
    for entry in shown:
        name, measured = entry["hierarchy"]["name"], entry["measured"]
        kind = "ours" if name == chosen else "plain"
        rows.append(charts.Bar(f"{name}, predicted", entry["predicted_speedup"], None, None, kind))
        if measured and measured["speedup"] is not None:
            bounds = measured["speedup_low"], measured["speedup_high"]
            rows.append(charts.Bar("measured", measured["speedup"], *bounds, kind))
    top = max([1.0, *(row.high or row.value or 0.0 for row in rows)])
    return page.section(
        "Alternatives",
        "Speed-up over plain decoding: predicted on the prompts that calibrated, measured on the "
        "others, with a 95 % bootstrap interval. The dashed line is plain decoding.",
        charts.bars(rows, 1.04 * top),
    )


def _parts(shown: Sequence[dict[str, Any]]) -> str:
    exits = charts.exit_names(
        {"": {"levels": [{"name": name} for x in shown for name in x["parts_ms_per_token"]]}}
    )
    rows = [
        (
            entry["hierarchy"]["name"],
            [
                (name, ms, "source0" if name == "databases" else charts.level_class(name, exits))
                for name, ms in entry["parts_ms_per_token"].items()
            ],
        )
        for entry in shown
    ]
    keys = [("databases", "source0"), *((name, charts.level_class(name, exits)) for name in exits)]
    return page.section(
        "Expected milliseconds a token",
        "Where they go: passes of each level, its lifting of rows through lower layers included.",
        charts.legend([*keys, (TARGET, "target")]) + charts.stacks(rows, "ms"),
    )


def _rates(acceptance: Acceptance) -> str:
    if not acceptance.counts:
        return ""
    longest = max(len(row) for row in acceptance.counts.values())
    rows = []
    for key, row in acceptance.counts.items():
        label = f"{key.lower} → {key.upper}"
        if key.origin != OWN:
            label += f", {key.origin} ({key.via})"
        rates = [count.rate if count.seen >= 5 else None for count in row]
        total = acceptance.total(key)
        rows.append((label, [*rates, *[None] * (longest - len(rates)), total.rate]))
    columns = [*map(str, range(1, longest + 1)), "all"]
    return page.section(
        "Acceptance by place and origin",
        "Given that all before it in the window stood; fewer than five observations are left out. "
        "Origins: the level below had drafted the same (accepted), another (corrected), or may "
        "have had no more (bonus).",
        charts.heat(columns, rows, corner="place"),
    )
