"""Results of queries: hits and answers, lists of them, their files, records and figures; does not import torch."""

from __future__ import annotations

from tracin_ann.results.answers import Answer, Hit, Id, SelfInfluence
from tracin_ann.results.formats import (
    HITS,
    RANKED,
    SCHEMA,
    Fields,
    Record,
    RowText,
    choose_fields,
    format_cells,
    join_lines,
    open_writer,
    parse_answer_line,
)
from tracin_ann.results.lists import Answers, Describe, RankedRows, RowList, TokenTexts, make_token_texts, match_tokens
from tracin_ann.results.plots import (
    GREY,
    OPPONENT,
    PROPONENT,
    checkpoints_figure,
    counts_figure,
    norms_figure,
    parts_figure,
    render_png,
    render_svg,
    render_svg_file,
    score_ranks_figure,
)

__all__ = [
    "Answer",
    "Answers",
    "Describe",
    "Fields",
    "GREY",
    "HITS",
    "Hit",
    "Id",
    "OPPONENT",
    "PROPONENT",
    "RANKED",
    "RankedRows",
    "Record",
    "RowList",
    "RowText",
    "SCHEMA",
    "SelfInfluence",
    "TokenTexts",
    "checkpoints_figure",
    "choose_fields",
    "counts_figure",
    "format_cells",
    "join_lines",
    "make_token_texts",
    "match_tokens",
    "norms_figure",
    "open_writer",
    "parse_answer_line",
    "parts_figure",
    "render_png",
    "render_svg",
    "render_svg_file",
    "score_ranks_figure",
]
