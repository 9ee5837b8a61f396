"""From a run's rows to the numbers of its tables: sums of raw counts, ratios only at the end.

Decode times are scaled to the number of tokens that plain decoding emitted, so that a method whose
answer ended earlier, or whose prefill already gave several tokens, is compared per decoded token.
With equal tokens the scale is 1 and the speed-up is the plain ratio of total times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hispec.bench.folder import Row, RunFolder
from hispec.bench.stats import Ratio, ratio

PLAIN = ("ar", "ar-fast")


def summarize(folder: RunFolder) -> dict[str, Any]:
    """Returns the document of ``hispec bench --json``."""
    return Summary(folder).document()


class Summary:
    """The rows of a run, grouped.

    Attributes:
        names: methods in the run's order.
        categories: in the order of the prompts.
        baseline: the faster of plain decoding in exact and in fast numerics.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.names = list(folder.settings["methods"])
        self.by_method: dict[str, dict[str, list[Row]]] = {name: {} for name in self.names}
        self.categories: list[str] = []
        self.errors: dict[str, list[Row]] = {name: [] for name in self.names}
        for row in folder.rows:
            if row["error"]:
                self.errors[row["method"]].append(row)
            else:
                self.by_method[row["method"]].setdefault(row["item"], []).append(row)
            if row["category"] not in self.categories:
                self.categories.append(row["category"])
        self._lengths = {
            item: rows[0]["num_tokens"] for item, rows in self.by_method.get("ar", {}).items()
        }
        plain = [name for name in PLAIN if self.by_method.get(name)]
        self.baseline = min(plain, key=self._decode_s, default="ar")

    def document(self) -> dict[str, Any]:
        """Returns everything a report shows, as plain values."""
        peak = self.folder.provenance.get("read_gb_per_s")
        drift = self.drift()
        return {
            "methods": {name: self.method(name, peak) for name in self.names},
            "baseline": self.baseline,
            "drift": _plain(drift, "ratio") if drift else None,
            "categories": self.categories,
            "answers": len(self._lengths),
            "skipped": self.folder.skipped,
            "settings": self.folder.settings,
            "provenance": self.folder.provenance,
        }

    def drift(self) -> Ratio | None:
        """Plain decoding first in its block over the same last: 1 on a steady machine."""
        first, last, prompts = [], [], []
        for rows in self.by_method.get("ar", {}).values():
            ends = [row["of"] - 1 for row in rows]
            early = [row["decode_s"] for row in rows if row["place"] == 0]
            late = [r["decode_s"] for r, end in zip(rows, ends, strict=True) if r["place"] == end]
            if early and late and rows[0]["num_tokens"] > 1:
                first.append(early)
                last.append(late)
                prompts.append(rows[0]["prompt"])
        return ratio(first, last, prompts) if first else None

    def method(self, name: str, peak_gb_per_s: float | None) -> dict[str, Any]:
        """Returns the row of one method."""
        items = self.by_method[name]
        rows = [row for found in items.values() for row in found]
        record: dict[str, Any] = {
            "prompts": len(items),
            "mismatched_prompts": _count(items, lambda row: bool(row.get("mismatch"))),
            "tied_prompts": _count(items, lambda row: bool((row.get("mismatch") or {}).get("tie"))),
            "failed_prompts": len({row["item"] for row in self.errors[name]}),
            "error": self.errors[name][0]["error"] if self.errors[name] else None,
            "note": self.folder.document.get("notes", {}).get(name, ""),
            "divergences": self._divergences(name),
        }
        record |= self._speed(name, list(items))
        record |= counts(rows)
        record["read_gb_per_s"] = _over(
            sum(row["bytes_read"] for row in rows), 1e9 * sum(row["decode_s"] for row in rows)
        )
        record["bandwidth_used"] = _over(record["read_gb_per_s"], peak_gb_per_s)
        record["memory_bytes"] = max((row["memory_bytes"] for row in rows), default=0)
        record["by_category"] = {}
        for category in self.categories:
            chosen = [item for item, found in items.items() if found[0]["category"] == category]
            if chosen:
                entry = self._speed(name, chosen) | counts(
                    [row for item in chosen for row in items[item]]
                )
                entry["prompts"] = len(chosen)
                del entry["levels"], entry["sources"], entry["time_share"]
                record["by_category"][category] = entry
        return record

    # ------------------------------------------------------------------ speed

    def _speed(self, name: str, items: Sequence[str]) -> dict[str, Any]:
        decode = self._compare(name, items, lambda row, scale: row["decode_s"] * scale)
        total = self._compare(
            name, items, lambda row, scale: row["prefill_s"] + row["decode_s"] * scale
        )
        rows = [row for item in items for row in self.by_method[name][item]]
        decoded = sum(row["num_tokens"] - row["first"] for row in rows)
        return {
            **_plain(decode, "speedup"),
            **_plain(total, "total_speedup"),
            "tok_per_s": _over(decoded, sum(row["decode_s"] for row in rows)),
            "prefill_s": _over(sum(row["prefill_s"] for row in rows), len(rows)),
            "decode_s": _over(sum(row["decode_s"] for row in rows), len(rows)),
        }

    def _compare(
        self, name: str, items: Sequence[str], seconds: Callable[[Row, float], float]
    ) -> Ratio | None:
        """The baseline's total over the method's, over the answers that both have decoded."""
        above, below, prompts = [], [], []
        for item in items:
            base, ours = self.by_method[self.baseline].get(item), self.by_method[name][item]
            if not base:
                continue
            upper = self._scaled(item, base, seconds)
            lower = self._scaled(item, ours, seconds)
            if upper and lower:
                above.append(upper)
                below.append(lower)
                prompts.append(ours[0]["prompt"])
        if not above:
            return None
        if name == self.baseline:
            # 1 by definition, so there is nothing to be uncertain of: noise is the drift's matter.
            return Ratio(1.0, None, None)
        return ratio(above, below, prompts)

    def _scaled(
        self, item: str, rows: Sequence[Row], seconds: Callable[[Row, float], float]
    ) -> list[float]:
        wanted = self._lengths.get(item, 0) - 1
        decoded = [row["num_tokens"] - row["first"] for row in rows]
        if wanted < 1 or min(decoded) < 1:
            return []
        return [seconds(row, wanted / n) for row, n in zip(rows, decoded, strict=True)]

    def _decode_s(self, name: str) -> float:
        """Seconds a decoded token takes, for choosing the baseline."""
        rows = [row for found in self.by_method[name].values() for row in found]
        decoded = sum(row["num_tokens"] - row["first"] for row in rows)
        return sum(row["decode_s"] for row in rows) / max(decoded, 1)

    def _divergences(self, name: str) -> list[dict[str, Any]]:
        """The first repeat of each prompt that left plain decoding's tokens."""
        found = []
        for item, rows in self.by_method[name].items():
            first = next((row["mismatch"] for row in rows if row.get("mismatch")), None)
            if first:
                found.append({"item": item, **first})
        return found


