"""Bounds of inner products by the Cauchy-Schwarz inequality, from reduced rows; valid with all rounding errors.

A row x is stored as x̂: R float16 numbers times a power of two. With a basis B [F, R], r = x − B·x̂ is the rest of the
row. Let p̂ be Bᵀq in float32 for a query q, and q⊥ = q − B·p̂ its rest. For any B, x̂ and p̂,

    q·x = (Bᵀq)·x̂ + p̂·(Bᵀr) + q⊥·r.

The rounding errors of x̂ are in Bᵀr, which is 0 without them for an orthonormal B; the energy outside the basis is in r.
The Cauchy-Schwarz inequality bounds the last two terms, so

    |q·x − p̂·x̂| ≤ ‖p̂‖·‖Bᵀr‖ + ‖q⊥‖·‖r‖ + ‖Bᵀq − p̂‖·‖x̂‖.

All norms are computed in float64 and rounded up. A float32 product of R numbers, summed in any order, is off by at most
R·2⁻²⁴·‖p̂‖·‖x̂‖ up to terms of second order (Higham 2002, section 3.1). Twice this error, and 32 units more for p̂, for
the sum of the terms of a bound, and for float64, are part of the first margin of a row.

Shapes: N rows, B rows of a block, Q queries, F feature dimension, R reduced dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tracin_ann.search.reduction import multiply_rows
from tracin_ann.types import Float32, Float64, Int64, StoredPart

Float16 = npt.NDArray[np.float16]
Int16 = npt.NDArray[np.int16]

_UNIT = 2.0**-23
"""Twice the largest relative error of a float32 operation."""
_SPARE_UNITS = 32
_LEAST_ERROR = 2.0**-120
"""More than the sum of all errors of products that underflow float32, also if such numbers are replaced by 0."""
_EXPONENT = 15
"""Rows of norm 1 are stored times 2^15: half of the largest float16 number."""
_MORE = 1 + 2.0**-20
"""A factor that exceeds all rounding errors of float64 sums."""


@dataclass(frozen=True)
class ReducedRows:
    """Reduced rows and the margins of their bounds, in some order.

    Attributes:
        ids_N: int64.
        stored_NR: float16; x̂ is this times 2^`exponent_N`.
        exponent_N: int16.
        rounding_N: float32 margin, to be multiplied by ‖q‖: rounding errors.
        missing_N: float32 margin, to be multiplied by ‖q⊥‖: the norm of the rest of the row.
        norm_N: float32 norm of the row, rounded up; infinity if it exceeds float32.
    """

    ids_N: Int64
    stored_NR: Float16
    exponent_N: Int16
    rounding_N: Float32
    missing_N: Float32
    norm_N: Float32

    def __post_init__(self) -> None:
        """Check shapes and dtypes."""
        n_rows, dtypes = len(self.ids_N), {"ids_N": "int64", "stored_NR": "float16", "exponent_N": "int16"}
        for name in self.__dataclass_fields__:
            array = getattr(self, name)
            is_valid = array.dtype == dtypes.get(name, "float32") and array.ndim == (2 if name == "stored_NR" else 1)
            if not is_valid or len(array) != n_rows:
                raise ValueError(f"{name} of {array.dtype} and shape {array.shape} for {n_rows} rows")

    @classmethod
    def make_empty(cls, n_rows: int, width: int) -> ReducedRows:
        """Return arrays for n_rows rows of R = `width` numbers, to be written with `write`."""
        columns = (np.zeros(n_rows, np.float32) for _ in range(3))
        stored_NR, exponent_N = np.zeros((n_rows, width), np.float16), np.zeros(n_rows, np.int16)
        return cls(np.zeros(n_rows, np.int64), stored_NR, exponent_N, *columns)

    def __len__(self) -> int:
        """Return N."""
        return len(self.ids_N)

    @property
    def nbytes(self) -> int:
        """Return the size of the arrays in bytes."""
        return sum(getattr(self, name).nbytes for name in self.__dataclass_fields__)

    def select(self, which: slice | Int64) -> ReducedRows:
        """Return the rows at some positions."""
        return ReducedRows(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def write(self, where: Int64, rows: ReducedRows) -> None:
        """Replace the rows at some positions."""
        for name in self.__dataclass_fields__:
            getattr(self, name)[where] = getattr(rows, name)

    @property
    def part(self) -> StoredPart:
        """Return the reduced rows for `StoredScorer`."""
        return StoredPart(self.stored_NR, self.exponent_N)


def reduce_rows(ids_B: Int64, rows_BF: Float32, norm_B: Float64, basis_FR: Float64) -> ReducedRows:
    """Return the reduced rows with their margins; `norm_B` are the norms of the rows."""
    exponent_B = np.frexp(norm_B)[1]
    # Norms are in [1/2, 1), so that no product overflows and none underflows that matters.
    wide_BF = np.ldexp(rows_BF.astype(np.float64), -exponent_B[:, None])
    stored_BR = np.ldexp(wide_BF.astype(np.float32) @ basis_FR.astype(np.float32), _EXPONENT).astype(np.float16)
    rounding_B, missing_B = _measure_rest(wide_BF, stored_BR, basis_FR)
    return ReducedRows(
        ids_B,
        stored_BR,
        (exponent_B - _EXPONENT).astype(np.int16),
        round_up(np.ldexp(rounding_B, exponent_B) + _count_units(basis_FR.shape[1]) * norm_B + _LEAST_ERROR),
        round_up(np.ldexp(missing_B, exponent_B)),
        round_up(_MORE * norm_B),
    )


def find_wrong_bounds(rows: ReducedRows, rows_BF: Float32, basis_FR: Float64) -> npt.NDArray[np.bool_]:
    """Return which reduced rows [B] do not belong to these rows, or have margins that are too small."""
    exponent_B = rows.exponent_N.astype(np.int64) + _EXPONENT
    wide_BF = np.ldexp(rows_BF.astype(np.float64), -exponent_B[:, None])
    rounding_B, missing_B = _measure_rest(wide_BF, rows.stored_NR, basis_FR)
    norm_B = _norms(wide_BF)
    rounding_B += _count_units(basis_FR.shape[1]) / 2 * norm_B
    wrong_B: npt.NDArray[np.bool_] = np.zeros(len(rows), bool)
    for margin_N, least_B in ((rows.rounding_N, rounding_B), (rows.missing_N, missing_B), (rows.norm_N, norm_B)):
        # `not ≥`: true for NaN too. Other sums of the same numbers differ by far less than 2⁻²⁰.
        wrong_B |= ~(margin_N * _MORE >= np.ldexp(least_B, exponent_B))
    return wrong_B


def _measure_rest(wide_BF: Float64, stored_BR: Float16, basis_FR: Float64) -> tuple[Float64, Float64]:
    """Return ‖Bᵀr‖ and ‖r‖ of rows of norm 1."""
    rest_BF = wide_BF - np.ldexp(stored_BR.astype(np.float64), -_EXPONENT) @ basis_FR.T
    return _norms(rest_BF @ basis_FR), _norms(rest_BF)


@dataclass(frozen=True)
class ReducedQueries:
    """Queries of norms in [1/2, 1), or 0, for bounds of their inner products.

    Attributes:
        query_QF: the queries, float32.
        norm_Q: their norms, float64.
        reduced_QR: p̂, float32.
        whole_Q: float32 factor of the first margin: the norm, or that of p̂ if it is larger, rounded up.
        missing_Q: float32 factor of the second margin: ‖q⊥‖, rounded up.
    """

    query_QF: Float32
    norm_Q: Float64
    reduced_QR: Float32
    whole_Q: Float32
    missing_Q: Float32

    @classmethod
    def reduce(cls, query_QF: Float32, basis_FR: Float64) -> ReducedQueries:
        """Return the queries with their reductions."""
        wide_QF = query_QF.astype(np.float64)
        norm_Q, reduced_QR = _norms(wide_QF), multiply_rows(wide_QF, basis_FR).astype(np.float32)
        wide_QR = reduced_QR.astype(np.float64)
        whole_Q = round_up(_MORE * np.maximum(norm_Q, _norms(wide_QR)))
        missing_Q = round_up(_MORE * _norms(wide_QF - multiply_rows(wide_QR, basis_FR.T)))
        return cls(query_QF, norm_Q, reduced_QR, whole_Q, missing_Q)

    def select(self, which: Int64) -> ReducedQueries:
        """Return the queries at some positions."""
        return ReducedQueries(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


def bound_product_error(dim: int, query_norm_P: Float64, row_norm_P: Float32) -> Float64:
    """Return a bound of the error of float32 inner products of F = `dim` numbers, by the norms of both vectors."""
    return _count_units(dim) * query_norm_P * row_norm_P.astype(np.float64) + _LEAST_ERROR


def _count_units(n_terms: int) -> float:
    """Return the largest error of a float32 inner product of vectors of norm 1, with room for `_SPARE_UNITS` more."""
    return (n_terms + _SPARE_UNITS) * _UNIT


def _norms(wide_BF: Float64) -> Float64:
    norm_B: Float64 = np.sqrt(np.einsum("nf,nf->n", wide_BF, wide_BF))
    return norm_B


def round_down(wide_N: Float64) -> Float32:
    """Return the numbers in float32, rounded down."""
    return -round_up(-wide_N)


def round_up(wide_N: Float64) -> Float32:
    """Return the numbers in float32, rounded up."""
    with np.errstate(over="ignore"):
        near_N = wide_N.astype(np.float32)
    up_N: Float32 = np.where(near_N < wide_N, np.nextafter(near_N, np.float32(np.inf)), near_N)
    return up_N
