"""How rows are cut into lists: one pass of measuring, a sample stratified by norm, k-means and assignment by L2.

FAISS would assign rows to lists by inner product, which crowds heavy-tailed rows into few lists; and it
would train on a silent random subsample, which misses the tail.

Shapes: N rows, B rows of a block, L lists, F feature dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tracin_ann.device import faiss_gpu_resources, import_faiss
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.search.flat import as_tensor
from tracin_ann.types import Float32, Float64, Int64, RowSource

LARGEST_EXPONENT = 13
"""Rows are scaled until their largest entry lies under 2^13: far from half precision's 65,504."""
_ROUNDS = 10


@dataclass(frozen=True)
class Survey:
    """What one pass over the rows tells.

    Attributes:
        ids_N: int64, rising.
        norm_N: float64 norms, unscaled.
        shift: rows × 2^shift have their largest entry in [2^12, 2^13); 0 where all rows are zero.
    """

    ids_N: Int64
    norm_N: Float64
    shift: int

    def __post_init__(self) -> None:
        """Check that there is one norm a row."""
        if len(self.ids_N) != len(self.norm_N):
            raise ValueError(f"Survey of {len(self.ids_N)} ids and {len(self.norm_N)} norms")


def survey(source: RowSource, block_rows: int) -> Survey:
    """Return ids, norms and scale of all rows.

    Raises:
        NonFiniteError: a row holds NaN or infinity; names its id.
    """
    ids, norms, largest = [np.zeros(0, np.int64)], [np.zeros(0)], 0.0
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
        largest = max(largest, float(np.abs(rows_BF).max(initial=0.0)))
    shift = LARGEST_EXPONENT - math.frexp(largest)[1] if largest else 0
    return Survey(np.concatenate(ids), np.concatenate(norms), shift)


def stratified_ids(measured: Survey, n_sample: int, seed: int) -> Int64:
    """Return n_sample ids in rising order: one drawn from each of n_sample equal strata of the norms."""
    n_rows = len(measured.ids_N)
    if n_sample >= n_rows:
        return measured.ids_N
    random = np.random.Generator(np.random.Philox(seed))
    edges = np.linspace(0, n_rows, n_sample + 1).astype(np.int64)
    places = edges[:-1] + (random.random(n_sample) * np.diff(edges)).astype(np.int64)
    return np.sort(measured.ids_N[np.argsort(measured.norm_N, kind="stable")[places]])


def centroids_of(sample_BF: Float32, n_lists: int, seed: int, device: torch.device) -> Float32:
    """Return L2 k-means centroids [L, F] of all rows of the sample."""
    faiss = import_faiss()
    dim = sample_BF.shape[1]
    clustering = faiss.Clustering(dim, n_lists)
    clustering.niter = _ROUNDS
    clustering.seed = seed % 2**31
    clustering.spherical = False
    clustering.min_points_per_centroid = 1
    clustering.max_points_per_centroid = len(sample_BF)
    lookup = faiss.IndexFlatL2(dim)
    resources = faiss_gpu_resources(device)
    if resources is not None:
        lookup = faiss.index_cpu_to_gpu(resources, device.index or 0, lookup)
    clustering.train(sample_BF, lookup)
    centroids_LF: Float32 = faiss.vector_to_array(clustering.centroids).reshape(n_lists, dim)
    return centroids_LF


class Assigner:
    """Assigns blocks of rows to their nearest centroid and keeps each list's mean square distance."""

    def __init__(self, centroids_LF: Float32, device: torch.device) -> None:
        """Put the centroids [L, F] on the device."""
        self._centroids_LF = as_tensor(centroids_LF).to(device)
        self._minus_half_square_L = -0.5 * self._centroids_LF.square().sum(dim=1)
        self._rows_L = np.zeros(len(centroids_LF))
        self._square_L = np.zeros(len(centroids_LF))

    def assign(self, rows_BF: Float32) -> Int64:
        """Return the list [B] of each row, nearest by L2: argmax of x·c - ‖c‖²/2."""
        rows: Tensor = as_tensor(rows_BF).to(self._centroids_LF.device)
        nearest, lists = torch.addmm(self._minus_half_square_L, rows, self._centroids_LF.T).max(dim=1)
        square_B = (rows.square().sum(dim=1) - 2 * nearest).clamp_min(0).cpu().numpy()
        lists_B: Int64 = lists.cpu().numpy()
        self._rows_L += np.bincount(lists_B, minlength=len(self._rows_L))
        self._square_L += np.bincount(lists_B, weights=square_B, minlength=len(self._rows_L))
        return lists_B

    def rms_distance_L(self) -> Float64:
        """Return each list's root mean square distance of rows to centroid; 0 where it is empty."""
        return np.sqrt(self._square_L / np.maximum(self._rows_L, 1))
