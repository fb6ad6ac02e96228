"""Scoring: exact TracInCP scores, the choice of a search strategy, ranking of candidates, answers and their formats."""

from __future__ import annotations

from tracin_ann.scoring.answers import Answer, Hit, Id, QueryOptions, SelfInfluence
from tracin_ann.scoring.exact import Directions, exact_self_influence, whole_gradients
from tracin_ann.scoring.formats import HITS, RANKED, Fields, Record, Texts, format_cells, join_lines, open_writer
from tracin_ann.scoring.plots import (
    GREY,
    OPPONENT,
    as_svg,
    checkpoints_figure,
    counts_figure,
    norms_figure,
    parts_figure,
    score_ranks_figure,
)
from tracin_ann.scoring.quality import QualityMeasurement
from tracin_ann.scoring.ranking import Question, Ranking
from tracin_ann.scoring.results import Answers, Describe, RankedRows, RowList
from tracin_ann.scoring.search_index import SearchIndexOptions, build_search_index

__all__ = [
    "Answer",
    "Answers",
    "Describe",
    "Directions",
    "Fields",
    "GREY",
    "HITS",
    "Hit",
    "Id",
    "OPPONENT",
    "QualityMeasurement",
    "QueryOptions",
    "Question",
    "RANKED",
    "RankedRows",
    "Ranking",
    "Record",
    "RowList",
    "SearchIndexOptions",
    "SelfInfluence",
    "Texts",
    "as_svg",
    "build_search_index",
    "checkpoints_figure",
    "counts_figure",
    "exact_self_influence",
    "format_cells",
    "join_lines",
    "norms_figure",
    "open_writer",
    "parts_figure",
    "score_ranks_figure",
    "whole_gradients",
]
