"""K-means of the inverted lists: norms of all rows (scale, outliers), stratified training samples, centroids.

By default FAISS trains on a random subsample, which misses the tail of the norms. The samples here are stratified by
norm, and k-means uses the complete sample.

Shapes: N rows, B rows of a block, M rows in lists, L lists, F feature dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tracin_ann.device import import_faiss
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.types import Float32, Float64, Int64, RowSource

LARGEST_EXPONENT = 13
"""Rows are scaled so that their largest norm is below 2^13, far below the largest half-precision number, 65,504."""
OUTLIER_FACTOR = 32.0
"""A row is an outlier if its norm exceeds this many times the 99th percentile; it would make all codes coarse."""
QUIET_SHARE = 1e-6
"""A row is quiet if its norm is at most this share of the 99th percentile.

Its codes would be zero, and all quiet rows would be in one list.
"""
_ITERATIONS = 8


@dataclass(frozen=True)
class Survey:
    """Ids and norms of all rows, from one pass over them.

    Attributes:
        ids_N: int64, increasing.
        norm_N: float64 norms, unscaled.
    """

    ids_N: Int64
    norm_N: Float64

    def __post_init__(self) -> None:
        """Check that there is one norm per row."""
        if len(self.ids_N) != len(self.norm_N):
            raise ValueError(f"Survey of {len(self.ids_N)} ids and {len(self.norm_N)} norms")

    @cached_property
    def _norm_limit(self) -> float:
        """Return the 99th percentile of the norms, rounded down to the norm of a row."""
        return float(np.percentile(self.norm_N, 99, method="lower")) if len(self.norm_N) else 0.0

    @cached_property
    def outlier_N(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Return which rows are outliers, scored exactly for every query: at most one in a hundred by definition."""
        outlier_N: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = self.norm_N > OUTLIER_FACTOR * self._norm_limit
        return outlier_N

    @cached_property
    def quiet_N(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Return which rows are quiet: too small to have codes that differ from zero."""
        quiet_N: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = self.norm_N <= QUIET_SHARE * self._norm_limit
        return quiet_N & ~self.outlier_N

    @cached_property
    def shift(self) -> int:
        """Return the exponent of the scale of listed rows: their largest norm × 2^shift is in [2^12, 2^13)."""
        largest = float(self.norm_N[self.listed_N].max(initial=0.0))
        return LARGEST_EXPONENT - math.frexp(largest)[1] if largest else 0

    @cached_property
    def listed_N(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Return which rows are in lists: all except outliers and quiet rows."""
        return ~(self.outlier_N | self.quiet_N)


def survey(source: RowSource, block_rows: int) -> Survey:
    """Read all rows once and return their ids and norms.

    Raises:
        NonFiniteError: a row contains NaN or infinity; the message has its id.
    """
    ids, norms = [np.zeros(0, np.int64)], [np.zeros(0)]
    for ids_B, rows_BF in source.blocks(block_rows):
        bad = np.flatnonzero(~np.isfinite(rows_BF).all(axis=1))
        if len(bad):
            raise NonFiniteError(
                problem(
                    f"row {ids_B[bad[0]]} is not finite",
                    got="NaN or infinity",
                    expected="finite features",
                    remedy="fix the example or the checkpoint, then extract its features again",
                )
            )
        ids.append(ids_B)
        norms.append(np.sqrt(np.einsum("nf,nf->n", rows_BF, rows_BF, dtype=np.float64)))
    return Survey(np.concatenate(ids), np.concatenate(norms))


def stratified_ids(measured: Survey, n_sample: int, seed: int) -> Int64:
    """Return n_sample ids of listed rows, increasing: one random row from each of n_sample equal strata by norm."""
    ids_M, norm_M = measured.ids_N[measured.listed_N], measured.norm_N[measured.listed_N]
    if n_sample >= len(ids_M):
        return ids_M
    random = np.random.Generator(np.random.Philox(seed))
    edges = np.linspace(0, len(ids_M), n_sample + 1).astype(np.int64)
    places = edges[:-1] + (random.random(n_sample) * np.diff(edges)).astype(np.int64)
    return np.sort(ids_M[np.argsort(norm_M, kind="stable")[places]])


def train_centroids(sample_BF: Float32, n_lists: int, seed: int) -> Float32:
    """Return L2 k-means centroids, float32 [L, F], of all rows of the sample."""
    if n_lists == 1:
        mean_1F: Float32 = sample_BF.mean(axis=0, keepdims=True)
        return mean_1F
    faiss = import_faiss()
    dim = sample_BF.shape[1]
    clustering = faiss.Clustering(dim, n_lists)
    clustering.niter = _ITERATIONS
    clustering.seed = seed % 2**31
    clustering.spherical = False
    clustering.min_points_per_centroid = 1
    clustering.max_points_per_centroid = len(sample_BF)
    clustering.train(np.ascontiguousarray(sample_BF), faiss.IndexFlatL2(dim))
    centroids_LF: Float32 = faiss.vector_to_array(clustering.centroids).reshape(n_lists, dim)
    return centroids_LF
