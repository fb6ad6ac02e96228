"""What is known of the rows before they are cut into lists: norms, scale, outliers; samples; k-means.

FAISS would train on a silent random subsample, which misses the tail of the norms; the samples here are stratified
by norm, and k-means uses all of what it is given.

Shapes: N rows, B rows of a block, L lists, F feature dimension.
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
"""Rows are scaled until the largest norm among them lies under 2^13: far from half precision's 65,504."""
OUTLIER_FACTOR = 32.0
"""A row is an outlier from this many times the 99th percentile of the norms on: it would spoil the codes of all."""
QUIET_SHARE = 1e-6
"""A row is quiet up to this share of the 99th percentile: its codes are zeros, and it crowds one list."""
_ITERATIONS = 8


@dataclass(frozen=True)
class Survey:
    """What one pass over the rows tells.

    Attributes:
        ids_N: int64, rising.
        norm_N: float64 norms, unscaled.
    """

    ids_N: Int64
    norm_N: Float64

    def __post_init__(self) -> None:
        """Check that there is one norm a row."""
        if len(self.ids_N) != len(self.norm_N):
            raise ValueError(f"Survey of {len(self.ids_N)} ids and {len(self.norm_N)} norms")

    @cached_property
    def _high(self) -> float:
        """Return the 99th percentile of the norms, an actual one."""
        return float(np.percentile(self.norm_N, 99, method="lower")) if len(self.norm_N) else 0.0

    @cached_property
    def outlier_N(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Return which rows are to be scored exactly: those out of all proportion, a hundredth by what that means."""
        outlier_N: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = self.norm_N > OUTLIER_FACTOR * self._high
        return outlier_N

    @cached_property
    def quiet_N(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Return which rows are too small to be told from zero beside the others."""
        quiet_N: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = self.norm_N <= QUIET_SHARE * self._high
        return quiet_N & ~self.outlier_N

    @cached_property
    def shift(self) -> int:
        """Return the exponent by which listed rows are scaled: their largest norm × 2^shift is in [2^12, 2^13)."""
        largest = float(self.norm_N[self.listed_N].max(initial=0.0))
        return LARGEST_EXPONENT - math.frexp(largest)[1] if largest else 0

    @cached_property
    def listed_N(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Return which rows belong in lists: neither outliers nor quiet."""
        return ~(self.outlier_N | self.quiet_N)


def survey(source: RowSource, block_rows: int) -> Survey:
    """Return ids and norms of all rows.

    Raises:
        NonFiniteError: a row holds NaN or infinity; names its id.
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
                    remedy="mend the example or the checkpoint and extract its features again",
                )
            )
        ids.append(ids_B)
        norms.append(np.sqrt(np.einsum("nf,nf->n", rows_BF, rows_BF, dtype=np.float64)))
    return Survey(np.concatenate(ids), np.concatenate(norms))


def stratified_ids(measured: Survey, n_sample: int, seed: int) -> Int64:
    """Return n_sample ids of listed rows in rising order: one drawn from each of n_sample equal strata of the norms."""
    ids_M, norm_M = measured.ids_N[measured.listed_N], measured.norm_N[measured.listed_N]
    if n_sample >= len(ids_M):
        return ids_M
    random = np.random.Generator(np.random.Philox(seed))
    edges = np.linspace(0, len(ids_M), n_sample + 1).astype(np.int64)
    places = edges[:-1] + (random.random(n_sample) * np.diff(edges)).astype(np.int64)
    return np.sort(ids_M[np.argsort(norm_M, kind="stable")[places]])


def train_centroids(sample_BF: Float32, n_lists: int, seed: int) -> Float32:
    """Return L2 k-means centroids [L, F] of all rows of the sample."""
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
