"""A training row and a query whose score is explained: checks, gradients and the score from the stored features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from tracin_ann.choices import SIDE_NAMES, SideName
from tracin_ann.errors import NonFiniteError, UsageError, problem
from tracin_ann.features import LoadedModel
from tracin_ann.index import InfluenceIndex
from tracin_ann.results import Describe, Id
from tracin_ann.scoring import Directions, QueryOptions, Score, compute_full_gradients


@dataclass(frozen=True)
class Pair:
    """The training row and the query that are explained.

    Attributes:
        id: the task's own id of the training row, else its position.
        row: position of the training row.
        query: the task's own id of the query, else its position.
        query_row: position of the query.
        side: data set of the query.
    """

    id: Id
    row: int
    query: Id
    query_row: int
    side: SideName


@dataclass(frozen=True)
class CheckedPair:
    """A pair of rows that exist, and what their explanation needs.

    Attributes:
        pair: the rows.
        score: the score that is explained.
        stored_score: its value from their stored features.
        checkpoints: the checkpoints to sum over.
        describe: returns the description of a row, also after the examples of the side `input` are no longer lent.
        inputs: the examples of the side `input`, if the query is one of them.
    """

    pair: Pair
    score: Score
    stored_score: float
    checkpoints: tuple[int, ...]
    describe: Describe
    inputs: Any = None


def check_pair(
    index: InfluenceIndex, train_id: int, query_id: int, side: SideName, options: QueryOptions
) -> CheckedPair:
    """Return the pair after checks of the rows and of the task, for the score and the checkpoints of the options.

    Raises:
        UsageError: a row or checkpoint does not exist, the training row was removed from the index, or the score is not
            defined over all parameters.
        IndexMismatchError: the task does not match the index, by a recorded field or by a canary row.
        NonFiniteError: the build skipped the training row, or a gradient of the query is NaN or infinite.
    """
    chosen, runner, score = index.view(options.checkpoints).checkpoints, index.runner, index.make_score(options)
    runner.check_ids("train", [train_id])
    runner.check_ids(side, [query_id])
    _check_present(index, train_id)
    # This also computes the canary rows and rejects a task that changed.
    query_F = score.weigh(index.features(side, [query_id], chosen), chosen).vector_QF[0].astype(np.float64)
    stored_score = float(score.rows(chosen).take([train_id])[0].astype(np.float64) @ query_F)
    pair = Pair(index.id_of("train", train_id), train_id, index.id_of(side, query_id), query_id, side)
    inputs = runner.data(side) if side == "input" else None
    describe = partial(index.describe, examples=inputs)
    return CheckedPair(pair, score, stored_score, chosen, describe, inputs)


def compute_gradient(model: LoadedModel, side: SideName, row: int) -> Directions:
    """Return the gradient of one example by parameter, [1, ...] each.

    Raises:
        NonFiniteError: the loss or a gradient is NaN or infinite.
    """
    try:
        gradient = compute_full_gradients(model, side, [row])
    except NonFiniteError as error:
        raise NonFiniteError(f"this row of {SIDE_NAMES[side]} cannot be explained: {error}") from error
    for name, grad in gradient.items():
        if not bool(torch.isfinite(grad).all()):
            raise NonFiniteError(
                problem(
                    f"the gradient of row {row} of {SIDE_NAMES[side]} at checkpoint {model.checkpoint} is not finite",
                    got=f"NaN or infinity in {name}",
                    expected="finite numbers",
                    remedy="inspect this row and the weights of this checkpoint",
                )
            )
    return gradient


def _check_present(index: InfluenceIndex, row: int) -> None:
    """Reject a training row that was removed or skipped.

    Raises:
        UsageError: the row was removed from the index.
        NonFiniteError: the build skipped the row.
    """
    if row in index.removed:
        raise UsageError(
            problem(
                f"row {row} of train_data was removed from the index",
                got=row,
                expected="a row of the index",
                remedy="change --train-id",
            )
        )
    skipped = dict(zip(index.skipped.row_S.tolist(), index.skipped.checkpoint_S.tolist(), strict=True))
    if row in skipped:
        raise NonFiniteError(
            problem(
                f"row {row} of train_data was skipped by the build",
                got=f"NaN or infinity at checkpoint {skipped[row]}",
                expected="a finite loss and gradient",
                remedy="change --train-id",
            )
        )