def counts(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns what a method did, from the raw counts of its rows."""
    levels: dict[str, dict[str, Any]] = {}
    sources: dict[str, dict[str, Any]] = {}
    for row in rows:
        for level in row["levels"]:
            add_level(levels.setdefault(level["name"], {"name": level["name"]}), level)
        for source in row.get("sources", []):
            total = sources.setdefault(source["name"], {"name": source["name"]})
            for key in ("proposed", "accepted", "time_s"):
                total[key] = total.get(key, 0) + source[key]
    for source in sources.values():
        source["acceptance_rate"] = _over(source["accepted"], source["proposed"])
    for level in levels.values():
        level["acceptance_rate"] = _over(level["accepted"], level["drafted"])
    drafting = [level for level in levels.values() if level["drafted"]]
    decode_s = sum(row["decode_s"] for row in rows)
    parts = {**sources, **levels}
    timed = {name: part["time_s"] for name, part in parts.items() if part["time_s"]}
    share = {name: time_s / decode_s for name, time_s in timed.items()} if decode_s else {}
    if share:
        share["other"] = max(1 - sum(share.values()), 0.0)
    committed = sum(row["committed"] for row in rows)
    proposed = sum(source["proposed"] for source in sources.values())
    accepted = sum(source["accepted"] for source in sources.values())
    return {
        "tokens": sum(row["num_tokens"] for row in rows),
        "block_efficiency": _over(committed, sum(row["passes"] for row in rows)),
        # Of what is handed to the target, how much it would have picked itself; of a tree's nodes
        # where databases alone draft.
        "acceptance_rate": (
            drafting[-1]["acceptance_rate"] if drafting else _over(accepted, proposed)
        ),
        "layer_visits_per_token": _over(sum(row["layer_visits"] for row in rows), committed),
        "levels": list(levels.values()),
        "sources": list(sources.values()),
        "time_share": share,
    }


def add_level(total: dict[str, Any], level: dict[str, Any]) -> None:
    """Adds one answer's counts of a level to ``total``."""
    for key in ("drafted", "accepted", "passes", "time_s"):
        total[key] = total.get(key, 0) + level.get(key, 0)
    for key in ("drafted_at", "accepted_at", "passes_of"):
        sums, more = total.setdefault(key, []), level.get(key, [])
        sums += [0] * (len(more) - len(sums))
        for place, count in enumerate(more):
            sums[place] += count


def _plain(found: Ratio | None, name: str) -> dict[str, float | None]:
    if found is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _over(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _count(items: dict[str, list[Row]], test: Callable[[Row], bool]) -> int:
    return sum(any(test(row) for row in rows) for rows in items.values())
