"""Two-level coarse quantizer of the inverted lists: groups of list centroids, and the order in which lists are probed.

Groups, and then the lists in them, are probed in decreasing order of q·c + α·‖q‖·radius, an estimate of the best
score in a list (after Bruch et al. 2024, Optimist). With the radius as one more coordinate of the centroid c, and
α·‖q‖ as one of the query q, the estimate is an inner product, so FAISS searches both levels. The centroids of a group
are k-means of the rows in the group; the number of centroids of a group is proportional to the sum of the distances
of its rows to the group's center.

Shapes: N rows, Q queries, B rows of a block, G groups, L lists, W lists per query, R reduced dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tracin_ann.device import import_faiss
from tracin_ann.search.clustering import train_centroids
from tracin_ann.search.inverted_lists import search_lists
from tracin_ann.types import Float32, Float64, Int64

_RADIUS_FACTOR = 1.5
"""A radius is this many times the root mean square distance of the rows to their centroid."""
_GROUPS_PER_ROW = 3
"""The list of a row is the nearest among the lists of this many nearest groups."""
_ROWS_PER_CENTROID = 4
_GROUPS_PER_ROOT = 4
"""L lists have this many times √L groups. With 1, a search scores twice as many centroids for the same recall."""
_FEW_QUERIES = 16
_MULTIPLE = 8
"""FAISS computes inner products fastest if the number of coordinates is a multiple of this."""


@dataclass(frozen=True)
class Probes:
    """The lists to probe for each query, in decreasing order of their estimated best score.

    Attributes:
        list_QW: int64 list numbers; -1: padding.
        scored_Q: int64, number of groups and centroids that were scored.
    """

    list_QW: Int64
    scored_Q: Int64


@dataclass(frozen=True)
class ListTree:
    """Groups of list centroids, in the reduced space.

    Attributes:
        group_GR: float32 centers of the groups.
        centroid_LR: float32 centroids of the lists, ordered by group.
        parent_L: int64 group of each list, nondecreasing.
        group_radius_G: float32 radius of the rows of each group.
        radius_L: float32 radius of the rows of each list; 0 for an empty list.
        size_L: int64 number of rows of each list.
    """

    group_GR: Float32
    centroid_LR: Float32
    parent_L: Int64
    group_radius_G: Float32
    radius_L: Float32
    size_L: Int64

    def __post_init__(self) -> None:
        """Check that shapes and dtypes of the arrays are consistent.

        Raises:
            ValueError: they are not.
        """
        n_groups, n_lists = len(self.group_GR), len(self.centroid_LR)
        valid = self.group_radius_G.shape == (n_groups,) and self.group_GR.shape[1:] == self.centroid_LR.shape[1:]
        valid = valid and all(a.shape == (n_lists,) for a in (self.parent_L, self.radius_L, self.size_L))
        valid = valid and self.group_GR.ndim == 2 and not (n_lists and self.size_L.min() < 0)  # noqa: PLR2004
        reals = (self.group_GR, self.centroid_LR, self.group_radius_G, self.radius_L)
        valid = valid and all(a.dtype == np.float32 for a in reals)
        valid = valid and self.parent_L.dtype == self.size_L.dtype == np.int64
        if not (valid and n_groups and n_lists and 0 <= self.parent_L.min() <= self.parent_L.max() < n_groups):
            raise ValueError(f"inconsistent arrays for {n_groups} groups and {n_lists} lists")

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> ListTree:
        """Return the tree with these arrays as fields; other keys are ignored."""
        return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})

    @property
    def n_lists(self) -> int:
        """Return L."""
        return len(self.centroid_LR)

    @property
    def resident_bytes(self) -> int:
        """Return the bytes in memory during search: FAISS's copies of centroids with radii and ids, and the arrays."""
        coordinates = -(-(self.centroid_LR.shape[1] + 1) // _MULTIPLE) * _MULTIPLE
        centroids: int = (self.n_lists + len(self.group_GR)) * (4 * coordinates + 8)
        small = (self.group_GR, self.parent_L, self.group_radius_G, self.radius_L, self.size_L)
        return centroids + sum(int(array.nbytes) for array in small)

    @cached_property
    def centroids_per_group(self) -> float:
        """Return the mean number of centroids per group."""
        return self.n_lists / len(self.group_GR)

    def probe(self, queries_QR: Float32, alpha: float, n_groups: int, n_lists: int) -> Probes:
        """Return the lists to probe: the best n_lists lists of the best n_groups groups, for each query."""
        norm_Q1 = np.linalg.norm(queries_QR, axis=1, keepdims=True).astype(np.float32)
        with_radius = _append_coordinate(queries_QR, alpha * norm_Q1)
        n_groups = min(n_groups, len(self.group_GR))
        groups, lists = self._faiss_indexes
        # For one query, FAISS uses one thread; several wait for each other, for milliseconds if a core is in use.
        step = 1 if len(with_radius) <= _FEW_QUERIES else len(with_radius)
        found = [groups.search(with_radius[at : at + step], n_groups)[1] for at in range(0, len(with_radius), step)]
        group_QG = np.concatenate([np.empty((0, n_groups), np.int64), *found])
        list_QW, _ = search_lists(lists, with_radius, min(n_lists, self.n_lists), group_QG)
        return Probes(list_QW, self._group_sizes[group_QG].sum(axis=1) + len(self.group_GR))

    @cached_property
    def _group_sizes(self) -> Int64:
        """Return the number of lists with rows in each group, [G]."""
        return np.bincount(self.parent_L[self.size_L > 0], minlength=len(self.group_GR))

    @cached_property
    def _faiss_indexes(self) -> tuple[Any, Any]:
        """Return FAISS indexes of groups and of nonempty lists, with radii as one more coordinate."""
        faiss = import_faiss()
        group_GX = _append_coordinate(self.group_GR, self.group_radius_G[:, None])
        groups = faiss.IndexFlatIP(group_GX.shape[1])
        groups.add(group_GX)
        nonempty = np.flatnonzero(self.size_L > 0)
        lists = _make_grouped_lists(
            _append_coordinate(self.centroid_LR[nonempty], self.radius_L[nonempty, None]),
            self.parent_L[nonempty],
            nonempty,
            len(self.group_GR),
            faiss.METRIC_INNER_PRODUCT,
        )
        return groups, lists


@dataclass(frozen=True)
class Extents:
    """Sums over a set of rows: rows per list, squared distances to the centroid of the list and center of the group."""

    size_L: Int64
    square_L: Float64
    group_square_G: Float64

    def __add__(self, other: Extents) -> Extents:
        """Return the extents of both sets of rows together."""
        return Extents(
            self.size_L + other.size_L,
            self.square_L + other.square_L,
            self.group_square_G + other.group_square_G,
        )


class Assigner:
    """Assignment of rows to the list of the nearest centroid in their nearest groups; accumulates `Extents`."""

    def __init__(self, group_GR: Float32, centroid_LR: Float32, parent_L: Int64) -> None:
        """Create the FAISS indexes of groups and centroids (see `ListTree` for the arrays)."""
        faiss = import_faiss()
        self._group_GR, self._centroid_LR, self._parent_L = group_GR, centroid_LR, parent_L
        self._groups = faiss.IndexFlatL2(group_GR.shape[1])
        self._groups.add(group_GR)
        self._lists = _make_grouped_lists(
            centroid_LR, parent_L, np.arange(len(parent_L), dtype=np.int64), len(group_GR), faiss.METRIC_L2
        )
        self._extents = self._make_zero_extents()

    def _make_zero_extents(self) -> Extents:
        n_lists, n_groups = len(self._parent_L), len(self._group_GR)
        return Extents(np.zeros(n_lists, np.int64), np.zeros(n_lists), np.zeros(n_groups))

    @property
    def arrays(self) -> dict[str, Any]:
        """Return the arguments of the constructor by name."""
        return {"group_GR": self._group_GR, "centroid_LR": self._centroid_LR, "parent_L": self._parent_L}

    @property
    def n_lists(self) -> int:
        """Return L."""
        return len(self._parent_L)

    def assign(self, rows_BR: Float32) -> Int64:
        """Return the list of each row, int64 [B], and add the rows to the extents."""
        _, group_BG = self._groups.search(rows_BR, min(_GROUPS_PER_ROW, len(self._group_GR)))
        list_B1, square_B1 = search_lists(self._lists, rows_BR, 1, group_BG)
        list_B: Int64 = list_B1[:, 0]
        n_lists = len(self._parent_L)
        parent_B = self._parent_L[list_B]
        off_B = np.square(rows_BR - self._group_GR[parent_B]).sum(axis=1)
        more = Extents(
            np.bincount(list_B, minlength=n_lists),
            np.bincount(list_B, weights=square_B1[:, 0].clip(0), minlength=n_lists).astype(np.float64),
            np.bincount(parent_B, weights=off_B, minlength=len(self._group_GR)).astype(np.float64),
        )
        self._extents = self._extents + more
        return list_B

    def take_extents(self) -> Extents:
        """Return the extents of the rows assigned since the last call, and reset them."""
        extents, self._extents = self._extents, self._make_zero_extents()
        return extents

    def make_tree(self, extents: Extents) -> ListTree:
        """Return the tree of the lists with these extents."""
        rows_G = np.bincount(self._parent_L, weights=extents.size_L, minlength=len(self._group_GR))
        return ListTree(
            self._group_GR,
            self._centroid_LR,
            self._parent_L,
            (_RADIUS_FACTOR * np.sqrt(extents.group_square_G / np.maximum(rows_G, 1))).astype(np.float32),
            (_RADIUS_FACTOR * np.sqrt(extents.square_L / np.maximum(extents.size_L, 1))).astype(np.float32),
            extents.size_L,
        )


def train_assigner(sample_BR: Float32, n_lists: int, seed: int) -> Assigner:
    """Train about n_lists centroids in about 4·√n_lists groups on the sample, and return their assigner."""
    n_groups = min(len(sample_BR), max(1, round(_GROUPS_PER_ROOT * math.sqrt(n_lists))))
    group_GR = train_centroids(sample_BR, n_groups, seed)
    nearest = import_faiss().IndexFlatL2(group_GR.shape[1])
    nearest.add(group_GR)
    square_B1, group_B1 = nearest.search(np.ascontiguousarray(sample_BR), 1)
    group_B = group_B1[:, 0]
    spread_G = np.bincount(group_B, weights=np.sqrt(square_B1[:, 0].clip(0)), minlength=n_groups)
    size_G = np.bincount(group_B, minlength=n_groups)
    share_G = np.round(n_lists * spread_G / max(spread_G.sum(), np.finfo(float).tiny)).astype(np.int64)
    n_centroids_G = np.clip(share_G, 1, np.maximum(1, size_G // _ROWS_PER_CENTROID))
    centroids = [
        train_centroids(sample_BR[group_B == g], int(n_centroids_G[g]), seed) if size_G[g] else group_GR[g : g + 1]
        for g in range(n_groups)
    ]
    parent_L = np.repeat(np.arange(n_groups, dtype=np.int64), [len(c) for c in centroids])
    return Assigner(group_GR, np.concatenate(centroids), parent_L)


def _make_grouped_lists(vectors: Float32, parent: Int64, labels: Int64, n_groups: int, metric: int) -> Any:
    """Return a FAISS IVF index of these vectors with one list per group; searches name the groups (`search_lists`)."""
    faiss = import_faiss()
    dim = vectors.shape[1]
    lists = faiss.IndexIVFFlat(faiss.IndexFlat(dim, metric), dim, n_groups, metric)
    lists.is_trained = True
    order = np.argsort(parent, kind="stable")
    for group, members in enumerate(np.split(order, np.searchsorted(parent[order], np.arange(1, n_groups)))):
        if len(members):
            codes, ids = np.ascontiguousarray(vectors[members]), np.ascontiguousarray(labels[members])
            lists.invlists.add_entries(
                group, len(members), faiss.swig_ptr(ids), faiss.swig_ptr(codes.view(np.uint8).reshape(-1))
            )
    lists.ntotal = len(vectors)
    return lists


def _append_coordinate(vectors: Float32, more: Float32) -> Float32:
    """Return the vectors with one more coordinate, padded with zeros to a multiple of 8 coordinates."""
    width = vectors.shape[1]
    padded = np.zeros((len(vectors), -(-(width + 1) // _MULTIPLE) * _MULTIPLE), np.float32)
    padded[:, :width] = vectors
    padded[:, width : width + 1] = more
    return padded
