"""EK-FAC: a Kronecker-factored approximation of the second moment of the gradients, with corrected eigenvalues.

F = (1/M) Σ_z w_z g_z g_zᵀ is approximated by one block for each parameter. The gradients of a parameter of shape
(R, c1, c2, ...) are matrices W_z [R, C], C = c1·c2·…. The eigenvectors of the block are Kronecker products of those of
its marginals, (1/M) Σ w_z W_z W_zᵀ and (1/M) Σ w_z W_zᵀ W_z. Its eigenvalues are the mean squares of the gradients in
this basis (George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv 2308.03296). For a layer that is called once
per example, the marginals are the covariances of its inputs and of its output gradients, each weighted with the squared
norm of the other. A vector (a bias, a norm layer) has C = 1, so that its block is exact.

Shapes: M rows of the sample, B batch, T positions, R rows and C columns of a parameter, P = R·C, Q directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.features import LoadedModel
from tracin_ann.gradients import Form, Outer, Rows, batch_size, form_dtype, materialise
from tracin_ann.scoring.computation import Computation, Steps
from tracin_ann.scoring.exact import Directions, collect_forms
from tracin_ann.types import Float64, ProgressCallback, ignore_progress

LARGEST_SIDE = 4096
"""Rows or columns of a parameter, above which this side has the identity as its eigenvectors."""
_ELEMENTS = 1 << 25
"""Numbers of the gradients of one parameter that are in memory at a time."""


Sides = tuple[Tensor | None, Tensor | None]
"""Square matrices of both sides of a parameter, [R, R] and [C, C]; None for a side that is too long."""


@dataclass(frozen=True, eq=False)
class _Block:
    """The block of one parameter: eigenvectors of both sides, None for the identity, and eigenvalues."""

    left_RR: Tensor | None
    right_CC: Tensor | None
    eigenvalue_RC: Tensor

    def solve(self, direction_QP: Tensor, damping: float) -> Tensor:
        rotated_QRC = _rotate(direction_QP.view(-1, *self.eigenvalue_RC.shape), self.left_RR, self.right_CC)
        rotated_QRC = rotated_QRC * (damping / (self.eigenvalue_RC.double() + damping)).to(rotated_QRC)
        left, right = (None if side is None else side.mT for side in (self.left_RR, self.right_CC))
        return _rotate(rotated_QRC, left, right).flatten(1)


class EKFAC:
    """The approximation at one checkpoint; see the module."""

    def __init__(self, blocks: dict[str, _Block], n_rows: int) -> None:
        self._blocks, self._n_rows = blocks, n_rows

    @property
    def n_bytes(self) -> int:
        """Return the memory of the blocks."""
        tensors = [t for block in self._blocks.values() for t in vars(block).values() if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def summary(self) -> str:
        """Return the method in a few words for users, with the share of the parameters that it covers less well."""
        sizes = {name: block.eigenvalue_RC.numel() for name, block in self._blocks.items()}
        partial = [name for name, block in self._blocks.items() if block.left_RR is None or block.right_CC is None]
        share = sum(sizes[name] for name in partial) / max(1, sum(sizes.values()))
        exception = f", diagonal on one side for {share:.1%} of the parameters" if partial else ""
        return f"EK-FAC curvature of {self._n_rows:,} rows{exception}"

    def solve(
        self,
        model: LoadedModel,
        directions: Directions,
        damping: float,
        progress: ProgressCallback = ignore_progress,
    ) -> Directions:
        """Return λ (F + λI)⁻¹ of directions, [Q, P] by parameter."""
        return {name: self._blocks[name].solve(direction_QP, damping) for name, direction_QP in directions.items()}

    def weigh_rows(self, rows: Sequence[int], damping: float) -> Float64:
        """Return 1 for each row: single rows hardly change the approximation."""
        return np.ones(len(rows))


def fit_ekfac(model: LoadedModel, rows: Sequence[int], weight_M: Float64) -> Computation[EKFAC]:
    """Return the computation of the approximation for training rows at the loaded checkpoint.

    A step is a batch of one of two passes over the rows, or the factorisation of one matrix between them, which counts
    no units. The checkpoint must be loaded at each step. Between steps, the matrices are in memory.

    Args:
        model: with a checkpoint loaded.
        rows: positions of the M training rows.
        weight_M: w.

    Raises:
        TaskError: the loss breaks the contract.
        NonFiniteError: squares of gradients do not fit into float32.
    """
    return Computation(2 * len(rows), _step_through_ekfac(model, rows, weight_M))


def _step_through_ekfac(model: LoadedModel, rows: Sequence[int], weight_M: Float64) -> Steps[EKFAC]:
    shapes = {n: (p.shape[0] if p.dim() else 1, prod(p.shape[1:])) for n, p in model.parameters.items() if p.numel()}
    device, dtype = model.runner.options.device, form_dtype(model.parameters.values())
    weights = torch.from_numpy(weight_M / len(rows)).to(device)
    marginals = {name: _make_marginals(shape, device) for name, shape in shapes.items()}
    for n_rows, batch in collect_forms(model, "train", rows):
        for name, places, forms in batch:
            _add_marginals(marginals[name], forms, weights[places], shapes[name])
        yield n_rows
    bases: dict[str, Sides] = {}
    for name in shapes:
        bases[name] = yield from _find_basis(marginals.pop(name), dtype)
    squares = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
    for n_rows, batch in collect_forms(model, "train", rows):
        for name, places, forms in batch:
            _add_squares(squares[name], forms, weights[places], bases[name])
        yield n_rows
    return EKFAC({name: _Block(*bases[name], squares[name].to(dtype)) for name in shapes}, len(rows))


def _make_marginals(shape: tuple[int, int], device: torch.device) -> Sides:
    left, right = (torch.zeros(n, n, dtype=torch.float64, device=device) if n <= LARGEST_SIDE else None for n in shape)
    return left, right


def _find_basis(marginals: Sides, dtype: torch.dtype) -> Steps[Sides]:
    """Return the eigenvectors of the marginals; each side is a step.

    Raises:
        NonFiniteError: a marginal is not finite.
    """
    if not all(matrix is None or bool(torch.isfinite(matrix).all()) for matrix in marginals):
        raise NonFiniteError(
            problem(
                "the curvature over all parameters is not finite",
                got="NaN or infinity in sums of squared gradients",
                expected="gradients whose squares fit into float32",
                remedy="use --rerank stored, or divide the loss by a constant",
            )
        )
    bases = []
    for matrix in marginals:
        bases.append(None if matrix is None else torch.linalg.eigh(matrix)[1].to(dtype))
        yield 0
    left, right = bases
    return left, right


def _add_marginals(total: Sides, forms: Sequence[Form], weight_B: Tensor, shape: tuple[int, int]) -> None:
    """Add Σ w W Wᵀ and Σ w Wᵀ W of a batch."""
    if (factors := _find_factors(forms)) is not None:
        left_BR, right_BC = factors
        _add_square(total[0], left_BR, weight_B * right_BC.square().sum(1))
        _add_square(total[1], right_BC, weight_B * left_BR.square().sum(1))
    elif total[0] is None and (rows := _merge_rows(forms)) is not None:
        _add_square(total[1], rows.value_UC, weight_B[rows.example_U])
    else:
        for part, grad_BRC in _materialise(forms, shape):
            weight_b = weight_B[part]
            _add_square(total[0], grad_BRC.mT.flatten(0, 1), weight_b.repeat_interleave(shape[1]))
            _add_square(total[1], grad_BRC.flatten(0, 1), weight_b.repeat_interleave(shape[0]))


def _add_square(total_NN: Tensor | None, vector_BN: Tensor, weight_B: Tensor) -> None:
    """Add Σ w v vᵀ."""
    if total_NN is not None:
        scaled_BN = vector_BN * weight_B.sqrt().to(vector_BN)[:, None]
        total_NN += scaled_BN.T @ scaled_BN


def _add_squares(total_RC: Tensor, forms: Sequence[Form], weight_B: Tensor, basis: Sides) -> None:
    """Add the weighted squares of the gradients of a batch in the basis."""
    left_RR, right_CC = basis
    if (factors := _find_factors(forms)) is not None:
        left_BR, right_BC = _project(factors[0], left_RR), _project(factors[1], right_CC)
        total_RC += (left_BR.square() * weight_B.to(left_BR)[:, None]).T @ right_BC.square()
    elif left_RR is None and (rows := _merge_rows(forms)) is not None:
        square_UC = _project(rows.value_UC, right_CC).square().to(total_RC)
        total_RC.index_add_(0, rows.index_U, square_UC * weight_B[rows.example_U, None])
    else:
        if all(isinstance(form, Outer) for form in forms):
            forms = [_project_outer(form, basis) for form in forms if isinstance(form, Outer)]
            basis = (None, None)
        for part, grad_BRC in _materialise(forms, (len(total_RC), total_RC.shape[1])):
            rotated_BRC = _rotate(grad_BRC, *basis)
            total_RC += torch.einsum("b,brc->rc", weight_B[part].to(rotated_BRC), rotated_BRC.square())


def _project(vector_BN: Tensor, basis_NN: Tensor | None) -> Tensor:
    return vector_BN if basis_NN is None else vector_BN @ basis_NN


def _project_outer(form: Outer, basis: Sides) -> Outer:
    return Outer(_project(form.left_BTR, basis[0]), _project(form.right_BTC, basis[1]))


def _rotate(matrix_BRC: Tensor, left_RR: Tensor | None, right_CC: Tensor | None) -> Tensor:
    """Return leftᵀ W right for each matrix W."""
    rotated_BRC = _project(matrix_BRC, right_CC)
    return rotated_BRC if left_RR is None else left_RR.mT @ rotated_BRC


def _find_factors(forms: Sequence[Form]) -> tuple[Tensor, Tensor] | None:
    """Return [B, R] and [B, C] of gradients that are one outer product per example; None for others."""
    if len(forms) == 1 and isinstance(forms[0], Outer) and forms[0].left_BTR.shape[1] == 1:
        return forms[0].left_BTR[:, 0], forms[0].right_BTC[:, 0]
    return None


@dataclass(frozen=True, eq=False)
class _MergedRows:
    """The rows of an embedding that have a gradient: example, index and gradient [C], once per example and index."""

    example_U: Tensor
    index_U: Tensor
    value_UC: Tensor


def _merge_rows(forms: Sequence[Form]) -> _MergedRows | None:
    """Return the gradients of embeddings with the positions of an index added; None if there are other forms."""
    uses = [form for form in forms if isinstance(form, Rows)]
    if len(uses) < len(forms):
        return None
    index_BT = torch.cat([form.index_BT for form in uses], dim=1)
    value_BTC = torch.cat([form.value_BTC for form in uses], dim=1)
    example_B1 = torch.arange(len(index_BT), device=index_BT.device)[:, None]
    key_U, place = torch.unique(example_B1 * uses[0].n_rows + index_BT, return_inverse=True)
    value_UC = value_BTC.new_zeros(len(key_U), value_BTC.shape[2])
    value_UC.index_add_(0, place.flatten(), value_BTC.flatten(0, 1))
    return _MergedRows(key_U // uses[0].n_rows, key_U % uses[0].n_rows, value_UC)


def _materialise(forms: Sequence[Form], shape: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Yield (examples, their gradients [B, R, C]): the sum over all forms, for a bounded number of examples."""
    n_examples, step = batch_size(forms[0]), max(1, _ELEMENTS // prod(shape))
    for start in range(0, n_examples, step):
        part = slice(start, min(start + step, n_examples))
        yield part, torch.stack([materialise(form[part]) for form in forms]).sum(0).view(-1, *shape)
