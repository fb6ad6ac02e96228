"""Exact search on GPUs: FAISS finds candidates in float16, which are scored again, or PyTorch scans all rows.

A candidate's float16 score has a bounded error. If the k-th exact score exceeds the float16 score of the last candidate
by more than this error, no other row can be a result; otherwise PyTorch scans the rows for the query. The method of a
search is the one with the shorter estimated time; the estimate uses rates that are measured on the GPU.

Shapes: N rows, Q queries, M candidates, K results, F feature dimension.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import numpy as np
import torch

from tracin_ann.device import Gpu, list_gpus
from tracin_ann.search.base import check_queries, scale_to_unit
from tracin_ann.search.candidates import score_candidates
from tracin_ann.search.flat import FlatIndex, check_finite
from tracin_ann.search.gpu import MOST_RESULTS, GpuRows, join_names, plan_gpus
from tracin_ann.search.rescored import replace_queries
from tracin_ann.search.topk import from_padded, negate, split
from tracin_ann.types import Float32, Float64, Int64, PendingReads, RowSource, TopK

_CANDIDATES_PER_RESULT = 1.25
_MORE_CANDIDATES = 32
_SAMPLE_NUMBERS, _SAMPLE_ROWS = 2**26, 2**17
"""The larger sample has at most so many numbers and rows, the smaller one an eighth of its rows."""
_SAMPLE_QUERIES = 64
_REPETITIONS = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScanRate:
    """Seconds of a scan of N rows for Q queries in both directions: `fixed` + N · (`row` + Q · `product`)."""

    fixed: float
    row: float
    product: float

    def seconds(self, n_rows: int, n_queries: int) -> float:
        """Return the seconds of a scan."""
        return self.fixed + n_rows * (self.row + n_queries * self.product)

    @classmethod
    def fit(cls, measure: Callable[[int, int], float], sizes: tuple[int, int]) -> ScanRate:
        """Return the rate by the seconds that `measure` returns for (rows, queries), for two numbers of rows."""
        few, many = sizes
        one_few, one_many, all_many = measure(few, 1), measure(many, 1), measure(many, _SAMPLE_QUERIES)
        product = max(0.0, all_many - one_many) / (many * (_SAMPLE_QUERIES - 1))
        row = max(0.0, (one_many - one_few) / (many - few) - product)
        return cls(max(0.0, one_few - few * (row + product)), row, product)


@dataclass(frozen=True)
class GpuRates:
    """The measured rates of both methods of a scan.

    Attributes:
        pytorch: scan by PyTorch of rows in the memory of the GPU.
        faiss: search by FAISS, without the reading of candidates.
        read: seconds per row to read rows in order and copy them to the GPU.
        take: seconds per row to read rows by id.
    """

    pytorch: ScanRate
    faiss: ScanRate
    read: float
    take: float


class GpuScan:
    """The exact scan of a `RowSource` on GPUs, without index files. Copies of rows in their memory remain there."""

    kind = "flat"

    def __init__(self, exact: FlatIndex, gpus: Sequence[Gpu], rates: GpuRates | None = None) -> None:
        """Store PyTorch's scan of the rows, the GPUs that FAISS may use, and the rates (None: measured when needed)."""
        self._exact, self._gpus, self._known_rates = exact, tuple(gpus), rates
        self._rows: GpuRows | None = None
        self._loading = threading.Lock()
        self._waited = 0.0
        self._refusal = ""
        self._last = threading.local()

    @property
    def device(self) -> torch.device:
        """Return the device of scans by PyTorch."""
        return self._exact.device

    @property
    def source(self) -> RowSource:
        """Return the rows."""
        return self._exact.source

    @property
    def dim(self) -> int:
        """Return F, the length of a row."""
        return self._exact.dim

    def __len__(self) -> int:
        """Return N, the number of rows."""
        return len(self._exact)

    def pending_reads(self) -> PendingReads:
        """Return what the next scan has to do once: files to open and bytes to verify."""
        return self._exact.pending_reads()

    def search(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> TopK:
        """Return the k rows of largest inner product with each query."""
        return self.search_both(queries_QF, k, allowed)[0]

    def search_both(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
        """Return (proponents, opponents), equal to those of `FlatIndex` except for the rounding of scores.

        Raises:
            NonFiniteError: a query, or the score of a result, is not finite.
        """
        queries_QF = check_queries(self, queries_QF, k)
        n_queries = len(queries_QF)
        rows = self._choose_rows(n_queries, k, allowed)
        if rows is None:
            refusal = f" ({self._refusal})" if self._refusal else ""
            self._last.place = f"{self._exact.describe_place(k, allowed)}{refusal}"
            return self._exact.search_both(queries_QF, k, allowed)
        place = f"scanned on {join_names(rows.gpus)} by FAISS, in float16 with exact scores of the candidates"
        found, is_proven = self._search_rows(rows, np.concatenate([queries_QF, -queries_QF]), k)
        proponents, opponents = split(found, n_queries)
        opponents = negate(opponents)
        places = np.flatnonzero(~(is_proven[:n_queries] & is_proven[n_queries:])).tolist()
        if places:
            place += f"; {len(places):,} of {n_queries:,} queries scanned by PyTorch, because scores are too close"
            exact = self._exact.search_both(queries_QF[places], k)
            proponents, opponents = (
                replace_queries(top, places, own) for top, own in zip((proponents, opponents), exact, strict=True)
            )
        self._last.place = place
        return proponents, opponents

    def _search_rows(
        self, rows: GpuRows, signed_QF: Float32, k: int
    ) -> tuple[TopK, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        """Return the best k of the candidates, and for which queries [Q] they are proven to be the best of all rows."""
        unit_QF, exponent_Q = scale_to_unit(signed_QF)
        n_candidates = self._count_candidates(k)
        ids_QM, half_QM = rows.find(unit_QF, n_candidates)
        scores_QM = score_candidates(self.source, signed_QF, ids_QM)
        check_finite(ids_QM, scores_QM)
        is_proven = np.ones(len(unit_QF), bool)
        if n_candidates < len(self):
            unit_QM: Float64 = np.ldexp(scores_QM.astype(np.float64), -exponent_Q[:, None])
            kth_Q = -np.partition(-unit_QM, k - 1, axis=1)[:, k - 1]
            is_proven = kth_Q > half_QM.min(axis=1) + rows.error
        return from_padded(ids_QM, scores_QM, k, np.full(len(ids_QM), len(self), np.int64)), is_proven

    def _count_candidates(self, k: int) -> int:
        return min(len(self), round(_CANDIDATES_PER_RESULT * k) + _MORE_CANDIDATES)

    def describe_place(self, k: int, allowed: Int64 | None = None) -> str:
        """Return where the last search of this thread ran, as text for users."""
        place: str = self._last.place
        return place

    def _can_use_rows(self, k: int, allowed: Int64 | None) -> bool:
        """Return whether FAISS can search the rows: without a filter, which its GPU functions ignore, and for few k."""
        is_filtered = allowed is not None and len(allowed) < len(self)
        return bool(len(self)) and not is_filtered and self._count_candidates(k) <= MOST_RESULTS

    def _choose_rows(self, n_queries: int, k: int, allowed: Int64 | None) -> GpuRows | None:
        """Return the rows for FAISS if its search is estimated to be faster than PyTorch's; loads them if it is."""
        if not self._can_use_rows(k, allowed) or self._refusal:
            return None
        with self._loading:
            rates = self._rates
            if rates is None:
                return None
            pytorch_s, faiss_s = self._estimate(rates, n_queries, k)
            saved = pytorch_s - faiss_s
            if self._rows is None and saved > 0:
                # Loading pays off once the searches before it would have saved as much time as it takes.
                self._waited += saved
                if self._waited >= rates.read * 2 * len(self):
                    self._load()
            return self._rows if saved > 0 else None

    def _load(self) -> None:
        """Copy the rows to the memory of the GPUs, or store why this is not possible."""
        n_bytes = GpuRows.count_bytes(len(self), self.dim)
        gpus = plan_gpus(n_bytes, self._gpus)
        if not gpus:
            self._refusal = f"{n_bytes / 2**30:,.1f} GiB of rows in float16 do not fit in the memory of the GPUs"
            return
        try:
            self._rows = GpuRows.load(self.source, gpus)
        except RuntimeError as error:
            self._refusal = f"the GPU rejects a copy of the rows: {error}".splitlines()[0]

    def estimate_seconds(self, n_queries: int, k: int) -> float | None:
        """Return the estimated seconds of a search in both directions, without the loading of rows for FAISS.

        None: there are no rows, or not enough memory to measure the rates.
        """
        rates = self._rates if len(self) else None
        if rates is None:
            return None
        pytorch_s, faiss_s = self._estimate(rates, n_queries, k)
        return min(pytorch_s, faiss_s) if self._rows is not None else pytorch_s

    def _estimate(self, rates: GpuRates, n_queries: int, k: int) -> tuple[float, float]:
        """Return the estimated seconds of a search by PyTorch, and by FAISS in loaded rows."""
        n_rows = len(self)
        pytorch_s = rates.pytorch.seconds(n_rows, n_queries)
        if not self._exact.is_resident:
            pytorch_s += rates.read * n_rows
        faiss_s = rates.faiss.seconds(n_rows, n_queries) + rates.take * 2 * n_queries * self._count_candidates(k)
        return pytorch_s, faiss_s

    @cached_property
    def _rates(self) -> GpuRates | None:
        """Return the rates, measured if they are not known; None: there is not enough memory to measure them."""
        if self._known_rates is not None:
            return self._known_rates
        try:
            return self._measure_rates()
        except RuntimeError as error:
            self._refusal = f"the GPU rejects a sample of the rows: {error}".splitlines()[0]
            return None

    def _measure_rates(self) -> GpuRates:
        """Return the rates, measured with sample rows on the first GPU.

        Raises:
            RuntimeError: the GPU does not have enough memory.
        """
        many = max(2 * _SAMPLE_QUERIES, min(_SAMPLE_ROWS, _SAMPLE_NUMBERS // self.dim))
        few = max(_SAMPLE_QUERIES, many // 8)
        ids, rows_BF = next(iter(self.source.blocks(few)))
        # Factors, because PyTorch's scan takes longer for equal scores.
        factor_N1 = np.linspace(1, 2, many, dtype=np.float32)[:, None]
        sample = ArrayRows(np.resize(rows_BF, (many, self.dim)) * factor_N1)
        exact = {n: FlatIndex(ArrayRows(sample.row_NF[:n]), self._exact.device) for n in (few, many)}
        rows = {n: GpuRows.load(ArrayRows(sample.row_NF[:n]), self._gpus[:1]) for n in (few, many)}

        def time_pytorch(n_rows: int, n_queries: int) -> float:
            return _time(lambda: exact[n_rows].search_both(sample.row_NF[:n_queries], _MORE_CANDIDATES))

        def time_faiss(n_rows: int, n_queries: int) -> float:
            unit_QF, _ = scale_to_unit(np.concatenate([sample.row_NF[:n_queries], -sample.row_NF[:n_queries]]))
            return _time(lambda: rows[n_rows].find(unit_QF, _MORE_CANDIDATES))

        def read() -> None:
            torch.from_numpy(next(iter(self.source.blocks(few)))[1].copy()).to(self._exact.device)

        some = ids[:: max(1, len(ids) // _SAMPLE_QUERIES)]
        rates = GpuRates(
            ScanRate.fit(time_pytorch, (few, many)),
            ScanRate.fit(time_faiss, (few, many)),
            _time(read) / len(ids),
            _time(lambda: self.source.take(some)) / len(some),
        )
        logger.info("measured rates of scans: %s", rates)
        return rates


@dataclass(frozen=True)
class ArrayRows:
    """Rows in memory, as a `RowSource`."""

    row_NF: Float32

    @property
    def dim(self) -> int:
        """Return F."""
        return int(self.row_NF.shape[1])

    def __len__(self) -> int:
        """Return N."""
        return len(self.row_NF)

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        """Yield (ids [B], rows [B, F])."""
        for at in range(start, len(self), block_rows):
            rows_BF = self.row_NF[at : at + block_rows]
            yield np.arange(at, at + len(rows_BF)), rows_BF

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        """Return the rows with these ids."""
        taken_BF: Float32 = self.row_NF[np.asarray(ids)]
        return taken_BF


def _time(run: Callable[[], object]) -> float:
    """Return the median seconds of some calls after the first one."""
    run()
    seconds = []
    for _ in range(_REPETITIONS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def open_scan(source: RowSource, device: torch.device) -> FlatIndex | GpuScan:
    """Return the exact scan of the rows on a device."""
    exact, gpus = FlatIndex(source, device), list_gpus(device)
    return GpuScan(exact, gpus) if gpus else exact
