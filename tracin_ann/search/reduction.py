"""Dimensionality reduction for compact codes of rows: the uncentered SVD of a sample of the rows.

The SVD preserves inner products; centering, as in PCA, would change them. For large F the leading right singular
vectors come from randomized subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4).

Shapes: N rows, B rows of a block, F feature dimension, R reduced dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tracin_ann.search.flat import as_tensor
from tracin_ann.search.threads import open_threads
from tracin_ann.types import Float32, Float64, Int64

_Float = TypeVar("_Float", np.float32, np.float64)
_OVERSAMPLING = 16
_ITERATIONS = 6
_SMALL_DIM = 2048
_SMALL_RATIO = 4
"""Up to this many times the width, all eigenvectors take less time than the iteration for the leading ones."""
_FEW_ROWS = 16
_NUMBERS_OF_ONE_THREAD = 2**20
"""A matrix of more numbers is read by two threads."""


@dataclass(frozen=True)
class Reduction:
    """A linear map of rows and queries from F to R dimensions; the identity where F is small enough.

    Attributes:
        dim: F.
        basis_FR: orthonormal columns, float32; None: R = F.
        energy: share of the squared norms of the sample that the map preserves.
    """

    dim: int
    basis_FR: Float32 | None
    energy: float

    def __post_init__(self) -> None:
        """Check that the basis has F rows."""
        if self.basis_FR is not None and self.basis_FR.shape[:-1] != (self.dim,):
            raise ValueError(f"a basis of shape {self.basis_FR.shape} for rows of {self.dim} numbers")

    @property
    def width(self) -> int:
        """Return R."""
        return self.dim if self.basis_FR is None else self.basis_FR.shape[1]

    def apply(self, rows_BF: Float32) -> Float32:
        """Return the reduced rows, float32 [B, R]."""
        if self.basis_FR is None:
            return np.ascontiguousarray(rows_BF, dtype=np.float32)
        return multiply_rows(rows_BF, self.basis_FR)


def normalize(vectors: Float32) -> tuple[Float32, Float64]:
    """Return the vectors scaled to norm 1, and their norms; zero vectors stay zero."""
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    # A plain quotient takes a third of the time of one with a mask.
    wide /= np.where(norms > 0, norms, 1)[:, None]
    return wide.astype(np.float32), norms


def pack_reduction(reduction: Reduction, outliers: Int64) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a file that `unpack_reduction` reads: the basis, and the ids of rows without a code."""
    basis = np.zeros((0, 0), np.float32) if reduction.basis_FR is None else reduction.basis_FR
    return {"basis_FR": basis, "outliers": outliers}


def unpack_reduction(arrays: Mapping[str, npt.NDArray[Any]], dim: int, energy: float) -> tuple[Reduction, Int64]:
    """Return the reduction of rows of `dim` numbers and the ids of outliers from the arrays of a file.

    Raises:
        KeyError, ValueError: the arrays are not those of `pack_reduction`.
    """
    basis, outliers = arrays["basis_FR"], arrays["outliers"]
    if basis.dtype != np.float32 or outliers.ndim != 1 or outliers.dtype != np.int64:
        raise ValueError(f"a basis of {basis.dtype}, outliers of {outliers.dtype} {outliers.shape}")
    if (np.diff(outliers, prepend=-1) <= 0).any():
        raise ValueError("the ids of outliers do not increase")
    return Reduction(dim, basis if basis.size else None, energy), outliers


def multiply_rows(rows_BF: npt.NDArray[_Float], matrix_FR: npt.NDArray[_Float]) -> npt.NDArray[_Float]:
    """Return the product of rows and a matrix [B, R]; few rows are multiplied one by one, by one thread.

    A product by PyTorch or NumPy uses several threads. If another process uses one of the cores, they wait for each
    other for milliseconds; and after the product, they wait for the next one and delay other threads. `einsum` has
    none, and takes a few tenths of a millisecond more for a large matrix.
    """
    if len(rows_BF) <= _FEW_ROWS:
        few: npt.NDArray[_Float] = np.empty((len(rows_BF), matrix_FR.shape[1]), matrix_FR.dtype)
        for row_F, few_R in zip(rows_BF, few, strict=True):
            few_R[...] = _multiply_row(row_F, matrix_FR)
        return few
    product: npt.NDArray[_Float] = (as_tensor(rows_BF) @ as_tensor(matrix_FR)).numpy()
    return product


def _multiply_row(row_F: npt.NDArray[_Float], matrix_FR: npt.NDArray[_Float]) -> npt.NDArray[_Float]:
    """Return the product of a row and a matrix [R]."""

    def multiply(part: slice) -> npt.NDArray[_Float]:
        product_R: npt.NDArray[_Float] = np.einsum("f,fr->r", row_F[part], matrix_FR[part])
        return product_R

    if matrix_FR.size <= _NUMBERS_OF_ONE_THREAD:
        return multiply(slice(None))
    middle = len(row_F) // 2
    first_R, second_R = open_threads().map(multiply, (slice(middle), slice(middle, None)))
    return first_R + second_R


def fit_reduction(sample_BF: Float32, width: int, seed: int) -> Reduction:
    """Return the reduction to at most `width` dimensions that preserves most of the squared norms of the sample."""
    dim = sample_BF.shape[1]
    return Reduction(dim, None, 1.0) if dim <= width else fit_axes(sample_BF, width, seed).reduce(width)


@dataclass(frozen=True)
class PrincipalAxes:
    """The leading right singular vectors of a sample of rows, without centering.

    Attributes:
        axis_FR: float32 orthonormal columns.
        square_R: float64 sum of squares of the sample along each axis, decreasing.
        total: squared Frobenius norm of the sample.
    """

    axis_FR: Float32
    square_R: Float64
    total: float

    def reduce(self, width: int, rotation_WW: Float32 | None = None) -> Reduction:
        """Return the reduction to the first `width` axes, which is rotated if a matrix is given."""
        basis_FW = np.ascontiguousarray(self.axis_FR[:, :width])
        if rotation_WW is not None:
            basis_FW = multiply_rows(basis_FW, rotation_WW)
        energy = min(1.0, float(self.square_R[:width].sum()) / self.total) if self.total else 1.0
        return Reduction(len(basis_FW), basis_FW, energy)


def fit_axes(sample_BF: Float32, width: int, seed: int) -> PrincipalAxes:
    """Return the axes of the largest squares of the sample: `width` ones, or all if F is smaller."""
    rows, dim = as_tensor(sample_BF), sample_BF.shape[1]
    width = min(dim, width)
    if dim <= max(_SMALL_DIM, _SMALL_RATIO * width):
        moment = rows.T @ rows
        try:
            square_F, axis_FF = torch.linalg.eigh(moment)
        except RuntimeError:
            # In float32 the solver may not converge for rows of low rank.
            square_F, axis_FF = torch.linalg.eigh(moment.double())
        axis_FR, square_R = axis_FF[:, -width:].flip(1), square_F[-width:].flip(0).clamp(min=0)
        total = float(moment.diagonal().sum(dtype=torch.float64))
    else:
        random = torch.Generator().manual_seed(seed)
        basis = torch.randn(dim, min(dim, width + _OVERSAMPLING), generator=random, dtype=rows.dtype)
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
        _, singular, rotation = torch.linalg.svd(rows @ basis, full_matrices=False)
        axis_FR, square_R = basis @ rotation[:width].T, singular[:width].double().square()
        total = float(np.einsum("bf,bf->", sample_BF, sample_BF, dtype=np.float64))
    return PrincipalAxes(axis_FR.to(rows.dtype).contiguous().numpy(), square_R.double().numpy(), total)
