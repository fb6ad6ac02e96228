"""Preconditioned scores without projection: the inverse of a curvature matrix over all parameters.

At each checkpoint, a = (F + λI)⁻¹ g_q and g' = a / √(aᵀ g_q), F = (1/M) Σ_z w_z g_z g_zᵀ over a sample of M training
rows; the score of row z is Σ_c ⟨g'_c, g_z⟩. F is exact (`scoring.gram`) where its Gram matrix is affordable, and
otherwise EK-FAC (`scoring.ekfac`). F is computed once for each checkpoint and kind of weights while an index is open,
in steps: a callback that is called between them may release the model, and may raise to end the computation.

Shapes: N training rows, M rows of the sample, P parameters, Q directions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch

from tracin_ann.choices import CurvatureName
from tracin_ann.features import LoadedModel
from tracin_ann.scoring.computation import Computation
from tracin_ann.scoring.curvature import CurvatureSource
from tracin_ann.scoring.ekfac import EKFAC, fit_ekfac
from tracin_ann.scoring.exact import Directions, scale_in_place
from tracin_ann.scoring.gram import GramCurvature, compute_gram
from tracin_ann.types import Float64, Int64, ProgressCallback, ignore_progress

_MOST_ROWS = 4096
"""Rows of the sample, spread evenly over the training rows."""
_MOST_PRODUCTS = 1 << 39
"""The largest M²P of a Gram matrix, to which the sample is reduced."""
_FEWEST_ROWS = 1024
"""Rows of a reduced sample, below which EK-FAC of the full sample is used."""
_KEPT_BYTES = 1 << 31
"""Memory of the curvatures that are kept; at least the last one is."""

logger = logging.getLogger(__name__)


class FullCurvature(Protocol):
    """The second moment of the gradients over all parameters at one checkpoint."""

    @property
    def n_bytes(self) -> int:
        """Return its memory."""

    @property
    def summary(self) -> str:
        """Return the method in a few words for users."""

    def solve(
        self,
        model: LoadedModel,
        directions: Directions,
        damping: float,
        progress: ProgressCallback = ignore_progress,
    ) -> Directions:
        """Return λ (F + λI)⁻¹ of directions, [Q, P] by parameter."""

    def weigh_rows(self, rows: Sequence[int], damping: float) -> Float64:
        """Return the factors [N] of the inner products of rows with directions, for F without the row's own term."""


_Computation = Computation[GramCurvature] | Computation[EKFAC]


