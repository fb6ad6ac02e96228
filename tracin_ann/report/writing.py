"""Write a report: which page suits which results, and one file from its parts, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tracin_ann.files import atomic_write
from tracin_ann.index import InfluenceIndex
from tracin_ann.results import Answers, Listed


def write_report(
    results: Answers | Listed[Any],
    path: str | os.PathLike[str],
    index: InfluenceIndex,
    title: str | None = None,
    *,
    checkpoints: Sequence[int] | None = None,
) -> Path:
    """Write results as one HTML file, and return its path."""
    out = Path(path)
    heading = escape(title or f"Influence in {index.directory.name}")
    body = f"<!doctype html><meta charset='utf-8'><title>{heading}</title><h1>{heading}</h1>{results._repr_html_()}"
    with atomic_write(out) as file:
        file.write(body.encode())
    return out
