"""The exact inverse of the damped second moment of the gradients of a sample of rows, by their Gram matrix.

F = (1/M) Σ_z w_z g_z g_zᵀ has rank M at most. With U [P, M], whose columns are √w_z g_z, the Woodbury identity gives
λ (F + λI)⁻¹ q = q - U (λM I + UᵀU)⁻¹ Uᵀ q: only the matrix UᵀU [M, M] is kept, and the gradients of the sample are
computed again for each q, in one pass for Uᵀq and one for the weighted sum.

A row of the sample is a term of F, and its product with (F + λI)⁻¹ q is smaller than that of an equal row outside the
sample. F without the row's own term, F - w_z g_z g_zᵀ / M, gives the product times 1 / (1 - h_z) by the formula of
Sherman and Morrison, h_z = w_z g_zᵀ (F + λI)⁻¹ g_z / M, the diagonal of UᵀU (λM I + UᵀU)⁻¹.

The gradient of a layer that is called once per example is an outer product of two vectors. The inner product of two
such gradients is the product of the inner products of their factors, which needs R + C products instead of R·C.

Shapes: M rows of the sample, B rows of a block, P parameters, R rows and C columns of a parameter, Q directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tracin_ann.features import LoadedModel
from tracin_ann.gradients import Outer, form_dtype, materialise, weighted_sums
from tracin_ann.scoring.computation import Computation, Steps
from tracin_ann.scoring.curvature import factorise_damped
from tracin_ann.scoring.exact import (
    Directions,
    collect_forms,
    compute_inner_products,
)
from tracin_ann.types import Float64, ProgressCallback, ignore_progress

_BLOCK_BYTES = 1 << 29
"""Memory of the gradients of one block of rows; two blocks are in memory."""
_STRIP = 128
"""Rows that are multiplied with others in one step."""
_LARGEST_EXPONENT = 100


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
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters.values())
    blocks = _split_rows(len(rows), n_bytes)
    return Computation(count_gradients(len(rows), n_bytes), _step_through_gram(model, rows, weight_M, blocks))


def count_gradients(n_rows: int, n_bytes: int) -> int:
    """Return the gradients, of `n_bytes` each, that are computed for the Gram matrix of M rows."""
    repeated: int = sum(block.start for block in _split_rows(n_rows, n_bytes))
    return n_rows + repeated


def _split_rows(n_rows: int, n_bytes: int) -> list[slice]:
    """Return blocks of rows whose gradients, of `n_bytes` each, fit into the memory of a block."""
    step = max(1, _BLOCK_BYTES // n_bytes)
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def _step_through_gram(
    model: LoadedModel, rows: Sequence[int], weight_M: Float64, blocks: Sequence[slice]
) -> Steps[GramCurvature]:
    gram_MM = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, block in enumerate(blocks):
        left = yield from _compute_scaled(model, rows[block])
        for other in blocks[: i + 1]:
            # This drops the last block before another one is computed.
            right = left
            if other != block:
                right = yield from _compute_scaled(model, rows[other])
            product_BB = yield from _multiply(left, right)
            gram_MM[block, other] = torch.ldexp(product_BB, left.exponent_B[:, None] + right.exponent_B)
    gram_MM = gram_MM.tril() + gram_MM.tril(-1).T
    root_M = torch.from_numpy(np.sqrt(weight_M))
    return GramCurvature(rows, weight_M, gram_MM * root_M[:, None] * root_M)


@dataclass(frozen=True, eq=False)
class _Block:
    """The gradients of a block of rows times powers of two, so that inner products neither overflow nor underflow.

    Attributes:
        factors: by parameter: the gradients [B, P], or factors [B, R] and [B, C] of outer products; parameters with
            zero gradients may be missing.
        exponent_B: the exponents that undo the scaling.
    """

    factors: dict[str, tuple[Tensor, ...]]
    exponent_B: Tensor


def _multiply(left: _Block, right: _Block) -> Steps[Tensor]:
    """Return the inner products of two blocks of gradients, float64; of a block with itself, the lower triangle."""
    n_left, n_right = len(left.exponent_B), len(right.exponent_B)
    product_BB = torch.zeros(n_left, n_right, dtype=torch.float64)
    for start in range(0, n_left, _STRIP):
        strip = slice(start, start + _STRIP)
        others = slice(0, start + _STRIP if left is right else n_right)
        for name in left.factors.keys() & right.factors.keys():
            pairs = _match([each[strip] for each in left.factors[name]], [each[others] for each in right.factors[name]])
            products = [one @ other.T for one, other in pairs]
            product_BB[strip, others] += (products[0] if len(products) == 1 else products[0] * products[1]).cpu()
        yield 0
    return product_BB


def _match(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of factors; if only one side has factors, of whole gradients."""
    if len(left) == len(right):
        return list(zip(left, right, strict=True))
    return [(_expand(left), _expand(right))]


