"""Diagnosis of feature rows, from a sample: how many directions they have, and how many rows bounds exclude.

Which search index suits an index of features depends on two numbers. The participation ratio of the second moment,
(Σλ)² / Σλ², is the number of directions of equal variance with the same concentration; inverted lists need rows with
few directions. The share of rows that Cauchy-Schwarz bounds leave tells whether an exact search is cheap.

Shapes: S sampled rows, Q queries, F feature dimension, R reduced dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracin_ann.search.reduction import fit_reduction
from tracin_ann.types import Float32, Float64, Int64, RowSource

_SAMPLE_ROWS = 4096
_SAMPLE_NUMBERS = 2**25
_QUERIES = 128
"""Sampled rows that are also queries."""
_WIDTH = 128
_RESULTS = 10


@dataclass(frozen=True)
class Diagnosis:
    """Properties of feature rows.

    Attributes:
        directions: participation ratio of the uncentered second moment, at least 1.
        energy: share of the squared norms in the leading 128 directions.
        bounded_share: share of the rows that could be among the first ten of a query by the leading 128 directions and
            the norms of the rest: mean over both directions of queries that are rows.
    """

    directions: float
    energy: float
    bounded_share: float


def diagnose(source: RowSource, ids: Int64, seed: int) -> Diagnosis:
    """Return the diagnosis of the rows with these ids, from a sample of at most 4,096 of them."""
    random = np.random.Generator(np.random.Philox(seed))
    n_sample = min(_SAMPLE_ROWS, _SAMPLE_NUMBERS // source.dim, len(ids))
    sample_SF = source.take(np.sort(random.choice(ids, n_sample, replace=False)))
    # In random order, because the first rows are queries and the first half is what the directions are fitted to.
    return _diagnose_sample(sample_SF[random.permutation(n_sample)], len(ids), seed)


def _diagnose_sample(sample_SF: Float32, n_rows: int, seed: int) -> Diagnosis:
    """Return the diagnosis by a sample of at least two of n_rows rows."""
    largest = float(np.abs(sample_SF).max(initial=0.0))
    if len(sample_SF) <= 1 or largest == 0:
        return Diagnosis(1.0, 1.0, 1.0)
    rows_SF = sample_SF / np.float32(largest)
    square_S = np.einsum("sf,sf->s", rows_SF, rows_SF, dtype=np.float64)
    products_SS = (rows_SF @ rows_SF.T).astype(np.float64)
    np.fill_diagonal(products_SS, 0.0)
    # The mean over pairs of different rows is an unbiased estimate of Σλ²; that of the sample's λ is biased upward.
    second = float(np.square(products_SS).sum()) / (len(rows_SF) * (len(rows_SF) - 1))
    directions = max(1.0, float(square_S.mean()) ** 2 / second) if second else 1.0
    half = len(rows_SF) // 2
    reduction = fit_reduction(rows_SF[:half], _WIDTH, seed)
    reduced_SR = reduction.apply(rows_SF)
    leading_S = np.einsum("sr,sr->s", reduced_SR, reduced_SR, dtype=np.float64)
    rest_S = np.sqrt(np.maximum(square_S - leading_S, 0.0))
    query = slice(0, min(_QUERIES, half))
    near_QT = (reduced_SR[query] @ reduced_SR[half:].T).astype(np.float64)
    bounded_share = _share_left(products_SS[query, half:], near_QT, rest_S[query, None] * rest_S[half:], n_rows)
    return Diagnosis(directions, float(leading_S[half:].sum() / max(square_S[half:].sum(), 1e-300)), bounded_share)


def _share_left(score_QT: Float64, near_QT: Float64, rest_QT: Float64, n_rows: int) -> float:
    """Return the share of rows [T] whose bound reaches the score of rank 10 among n_rows rows, for both directions.

    Args:
        score_QT: scores of rows.
        near_QT: the parts of the scores in the leading directions.
        rest_QT: the largest that the other parts can be.
        n_rows: of the index. The rank among the T rows is smaller in proportion, but at least 1.
    """
    rank = min(score_QT.shape[1], max(1, round(_RESULTS * score_QT.shape[1] / n_rows)))
    shares = []
    for sign in (1, -1):
        limit_Q = -np.partition(-sign * score_QT, rank - 1, axis=1)[:, rank - 1]
        shares.append(float((sign * near_QT + rest_QT >= limit_Q[:, None]).mean()))
    return sum(shares) / 2
