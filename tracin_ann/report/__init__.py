"""The report: results as one self-contained HTML file with images, text and figures, which needs no network."""

from __future__ import annotations

from tracin_ann.report.page import require_writable, write_report

__all__ = ["require_writable", "write_report"]
