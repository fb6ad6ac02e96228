"""Approximate search in two steps: candidates from compact codes of the rows, scored again with the rows themselves.

`RescoredIndex` has what all such indexes share; a subclass stores the codes and finds candidates with them. Outliers
(rows of very large norm) have no code; every query scores them. Quiet rows (norm near zero) have no code either;
queries whose results they could enter are answered by an exact scan.

Shapes: N rows, Q queries, M candidates, K results, F feature dimension, R reduced dimension.
"""

from __future__ import annotations

import copy
import math
import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from tracin_ann.errors import DamagedIndexError, problem
from tracin_ann.search.base import CalibratedIndex, check_queries
from tracin_ann.search.candidates import score_candidates
from tracin_ann.search.clustering import Survey
from tracin_ann.search.flat import FlatIndex, RowScanner, Sign, check_finite
from tracin_ann.search.reduction import Reduction, normalize
from tracin_ann.search.settings import Setting
from tracin_ann.search.topk import concatenate, from_padded, merge, negate
from tracin_ann.types import Float32, Float64, Int64, RowSource, TopK

if TYPE_CHECKING:
    from typing_extensions import Self

_KEPT_QUERIES = 256
_QUERIES_AT_ONCE, _PAIRS_AT_ONCE = 1024, 2**22
"""The larger a batch is, the more of its queries share a candidate, which is read once."""
_LEAST_CANDIDATES = 40
_IDS_AT_ONCE = 8192


