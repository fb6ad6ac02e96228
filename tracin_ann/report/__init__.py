"""Results as one HTML file that opens from disk, with pictures, texts and figures in it, and needs no network."""

from __future__ import annotations

from tracin_ann.report.writing import write_report

__all__ = ["write_report"]
