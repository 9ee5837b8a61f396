"""A run's tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]

#: A cell where there is nothing to say.
NOTHING = "-"


def render(document: Document) -> str:
    """Returns the tables of a run, and the conditions it was made under."""
    parts = [
        conditions(document),
        methods_table(document),
        footnotes(document),
        categories_table(document),
        levels_table(document),
        sources_table(document),
        divergences_table(document),
        rouge_table(document),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def conditions(document: Document) -> str:
    """Returns what the numbers were measured on, in a few lines."""
    made, asked = document["provenance"], document["settings"]
    held = max((entry["memory_bytes"] for entry in document["methods"].values()), default=0)
    place = made.get("gpu") or made["cpu"]
    drift = document["drift"]
    lines = [
        f"{made['model']} ({made['layers']} layers, {made['dtype']}) on {place}, "
        f"{made['threads']} threads, torch {made['torch']}, "
        f"transformers {made['transformers']}, hispec {made['hispec']} "
        f"({made['commit'] or 'no commit'}), {made['date'][:10]}.",
        f"Memory: weights {made['weight_bytes'] / 1e6:,.0f} MB, "
        f"{made['kv_bytes_per_token'] / 1e3:.1f} kB of KV a token, up to {held / 1e6:,.0f} MB in "
        f"use with every method's model loaded; this machine reads "
        f"{made['read_gb_per_s']:.1f} GB/s. Narrow passes: {made['passes']}"
        + (f" ({made['why_not_compiled']})." if made["why_not_compiled"] else "."),
        f"{document['answers']} answers to {asked['prompts']} ({asked['number_of_prompts']} "
        f"prompts), up to {asked['max_new_tokens']} new tokens, greedy, batch 1, "
        f"{asked['repeats']} repeats. Baseline: `{document['baseline']}`, the fastest plain "
        f"decoding of our own; speed-up is the ratio of total decode times, "
        f"with a 95 % bootstrap interval over prompts.",
    ]
    if drift:
        low, high = drift["ratio_low"], drift["ratio_high"]
        steady = low is None or low <= 1 <= high
        lines.append(
            f"Drift (`ar` first over `ar` last): {interval(drift, 'ratio')}"
            + (
                "."
                if steady
                else ": **the machine was not steady; differences this small mean nothing.**"
            )
        )
    return "\n".join(lines)


def methods_table(document: Document) -> str:
    """Returns the table of methods."""
    return table(*method_rows(document))


def method_rows(document: Document) -> tuple[list[str], list[list[str]]]:
    """Returns heads and one row a method."""
    rows = []
    for name, entry in document["methods"].items():
        differs = str(entry["mismatched_prompts"])
        if entry["tied_prompts"]:
            differs += f" ({entry['tied_prompts']} ties)"
        if "gguf" in document["settings"]["methods"][name]:
            differs = NOTHING
        rows.append(
            [
                label(document, name),
                interval(entry, "speedup"),
                number(entry["total_speedup"], 2),
                number(entry["tok_per_s"], 1),
                number(_times(entry["prefill_s"], 1000), 0),
                number(entry["block_efficiency"], 2),
                _percent(entry["acceptance_rate"]),
                number(entry["layer_visits_per_token"], 1),
                _percent(entry["bandwidth_used"]),
                differs,
            ]
        )
    head = [
        "method",
        "speed-up",
        "with prefill",
        "tok/s",
        "prefill ms",
        "tokens/pass",
        "accepted",
        "layer visits/token",
        "bandwidth",
        "answers that differ",
    ]
    return head, rows


def label(document: Document, name: str) -> str:
    """Returns a method's name, with its weights where they are not those of the other rows."""
    gguf = document["settings"]["methods"][name].get("gguf")
    return f"{name} ({quantization(gguf)})" if gguf else name


def quantization(gguf: str) -> str:
    """Returns what weights a GGUF file has, ``4-bit weights, Q4_1``, by its name."""
    found = re.search(r"(?<![A-Z])I?Q(\d)_\w+", gguf.replace("\\", "/").split("/")[-1].upper())
    return f"{found[1]}-bit weights, {found[0]}" if found else "the GGUF file's weights"


def footnotes(document: Document) -> str:
    """Returns notes, failures and skipped prompts."""
    lines = []
    for name, entry in document["methods"].items():
        if entry["note"]:
            lines.append(f"- `{name}`: {entry['note']}.")
        if entry["error"]:
            lines.append(
                f"- `{name}` **failed** on {entry['failed_prompts']} answers: {entry['error']}"
            )
    skipped = document["skipped"]
    if skipped:
        named = ", ".join(f"{row['item']} ({row['reason']})" for row in skipped[:5])
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        lines.append(f"- skipped {len(skipped)} prompts: {named}{more}.")
    return "\n".join(lines)


