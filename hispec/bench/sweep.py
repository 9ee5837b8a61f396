"""Looking for the best exits and windows: a grid measured once, its best measured again.

The first stage ranks with one repeat; its winner is partly luck, so the best few of each kind run
again, with repeats, and only that decides. Tune on prompts of their own: a hierarchy chosen on the
prompts it is reported on looks better than it is.

Single exits are tried strict and ranking, pairs strict only: a ranking level runs only while that
pays, so its window is a bound that matters less, and all pairs once more would double the grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hispec.bench import charts, page
from hispec.bench.markdown import NOTHING, interval, number
from hispec.errors import UsageError
from hispec.hierarchy import AR, MAX_WIDTH, Hierarchy, Level, eighth_and_quarter

KINDS = ("layerskip", "hispec")


def default_exits(num_layers: int, trained: Sequence[int]) -> list[int]:
    """Returns the exits to try: the trained ones, or the depths that the papers use."""
    if trained:
        return sorted(trained)
    draft, check = eighth_and_quarter(num_layers)
    found = {draft, check, max(1, num_layers // 3), max(1, num_layers // 2)}
    return sorted(e for e in found if e < num_layers)


def grid(
    exits: Sequence[int], windows: Sequence[int], check_windows: Sequence[int]
) -> dict[str, Hierarchy]:
    """Returns every strict LayerSkip and HiSpec hierarchy of these, by name, and ranking LayerSkip.

    Args:
        exits: layers.
        windows: of the drafting exit.
        check_windows: of the checking exit; smaller ones than the draft's are left out.

    Raises:
        UsageError: nothing fits.
    """
    found: dict[str, Hierarchy] = {}
    for exit_layer in exits:
        for window in windows:
            if window < MAX_WIDTH:
                add(found, (Level(exit_layer, window),))
                add(found, (Level(exit_layer, window, ranks=True),))
    for lower in exits:
        for upper in (e for e in exits if e > lower):
            for window in windows:
                for check in (w for w in check_windows if w >= window):
                    if window + check < MAX_WIDTH:
                        add(found, (Level(lower, window), Level(upper, check)))
    if not found:
        raise UsageError("the sweep is empty. Give at least one exit and one window.")
    return found


def add(found: dict[str, Hierarchy], levels: tuple[Level, ...]) -> None:
    """Adds a hierarchy under its name."""
    name = name_of(levels)
    found[name] = Hierarchy(levels, name)


def name_of(levels: Iterable[Level]) -> str:
    """Returns ``4x2-8x4`` for exits 4 and 8 with windows of 2 and 4; ``4x2r`` if exit 4 ranks."""
    return "-".join(f"{x.exit_layer}x{x.window}{'r' if x.ranks else ''}" for x in levels)


def kind(hierarchy: Hierarchy) -> str:
    """Returns ``layerskip`` or ``hispec``."""
    return KINDS[len(hierarchy.levels) - 1]


def finalists(
    document: Mapping[str, Any], hierarchies: Mapping[str, Hierarchy], count: int
) -> dict[str, Hierarchy]:
    """Returns the fastest ``count`` of each kind in a measured grid."""
    found: dict[str, Hierarchy] = {}
    for wanted in KINDS:
        names = [name for name, h in hierarchies.items() if kind(h) == wanted]
        names.sort(key=lambda name: -(document["methods"][name]["speedup"] or 0.0))
        found |= {name: hierarchies[name] for name in names[:count]}
    return found


def best(
    document: Mapping[str, Any], hierarchies: Mapping[str, Hierarchy]
) -> dict[str, dict[str, Any]]:
    """Returns the fastest of each kind as JSON, and ``auto``: the fastest that surely gains.

    ``auto`` is plain decoding unless the whole interval of the winner lies above 1.
    """
    chosen: dict[str, Hierarchy] = {}
    speed = {name: document["methods"][name]["speedup"] or 0.0 for name in hierarchies}
    for wanted in KINDS:
        names = [name for name, h in hierarchies.items() if kind(h) == wanted]
        if names:
            chosen[wanted] = hierarchies[max(names, key=lambda name: speed[name])]
    first = max(hierarchies, key=lambda name: speed[name])
    gains = (document["methods"][first]["speedup_low"] or 0.0) > 1.0
    chosen["auto"] = hierarchies[first] if gains else AR
    return {
        name: {**hierarchy.to_json(), "name": hierarchy.name if name == "auto" else name}
        for name, hierarchy in chosen.items()
    }


def render(
    document: Mapping[str, Any],
    hierarchies: Mapping[str, Hierarchy],
    final: Mapping[str, Any],
    chosen: Mapping[str, Any],
) -> str:
    """Returns the sweep's page: heat maps of the grid, and what the second stage decided."""
    speed = {name: document["methods"][name]["speedup"] for name in hierarchies}
    known = [value for value in speed.values() if value is not None]
    shades = {"start": min(known, default=0.0), "end": max(known, default=1.0)}
    by_levels = {hierarchies[name].levels: value for name, value in speed.items()}
    made = document["provenance"]
    decided = [
        [name, str(Hierarchy.from_json(value, name)), *_measured(final, value)]
        for name, value in chosen.items()
    ]
    sections = [
        f"<h1>{page.short_name(made['model'])}: exits and windows</h1>",
        page.section(
            "Chosen",
            f"The best of each kind, measured again with "
            f"{final['settings']['repeats']} repeats on {final['answers']} answers to "
            f"{final['settings']['prompts']}. {made['dtype']}, {made['threads']} threads, "
            f"{made.get('gpu') or made['cpu']}. Two exits that rank, and exits over "
            f"databases, were not tried.",
            page.table(["", "hierarchy", "speed-up", "with prefill"], decided),
        ),
        _pairs(by_levels, shades),
        _single(by_levels, shades, ranks=False),
        _single(by_levels, shades, ranks=True),
        _windows(by_levels, shades),
    ]
    return page.page("hispec bench sweep", sections)


