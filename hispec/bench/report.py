"""A report of one or several runs: Markdown, and one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hispec.bench import markdown, page
from hispec.bench.folder import RunFolder, write_whole
from hispec.bench.summary import summarize


def write_report(folders: Sequence[RunFolder]) -> dict[str, Any]:
    """After the call every run's folder has its ``report.md`` and ``report.html``.

    Returns:
        The JSON document of the first run.
    """
    documents = [summarize(folder) for folder in folders]
    for folder, document in zip(folders, documents, strict=True):
        write_whole(folder.path / "report.md", markdown.render(document))
        write_whole(folder.path / "report.html", page.render(document, folder.rows))
    return documents[0]
