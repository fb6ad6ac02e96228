"""Inner products of queries with rows in their stored format, in float32, without a decoded copy of the rows.

float16 rows are converted to float32 in registers, for up to four queries, or else in a buffer that stays in the
cache. Their exponents, or norms, multiply the inner products instead of the rows, so a scan for few queries reads the
stored rows once and writes only scores.

Shapes: Q queries, B rows of a block, F feature dimension, D columns of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracin_ann.search.half_scanner import HalfScanner, share_memory
from tracin_ann.types import StoredPart

_BUFFER_NUMBERS = 1 << 21
"""float32 numbers of the buffer of converted rows: 8 MiB."""
_QUERIES_AT_ONCE = 128
_SCANNED_QUERIES = 4
"""Up to this number, `HalfScanner` is faster than a conversion and a matrix product."""
_FEW_QUERIES = 8
"""Up to this number, a product of rows and queries is faster than one of queries and rows."""
_SAFE_EXPONENT = 64
_EXPONENT_BIAS, _LARGEST_BIASED, _FRACTION_BITS = 127, 254, 23
_ONE = torch.ones(1)


class StoredScorer:
    """Inner products of some queries with blocks of stored rows; one thread uses it at a time."""

    def __init__(self, queries_QF: Tensor) -> None:
        """Store the float32 queries [Q, F], on the CPU."""
        self._queries_QF = queries_QF
        self._scaled: dict[int, _PartQueries] = {}
        self._row_buffer = torch.empty(0)
        self._product_buffer = torch.empty(0)

    def score(self, parts: Sequence[StoredPart], out_QB: Tensor) -> None:
        """Write the inner products of the queries and the rows that the parts form together to `out_QB`."""
        start = 0
        for part in parts:
            stop = start + part.stored_BD.shape[1]
            if start not in self._scaled:
                self._scaled[start] = _scale(self._queries_QF[:, start:stop])
            self._add_part(part, self._scaled[start], out_QB, is_first=start == 0)
            start = stop

    def _add_part(self, part: StoredPart, queries: _PartQueries, out_QB: Tensor, *, is_first: bool) -> None:
        """Add the inner products with one part to `out_QB`, or write them there for the first part."""
        power_Q1 = queries.power_Q1
        if len(queries.query_QD) <= _SCANNED_QUERIES and part.stored_BD.dtype == np.float16 and not part.unit:
            product_QB = np.stack([scanner.multiply(part.stored_BD) for scanner in queries.scanners])
            factors = _compute_powers(part.exponent_B)
            _accumulate(torch.from_numpy(product_QB), power_Q1, factors, out_QB, is_first=is_first)
            return
        n_rows, dim = part.stored_BD.shape
        stored_BD = torch.from_numpy(share_memory(part.stored_BD))
        step = max(1, _BUFFER_NUMBERS // dim)
        for start in range(0, n_rows, step):
            rows = slice(start, min(start + step, n_rows))
            rows_BD = self._convert(stored_BD[rows])
            factors = _invert_norms(rows_BD) if part.unit else _compute_powers(part.exponent_B[rows])
            for first in range(0, len(queries.query_QD), _QUERIES_AT_ONCE):
                some = slice(first, first + _QUERIES_AT_ONCE)
                some_QB = self._multiply(queries.query_QD[some], rows_BD)
                some_power_Q1 = None if power_Q1 is None else power_Q1[some]
                _accumulate(some_QB, some_power_Q1, factors, out_QB[some, rows], is_first=is_first)

    def _convert(self, stored_BD: Tensor) -> Tensor:
        """Return the rows as float32: in the buffer, or without a copy if they are stored as float32."""
        if stored_BD.dtype == torch.float32:
            return stored_BD
        if len(self._row_buffer) < stored_BD.numel():
            self._row_buffer = torch.empty(stored_BD.numel())
        return self._row_buffer[: stored_BD.numel()].view(stored_BD.shape).copy_(stored_BD)

    def _multiply(self, queries_QD: Tensor, rows_BD: Tensor) -> Tensor:
        """Return the inner products [Q, B], in a buffer."""
        n_products = len(queries_QD) * len(rows_BD)
        if len(self._product_buffer) < n_products:
            self._product_buffer = torch.empty(n_products)
        buffer = self._product_buffer[:n_products]
        if len(queries_QD) <= _FEW_QUERIES:
            return torch.mm(rows_BD, queries_QD.T, out=buffer.view(len(rows_BD), len(queries_QD))).T
        return torch.mm(queries_QD, rows_BD.T, out=buffer.view(len(queries_QD), len(rows_BD)))


@dataclass(frozen=True)
class _PartQueries:
    """The queries' columns of a part: `query_QD`, times `power_Q1` (float64) if it is not None."""

    query_QD: Tensor
    power_Q1: Tensor | None

    @cached_property
    def scanners(self) -> list[HalfScanner]:
        """Return a scanner for each query."""
        return [HalfScanner(query_D) for query_D in self.query_QD.numpy()]