def choose_inverse(n_rows: int, entries: int) -> tuple[bool, int]:
    """Return whether the inverse is exact, by a Gram matrix, and M, for N training rows and P parameter entries."""
    n_sampled = min(n_rows, _MOST_ROWS)
    affordable = math.isqrt(_MOST_PRODUCTS // max(1, entries))
    has_gram = affordable >= min(n_sampled, _FEWEST_ROWS)
    return has_gram, min(n_sampled, affordable) if has_gram else n_sampled


class FullCurvatures:
    """The curvatures of an open index, computed when they are first used.

    A curvature that is being computed is shared by the callers that need it: each continues it, whoever comes next. It
    is dropped when the last of them has stopped.

    Args:
        source: the training rows and their weights.
    """

    def __init__(self, source: CurvatureSource) -> None:
        self._source = source
        self._kept: dict[tuple[CurvatureName, int], FullCurvature] = {}
        self._computations: dict[tuple[CurvatureName, int, LoadedModel], _Computation] = {}
        self._summaries: dict[CurvatureName, str] = {}

    def find(
        self, name: CurvatureName, model: LoadedModel, progress: ProgressCallback = ignore_progress
    ) -> FullCurvature:
        """Return the curvature at the loaded checkpoint.

        Args:
            name: the score.
            model: with the checkpoint loaded.
            progress: called with ("curvature", done, total) between steps.

        Raises:
            UsageError: the weights need probabilities, and the losses are not -log p of one label.
        """
        key = name, model.checkpoint
        found = self._kept.get(key) or self._compute(name, model, progress)
        self._kept.pop(key, None)
        self._kept[key], self._summaries[name] = found, found.summary
        while len(self._kept) > 1 and sum(each.n_bytes for each in self._kept.values()) > _KEPT_BYTES:
            self._kept.pop(self._choose_unneeded(name))
        return found

    def _choose_unneeded(self, name: CurvatureName) -> tuple[CurvatureName, int]:
        """Return the curvature to remove: the one of another score whose last use is longest ago, if there is one.

        Otherwise it is the one that was used before the last: scores use the checkpoints in turn, and if the one whose
        last use is longest ago were removed, the next query would compute all again.
        """
        return next((key for key in self._kept if key[0] != name), [*self._kept][-2])

    def summarise(self, name: CurvatureName) -> str:
        """Return the method of the last curvature that `find` returned, in a few words for users."""
        return self._summaries[name]

    def _compute(self, name: CurvatureName, model: LoadedModel, progress: ProgressCallback) -> FullCurvature:
        """Return the result of the computation that this caller starts or joins."""
        key = name, model.checkpoint, model
        if key not in self._computations:
            self._computations[key] = self._start(name, model)
        computation = self._computations[key]
        computation.callers += 1
        try:
            return computation.finish(partial(progress, "curvature"))
        finally:
            computation.callers -= 1
            if not computation.callers:
                del self._computations[key]

    def _start(self, name: CurvatureName, model: LoadedModel) -> _Computation:
        entries = sum(p.numel() for p in model.parameters.values())
        has_gram, n_sampled = choose_inverse(len(self._source.rows_N), entries)
        rows_M = self._draw(n_sampled)
        weight_M = self._source.weigh_rows(name, model.checkpoint, rows_M)
        logger.info("curvature of checkpoint %d from %s rows", model.checkpoint, f"{len(rows_M):,}")
        if has_gram:
            return compute_gram(model, rows_M.tolist(), weight_M)
        return fit_ekfac(model, rows_M.tolist(), weight_M)

    def _draw(self, n_rows: int) -> Int64:
        rows_N = self._source.rows_N
        return rows_N[np.linspace(0, len(rows_N) - 1, n_rows).round().astype(np.int64)]


@dataclass(eq=False)
class ExactPreconditioner:
    """The map of directions of a preconditioned score; it keeps the curvature that it used last.

    Attributes:
        name: the score.
        damping_C: λ at each checkpoint.
        curvatures: of the open index.
    """

    name: CurvatureName
    damping_C: Sequence[float]
    curvatures: FullCurvatures
    _used: tuple[int, FullCurvature] | None = field(default=None, init=False, repr=False)

    @property
    def summary(self) -> str:
        """Return the method in a few words for users, after directions were computed."""
        return self.curvatures.summarise(self.name)

    def apply(
        self, model: LoadedModel, directions: Directions, progress: ProgressCallback = ignore_progress
    ) -> Directions:
        """Return a / √(aᵀg) for gradients g of queries at the loaded checkpoint; zero for zero gradients.

        Raises:
            NonFiniteError: the curvature is not finite, or cannot be inverted.
        """
        curvature = self._find(model, progress)
        # The result does not depend on the scale of the gradients.
        scale_in_place(directions)
        damping = self.damping_C[model.checkpoint]
        damped = curvature.solve(model, directions, damping, progress)
        square_Q = torch.stack(
            [torch.einsum("qp,qp->q", damped[name].double(), g.double()) for name, g in directions.items()]
        ).sum(0)
        # a = damped / λ; a of large gradients does not fit into float32.
        factor_Q = torch.where(square_Q > 0, (square_Q * damping).rsqrt(), 0)
        return {name: direction.mul_(factor_Q.to(direction)[:, None]) for name, direction in damped.items()}

    def weigh_rows(
        self, model: LoadedModel, rows: Sequence[int], progress: ProgressCallback = ignore_progress
    ) -> Float64:
        """Return the factors [N] that leave the own term of each row out of F."""
        return self._find(model, progress).weigh_rows(rows, self.damping_C[model.checkpoint])

    def _find(self, model: LoadedModel, progress: ProgressCallback) -> FullCurvature:
        if self._used is None or self._used[0] != model.checkpoint:
            self._used = model.checkpoint, self.curvatures.find(self.name, model, progress)
        return self._used[1]