def _expand(factors: Sequence[Tensor]) -> Tensor:
    """Return the gradients [B, P] of their factors."""
    return factors[0] if len(factors) == 1 else (factors[0][:, :, None] * factors[1][:, None]).flatten(1)


def _compute_scaled(model: LoadedModel, rows: Sequence[int]) -> Steps[_Block]:
    """Compute the scaled gradients of training rows at the loaded checkpoint; a step is a batch."""
    device, dtype = model.runner.options.device, form_dtype(model.parameters.values())
    factors: dict[str, tuple[Tensor, ...]] = {}
    for n_rows, batch in collect_forms(model, "train", rows):
        for name, places, forms in batch:
            form, n_entries = forms[0], model.parameters[name].numel()
            is_outer = len(forms) == 1 and isinstance(form, Outer) and form.left_BTR.shape[1] == 1
            if name not in factors:
                sizes = form.shape if is_outer else (n_entries,)
                factors[name] = tuple(torch.zeros(len(rows), n, dtype=dtype, device=device) for n in sizes)
            if is_outer and len(factors[name]) > 1:
                assert isinstance(form, Outer)
                for target, side in zip(factors[name], (form.left_BTR, form.right_BTC), strict=True):
                    target[places] = side[:, 0]
                continue
            if len(factors[name]) > 1:
                factors[name] = (_expand(factors[name]),)
            for each in forms:
                factors[name][0][places] += materialise(each)
        yield n_rows
    return _Block(factors, _scale_factors(factors, len(rows)))


def _scale_factors(factors: dict[str, tuple[Tensor, ...]], n_rows: int) -> Tensor:
    """Scale the gradients of each row by a power of two, in place; return the exponents [B] that undo it, float64."""
    found = {name: [_find_exponents(each) for each in own] for name, own in factors.items()}
    totals = [torch.stack(own).sum(0) for own in found.values()] or [torch.zeros(n_rows, dtype=torch.float64)]
    total_B = torch.stack(totals).amax(0)
    total_B = torch.where(total_B.isfinite(), total_B, 0).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    for name, own in factors.items():
        if len(own) == 1:
            own[0].mul_(torch.ldexp(torch.ones_like(total_B), -total_B).to(own[0])[:, None])
            continue
        # The largest entry of the second factor becomes about 1, so that the first one has the rest of the exponent; if
        # the second one is zero, it becomes zero.
        second_B = found[name][1]
        for each, exponent_B in zip(own, (total_B - second_B, second_B.where(second_B.isfinite(), 0)), strict=True):
            each.copy_(torch.ldexp(each.double(), -exponent_B[:, None]))
    return total_B.cpu()


def _find_exponents(factor_BX: Tensor) -> Tensor:
    """Return the exponents [B] of the largest entries of rows, float64; -inf for zero."""
    peak_B = torch.linalg.vector_norm(factor_BX, ord=torch.inf, dim=1).double()
    return torch.where(peak_B > 0, peak_B.frexp().exponent.double(), -torch.inf)


def _count(progress: ProgressCallback, total: int) -> Callable[[int], None]:
    done = 0

    def add(rows: int) -> None:
        nonlocal done
        done += rows
        progress("inverse curvature", done, total)

    return add
