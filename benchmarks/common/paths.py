"""Folders of the repository that the benchmarks use."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"


def add_tests_to_path() -> None:
    """Make the helper modules of the tests importable."""
    for folder in (ROOT / "tests" / "support", ROOT / "tests" / "end_to_end"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
