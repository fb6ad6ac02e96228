"""The scores of stored rows: which vector of a query the rows are multiplied with, and how rows are read for it.

Every score is an inner product of a row with a vector that depends on the query alone, so that each search finds its
largest and smallest values. Scores of several queries are averaged by averaging their vectors.

- `tracin`: the feature of the query: Σ_c η_c ⟨∇ℓ(w_c, z), ∇ℓ(w_c, z')⟩ (Pruthi et al. 2020, eq. 4).
- `cosine`: the mean of the cosines at each checkpoint, with weights η_c.
- `fisher`, `gauss-newton`, `trak`: at each checkpoint a / √(aᵀq) with a = (K_c + λ_c I)⁻¹ q (`scoring.curvature`). The
  factor gives every checkpoint the same norm in the metric of K⁻¹: without it, early checkpoints, whose gradients are
  large, would determine the score.
- `trackstar`: the mean of the cosines at each checkpoint in the metric of K⁻¹ (Chang et al. 2024, arXiv 2410.17413).

Shapes: N rows, B rows of a block, Q queries, G weighted sums of queries, C checkpoints, D sketch dimension, F = C·D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tracin_ann.choices import CURVATURES, CurvatureName, ScoreName
from tracin_ann.scoring.curvature import Curvature, CurvatureSource, Solver
from tracin_ann.scoring.exact import DirectionMap
from tracin_ann.scoring.exact_preconditioning import ExactPreconditioner, FullCurvatures
from tracin_ann.store import (
    FeatureStore,
    FeatureView,
    Manifest,
    generation_folder,
    read_removed_ids,
    read_skipped_rows,
)
from tracin_ann.types import Float32, Float64, Int64, RowSource

_DAMPINGS, _KEPT_BYTES = 2, 1 << 31
"""Dampings whose factorised matrices are in memory, and their bytes, 12 D² for each checkpoint; at least one is."""


@dataclass(frozen=True, eq=False)
class QueryVectors:
    """The vectors that rows are multiplied with, for queries or for weighted sums of them.

    Attributes:
        vector_QF: their inner products with rows are the scores.
        half_QF: for scores with a curvature matrix, the vectors of two estimates of the score, each by one half of the
            D numbers of every checkpoint; None for other scores, and if they were not requested.
        amount_QF: for scores with a curvature matrix, the vectors of `Hit.amount`; None as `half_QF`.
    """

    vector_QF: Float32
    half_QF: tuple[Float32, Float32] | None = None
    amount_QF: Float32 | None = None

    def __getitem__(self, chosen: npt.NDArray[np.integer] | slice | range) -> QueryVectors:
        """Return the vectors of some queries."""
        half, amount = self.half_QF, self.amount_QF
        return QueryVectors(
            self.vector_QF[chosen],
            None if half is None else (half[0][chosen], half[1][chosen]),
            None if amount is None else amount[chosen],
        )

    def mix(self, mixture_GQ: Float64 | None) -> QueryVectors:
        """Return the vectors of weighted sums of queries; None: of the queries themselves."""
        if mixture_GQ is None:
            return self
        half, amount = self.half_QF, self.amount_QF
        return QueryVectors(
            _mix(mixture_GQ, self.vector_QF),
            None if half is None else (_mix(mixture_GQ, half[0]), _mix(mixture_GQ, half[1])),
            None if amount is None else _mix(mixture_GQ, amount),
        )


class LocatedRows(RowSource, Protocol):
    """A `RowSource` that returns each of several rows once."""

    def locate(self, ids: Sequence[int] | Int64) -> tuple[Float32, Int64]:
        """Return rows [N, F], and the places [K] of the rows with these ids among them."""


class Score(Protocol):
    """A score of stored rows."""

    @property
    def name(self) -> ScoreName:
        """Return its name."""

    @property
    def summary(self) -> str:
        """Return the score in a few words for users; "" for TracIn."""

    def rows(self, checkpoints: Sequence[int]) -> LocatedRows:
        """Return the rows at some checkpoints, as this score multiplies them."""

    def weigh(self, query_QF: Float32, checkpoints: Sequence[int], *, estimates: bool = False) -> QueryVectors:
        """Return the vectors for queries with these features over the checkpoints.

        With `estimates`, those of error bars and amounts too, if the score has them.
        """

    @property
    def direction_map(self) -> DirectionMap | None:
        """Return the map of unprojected gradients of queries for exact scores; None: exact scores are TracInCP."""


@dataclass(frozen=True)
class TracInScore:
    """The inner product of the features."""

    store: FeatureStore
    name: ScoreName = "tracin"
    summary: str = ""
    direction_map: DirectionMap | None = None

    def rows(self, checkpoints: Sequence[int]) -> FeatureView:
        """Return the stored rows."""
        return self.store.view(checkpoints)

    def weigh(self, query_QF: Float32, checkpoints: Sequence[int], *, estimates: bool = False) -> QueryVectors:
        """Return the features."""
        return QueryVectors(query_QF)


@dataclass(frozen=True)
class CosineScore:
    """The cosine at each checkpoint, averaged with weights η_c."""

    store: FeatureStore
    rates: Sequence[float]
    name: ScoreName = "cosine"
    summary: str = ""
    direction_map: DirectionMap | None = None

    def rows(self, checkpoints: Sequence[int]) -> FeatureView:
        """Return the rows with parts of norm 1."""
        return self.store.view(checkpoints, cosine=True)

    def weigh(self, query_QF: Float32, checkpoints: Sequence[int], *, estimates: bool = False) -> QueryVectors:
        """Return the features with parts of norm η_c / Σ η."""
        rates = np.array([self.rates[c] for c in checkpoints])
        unit_QCD = _scale_parts(query_QF.reshape(len(query_QF), len(rates), -1))
        weighted_QCD = unit_QCD * (rates / rates.sum()).astype(np.float32)[:, None]
        return QueryVectors(weighted_QCD.reshape(query_QF.shape))


def find_curvature(score: str) -> CurvatureName | None:
    """Return the curvature matrix of a score; None if it has none."""
    return next((name for name in CURVATURES if name == score), "fisher" if score == "trackstar" else None)


@dataclass(frozen=True)
class ScoreMaker:
    """Makes the scores of an index; each curvature is read or computed once.

    Attributes:
        source: the stored features, and what the curvature is computed from.
        steps: optimizer updates of the run of each checkpoint; None: not known.
    """

    source: CurvatureSource
    steps: Sequence[float | None]

    def make(self, name: ScoreName, damping: float | None = None) -> Score:
        """Return a score.

        Args:
            name: the score.
            damping: λ at every checkpoint; None: by the automatic rule.

        Raises:
            UsageError: the score needs probabilities, and the losses are not -log p of one label.
            DamagedIndexError: a feature file is damaged.
        """
        store, rates = self.source.store, self.source.rates
        if name == "tracin":
            return TracInScore(store)
        if name == "cosine":
            return CosineScore(store, rates)
        if name == "trackstar":
            return TrackStarScore(store, rates, self.damp("fisher", damping))
        return PreconditionedScore(
            name, store, rates, self.damp(name, damping), len(self.source.rows_N), self._full_curvatures
        )

    @cached_property
    def _full_curvatures(self) -> FullCurvatures:
        return FullCurvatures(self.source)

    def damp(self, name: CurvatureName, damping: float | None = None) -> Damping:
        """Return the curvature of every checkpoint with its damping; arguments and errors as of `make`."""
        return self._find_damping(name, damping)

    @cached_property
    def _find_damping(self) -> Callable[[CurvatureName, float | None], Damping]:
        """Return `_damp`, which keeps its last results: they contain the factorised matrices."""
        n_bytes = 12 * self.source.store.layout.dim**2 * len(self.source.rates)
        return lru_cache(maxsize=max(1, min(_DAMPINGS, _KEPT_BYTES // n_bytes)))(self._damp)

    def _damp(self, name: CurvatureName, damping: float | None) -> Damping:
        curvatures, rates = self.load(name), self.source.rates
        if damping is not None:
            return Damping(curvatures, [damping] * len(rates), f"{damping:g}")
        # TRAK's matrix is not that of a loss, so that the length of training says nothing about its damping.
        known = [None] * len(rates) if name == "trak" else self.steps
        chosen = [c.choose_damping(rate, steps) for c, rate, steps in zip(curvatures, rates, known, strict=True)]
        used = sorted({rule for (_, rule), rate in zip(chosen, rates, strict=True) if rate > 0})
        return Damping(curvatures, [damping for damping, _ in chosen], " or ".join(used))

    @cached_property
    def load(self) -> Callable[[CurvatureName], list[Curvature]]:
        """Return a function that reads or computes the curvature of every checkpoint, each once."""
        return cache(self.source.load)


def open_score_maker(directory: Path, manifest: Manifest, store: FeatureStore) -> ScoreMaker:
    """Return what makes the scores of a finished index."""
    spec, record = manifest.build.spec, manifest.score
    absent = [read_removed_ids(directory, manifest), read_skipped_rows(directory, manifest).row_S]
    source = CurvatureSource(
        store,
        np.setdiff1d(np.arange(spec.train_rows), np.concatenate(absent)),
        [checkpoint.learning_rate for checkpoint in spec.checkpoints],
        None if record is None else record.loss_is_nll,
        generation_folder(directory, manifest.generation),
    )
    return ScoreMaker(source, [None] * len(spec.checkpoints) if record is None else record.steps)


@dataclass(frozen=True, eq=False)
class Damping:
    """The curvature of every checkpoint and its damping λ_c.

    Attributes:
        curvatures: K_c.
        damping_C: λ_c.
        rule: where λ comes from, for users.
    """

    curvatures: Sequence[Curvature]
    damping_C: Sequence[float]
    rule: str

    @cached_property
    def solver(self) -> Callable[[int, int, int], Solver]:
        """Return a function that factorises the block of K_c + λ_c I of entries start..stop-1, each once."""
        return cache(self._factorise)

    def _factorise(self, checkpoint: int, start: int, stop: int) -> Solver:
        return self.curvatures[checkpoint].factorise(self.damping_C[checkpoint], slice(start, stop))


@dataclass(frozen=True, eq=False)
class PreconditionedScore:
    """The score with the inverse of a curvature matrix.

    Attributes:
        name: the weights of the curvature matrix.
        store: the stored features.
        rates: η_c of all checkpoints.
        damping: the curvature and its damping.
        n_rows: N, the training rows that answers may contain.
        full_curvatures: for exact scores.
    """

    name: CurvatureName
    store: FeatureStore
    rates: Sequence[float]
    damping: Damping
    n_rows: int
    full_curvatures: FullCurvatures

    @property
    def summary(self) -> str:
        """Return the name and where the damping comes from."""
        return f"score {self.name}, damping {self.damping.rule}"

    @property
    def direction_map(self) -> ExactPreconditioner:
        """Return the map by the inverse of the curvature over all parameters."""
        return ExactPreconditioner(self.name, self.damping.damping_C, self.full_curvatures)

    def rows(self, checkpoints: Sequence[int]) -> FeatureView:
        """Return the stored rows."""
        return self.store.view(checkpoints)

    def weigh(self, query_QF: Float32, checkpoints: Sequence[int], *, estimates: bool = False) -> QueryVectors:
        """Return a / √(aᵀq) / √η_c at each checkpoint, because stored rows contain √η_c."""
        dim, used = self.store.layout.dim, sum(self.rates[c] > 0 for c in checkpoints)
        query_QCD = query_QF.reshape(len(query_QF), len(checkpoints), dim).astype(np.float64)
        # The vectors of the scores, of both halves and of the amounts.
        found_4QCD = np.zeros((4 if estimates else 1, *query_QCD.shape), np.float32)
        for i, checkpoint in enumerate(checkpoints):
            rate = self.rates[checkpoint]
            if rate == 0:
                continue
            norm_Q = np.linalg.norm(query_QCD[:, i], axis=1)
            unit_QD = _divide(query_QCD[:, i], norm_Q)
            solved_QD, found_4QCD[0, :, i] = self._precondition(unit_QD, checkpoint, slice(0, dim))
            if estimates:
                for half_QCD, part in zip(found_4QCD[1:3], (slice(0, dim // 2), slice(dim // 2, dim)), strict=True):
                    half_QCD[:, i, part] = self._precondition(unit_QD[:, part], checkpoint, part)[1]
                scale = self.damping.curvatures[checkpoint].scale or 1.0
                found_4QCD[3, :, i] = solved_QD * (norm_Q / rate / self.n_rows / used)[:, None] / scale / scale
        vector_QF, *others = found_4QCD.reshape(-1, *query_QF.shape)
        return QueryVectors(vector_QF, (others[0], others[1]), others[2]) if estimates else QueryVectors(vector_QF)

    def _precondition(self, query_QD: Float64, checkpoint: int, part: slice) -> tuple[Float64, Float64]:
        """Return (K + λI)⁻¹ q · scale², and a / √(aᵀq) / √η, for entries of a checkpoint."""
        solver = self.damping.solver(checkpoint, part.start, part.stop)
        solved_QD = solver.solve(query_QD)
        norm_Q = np.sqrt(np.einsum("qd,qd->q", solved_QD, query_QD).clip(min=0))
        return solved_QD, _divide(solved_QD, norm_Q * solver.scale) / self.rates[checkpoint] ** 0.5


@dataclass(frozen=True, eq=False)
class TrackStarScore:
    """The cosine in the metric of the inverse curvature, mean over checkpoints."""

    store: FeatureStore
    rates: Sequence[float]
    damping: Damping
    name: ScoreName = "trackstar"
    direction_map: DirectionMap | None = None

    @property
    def summary(self) -> str:
        """Return the name and where the damping comes from."""
        return f"score {self.name}, damping {self.damping.rule}"

    def rows(self, checkpoints: Sequence[int]) -> WhitenedRows:
        """Return the rows with parts L_c⁻¹φ of norm 1, where L_c L_cᵀ = K_c + λ_c I."""
        return WhitenedRows(self.store.view(checkpoints, cosine=True), self.damping)

    def weigh(self, query_QF: Float32, checkpoints: Sequence[int], *, estimates: bool = False) -> QueryVectors:
        """Return the query with parts L_c⁻¹q of norm 1 / C."""
        used = sum(self.rates[c] > 0 for c in checkpoints)
        part_QCD = query_QF.reshape(len(query_QF), len(checkpoints), -1)
        whitened_QCD = _whiten(_scale_parts(part_QCD), checkpoints, self.damping)
        return QueryVectors((whitened_QCD / np.float32(used)).reshape(query_QF.shape))


@dataclass(frozen=True)
class WhitenedRows:
    """Rows [N, F] with parts L_c⁻¹φ of norm 1, computed when they are read."""

    view: FeatureView
    damping: Damping

    @property
    def dim(self) -> int:
        """Return F."""
        return self.view.dim

    def __len__(self) -> int:
        """Return N."""
        return len(self.view)

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        """Yield (ids [n], rows [n, F]) by ascending id, n ≤ block_rows."""
        for ids, row_BF in self.view.blocks(block_rows, start):
            yield ids, self._transform(row_BF)

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        """Return the rows with these ids, [K, F].

        Raises:
            KeyError: an id is outside 0..N-1.
        """
        return self._transform(self.view.take(ids))

    def locate(self, ids: Sequence[int] | Int64) -> tuple[Float32, Int64]:
        """Return rows [N, F], and the places [K] of the rows with these ids among them."""
        row_N, place_K = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
        return self.take(row_N), place_K

    def _transform(self, row_NF: Float32) -> Float32:
        checkpoints = self.view.checkpoints
        part_NCD = row_NF.reshape(len(row_NF), len(checkpoints), -1)
        return _whiten(part_NCD, checkpoints, self.damping).reshape(row_NF.shape)


def _whiten(part_NCD: Float32, checkpoints: Sequence[int], damping: Damping) -> Float32:
    """Return L_c⁻¹v of norm 1 for the part of each checkpoint; zero parts remain zero."""
    whitened_NCD = np.empty_like(part_NCD)
    for i, checkpoint in enumerate(checkpoints):
        whitened_NCD[:, i] = damping.solver(checkpoint, 0, part_NCD.shape[2]).whiten(part_NCD[:, i])
    return _scale_parts(whitened_NCD)


def _scale_parts(part_QCD: Float32) -> Float32:
    """Return the parts of each checkpoint divided by their norms; zero parts remain zero."""
    norms = np.linalg.norm(part_QCD.astype(np.float64), axis=2, keepdims=True)
    unit_QCD: Float32 = np.divide(part_QCD, norms, out=np.zeros_like(part_QCD), where=norms > 0, casting="same_kind")
    return unit_QCD


def _divide(vector_QD: Float64, norm_Q: Float64) -> Float64:
    """Return vectors divided by norms; zero where a norm is zero."""
    norm = norm_Q[:, None]
    return np.divide(vector_QD, norm, out=np.zeros_like(vector_QD), where=norm > 0)


def _mix(mixture_GQ: Float64, each_QF: Float32) -> Float32:
    """Return weighted sums of vectors."""
    mixed_GF: Float32 = np.einsum("gq,qf->gf", mixture_GQ, each_QF.astype(np.float64)).astype(np.float32)
    return mixed_GF
