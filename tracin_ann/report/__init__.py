"""Results as one HTML file that opens from disk, with pictures, texts and figures in it, and needs no network."""

from __future__ import annotations

from tracin_ann.report.writing import refuse_unwritable, write_report

__all__ = ["refuse_unwritable", "write_report"]
