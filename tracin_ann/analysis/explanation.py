"""Parts of one score: the exact score of a training row for a query, by checkpoint and parameter or token."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import nn

from tracin_ann.analysis.pairs import CheckedPair, Pair, check_pair, compute_gradient
from tracin_ann.analysis.token_explanation import ExampleName, TokenExplanation
from tracin_ann.choices import CURVATURES, ScoreName, SideName
from tracin_ann.errors import UsageError, problem
from tracin_ann.features import LoadedModel
from tracin_ann.index import InfluenceIndex
from tracin_ann.results import Describe, Fields, Record, RowList, parts_figure
from tracin_ann.scoring import (
    DirectionMap,
    Directions,
    QueryOptions,
    TokenSplitter,
    report_part,
    require_token_losses,
    scale_in_place,
    select_direction,
)
from tracin_ann.types import Float64, ProgressCallback, ignore_progress

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
        contribution: η_c ⟨∇_p ℓ(w_c, z), ∇_p ℓ(w_c, z')⟩ over the entries of this parameter, or the product with the
            preconditioned gradient of the query.
        share: the contribution divided by the sum of the absolute contributions of all parts.
    """

    checkpoint: int
    layer: str
    parameter: str
    contribution: float
    share: float


class Explanation(RowList[Part]):
    """The parts of one exact score, by checkpoint and then by parameter in the model's order; they sum to the score.

    Attributes:
        pair: the training row and the query.
        score: the exact score, the sum of the parts.
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


@overload
def explain(
    index: InfluenceIndex,
    train_id: int,
    query_id: int,
    side: SideName = "query",
    progress: ProgressCallback | None = None,
    *,
    checkpoints: Sequence[int] | None = None,
    by: Literal["layer"] = "layer",
    score: ScoreName | None = None,
    damping: float | None = None,
) -> Explanation: ...


@overload
def explain(
    index: InfluenceIndex,
    train_id: int,
    query_id: int,
    side: SideName = "query",
    progress: ProgressCallback | None = None,
    *,
    checkpoints: Sequence[int] | None = None,
    by: Literal["token"],
    score: ScoreName | None = None,
    damping: float | None = None,
) -> TokenExplanation: ...


def explain(  # noqa: PLR0913
    index: InfluenceIndex,
    train_id: int,
    query_id: int,
    side: SideName = "query",
    progress: ProgressCallback | None = None,
    *,
    checkpoints: Sequence[int] | None = None,
    by: Literal["layer", "token"] = "layer",
    score: ScoreName | None = None,
    damping: float | None = None,
) -> Explanation | TokenExplanation:
    """Return the parts of the exact score of a training row for a query, by parameter or by token, and checkpoint.

    The gradients of both rows are computed in float32, like the exact scores of a query, and multiplied in float64:
    Σ_c Σ_p η_c ⟨∇_p ℓ(w_c, z), ∇_p ℓ(w_c, z')⟩ (Pruthi et al. 2020, eq. 4). For a score with a curvature matrix, the
    gradient of the query is replaced by its product with the inverse, as for `rerank="exact"`.

    Args:
        index: an open index.
        train_id: position of the training row.
        query_id: position of the query.
        side: data set of the query, `query` or `train`, or `input` for an example that `index.lend` lends.
        progress: called with ("gradients", checkpoints done, checkpoints), and with other stages for a score with a
            curvature matrix.
        checkpoints: positions of the checkpoints to sum over; None: all.
        by: `layer`: an Explanation, one part per parameter and checkpoint, with sums by layer. `token`: a
            TokenExplanation, one part per target position and checkpoint, for the row and for the query; this needs
            `Task.token_losses`.
        score: see QueryOptions; None: the index's default.
        damping: of a score with a curvature matrix; None: by the automatic rule.

    Raises:
        UsageError: a row or checkpoint does not exist, the training row was removed from the index, the task has no
            `token_losses`, or the score cannot be split.
        TaskError: `token_losses` do not sum to the loss.
        IndexMismatchError: the task does not match the index, by a recorded field or by a canary row.
        NonFiniteError: a loss or gradient of one of the rows is NaN or infinite.
    """
    if by == "token":
        require_token_losses(index.task, "train")
    name, possible = score or index.default_score, ("tracin", *CURVATURES)
    if name not in possible:
        what, expected = f"the score cannot be split by {by}", " or ".join(possible)
        raise UsageError(problem(what, got=f"the score {name}", expected=expected, remedy="change --score"))
    chosen = None if checkpoints is None else tuple(checkpoints)
    options = QueryOptions(rerank="exact", checkpoints=chosen, score=name, damping=damping)
    checked = check_pair(index, train_id, query_id, side, options)
    split = _split_by_token if by == "token" else _split_by_parameter
    return split(index, checked, progress)


def _split_by_parameter(index: InfluenceIndex, checked: CheckedPair, progress: ProgressCallback | None) -> Explanation:
    pair, direction_map = checked.pair, checked.score.direction_map
    products: list[tuple[int, str, str, float]] = []
    with index.runner.model("fp32") as model:
        layers = find_layers(model.module)
        for done, checkpoint in enumerate(checked.checkpoints):
            model.load(checkpoint)
            query_grads = compute_gradient(model, pair.side, pair.query_row)
            train_grads, factor = compute_gradient(model, "train", pair.row), model.rate
            if direction_map is not None and model.rate > 0:
                report = report_part(progress or ignore_progress, done, len(checked.checkpoints))
                query_grads = direction_map.apply(model, query_grads, report)
                factor = float(direction_map.weigh_rows(model, [pair.row])[0])
            for name, grad in query_grads.items():
                product = factor * float(grad.flatten().double() @ train_grads[name].flatten().double())
                products.append((checkpoint, layers[name], name, product))
            if progress is not None:
                progress("gradients", done + 1, len(checked.checkpoints))
    total = math.fsum(abs(product) for *_, product in products) or 1.0
    parts = [Part(c, layer, name, product, product / total) for c, layer, name, product in products]
    return Explanation(parts, checked.describe, pair, checked.stored_score)


def _split_by_token(index: InfluenceIndex, checked: CheckedPair, progress: ProgressCallback | None) -> TokenExplanation:
    """Return the parts of the row's tokens along the query's gradient, and of the query's along the row's.

    For a score with a curvature matrix A = F + λI, the directions are A⁻¹g / √(qᵀA⁻¹q) for either gradient g, where q
    is the gradient of the query: their products with the other gradient are the same score.
    """
    pair, task = checked.pair, index.runner.task
    rows: list[tuple[ExampleName, SideName, int]] = [("row", "train", pair.row)]
    if task.find_token_losses(pair.side) is not None:
        rows.append(("query", pair.side, pair.query_row))
    parts: dict[ExampleName, dict[int, Float64]] = {example: {} for example, *_ in rows}
    with index.runner.model("fp32") as model:
        splitters = {side: TokenSplitter(model, side) for _, side, _ in rows}
        for done, checkpoint in enumerate(checked.checkpoints):
            model.load(checkpoint)
            gradients: dict[ExampleName, Directions] = {"row": compute_gradient(model, pair.side, pair.query_row)}
            if len(rows) > 1:
                gradients["query"] = compute_gradient(model, "train", pair.row)
            factors = dict.fromkeys(gradients, model.rate)
            if checked.score.direction_map is not None and model.rate > 0:
                report = report_part(progress or ignore_progress, done, len(checked.checkpoints))
                factors = _precondition(checked.score.direction_map, model, gradients, pair.row, report)
            for example, side, row in rows:
                (exponent,) = scale_in_place(gradients[example])
                (part_T,) = splitters[side].split([row], select_direction(gradients[example], 0))
                parts[example][checkpoint] = np.ldexp(factors[example] * part_T, exponent)
            if progress is not None:
                progress("gradients", done + 1, len(checked.checkpoints))
    return TokenExplanation(parts, checked.describe, pair, checked.stored_score, checked.inputs)


def _precondition(
    direction_map: DirectionMap,
    model: LoadedModel,
    gradients: dict[ExampleName, Directions],
    row: int,
    progress: ProgressCallback,
) -> dict[ExampleName, float]:
    """Replace the gradients of the query ("row", whose tokens it splits) and of the row ("query") by directions.

    Returns:
        The factors of the products with the directions. `apply` returns A⁻¹g / √(gᵀA⁻¹g), so that the product with g is
        √(gᵀA⁻¹g); both directions need the root of the query.
    """
    joined = {name: torch.cat([gradient[name] for gradient in gradients.values()]) for name in gradients["row"]}
    directions = direction_map.apply(model, joined, progress)
    root: dict[ExampleName, float] = {}
    for at, (example, gradient) in enumerate(gradients.items()):
        direction = {name: both_2P[at : at + 1] for name, both_2P in directions.items()}
        products = (direction[name].flatten().double() @ part.flatten().double() for name, part in gradient.items())
        root[example] = math.fsum(map(float, products))
        gradients[example] = direction
    factor = float(direction_map.weigh_rows(model, [row])[0])
    return {example: factor * own / root["row"] if root["row"] else 0.0 for example, own in root.items()}


def find_layers(model: nn.Module) -> dict[str, str]:
    """Return the layer of each parameter by its first name; the owners of tied weights are joined by ` + `."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # The container of a parametrised weight is not a layer.
        owner = _PARAMETRISED.sub("", name.rpartition(".")[0])
        owners[id(parameter)].append(owner or MODEL)
    return {name: " + ".join(dict.fromkeys(owners[id(p)])) for name, p in model.named_parameters()}


def _sum_by_key(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    values: dict[Any, list[float]] = defaultdict(list)
    for key, value in pairs:
        values[key].append(value)
    return {key: math.fsum(summands) for key, summands in values.items()}
