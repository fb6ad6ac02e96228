"""The report: results as one self-contained HTML file with images, text and figures, which needs no network.

The explorer (`serve`) shows the same views of examples, answers, rows and figures with the same templates and style.
"""

from __future__ import annotations

from tracin_ann.report.examples import Examples, ExampleView, Token, format_value
from tracin_ann.report.figures import (
    Figure,
    answer_figures,
    make_counts_figure,
    make_norms_figure,
    read_parts,
    row_figures,
)
from tracin_ann.report.images import digest_pixels, encode_pixels, to_pixels
from tracin_ann.report.page import (
    explain_score,
    has_wide_hits,
    list_facts,
    load_templates,
    read_style,
    require_writable,
    write_report,
)
from tracin_ann.report.suspects import SuspectView, build_suspect_views, find_neighbours
from tracin_ann.report.views import (
    SIDES,
    HitList,
    LossView,
    QueryView,
    ScoredCheckpoints,
    ViewBuilder,
    format_score,
)

__all__ = [
    "ExampleView",
    "Examples",
    "Figure",
    "HitList",
    "LossView",
    "QueryView",
    "SIDES",
    "ScoredCheckpoints",
    "SuspectView",
    "Token",
    "ViewBuilder",
    "answer_figures",
    "build_suspect_views",
    "digest_pixels",
    "encode_pixels",
    "explain_score",
    "find_neighbours",
    "format_score",
    "format_value",
    "has_wide_hits",
    "list_facts",
    "load_templates",
    "make_counts_figure",
    "make_norms_figure",
    "read_parts",
    "read_style",
    "require_writable",
    "row_figures",
    "to_pixels",
    "write_report",
]
