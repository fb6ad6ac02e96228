"""Interface of a search index: the rows of largest and of most negative inner product with a query.

Shapes: N rows, Q queries, F feature dimension, K results.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from tracin_ann.errors import NonFiniteError, UsageError, problem
from tracin_ann.search.topk import negate, split
from tracin_ann.types import Float32, Int64, TopK

_FLOAT32_POWERS = 125
"""Powers of two with exponents from −125 to 125 are exact in float32, and so are their products with rows in range."""


class SearchIndex(Protocol):
    """Rows with ids, searched for the largest inner products with queries."""

    @property
    def kind(self) -> str:
        """Return the name of the backend: `flat` or `ivf`."""

    @property
    def dim(self) -> int:
        """Return F, the length of rows and queries."""

    def __len__(self) -> int:
        """Return N, the number of rows."""

    def search(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> TopK:
        """Return the k rows of largest inner product with each query; fewer only where there are fewer rows.

        `allowed` restricts the search to rows with these ids (int64, increasing); None: all rows.
        """


@runtime_checkable
class TwoSidedIndex(Protocol):
    """An index with its own search for both directions: in one pass, or with one setting per direction."""

    def search_both(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
        """Return (proponents, opponents) as the function `search_both` does."""


def search_both(index: SearchIndex, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
    """Return (proponents, opponents): the k rows of largest and of most negative inner product.

    Opponents are the results for −q with negated scores, so their scores increase from the most negative one.
    Results are not filtered by sign: where few scores are negative, opponents can have positive scores.
    """
    if isinstance(index, TwoSidedIndex):
        return index.search_both(queries_QF, k, allowed)
    queries = check_queries(index, queries_QF, k)
    proponents, opponents = split(index.search(np.concatenate([queries, -queries]), k, allowed), len(queries))
    return proponents, negate(opponents)


def scale_to_unit(queries_QF: Float32) -> tuple[Float32, Int64]:
    """Return each query times a power of two, so that its norm is in [1/2, 1), and the exponents [Q] to undo it.

    Scores change by exactly these powers, except scores that overflow or underflow float32 without the scaling.
    """
    norm_Q = np.linalg.norm(queries_QF.astype(np.float64), axis=1)
    exponent_Q = np.where(np.isfinite(norm_Q), np.frexp(norm_Q)[1], 0).astype(np.int64)
    if (np.abs(exponent_Q) <= _FLOAT32_POWERS).all():
        # A product takes a tenth of the time of `ldexp`.
        return queries_QF * np.ldexp(np.float32(1), -exponent_Q)[:, None], exponent_Q
    scaled_QF: Float32 = np.ldexp(queries_QF, -exponent_Q[:, None])
    return scaled_QF, exponent_Q


def check_queries(index: SearchIndex, queries_QF: Float32, k: int) -> Float32:
    """Return the queries as contiguous float32 [Q, F].

    Raises:
        UsageError: k < 1, or the queries do not have the dimension of the index.
        NonFiniteError: a query contains NaN or infinity.
    """
    if k < 1:
        raise UsageError(
            problem("the number of results is too small", got=f"k = {k}", expected="k ≥ 1", remedy="raise k")
        )
    queries = np.ascontiguousarray(queries_QF, dtype=np.float32)
    if queries.shape != (len(queries), index.dim):
        raise UsageError(
            problem(
                "the queries do not have the shape that the index expects",
                got=f"shape {queries.shape}",
                expected=f"(number of queries, {index.dim})",
                remedy="compute their features with the sketch that the index was built with",
            )
        )
    bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(bad):
        raise NonFiniteError(
            problem(
                f"query {bad[0]} is not finite",
                got="NaN or infinity",
                expected="finite features",
                remedy="fix the query, or the checkpoint that its features were computed with",
            )
        )
    return queries