def _measured(final: Mapping[str, Any], value: Mapping[str, Any]) -> list[str]:
    name = name_of(Hierarchy.from_json(value).levels) or "ar"
    entry = final["methods"].get(name)
    if not entry or entry["speedup"] is None:
        return ["not measured", NOTHING]
    return [interval(entry, "speedup"), number(entry["total_speedup"], 2)]


Speeds = Mapping[tuple[Level, ...], float | None]


def _pairs(speeds: Speeds, shades: Mapping[str, float]) -> str:
    """Draft exit against check exit, the best windows of each pair."""
    table: dict[tuple[int, int], float] = {}
    for levels, value in speeds.items():
        if len(levels) == 2 and value is not None:
            pair = (levels[0].exit_layer, levels[1].exit_layer)
            table[pair] = max(value, table.get(pair, 0.0))
    if not table:
        return ""
    return page.section(
        "Draft exit and check exit",
        "Speed-up over plain decoding with the best windows for each pair of exits.",
        _map(table, "draft ↓ check →", shades),
    )


def _single(speeds: Speeds, shades: Mapping[str, float], *, ranks: bool) -> str:
    """One exit: its layer against its window."""
    table = {
        (levels[0].exit_layer, levels[0].window): value
        for levels, value in speeds.items()
        if len(levels) == 1 and levels[0].ranks == ranks and value is not None
    }
    if not table:
        return ""
    title, said = "One exit (LayerSkip)", "Speed-up by exit and window."
    if ranks:
        title = "One exit, ranking"
        said = "Speed-up by exit and window; the exit runs only while that pays, and no further."
    return page.section(
        title,
        said,
        _map(table, "exit ↓ window →", shades),
    )


def _windows(speeds: Speeds, shades: Mapping[str, float]) -> str:
    """Two exits: for each pair the draft's window against the check's."""
    tables: dict[tuple[int, int], dict[tuple[int, int], float]] = {}
    for levels, value in speeds.items():
        if len(levels) == 2 and value is not None:
            pair = (levels[0].exit_layer, levels[1].exit_layer)
            tables.setdefault(pair, {})[levels[0].window, levels[1].window] = value
    panels = "".join(
        f'<div class="panel"><h3>exits {lower} and {upper}</h3>'
        f"{_map(table, 'draft ↓ check →', shades)}</div>"
        for (lower, upper), table in tables.items()
    )
    if not panels:
        return ""
    return page.section(
        "Two exits (HiSpec): windows",
        "Speed-up by the window of the drafting exit and that of the checking exit.",
        f'<div class="panels">{panels}</div>',
    )


def _map(table: Mapping[tuple[int, int], float], corner: str, shades: Mapping[str, float]) -> str:
    ys = sorted({y for y, _ in table})
    xs = sorted({x for _, x in table})
    rows = [(str(y), [table.get((y, x)) for x in xs]) for y in ys]
    top = max(table, key=lambda key: table[key], default=None)
    framed = (ys.index(top[0]), xs.index(top[1])) if top else None
    return charts.heat(
        [str(x) for x in xs], rows, corner=corner, text="{:.2f}", best=framed, **shades
    )
