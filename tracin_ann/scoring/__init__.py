"""Scoring: exact TracInCP scores, the choice of a search strategy, ranking of candidates, answers and their formats."""

from __future__ import annotations

from tracin_ann.scoring.answers import Answer, Hit, Id, QueryOptions, SelfInfluence
from tracin_ann.scoring.exact import Directions, exact_self_influence, whole_gradients
from tracin_ann.scoring.formats import HITS, RANKED, Fields, Record, Texts, one_line, shown_cells, writer
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
from tracin_ann.scoring.quality import Yardstick
from tracin_ann.scoring.ranking import Question, Ranking
from tracin_ann.scoring.results import Answers, Describe, Listed, Ranked

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
    "Listed",
    "OPPONENT",
    "QueryOptions",
    "Question",
    "RANKED",
    "Ranked",
    "Ranking",
    "Record",
    "SelfInfluence",
    "Texts",
    "Yardstick",
    "as_svg",
    "checkpoints_figure",
    "counts_figure",
    "exact_self_influence",
    "norms_figure",
    "one_line",
    "parts_figure",
    "score_ranks_figure",
    "shown_cells",
    "whole_gradients",
    "writer",
]
