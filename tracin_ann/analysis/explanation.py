"""Parts of one score: the exact TracInCP score of a training row for a query, by checkpoint, layer and parameter."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tracin_ann.choices import SIDE_NAMES, SideName
from tracin_ann.errors import NonFiniteError, UsageError, problem
from tracin_ann.features import LoadedModel
from tracin_ann.index import InfluenceIndex
from tracin_ann.scoring import Describe, Directions, Fields, Id, Record, RowList, compute_full_gradients, parts_figure
from tracin_ann.types import ProgressCallback

MODEL = "(model)"
"""Name of the layer for parameters that belong to the model itself."""
_PARAMETRISED = re.compile(r"(^|\.)parametrizations\..*")


@dataclass(frozen=True)
class Part:
    """The part of a score that one parameter contributes at one checkpoint.

    Attributes:
        checkpoint: position of the checkpoint.
        layer: module that owns the parameter; for tied weights all owners, such as `tokens + head`.
        parameter: name of the parameter; for tied weights the first name.
        contribution: η_c ⟨∇_p ℓ(w_c, z), ∇_p ℓ(w_c, z')⟩ over the entries of this parameter.
        share: the contribution divided by the sum of the absolute contributions of all parts.
    """

    checkpoint: int
    layer: str
    parameter: str
    contribution: float
    share: float


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


class Explanation(RowList[Part]):
    """The parts of one exact score, by checkpoint and then by parameter in the model's order; they sum to the score.

    Attributes:
        pair: the training row and the query.
        score: exact TracInCP, the sum of the parts.
        stored_score: the score from the stored features.
    """

    FIELDS = Fields(
        (
            ("query", "id"),
            ("query_row", "int"),
            ("side", "text"),
            ("id", "id"),
            ("row", "int"),
            ("checkpoint", "int"),
            ("layer", "text"),
            ("parameter", "text"),
            ("contribution", "float"),
            ("share", "float"),
            ("score", "float"),
            ("stored_score", "float"),
        )
    )

    def __init__(self, parts: Iterable[Part], describe: Describe, pair: Pair, stored_score: float) -> None:
        super().__init__(parts, describe)
        self.pair, self.stored_score = pair, stored_score
        self.score = math.fsum(part.contribution for part in self)

    @property
    def difference(self) -> float:
        """Return the stored score minus the exact score."""
        return self.stored_score - self.score

    @property
    def by_checkpoint(self) -> dict[int, float]:
        """Return the contribution of each checkpoint to the score, in the requested order."""
        return _sum_by_key((part.checkpoint, part.contribution) for part in self)

    @property
    def by_layer(self) -> dict[str, float]:
        """Return the contribution of each layer to the score, in the model's order."""
        return _sum_by_key((part.layer, part.contribution) for part in self)

    @property
    def by_parameter(self) -> dict[str, float]:
        """Return the contribution of each parameter to the score, in the model's order."""
        return _sum_by_key((part.parameter, part.contribution) for part in self)

    def record(self, row: Part) -> Record:
        """Return a part's record."""
        return {
            "query": self.pair.query,
            "query_row": self.pair.query_row,
            "side": self.pair.side,
            "id": self.pair.id,
            "row": self.pair.row,
            "checkpoint": row.checkpoint,
            "layer": row.layer,
            "parameter": row.parameter,
            "contribution": row.contribution,
            "share": row.share,
            "score": self.score,
            "stored_score": self.stored_score,
        }

    def plot(self) -> Any:
        """Return a matplotlib Figure of the contributions, by layer and by checkpoint.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return parts_figure(self.by_layer, self.by_checkpoint)


def explain(
    index: InfluenceIndex,
    train_id: int,
    query_id: int,
    side: SideName = "query",
    progress: ProgressCallback | None = None,
    *,
    checkpoints: Sequence[int] | None = None,
) -> Explanation:
    """Return the parts of the exact score of a training row for a query, one per parameter and checkpoint.

    The gradients of both rows are computed in float32, like the exact scores of a query, and multiplied in float64:
    Σ_c Σ_p η_c ⟨∇_p ℓ(w_c, z), ∇_p ℓ(w_c, z')⟩ (Pruthi et al. 2020, eq. 4).

    Args:
        index: an open index.
        train_id: position of the training row.
        query_id: position of the query.
        side: data set of the query, `query` or `train`, or `input` for an example that `index.lend` lends.
        progress: called with ("gradients", checkpoints done, checkpoints).
        checkpoints: positions of the checkpoints to sum over; None: all.

    Raises:
        UsageError: a row or checkpoint does not exist, or the training row was removed from the index.
        IndexMismatchError: the task does not match the index, by a recorded field or by a canary row.
        NonFiniteError: a loss or gradient of one of the rows is NaN or infinite.
    """
    view, runner = index.view(checkpoints), index.runner
    runner.check_ids("train", [train_id])
    runner.check_ids(side, [query_id])
    _check_present(index, train_id)
    # This also computes the canary rows and rejects a task that changed.
    query_F = index.features(side, [query_id], view.checkpoints)[0].astype(np.float64)
    stored_score = float(view.take([train_id])[0].astype(np.float64) @ query_F)
    products: list[tuple[int, str, str, float]] = []
    with runner.model("fp32") as model:
        layers = find_layers(model.module)
        for done, checkpoint in enumerate(view.checkpoints):
            model.load(checkpoint)
            rate = model.rate
            query_grads, train_grads = _gradient(model, side, query_id), _gradient(model, "train", train_id)
            for name, grad in query_grads.items():
                product = rate * float(grad.flatten().double() @ train_grads[name].flatten().double())
                products.append((checkpoint, layers[name], name, product))
            if progress is not None:
                progress("gradients", done + 1, len(view.checkpoints))
    total = math.fsum(abs(product) for *_, product in products) or 1.0
    parts = [Part(c, layer, name, product, product / total) for c, layer, name, product in products]
    pair = Pair(index.id_of("train", train_id), train_id, index.id_of(side, query_id), query_id, side)
    return Explanation(parts, index.describe, pair, stored_score)


def find_layers(model: nn.Module) -> dict[str, str]:
    """Return the layer of each parameter by its first name; the owners of tied weights are joined by ` + `."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # The container of a parametrised weight is not a layer.
        owner = _PARAMETRISED.sub("", name.rpartition(".")[0])
        owners[id(parameter)].append(owner or MODEL)
    return {name: " + ".join(dict.fromkeys(owners[id(p)])) for name, p in model.named_parameters()}


def _gradient(model: LoadedModel, side: SideName, row: int) -> Directions:
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


def _sum_by_key(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    values: dict[Any, list[float]] = defaultdict(list)
    for key, value in pairs:
        values[key].append(value)
    return {key: math.fsum(summands) for key, summands in values.items()}
