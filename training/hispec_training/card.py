"""The model card of a folder of exits, made from its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(record: Mapping[str, Any]) -> str:
    """Markdown with the card's front matter, the acceptance tables and how to use the exits.

    Args:
        record: What ``config.json`` holds.
    """
    base, exits = record["base"], record["exits"]
    layers = ", ".join(str(entry["exit_layer"]) for entry in exits)
    lines = [
        "---",
        f"base_model: {base['model']}",
        "library_name: hispec",
        "tags: [speculative-decoding, early-exit, self-speculative]",
        "---",
        "",
        f"# Exits of {base['model']}",
        "",
        f"Trained exit heads after layers {layers} of {record['num_layers']}. The backbone is not "
        "touched: text generated with these exits is the original model's, token for token. They "
        f"fit the weights with fingerprint `{base['fingerprint']}` and are refused on others.",
        "",
        "```",
        f"hispec generate --model {base['model']} --exits DIR --prompt TEXT",
        "```",
        "",
    ]
    lines += _parts(exits, record["vocab_size"])
    measured = [entry for entry in exits if entry.get("acceptance")]
    if measured:
        lines += _acceptance(measured)
    if record.get("training"):
        lines += ["## Training", ""]
        lines += [f"- {key}: {value}" for key, value in record["training"].items()]
        lines += [""]
    return "\n".join(lines)


def _parts(exits: list[dict[str, Any]], vocab_size: int) -> list[str]:
    lines = ["| exit layer | head | context | rows of the vocabulary |", "|---|---|---|---|"]
    for entry in exits:
        context = "final states before the root" if entry["context"] == "deep" else "the exit's own"
        lines.append(
            f"| {entry['exit_layer']} | {_head(entry)} | {context} | "
            f"{entry['vocab_size']:,} of {vocab_size:,} |"
        )
    return [*lines, ""]


def _head(entry: Mapping[str, Any]) -> str:
    if entry["kind"] == "lora":
        return f"layer {entry['layer']} of the model with LoRA of rank {entry['rank']}"
    return str(entry["kind"])


def _acceptance(exits: list[dict[str, Any]]) -> list[str]:
    names = [f"exit {entry['exit_layer']}" for entry in exits]
    tables = [entry["acceptance"] for entry in exits]
    on = tables[0].get("texts", "held-out texts")
    count = f"{tables[0].get('positions', 0):,} positions"
    if tables[0].get("divisions", 1) > 1:
        count += f", each under {tables[0]['divisions']} divisions into rounds"
    lines = [
        "## Acceptance",
        "",
        f"How often the exit's pick is the full model's, teacher-forced on {on} ({count}).",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
        _row("all positions", [table["top1"] for table in tables]),
    ]
    categories = sorted({c for table in tables for c in table.get("by_category", {})})
    lines += [_row(c, [table["by_category"].get(c) for table in tables]) for c in categories]
    if all(table.get("by_offset") for table in tables):
        for j in range(len(tables[0]["by_offset"])):
            title = "right after the root" if j == 0 else f"{j} after the root"
            lines.append(_row(title, [table["by_offset"][j] for table in tables]))
    return [*lines, ""]


def _row(title: str, values: list[float | None]) -> str:
    return f"| {title} | " + " | ".join("" if v is None else f"{v:.3f}" for v in values) + " |"