def categories_table(document: Document) -> str:
    """Returns speed-ups by category, one column each."""
    categories = document["categories"]
    if len(categories) < 2:
        return ""
    rows = [
        [label(document, name)]
        + [interval(entry["by_category"].get(category, {}), "speedup") for category in categories]
        for name, entry in document["methods"].items()
    ]
    return "Speed-up by category\n\n" + table(["method", *categories], rows)


def levels_table(document: Document) -> str:
    """Returns acceptance by level and position, and where the time goes."""
    rows = []
    for name, entry in document["methods"].items():
        for level in entry["levels"]:
            at = [
                f"{accepted / drafted:.0%}" if drafted else NOTHING
                for drafted, accepted in zip(level["drafted_at"], level["accepted_at"], strict=True)
            ]
            rows.append(
                [
                    name,
                    level["name"],
                    str(level["drafted"] or NOTHING),
                    _percent(level["acceptance_rate"]),
                    " ".join(at) or NOTHING,
                    _percent(entry["time_share"].get(level["name"])),
                ]
            )
    if not rows:
        return ""
    head = ["method", "level", "drafted", "accepted", "accepted by position", "share of time"]
    return "Levels: what each handed up, what the next one made of it\n\n" + table(head, rows)


def sources_table(document: Document) -> str:
    """Returns what each database put into trees, and what of it stood."""
    head, rows = source_rows(document)
    return "Sources: what each put into the tree\n\n" + table(head, rows) if rows else ""


def source_rows(document: Document) -> tuple[list[str], list[list[str]]]:
    """Returns heads and one row a method and source."""
    rows = [
        [
            name,
            source["name"],
            str(source["proposed"]),
            str(source["accepted"]),
            _percent(source["acceptance_rate"]),
            _percent(source["accepted"] / entry["tokens"] if entry["tokens"] else None),
            _percent(entry["time_share"].get(source["name"])),
        ]
        for name, entry in document["methods"].items()
        for source in entry.get("sources", [])
    ]
    head = ["method", "source", "proposed", "accepted", "rate", "of all tokens", "share of time"]
    return head, rows


def divergences_table(document: Document) -> str:
    """Returns where answers left plain decoding's, and how close the tokens were."""
    head, rows = divergence_rows(document)
    title = "First differing token of every answer that differs\n\n"
    return title + table(head, rows) if rows else ""


def divergence_rows(document: Document) -> tuple[list[str], list[list[str]]]:
    """Returns heads and one row for each answer that differs."""
    rows = []
    for name, entry in document["methods"].items():
        for found in entry["divergences"]:
            rows.append(
                [
                    name,
                    found["item"],
                    str(found["index"]),
                    str(found["position"]),
                    f"{found['expected']} / {found['found']}" if "found" in found else "length",
                    f"{found['top2_gap']:.2g}" if "top2_gap" in found else NOTHING,
                    {True: "tie", False: "no tie"}.get(found.get("tie"), NOTHING),
                ]
            )
    head = ["method", "prompt", "token", "position", "ar's id / its id", "top-2 logit gap", "is"]
    return head, rows


def rouge_table(document: Document) -> str:
    """Returns ROUGE where references exist."""
    head, rows = rouge_rows(document)
    return "ROUGE (F1) against the references\n\n" + table(head, rows) if rows else ""


def rouge_rows(document: Document) -> tuple[list[str], list[list[str]]]:
    """Returns heads and one row a method and category."""
    rows = [
        [name, category, str(entry["n"])]
        + [f"{100 * entry[key]:.1f}" for key in ("rouge1", "rouge2", "rougeL")]
        for name, found in (document.get("rouge") or {}).items()
        for category, entry in found.items()
    ]
    return ["method", "category", "n", "ROUGE-1", "ROUGE-2", "ROUGE-L"], rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table whose source is aligned too."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def interval(entry: Document, key: str) -> str:
    """Returns a ratio with its interval, ``1.42 [1.38, 1.47]``."""
    value, low, high = entry.get(key), entry.get(f"{key}_low"), entry.get(f"{key}_high")
    if value is None:
        return NOTHING
    if low is None or high is None:
        return f"{value:.2f}"
    # Two prompts can leave a ratio as good as open.
    return f"{value:.2f} [{low:.2f}, {f'{high:.2f}' if high < 100 else '> 100'}]"


def number(value: float | None, digits: int) -> str:
    """Returns a rounded number."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