@dataclass(frozen=True)
class UncodedRows:
    """The rows without a code.

    Attributes:
        outliers: ids of rows of very large norm, int64, increasing.
        quiet_rows: number of quiet rows.
        quiet_norm: their largest norm.
    """

    outliers: Int64
    quiet_rows: int = 0
    quiet_norm: float = 0.0

    @classmethod
    def find(cls, measured: Survey) -> UncodedRows:
        """Return the rows of a survey that get no code."""
        quiet_norm = float(measured.norm_N[measured.quiet_N].max(initial=0.0))
        return cls(measured.ids_N[measured.outlier_N], int(measured.quiet_N.sum()), quiet_norm)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What the JSON file beside the codes says of the rows, by which files that do not belong together are found.

    Subclasses add fields, and `caption` and `version` of their files.
    """

    rows: int
    shift: int
    quiet_rows: int
    quiet_norm: float
    energy: float
    caption: str
    version: int

    def __post_init__(self) -> None:
        """Check caption and version.

        Raises:
            ValueError: the file is of another kind or version.
        """
        own = tuple(type(self).__dataclass_fields__[name].default for name in ("caption", "version"))
        if (self.caption, self.version) != own:
            raise ValueError(f"{self.caption!r} version {self.version} instead of {own[0]!r} version {own[1]}")


@dataclass(frozen=True)
class Direction:
    """A direction of a search: the sign of the inner products, and the setting."""

    sign: Sign
    setting: Setting


class RescoredIndex(CalibratedIndex):
    """Approximate maximum inner product search; the scores of results are exact."""

    candidates_per_result: ClassVar[float] = 1.25
    """Candidates for each of many results; reading them takes most of the time of the search."""
    rescores_budget: ClassVar[bool] = False
    """Whether `Setting.codes` is the number of candidates, which are the best of all (allowed) codes."""

    def __init__(self, source: RowSource, reduction: Reduction, uncoded: UncodedRows, device: torch.device) -> None:
        """Store the arguments; subclasses set `settings`."""
        self._source, self._reduction, self._uncoded, self._device = source, reduction, uncoded, device
        self._last = threading.local()
        self._codes_name = self.FILES[0]
        self._row_scanner: RowScanner | None = None

    def with_settings(self, proponents: Setting, opponents: Setting | None = None) -> Self:
        """Return an index with the same codes and these settings; without `opponents`, one setting for both."""
        other = copy.copy(self)
        other.settings = proponents, opponents or proponents
        return other

    def with_row_scanner(self, scanner: RowScanner) -> Self:
        """Return an index with the same codes and settings, whose exact scans `scanner` runs; see `FlatIndex`."""
        other = copy.copy(self)
        other._row_scanner = scanner
        return other

    @abstractmethod
    def _find_candidates(
        self, reduced_QR: Float32, directions: Sequence[Direction], counts: Sequence[int], allowed: Int64 | None
    ) -> list[tuple[Int64, Int64]]:
        """Return, for each direction, padded ids of candidates [Q, M] (−1: padding) and numbers of scored codes [Q].

        Args:
            reduced_QR: queries of norm 1 or 0, reduced.
            directions: with their settings.
            counts: for each direction, the least number of candidates of a query, if there are as many codes.
            allowed: increasing ids to which candidates are restricted; None: all.
        """

    @property
    def source(self) -> RowSource:
        """Return the rows."""
        return self._source

    def measure(self, queries_QF: Float32) -> tuple[Float64, Float64]:
        """Return the norm of each query [Q], and a statistic of its direction, between 0 and 1 [Q].

        Here the statistic is the norm of the leading half of the reduced query of norm 1; 0 for a zero query.
        """
        reduced_QR, norm_Q = self._reduce(queries_QF)
        leading_QR = reduced_QR[:, : max(1, reduced_QR.shape[1] // 2)].astype(np.float64)
        return norm_Q, np.linalg.norm(leading_QR, axis=1)

    def _reduce(self, queries_QF: Float32) -> tuple[Float32, Float64]:
        """Return the queries, scaled to norm 1, in R dimensions, and their norms [Q].

        Those of the last call of a thread are stored: queries are compared with the calibration queries, then searched.
        """
        unit_QF, norm_Q = normalize(queries_QF)
        last: tuple[Float32, Float32] | None = getattr(self._last, "queries", None)
        if last is not None and np.array_equal(last[0], unit_QF):
            return last[1], norm_Q
        reduced_QR = self._reduction.apply(unit_QF)
        if len(unit_QF) <= _KEPT_QUERIES:
            self._last.queries = unit_QF, reduced_QR
        return reduced_QR, norm_Q

    def search(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> TopK:
        """Return the k rows of largest inner product among the rows that the setting reaches; always min(k, N) rows.

        `rows_scored` counts the codes that are scored, and centroids, if the index has any.
        """
        directions = [Direction(1, self.settings[0])]
        return self._search_directions(check_queries(self, queries_QF, k), k, directions, allowed)[0]

    def search_both(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
        """Return (proponents, opponents), each with its own setting, as two separate searches do.

        Both directions share the reduction of the queries, the scan of outliers, and one reading of the candidates.
        """
        directions = [Direction(1, self.settings[0]), Direction(-1, self.settings[1])]
        queries = check_queries(self, queries_QF, k)
        proponents, opponents = self._search_directions(queries, k, directions, allowed)
        return proponents, negate(opponents)

    def _describe_rows(self, shift: int) -> dict[str, Any]:
        """Return the values of `Caption`, for rows scaled by 2^shift."""
        return {
            "rows": len(self),
            "shift": shift,
            "quiet_rows": self._uncoded.quiet_rows,
            "quiet_norm": self._uncoded.quiet_norm,
            "energy": self._reduction.energy,
        }

    def _compare_ids(self, coded_N: Int64) -> list[str]:
        """Return a description of the difference between the ids of codes and outliers and those of the source."""
        everything = np.concatenate([coded_N, self._uncoded.outliers])
        known = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in self._source.blocks(_IDS_AT_ONCE))])
        twice, n_quiet = len(everything) - len(np.unique(everything)), self._uncoded.quiet_rows
        if not twice and np.isin(everything, known).all() and len(known) - len(everything) == n_quiet:
            return []
        return [
            f"{len(everything):,} ids ({twice:,} duplicates) and {n_quiet:,} quiet rows do not match "
            f"{len(known):,} stored rows"
        ]

    def will_scan(self, k: int, allowed: Int64 | None = None) -> bool:
        """Return whether a search scans all (allowed) rows, because the codes of as many would be scored."""
        n_rows = len(self) if allowed is None else len(allowed)
        return all(self._is_scanned(k, self._adapt(setting, k, n_rows), n_rows) for setting in self.settings)

    def describe_place(self, k: int, allowed: Int64 | None = None) -> str:
        """Return where a search runs, as text for users; "" if the device is a CPU."""
        if self._device.type == "cpu":
            return ""
        if self.will_scan(k, allowed):
            return FlatIndex(self._source, self._device, scanner=self._row_scanner).describe_place(k, allowed)
        return self._describe_code_search(k, allowed)

    def _describe_code_search(self, k: int, allowed: Int64 | None) -> str:
        """Return where the codes are searched if the device is not a CPU, as text for users."""
        return f"{self.name} searched on the CPU, which has the only version"

    def most_rows_read(self, n_queries: int, k: int) -> int:
        """Return the largest number of stored rows that a search in both directions reads: candidates and outliers."""
        n_candidates = sum(self._count_candidates(k, self._adapt(each, k, len(self))) for each in self.settings)
        return n_candidates * n_queries + len(self._uncoded.outliers)

    def _count_candidates(self, k: int, setting: Setting) -> int:
        """Return how many candidates are rescored for k results."""
        least = max(_LEAST_CANDIDATES, math.ceil(self.candidates_per_result * k))
        return max(least, setting.codes) if self.rescores_budget else least

    def _adapt(self, setting: Setting, k: int, n_rows: int) -> Setting:
        """Return the setting for k results among n_rows allowed rows."""
        if self.rescores_budget:
            return setting
        setting = setting.scale_for_results(k)
        return setting if n_rows == len(self) else setting.scale_for_share(max(n_rows, 1) / len(self))

    def _is_scanned(self, k: int, setting: Setting, n_rows: int) -> bool:
        """Return whether a search would score as many rows or codes as a scan of n_rows rows."""
        return max(setting.codes, self._count_candidates(k, setting)) >= n_rows

    def _search_directions(
        self, queries_QF: Float32, k: int, directions: Sequence[Direction], allowed: Int64 | None
    ) -> list[TopK]:
        """Return the k rows of largest sign × inner product for each direction: of codes and outliers, or of a scan."""
        allowed = None if allowed is not None and len(allowed) == len(self) else allowed
        n_rows = len(self) if allowed is None else len(allowed)
        directions = [replace(d, setting=self._adapt(d.setting, k, n_rows)) for d in directions]
        scanned = [d for d in directions if self._is_scanned(k, d.setting, n_rows)]
        coded = [d for d in directions if d not in scanned]
        found = self._scan(queries_QF, k, scanned, allowed) if scanned else {}
        if coded:
            found |= self._search_codes(queries_QF, k, coded, allowed)
        return [found[d.sign] for d in directions]

    def _scan(
        self, queries_QF: Float32, k: int, directions: Sequence[Direction], allowed: Int64 | None
    ) -> dict[Sign, TopK]:
        """Return the results of an exact scan, by sign of the direction."""
        signs = [d.sign for d in directions]
        scan = FlatIndex(self._source, self._device, scanner=self._row_scanner)
        return dict(zip(signs, scan.search_signs(queries_QF, k, signs, allowed), strict=True))

    def _search_codes(
        self, queries_QF: Float32, k: int, directions: Sequence[Direction], allowed: Int64 | None
    ) -> dict[Sign, TopK]:
        """Return the results of codes and outliers, by sign of the direction."""
        n_pairs = sum(self._count_candidates(k, d.setting) for d in directions)
        step = max(1, min(_QUERIES_AT_ONCE, _PAIRS_AT_ONCE // n_pairs))
        batches = [
            self._search_batch(queries_QF[at : at + step], k, directions, allowed)
            for at in range(0, len(queries_QF), step)
        ]
        found = {d.sign: concatenate([batch[d.sign] for batch in batches]) for d in directions}
        outliers = self._uncoded.outliers
        if allowed is not None:
            outliers = np.intersect1d(outliers, allowed)
        if len(outliers):
            with self._report_unknown_rows():
                scanned = self._scan(queries_QF, k, directions, outliers)
            found = {sign: merge([top, scanned[sign]], k) for sign, top in found.items()}
        return self._complete(found, queries_QF, k, directions, allowed)

    def _search_batch(
        self, queries_QF: Float32, k: int, directions: Sequence[Direction], allowed: Int64 | None
    ) -> dict[Sign, TopK]:
        """Return the best k of the candidates by their exact scores, by sign of the direction."""
        reduced_QR, _ = self._reduce(queries_QF)
        counts = [self._count_candidates(k, direction.setting) for direction in directions]
        candidates = self._find_candidates(reduced_QR, directions, counts, allowed)
        scores = self._rescore(queries_QF, [ids_QM for ids_QM, _ in candidates])
        found: dict[Sign, TopK] = {}
        for direction, (ids_QM, scored_Q), scores_QM in zip(directions, candidates, scores, strict=True):
            check_finite(ids_QM, scores_QM)
            found[direction.sign] = from_padded(ids_QM, direction.sign * scores_QM, k, scored_Q)
        return found

    def _rescore(self, queries_QF: Float32, candidates: Sequence[Int64]) -> list[Float32]:
        """Return the inner products [Q, M] of each array of ids [Q, M]; 0 for padding. Each row is read once."""
        with self._report_unknown_rows():
            scores_QM = score_candidates(self._source, queries_QF, np.concatenate(candidates, axis=1))
        return np.split(scores_QM, np.cumsum([ids.shape[1] for ids in candidates])[:-1], axis=1)

    def _complete(
        self,
        found: dict[Sign, TopK],
        queries_QF: Float32,
        k: int,
        directions: Sequence[Direction],
        allowed: Int64 | None,
    ) -> dict[Sign, TopK]:
        """Return the results, from an exact scan for queries with too few results or where quiet rows could enter."""
        n_results = min(k, len(self) if allowed is None else len(allowed))
        norm_Q = np.linalg.norm(queries_QF.astype(np.float64), axis=1)
        quiet_Q = norm_Q * self._uncoded.quiet_norm
        has_quiet = self._uncoded.quiet_rows > 0
        together: dict[tuple[int, ...], list[Direction]] = {}
        for direction in directions:
            incomplete = [
                at
                for at, scores in enumerate(found[direction.sign].scores)
                if len(scores) < n_results or norm_Q[at] == 0 or (has_quiet and scores[-1] <= quiet_Q[at])
            ]
            if incomplete:
                together.setdefault(tuple(incomplete), []).append(direction)
        for places, some in together.items():
            exact = self._scan(queries_QF[list(places)], k, some, allowed)
            found = found | {sign: replace_queries(found[sign], places, top) for sign, top in exact.items()}
        return found

    @contextmanager
    def _report_unknown_rows(self) -> Iterator[None]:
        """Report a row that the source does not have as damage of the codes, which `load` does not check row by row.

        Raises:
            DamagedIndexError: the codes contain such a row; the message has its id.
        """
        try:
            yield
        except KeyError as error:
            raise DamagedIndexError(
                problem(
                    f"{self._codes_name} contains an unknown row",
                    got=f"id {error}",
                    expected="ids of the stored features",
                    remedy="rebuild the index",
                )
            ) from error


def replace_queries(top: TopK, places: Sequence[int], exact: TopK) -> TopK:
    """Return the results with those at some places from a scan of these queries; rows_scored are added."""
    ids, scores, counts = list(top.ids), list(top.scores), top.rows_scored.copy()
    for own, at in enumerate(places):
        ids[at], scores[at] = exact.ids[own], exact.scores[own]
        counts[at] += exact.rows_scored[own]
    return TopK(tuple(ids), tuple(scores), counts)
