"""Scores of training rows: exact scores, search strategy, ranking of candidates, measured quality."""

from __future__ import annotations

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
from tracin_ann.scoring.options import QueryOptions
from tracin_ann.scoring.pilot import PILOT_DIM, DimChoice, DimPrediction, DimTarget, run_pilot
from tracin_ann.scoring.quality import QualityMeasurement
from tracin_ann.scoring.ranking import QueryRequest, Ranker
from tracin_ann.scoring.scores import Score, ScoreMaker, find_curvature, open_score_maker
from tracin_ann.scoring.search_index import SearchIndexOptions, build_search_index
from tracin_ann.scoring.sizes import IndexShape, IndexSize
from tracin_ann.scoring.tokens import TokenSplitter, require_token_losses, select_direction
from tracin_ann.scoring.workers import Coverage, SearchWorkers

__all__ = [
    "Coverage",
    "Curvature",
    "CurvatureSource",
    "DimChoice",
    "DimPrediction",
    "DimTarget",
    "DirectionMap",
    "Directions",
    "ExactProgress",
    "IndexShape",
    "IndexSize",
    "PILOT_DIM",
    "QualityMeasurement",
    "Queries",
    "QueryOptions",
    "QueryRequest",
    "Ranker",
    "RowScorer",
    "Score",
    "ScoreMaker",
    "SearchIndexOptions",
    "SearchWorkers",
    "TokenSplitter",
    "build_search_index",
    "compute_full_gradients",
    "exact_self_influence",
    "find_curvature",
    "make_exact_scorer",
    "open_score_maker",
    "report_part",
    "require_token_losses",
    "run_pilot",
    "scale_in_place",
    "select_direction",
    "suggest_dim",
]
