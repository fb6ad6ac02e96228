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

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tracin_ann.features import LoadedModel
from tracin_ann.gradients import weighted_sums
from tracin_ann.scoring.curvature import factorise_damped
from tracin_ann.scoring.exact import (
    Directions,
    collect_forms,
    compute_full_gradients,
    compute_inner_products,
    scale_in_place,
)
from tracin_ann.types import Float64

_BLOCK_BYTES = 1 << 29
"""Memory of the gradients of one block of rows; two blocks are in memory."""
_STRIP = 256
"""Rows that are multiplied with others at once."""


class GramCurvature:
    """The second moment of the gradients of M rows at one checkpoint; see the module.

    Args:
        rows: positions of the training rows.
        weight_M: w.
        gram_MM: UᵀU, float64.
    """

    def __init__(self, rows: Sequence[int], weight_M: Float64, gram_MM: Tensor) -> None:
        self._rows, self._root_M, self._gram_MM = list(rows), torch.from_numpy(np.sqrt(weight_M)), gram_MM
        self._factorise = lru_cache(maxsize=1)(self._compute_factor)

    @property
    def n_bytes(self) -> int:
        """Return the memory of the matrix and its Cholesky factor."""
        return 2 * self._gram_MM.numel() * self._gram_MM.element_size()

    @property
    def summary(self) -> str:
        """Return the method in a few words for users."""
        return f"curvature of {len(self._rows):,} rows"

    def solve(self, model: LoadedModel, directions: Directions, damping: float) -> Directions:
        """Return λ (F + λI)⁻¹ of directions, [Q, P] by parameter, in two passes over the sample.

        Raises:
            NonFiniteError: the matrix is not positive definite in float64.
        """
        factor_MM, _ = self._factorise(damping)
        n_directions = len(next(iter(directions.values())))
        everything = np.ones((n_directions, len(self._rows)), dtype=bool)
        product_QM = torch.from_numpy(compute_inner_products(model, directions, self._rows, everything))
        weight_QM = torch.cholesky_solve((product_QM * self._root_M).T, factor_MM).T * self._root_M
        solved = {name: direction.clone() for name, direction in directions.items()}
        for name, places, forms in collect_forms(model, "train", self._rows):
            for form in forms:
                solved[name] -= weighted_sums(form, weight_QM[:, places].to(solved[name].device))
        return solved

    def weigh_rows(self, rows: Sequence[int], damping: float) -> Float64:
        """Return 1 / (1 - h) [N] of training rows; 1 for rows outside the sample."""
        _, weight_M = self._factorise(damping)
        weight_of = dict(zip(self._rows, weight_M.tolist(), strict=True))
        return np.array([weight_of.get(row, 1.0) for row in rows])

    def _compute_factor(self, damping: float) -> tuple[Tensor, Tensor]:
        """Return the Cholesky factor of λM I + UᵀU, and 1 / (1 - h) of the sample."""
        n_rows = len(self._rows)
        damped_MM = self._gram_MM.clone()
        damped_MM.diagonal().add_(damping * n_rows)
        trace = float(self._gram_MM.trace()) / n_rows
        factor_MM = factorise_damped(damped_MM, f"a damping of {damping:.3g} for a trace of {trace:.3g}")
        # 1 - h is the diagonal of λM (λM I + UᵀU)⁻¹.
        return factor_MM, 1 / (damping * n_rows * torch.cholesky_inverse(factor_MM).diagonal())


def compute_gram(model: LoadedModel, rows: Sequence[int], weight_M: Float64) -> GramCurvature:
    """Return the second moment of the gradients of training rows at the loaded checkpoint.

    The gradients are computed once, or once for each pair of blocks of rows where they exceed 0.5 GiB.

    Raises:
        TaskError: the loss breaks the contract.
    """
    entries = sum(p.numel() * p.element_size() for p in model.parameters.values())
    step = max(1, _BLOCK_BYTES // entries)
    blocks = [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]
    gram_MM = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, block in enumerate(blocks):
        left, exponent_B = _compute_scaled(model, rows[block])
        for other in blocks[: i + 1]:
            right, other_exponent_B = (left, exponent_B) if other == block else _compute_scaled(model, rows[other])
            product_BB = _multiply(left, right)
            gram_MM[block, other] = torch.ldexp(product_BB, exponent_B[:, None] + other_exponent_B)
    gram_MM = gram_MM.tril() + gram_MM.tril(-1).T
    root_M = torch.from_numpy(np.sqrt(weight_M))
    return GramCurvature(rows, weight_M, gram_MM * root_M[:, None] * root_M)


def _multiply(left: Directions, right: Directions) -> Tensor:
    """Return the inner products of two blocks of gradients, float64; of a block with itself, the lower triangle."""
    n_left, n_right = (len(next(iter(block.values()))) for block in (left, right))
    product_BB = torch.zeros(n_left, n_right, dtype=torch.float64)
    for start in range(0, n_left, _STRIP):
        strip = slice(start, start + _STRIP)
        others = slice(0, start + _STRIP if left is right else n_right)
        for name, gradient in left.items():
            product_BB[strip, others] += (gradient[strip] @ right[name][others].T).cpu()
    return product_BB


def _compute_scaled(model: LoadedModel, rows: Sequence[int]) -> tuple[Directions, Tensor]:
    """Return gradients of training rows times powers of two, and the exponents [B] that undo the scaling."""
    gradients = compute_full_gradients(model, "train", rows)
    return gradients, torch.from_numpy(scale_in_place(gradients))
