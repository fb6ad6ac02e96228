"""Evaluation of scores: by retraining (LDS, removal), by single steps (tail patch, TracInIdeal), by wrong labels."""

from __future__ import annotations

from tracin_ann.evaluation.adapters import QuandaExplainer, make_dattri_arguments
from tracin_ann.evaluation.comparison import (
    Candidate,
    Comparison,
    Result,
    compare_by_lds,
    compare_by_removal,
    compare_by_tail_patch,
    list_candidates,
)
from tracin_ann.evaluation.detection import DetectionCurve, compare_rankings, compute_detection
from tracin_ann.evaluation.estimates import Estimate, correlate, estimate_mean
from tracin_ann.evaluation.lds import compute_ceiling, compute_lds, sum_scores
from tracin_ann.evaluation.recommendation import Recommendation, recommend
from tracin_ann.evaluation.removal import Removal, draw_random_rows, find_top_rows, measure_removal
from tracin_ann.evaluation.retraining import Retraining, compute_query_losses
from tracin_ann.evaluation.subsets import FRACTION, draw_leave_one_out, draw_subsets
from tracin_ann.evaluation.tail_patch import measure_tail_patch
from tracin_ann.evaluation.trace import Trace, TracedRun, trace

__all__ = [
    "Candidate",
    "Comparison",
    "DetectionCurve",
    "Estimate",
    "FRACTION",
    "QuandaExplainer",
    "Recommendation",
    "Removal",
    "Result",
    "Retraining",
    "Trace",
    "TracedRun",
    "compare_by_lds",
    "compare_by_removal",
    "compare_by_tail_patch",
    "compare_rankings",
    "compute_ceiling",
    "compute_detection",
    "compute_lds",
    "compute_query_losses",
    "correlate",
    "draw_leave_one_out",
    "draw_random_rows",
    "draw_subsets",
    "estimate_mean",
    "find_top_rows",
    "list_candidates",
    "make_dattri_arguments",
    "measure_removal",
    "measure_tail_patch",
    "recommend",
    "sum_scores",
    "trace",
]
