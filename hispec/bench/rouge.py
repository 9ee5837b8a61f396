"""ROUGE of the answers that have a reference, where ``rouge-score`` is installed.

Lossless methods score alike to the last digit; the column is for those that are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hispec.bench.folder import Row

KINDS = ("rouge1", "rouge2", "rougeL")


def scores(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns F1 by method and category; nothing without the package.

    Of several references the best counts.

    Args:
        rows: a run's; those with ``text`` and ``references`` count.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return {}
    scorer = RougeScorer(list(KINDS), use_stemmer=True)
    sums: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if not row.get("references") or "text" not in row:
            continue
        found = scorer.score_multi(row["references"], row["text"])
        entry = sums.setdefault(row["method"], {}).setdefault(row["category"], {"n": 0})
        entry["n"] += 1
        for kind in KINDS:
            entry[kind] = entry.get(kind, 0.0) + found[kind].fmeasure
    return {
        method: {category: _mean(entry) for category, entry in by_category.items()}
        for method, by_category in sums.items()
    }


def _mean(entry: dict[str, float]) -> dict[str, Any]:
    return {"n": entry["n"]} | {kind: entry[kind] / entry["n"] for kind in KINDS}
