"""The exact inverse of the damped second moment of the gradients of a sample of rows, by their Gram matrix.

F = (1/M) Σ_z w_z g_z g_zᵀ has rank M at most. With U [P, M], whose columns are √w_z g_z, the Woodbury identity gives
λ (F + λI)⁻¹ q = q - U (λM I + UᵀU)⁻¹ Uᵀ q: only the matrix UᵀU [M, M] is kept, and the gradients of the sample are
computed again for each q, in one pass for Uᵀq and one for the weighted sum.

A row of the sample is a term of F, and its product with (F + λI)⁻¹ q is smaller than that of an equal row outside the
sample. F without the row's own term, F - w_z g_z g_zᵀ / M, gives the product times 1 / (1 - h_z) by the formula of
Sherman and Morrison, h_z = w_z g_zᵀ (F + λI)⁻¹ g_z / M, the diagonal of UᵀU (λM I + UᵀU)⁻¹.

Shapes: M rows of the sample, P parameters, Q directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tracin_ann.features import LoadedModel
from tracin_ann.gradients import weighted_sums
from tracin_ann.scoring.computation import Computation, Steps
from tracin_ann.scoring.curvature import factorise_damped
from tracin_ann.scoring.exact import (
    Directions,
    collect_forms,
    compute_inner_products,
    scale_in_place,
    step_through_gradients,
)
from tracin_ann.types import Float64, ProgressCallback, ignore_progress

_BLOCK_BYTES = 1 << 29
"""Memory of the gradients of one block of rows; two blocks are in memory."""
_STRIP = 128
"""Rows that are multiplied with others in one step."""


class GramCurvature:
    """The second moment of the gradients of M rows at one checkpoint; see the module.

    Args:
        rows: positions of the training rows.
        weight_M: w.
        gram_MM: UᵀU, float64.
    """

    def __init__(self, rows: Sequence[int], weight_M: Float64, gram_MM: Tensor) -> None:
        self._rows, self._root_M, self._gram_MM = list(rows), torch.from_numpy(np.sqrt(weight_M)), gram_MM
        self._last: tuple[float, tuple[Tensor, Tensor]] | None = None

    @property
    def n_bytes(self) -> int:
        """Return the memory of the matrix and its Cholesky factor."""
        return 2 * self._gram_MM.numel() * self._gram_MM.element_size()

    @property
    def summary(self) -> str:
        """Return the method in a few words for users."""
        return f"curvature of {len(self._rows):,} rows"

    def solve(
        self,
        model: LoadedModel,
        directions: Directions,
        damping: float,
        progress: ProgressCallback = ignore_progress,
    ) -> Directions:
        """Return λ (F + λI)⁻¹ of directions, [Q, P] by parameter, in two passes over the sample.

        Args:
            model: the model.
            directions: [Q, P] by parameter.
            damping: λ.
            progress: called with ("inverse curvature", rows done, rows of both passes).

        Raises:
            NonFiniteError: the matrix is not positive definite in float64.
        """
        factor_MM, _ = self._factorise(damping)
        n_directions = len(next(iter(directions.values())))
        everything = np.ones((n_directions, len(self._rows)), dtype=bool)
        add_rows = _count(progress, 2 * len(self._rows))
        product_QM = torch.from_numpy(compute_inner_products(model, directions, self._rows, everything, add_rows))
        weight_QM = torch.cholesky_solve((product_QM * self._root_M).T, factor_MM).T * self._root_M
        solved = {name: direction.clone() for name, direction in directions.items()}
        for n_rows, batch in collect_forms(model, "train", self._rows):
            for name, places, forms in batch:
                for form in forms:
                    solved[name] -= weighted_sums(form, weight_QM[:, places].to(solved[name].device))
            add_rows(n_rows)
        return solved

    def weigh_rows(self, rows: Sequence[int], damping: float) -> Float64:
        """Return 1 / (1 - h) [N] of training rows; 1 for rows outside the sample."""
        _, weight_M = self._factorise(damping)
        weight_of = dict(zip(self._rows, weight_M.tolist(), strict=True))
        return np.array([weight_of.get(row, 1.0) for row in rows])

    def _factorise(self, damping: float) -> tuple[Tensor, Tensor]:
        """Return the Cholesky factor of λM I + UᵀU, and 1 / (1 - h) of the sample; the last ones are kept."""
        if self._last is None or self._last[0] != damping:
            self._last = None
            self._last = damping, self._compute_factor(damping)
        return self._last[1]

    def _compute_factor(self, damping: float) -> tuple[Tensor, Tensor]:
        n_rows = len(self._rows)
        damped_MM = self._gram_MM.clone()
        damped_MM.diagonal().add_(damping * n_rows)
        trace = float(self._gram_MM.trace()) / n_rows
        factor_MM = factorise_damped(damped_MM, f"a damping of {damping:.3g} for a trace of {trace:.3g}")
        # 1 - h is the diagonal of λM (λM I + UᵀU)⁻¹.
        return factor_MM, 1 / (damping * n_rows * torch.cholesky_inverse(factor_MM).diagonal())


def compute_gram(model: LoadedModel, rows: Sequence[int], weight_M: Float64) -> Computation[GramCurvature]:
    """Return the computation of the second moment of the gradients of training rows at the loaded checkpoint.

    The gradients are computed once, or once for each pair of blocks of rows where they exceed 0.5 GiB. The units are
    rows whose gradients are computed. The checkpoint must be loaded at each step. Between steps, the matrix and two
    blocks of gradients are in memory.

    Raises:
        TaskError: the loss breaks the contract.
    """
    entries = sum(p.numel() * p.element_size() for p in model.parameters.values())
    step = max(1, _BLOCK_BYTES // entries)
    blocks = [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]
    total = len(rows) + sum(block.start for block in blocks)
    return Computation(total, _step_through_gram(model, rows, weight_M, blocks))


def _step_through_gram(
    model: LoadedModel, rows: Sequence[int], weight_M: Float64, blocks: Sequence[slice]
) -> Steps[GramCurvature]:
    gram_MM = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, block in enumerate(blocks):
        left, exponent_B = yield from _compute_scaled(model, rows[block])
        for other in blocks[: i + 1]:
            # This drops the last block before another one is computed.
            right, other_exponent_B = left, exponent_B
            if other != block:
                right, other_exponent_B = yield from _compute_scaled(model, rows[other])
            product_BB = yield from _multiply(left, right)
            gram_MM[block, other] = torch.ldexp(product_BB, exponent_B[:, None] + other_exponent_B)
    gram_MM = gram_MM.tril() + gram_MM.tril(-1).T
    root_M = torch.from_numpy(np.sqrt(weight_M))
    return GramCurvature(rows, weight_M, gram_MM * root_M[:, None] * root_M)


def _multiply(left: Directions, right: Directions) -> Steps[Tensor]:
    """Return the inner products of two blocks of gradients, float64; of a block with itself, the lower triangle."""
    n_left, n_right = (len(next(iter(block.values()))) for block in (left, right))
    product_BB = torch.zeros(n_left, n_right, dtype=torch.float64)
    for start in range(0, n_left, _STRIP):
        strip = slice(start, start + _STRIP)
        others = slice(0, start + _STRIP if left is right else n_right)
        for name, gradient in left.items():
            product_BB[strip, others] += (gradient[strip] @ right[name][others].T).cpu()
        yield 0
    return product_BB


def _count(progress: ProgressCallback, total: int) -> Callable[[int], None]:
    done = 0

    def add(rows: int) -> None:
        nonlocal done
        done += rows
        progress("inverse curvature", done, total)

    return add


def _compute_scaled(model: LoadedModel, rows: Sequence[int]) -> Steps[tuple[Directions, Tensor]]:
    """Return gradients of training rows times powers of two, and the exponents [B] that undo the scaling."""
    gradients = yield from step_through_gradients(model, "train", rows)
    return gradients, torch.from_numpy(scale_in_place(gradients))
