"""Where one score comes from: true TracInCP of a training row for a query, by checkpoint, layer and parameter."""

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

from tracin_ann.choices import SideName
from tracin_ann.errors import NonFiniteError, UsageError, problem
from tracin_ann.features import LoadedModel
from tracin_ann.index import InfluenceIndex
from tracin_ann.scoring import Describe, Directions, Fields, Id, Record, RowList, parts_figure, whole_gradients
from tracin_ann.types import ProgressCallback

MODEL = "(model)"
"""The layer of parameters that the model itself owns."""
_PARAMETRISED = re.compile(r"(^|\.)parametrizations\..*")


@dataclass(frozen=True)
class Part:
    """What one parameter adds to a score at one checkpoint.

    Attributes:
        checkpoint: its position.
        layer: the module that owns the parameter; of tied weights all owners, `tokens + head`.
        parameter: its name; of tied weights the first.
        contribution: η_c ⟨∇_p ℓ(w_c, z), ∇_p ℓ(w_c, z')⟩ over the entries of this parameter.
        share: the contribution, with its sign, of the sum of all parts' absolute contributions.
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
        id: the training row's own id, else its position.
        row: its position.
        query: the query's own id, else its position.
        query_row: its position.
        side: the query's data set.
    """

    id: Id
    row: int
    query: Id
    query_row: int
    side: SideName


class Explanation(RowList[Part]):
    """The parts of one true score, checkpoint after checkpoint, parameters in the model's order; they add up to it.

    Attributes:
        pair: whose score it is.
        score: true TracInCP, the sum of the parts.
        stored_score: the same by the stored features.
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
        """Return how much the stored features' score is above the true one."""
        return self.stored_score - self.score

    @property
    def by_checkpoint(self) -> dict[int, float]:
        """Return what each checkpoint adds to the score, in the order asked."""
        return _added((part.checkpoint, part.contribution) for part in self)

    @property
    def by_layer(self) -> dict[str, float]:
        """Return what each layer adds to the score, in the model's order."""
        return _added((part.layer, part.contribution) for part in self)

    @property
    def by_parameter(self) -> dict[str, float]:
        """Return what each parameter adds to the score, in the model's order."""
        return _added((part.parameter, part.contribution) for part in self)

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
    """Return what every parameter at every checkpoint adds to the true score of a training row for a query.

    Both whole gradients are computed now, in float32 as the index's exact scores are, and multiplied in float64:
    Σ_c Σ_p η_c ⟨∇_p ℓ(w_c, z), ∇_p ℓ(w_c, z')⟩ (Pruthi et al. 2020, eq. 4).

    Args:
        index: an open index.
        train_id: the training row's position.
        query_id: the query's position.
        side: the query's data set, `query`, or `train` for a training row as the query.
        progress: called with ("gradients", checkpoints done, checkpoints).
        checkpoints: positions of those to sum over; None: all.

    Raises:
        UsageError: there is no such row or checkpoint, or the row was removed from the index.
        IndexMismatchError: the task does not fit the index, by a field or by a canary.
        NonFiniteError: a loss or gradient of either is NaN or infinite.
    """
    view, passes = index.view(checkpoints), index.passes
    passes.check_ids("train", [train_id])
    passes.check_ids(side, [query_id])
    _refuse_absent(index, train_id)
    # With the query's features come the canaries: a task that changed is refused here.
    query_F = index.features(side, [query_id], view.checkpoints)[0].astype(np.float64)
    stored_score = float(view.take([train_id])[0].astype(np.float64) @ query_F)
    found: list[tuple[int, str, str, float]] = []
    with passes.at_precision("fp32").model() as model:
        layers = layers_of(model.module)
        for done, checkpoint in enumerate(view.checkpoints):
            model.load(checkpoint)
            rate = passes.task.checkpoints[checkpoint].learning_rate
            mine, theirs = _gradient(model, side, query_id), _gradient(model, "train", train_id)
            for name, grad in mine.items():
                product = rate * float(grad.flatten().double() @ theirs[name].flatten().double())
                found.append((checkpoint, layers[name], name, product))
            if progress is not None:
                progress("gradients", done + 1, len(view.checkpoints))
    whole = math.fsum(abs(product) for *_, product in found) or 1.0
    parts = [Part(c, layer, name, product, product / whole) for c, layer, name, product in found]
    pair = Pair(index.id_of("train", train_id), train_id, index.id_of(side, query_id), query_id, side)
    return Explanation(parts, index.described, pair, stored_score)


def layers_of(model: nn.Module) -> dict[str, str]:
    """Return the layer of every parameter by its first name: its owners, those of tied weights joined by ` + `."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # What holds the parts of a parametrised weight is no layer of its own.
        owner = _PARAMETRISED.sub("", name.rpartition(".")[0])
        owners[id(parameter)].append(owner or MODEL)
    return {name: " + ".join(dict.fromkeys(owners[id(p)])) for name, p in model.named_parameters()}


def _gradient(model: LoadedModel, side: SideName, row: int) -> Directions:
    """Return the whole gradient [1, P] a parameter of one example, finite."""
    try:
        gradient = whole_gradients(model, side, [row])
    except NonFiniteError as error:
        raise NonFiniteError(f"this row of {side}_data cannot be explained: {error}") from error
    for name, grad in gradient.items():
        if not bool(torch.isfinite(grad).all()):
            raise NonFiniteError(
                problem(
                    f"the gradient of row {row} of {side}_data at checkpoint {model.checkpoint} is not finite",
                    got=f"NaN or infinity in {name}",
                    expected="finite numbers",
                    remedy="look at this row and this checkpoint's weights",
                )
            )
    return gradient


def _refuse_absent(index: InfluenceIndex, row: int) -> None:
    if row in index.removed:
        raise UsageError(
            problem(
                f"row {row} of train_data was removed from the index",
                got=row,
                expected="a row that answers may hold",
                remedy="change --train-id",
            )
        )
    skipped = dict(zip(index.skipped.row_S.tolist(), index.skipped.checkpoint_S.tolist(), strict=True))
    if row in skipped:
        raise NonFiniteError(
            problem(
                f"row {row} of train_data was skipped at the build",
                got=f"NaN or infinity at checkpoint {skipped[row]}",
                expected="a finite loss and gradient",
                remedy="change --train-id",
            )
        )


def _added(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    parts: dict[Any, list[float]] = defaultdict(list)
    for key, value in pairs:
        parts[key].append(value)
    return {key: math.fsum(values) for key, values in parts.items()}
