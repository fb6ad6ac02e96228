"""Scores of training rows: exact scores, search strategy, ranking of candidates, measured quality, result formats."""

from __future__ import annotations

from tracin_ann.scoring.answers import Answer, Hit, Id, QueryOptions, SelfInfluence
from tracin_ann.scoring.curvature import Curvature, CurvatureSource, suggest_dim
from tracin_ann.scoring.exact import (
    DirectionMap,
    Directions,
    ExactProgress,
    Queries,
    RowScorer,
    compute_full_gradients,
    exact_self_influence,
    make_exact_scorer,
    report_part,
    scale_in_place,
)
from tracin_ann.scoring.formats import (
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
from tracin_ann.scoring.pilot import PILOT_DIM, DimChoice, DimPrediction, DimTarget, run_pilot
from tracin_ann.scoring.plots import (
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
from tracin_ann.scoring.quality import QualityMeasurement
from tracin_ann.scoring.ranking import QueryRequest, Ranker
from tracin_ann.scoring.results import Answers, Describe, RankedRows, RowList, TokenTexts, make_token_texts
from tracin_ann.scoring.scores import Score, ScoreMaker, find_curvature, open_score_maker
from tracin_ann.scoring.search_index import SearchIndexOptions, build_search_index
from tracin_ann.scoring.sizes import IndexShape, IndexSize
from tracin_ann.scoring.tokens import TokenSplitter, match_tokens, require_token_losses, select_direction
from tracin_ann.scoring.workers import Coverage, SearchWorkers

__all__ = [
    "Answer",
    "Answers",
    "Coverage",
    "Curvature",
    "CurvatureSource",
    "Describe",
    "DimChoice",
    "DimPrediction",
    "DimTarget",
    "DirectionMap",
    "Directions",
    "ExactProgress",
    "Fields",
    "GREY",
    "HITS",
    "Hit",
    "Id",
    "IndexShape",
    "IndexSize",
    "OPPONENT",
    "PILOT_DIM",
    "PROPONENT",
    "QualityMeasurement",
    "Queries",
    "QueryOptions",
    "QueryRequest",
    "RANKED",
    "RankedRows",
    "Ranker",
    "Record",
    "RowList",
    "RowScorer",
    "RowText",
    "SCHEMA",
    "Score",
    "ScoreMaker",
    "SearchIndexOptions",
    "SearchWorkers",
    "SelfInfluence",
    "TokenSplitter",
    "TokenTexts",
    "build_search_index",
    "checkpoints_figure",
    "choose_fields",
    "compute_full_gradients",
    "counts_figure",
    "exact_self_influence",
    "find_curvature",
    "format_cells",
    "join_lines",
    "make_exact_scorer",
    "make_token_texts",
    "match_tokens",
    "norms_figure",
    "open_score_maker",
    "open_writer",
    "parse_answer_line",
    "parts_figure",
    "render_png",
    "render_svg",
    "render_svg_file",
    "report_part",
    "require_token_losses",
    "run_pilot",
    "scale_in_place",
    "score_ranks_figure",
    "select_direction",
    "suggest_dim",
]
