"""Evaluation of scores by retraining: the linear datamodeling score and the losses of retrained models."""

from __future__ import annotations

from tracin_ann.evaluation.lds import (
    DatamodelingScore,
    compute_ceiling,
    compute_lds,
    correlate_predictions,
    sum_scores,
)
from tracin_ann.evaluation.retraining import Retraining, compute_query_losses
from tracin_ann.evaluation.subsets import FRACTION, draw_leave_one_out, draw_subsets

__all__ = [
    "DatamodelingScore",
    "FRACTION",
    "Retraining",
    "compute_ceiling",
    "compute_lds",
    "compute_query_losses",
    "correlate_predictions",
    "draw_leave_one_out",
    "draw_subsets",
    "sum_scores",
]
