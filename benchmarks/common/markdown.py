"""Parts of the tables of the documents: Markdown tables, captions and the line that names the machine."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

Row = tuple[str, ...]
WIDTH = 120
"""Columns of a page."""
SIDES = ("proponents", "opponents")


def format_table(*rows: Row) -> str:
    """Return a Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def format_environment(content: dict[str, Any]) -> str:
    """Return the line below a table: machine, threads, versions and date."""
    machine = content["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{machine['machine']}; {machine['device']}; {versions}; {machine['date']}"


def format_sides(values: Iterable[float], form: str = ".3f") -> str:
    """Return the figures of proponents and opponents in one cell."""
    return " / ".join(format(value, form) for value in values)


def find_sides(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of proponents and opponents."""
    return [figures[side] for side in SIDES]


def compose(scope: str, *parts: str) -> str:
    """Return a caption line, which says what was measured, and the parts below it."""
    return "\n\n".join([textwrap.fill(f"Scope: {scope}", WIDTH, break_on_hyphens=False), *parts])