def _accumulate(
    product_QB: Tensor, power_Q1: Tensor | None, factors: Sequence[Tensor], out_QB: Tensor, *, is_first: bool
) -> None:
    """Multiply the products by all factors, and add them to `out_QB`, or write them there if they are the first."""
    *others, factor_B = factors
    if power_Q1 is not None:
        product_QB = product_QB.double().mul_(power_Q1)
        others, factor_B = list(factors), _ONE
    for other_B in others:
        product_QB *= other_B
    if is_first:
        torch.mul(product_QB.float(), factor_B, out=out_QB)
    else:
        out_QB.addcmul_(product_QB.float(), factor_B)


def _scale(query_QD: Tensor) -> _PartQueries:
    """Return the columns, scaled by powers of two to norms below 1 if the norm of one is extreme.

    The inner product of such a query and a stored row, which has numbers up to 2^15, can leave the range of float32
    although their score is in it.
    """
    norm_Q1 = torch.linalg.vector_norm(query_QD.double(), dim=1, keepdim=True).numpy()
    exponent_Q1 = np.frexp(norm_Q1)[1]
    exponent_Q1[np.abs(exponent_Q1) <= _SAFE_EXPONENT] = 0
    if not exponent_Q1.any():
        return _PartQueries(query_QD.contiguous(), None)
    scaled_QD = np.ldexp(query_QD.numpy(), -exponent_Q1)
    return _PartQueries(torch.from_numpy(scaled_QD), torch.from_numpy(np.ldexp(1.0, exponent_Q1)))


def _invert_norms(rows_BD: Tensor) -> list[Tensor]:
    """Return the factor that divides an inner product by the norm of its row; 0 for a zero row."""
    norm_B = torch.linalg.vector_norm(rows_BD, dim=1)
    return [norm_B.reciprocal().masked_fill_(norm_B == 0, 0.0)]


def _compute_powers(exponent_B: npt.NDArray[np.int16]) -> list[Tensor]:
    """Return the powers of two of these exponents: two factors if a power is not a normal float32."""
    biased_B = exponent_B.astype(np.int32)
    biased_B += _EXPONENT_BIAS
    # As unsigned numbers, negative ones are large: one pass checks both limits.
    if not len(biased_B) or (biased_B - 1).view(np.uint32).max() < _LARGEST_BIASED:
        return [_as_powers(biased_B)]
    first_B = biased_B.clip(1, _LARGEST_BIASED)
    return [_as_powers(first_B), _as_powers((biased_B - first_B + _EXPONENT_BIAS).clip(1, _LARGEST_BIASED))]


def _as_powers(biased_B: npt.NDArray[np.int32]) -> Tensor:
    """Return float32 numbers with these biased exponents, which must be those of normal numbers."""
    return torch.from_numpy((biased_B << _FRACTION_BITS).view(np.float32))
