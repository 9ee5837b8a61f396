"""A report of one or several runs: Markdown, and HTML pages that need nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hispec.bench import compare, markdown, page, rouge
from hispec.bench.folder import RunFolder, write_whole
from hispec.bench.summary import summarize


def write_report(folder: RunFolder) -> dict[str, Any]:
    """After the call the run's folder has its ``report.md``, ``report.html`` and ``report.json``.

    Returns:
        The document of ``hispec bench --json``.
    """
    document = summarize(folder)
    document["rouge"] = rouge.scores(folder.rows)
    write_whole(folder.path / "report.md", markdown.render(document))
    write_whole(folder.path / "report.html", page.render(document, folder.rows))
    write_whole(folder.path / "report.json", json.dumps(document))
    return document


def write_comparison(folders: Sequence[RunFolder], out: Path) -> dict[str, Any]:
    """After the call every run has its report, and ``out`` a ``comparison.md`` and ``.html``.

    Returns:
        The runs' documents by name.
    """
    documents: dict[str, Any] = {}
    for folder in folders:
        name = folder.path.resolve().name
        while name in documents:  # folders of one name in different places
            name += "'"
        documents[name] = write_report(folder)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "comparison.md", compare.markdown(documents))
    write_whole(out / "comparison.html", compare.html(documents))
    return documents
