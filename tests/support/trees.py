"""Names and contents of the files in a directory."""

from __future__ import annotations

from pathlib import Path


def list_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def read_contents(directory: Path) -> dict[str, bytes]:
    """Return the content of every file below a directory, by its relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
