"""A report of one or several runs: Markdown, and HTML pages that need nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hispec.bench import compare, markdown, page, rouge
from hispec.bench.folder import RunFolder
from hispec.bench.summary import summarize
from hispec.files import write_whole


def write_report(folder: RunFolder, out: Path | None = None) -> dict[str, Any]:
    """After the call there are ``report.md``, ``report.html`` and ``report.json`` of a run.

    Args:
        folder: the run.
        out: where they go; the run's own folder by default.

    Returns:
        The document of ``hispec bench --json``.

    Raises:
        WriteError: they cannot be written.
    """
    document = summarize(folder)
    document["rouge"] = rouge.scores(folder.rows)
    texts = {
        "report.md": markdown.render(document),
        "report.html": page.render(document, folder.rows),
        "report.json": json.dumps(document),
    }
    _write(out or folder.path, texts)
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
    texts = {
        "comparison.md": compare.markdown(documents),
        "comparison.html": compare.html(documents),
    }
    _write(out, texts)
    return documents


def _write(out: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        write_whole(out / name, text)
