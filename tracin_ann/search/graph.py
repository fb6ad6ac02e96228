"""Approximate search in a graph of reduced rows (HNSW) by inner product; candidates are scored again with the rows.

The graph is FAISS's implementation of Malkov and Yashunin (2018) with inner products instead of distances, as in
Morozov and Babenko (2018). A row has one code of 4 bits per dimension, and links to other rows.

Shapes: N rows, B rows of a block, Q queries, M candidates, E measured beams, F feature dimension, R reduced dimension.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tracin_ann.device import import_faiss
from tracin_ann.errors import DamagedIndexError, UsageError, attach_path, problem
from tracin_ann.files import open_regular, read_json, read_npz, read_record, report_damage
from tracin_ann.search.clustering import Survey, stratified_ids, survey
from tracin_ann.search.construction import SAMPLE_NUMBERS, count_block_rows, scale_rows
from tracin_ann.search.faiss_file import REMEDY, WrittenFile, read_faiss, write_faiss
from tracin_ann.search.inverted_lists import make_selector
from tracin_ann.search.reduction import Reduction, fit_reduction, pack_reduction, unpack_reduction
from tracin_ann.search.rescored import Caption, Direction, RescoredIndex, UncodedRows
from tracin_ann.search.settings import Setting, check_fields
from tracin_ann.types import Float32, Float64, Int64, RowSource

_CAPTION = "tracin_ann graph"
_VERSION = 1
_EXPECTED = "a file written by a build"
_SMALLEST_BEAM, _LARGEST_BEAM = 32, 8192
_DEFAULT_BEAM = 256
_LEAST_RESCORED, _SHARE_RESCORED = 200, 4
"""As many rows of a beam, or one in so many if that is more, are scored again."""
_MEASURED_QUERIES = 32


@dataclass(frozen=True)
class GraphParams:
    """Parameters of a graph.

    Attributes:
        width: number of dimensions to which rows are reduced.
        links: links of a row to others in the upper levels (M in the paper); the lowest level has twice as many.
        ef_construction: length of the beam that finds the links of a new row. If it is less than twice `links`, FAISS
            keeps all that the beam finds. Otherwise it drops rows that are similar to another one found, which can make
            rows unreachable if the norms have a heavy tail.
        seed: seed of the sample, the reduction and the levels of rows.
    """

    width: int = 768
    links: int = 24
    ef_construction: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UsageError: a field is out of range.
        """
        check_fields(
            ("width", self.width, self.width >= 1, "at least 1"),
            ("links", self.links, self.links > 1, "at least 2"),
            ("ef_construction", self.ef_construction, self.ef_construction >= 1, "at least 1"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
        )

    def estimate_bytes(self, n_rows: int, dim: int) -> int:
        """Return the approximate size in bytes of the files for N rows of F numbers: codes, links and ids."""
        return n_rows * (math.ceil(min(dim, self.width) / 2) + self._link_bytes + 20)

    @property
    def _link_bytes(self) -> int:
        """Return the mean number of bytes of a row's links; one row in `links` is also in an upper level."""
        return round(4 * self.links * (2 + 1 / (self.links - 1)))


@dataclass(frozen=True, kw_only=True)
class _Caption(Caption):
    """The content of the JSON file beside the graph."""

    params: GraphParams
    graph: WrittenFile
    caption: str = _CAPTION
    version: int = _VERSION


@dataclass(frozen=True)
class _Parts:
    """The graph and what a search needs with it.

    Attributes:
        graph: `faiss.IndexHNSWSQ`; it is searched only with parameters of the call, so several threads can do so.
        id_N: id of each row of the graph, int64, increasing.
        beam_E: measured lengths of beams, int64, increasing.
        visited_E: mean number of rows that a search with such a beam scores, float64.
        params: parameters.
        shift: exponent of the scale of rows (see `Survey.shift`).
    """

    graph: Any
    id_N: Int64
    beam_E: Int64
    visited_E: Float64
    params: GraphParams
    shift: int

    def estimate_visited(self, beam: int) -> int:
        """Return the mean number of rows that a search scores; linear between measured beams on logarithmic axes."""
        if not len(self.id_N):
            return 0
        estimate = np.interp(math.log(beam), np.log(self.beam_E), np.log(self.visited_E))
        return min(len(self.id_N), round(math.exp(float(estimate))))

    def find(self, reduced_QR: Float32, n_results: int, beam: int, position_A: Int64 | None = None) -> Int64:
        """Return padded positions [Q, n_results] of rows of large inner product, among allowed positions [A] if given.

        FAISS keeps the best `beam` rows that it has scored, and follows the links of the best one that it has not
        followed yet until all of these are followed. Rows that are not allowed are followed but not returned.
        """
        parameters = import_faiss().SearchParametersHNSW()
        parameters.efSearch = min(beam, len(self.id_N))
        selector = make_selector(position_A, len(self.id_N))
        if selector is not None:
            parameters.sel = selector.selector
        _, position_QM = self.graph.search(np.ascontiguousarray(reduced_QR), n_results, params=parameters)
        found: Int64 = position_QM
        return found


class GraphIndex(RescoredIndex):
    """Approximate maximum inner product search; the scores of results are exact.

    A setting's `codes` is the length of the beam (`efSearch`). `rows_scored` is an estimate, because FAISS only counts
    the rows that all threads score together: the mean of searches with this beam that the build has measured.
    """

    kind = "graph"
    name = "graph (HNSW)"
    FILES = ("graph.faiss", "graph.npz", "graph.json")

    def __init__(
        self, source: RowSource, reduction: Reduction, uncoded: UncodedRows, device: torch.device, parts: _Parts
    ) -> None:
        """Wrap a graph with all rows; use `build` or `load` to create an index."""
        super().__init__(source, reduction, uncoded, device)
        self._parts = parts
        self.settings = (Setting(_DEFAULT_BEAM),) * 2

    @classmethod
    def build(
        cls,
        source: RowSource,
        params: GraphParams,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> GraphIndex:
        """Build an index of all rows of the source; reads all rows twice, and a sample once more.

        The graph has the same bytes for any number of threads, because FAISS links new rows in batches. An interrupted
        build starts again.

        Args:
            source: the rows.
            params: parameters of the graph.
            device: device of exact scans.
            progress: called with (rows done, rows).

        Raises:
            UsageError: there are no rows.
            NonFiniteError: a row contains NaN or infinity; the message has its id.
        """
        if not len(source):
            raise UsageError(
                problem("too few rows for a graph", got="no rows", expected="at least one", remedy="use a flat index")
            )
        block_rows = count_block_rows(source)
        measured = survey(source, block_rows)
        sample_ids = stratified_ids(measured, SAMPLE_NUMBERS // source.dim, params.seed)
        sample_BF = np.zeros((1, source.dim), np.float32)
        if len(sample_ids):
            sample_BF = scale_rows(source.take(sample_ids), measured.shift)
        reduction = fit_reduction(sample_BF, params.width, params.seed)
        graph = _make_empty_graph(reduction.width, params)
        graph.train(reduction.apply(sample_BF))
        rows = _CodedRows(source, measured, reduction, block_rows)
        beam_E, visited_E = _fill(graph, rows, params, progress)
        parts = _Parts(graph, measured.ids_N[measured.listed_N], beam_E, visited_E, params, measured.shift)
        return cls(source, reduction, UncodedRows.find(measured), device, parts)

    @classmethod
    def load(cls, directory: Path, source: RowSource, device: torch.device) -> GraphIndex:
        """Return the index that `save` wrote, see `RescoredIndex.load`."""
        graph_path, arrays_path, caption_path = (Path(directory) / name for name in cls.FILES)
        content = read_json(caption_path, REMEDY)
        with report_damage(caption_path, _EXPECTED, REMEDY):
            caption = read_record(_Caption, content)
        with report_damage(arrays_path, _EXPECTED, REMEDY), open_regular(arrays_path) as file:
            arrays = read_npz(file)
            reduction, outliers = unpack_reduction(arrays, source.dim, caption.energy)
            id_N, beam_E, visited_E = _check_arrays(arrays["id_N"], arrays["beam_E"], arrays["visited_E"])
        graph = read_faiss(graph_path, caption.graph)
        n_listed = len(source) - caption.quiet_rows - len(outliers)
        got = type(graph).__name__, graph.ntotal, graph.d, len(id_N), caption.rows
        expected = "IndexHNSWSQ", n_listed, reduction.width, n_listed, len(source)
        if got != expected or graph.metric_type != import_faiss().METRIC_INNER_PRODUCT:
            raise DamagedIndexError(
                problem(
                    f"{caption_path} does not belong to {graph_path.name}, {arrays_path.name} and the features",
                    got=f"index, rows, dimensions, ids, rows {got}",
                    expected=f"{expected} and inner products",
                    remedy=REMEDY,
                )
            )
        uncoded = UncodedRows(outliers, caption.quiet_rows, caption.quiet_norm)
        parts = _Parts(graph, id_N, beam_E, visited_E, caption.params, caption.shift)
        return cls(source, reduction, uncoded, device, parts)

    def save(self, directory: Path) -> None:
        """Write the files `FILES`, see `RescoredIndex.save`."""
        graph_path, arrays_path, caption_path = (Path(directory) / name for name in self.FILES)
        parts = self._parts
        written = write_faiss(graph_path, parts.graph)
        arrays = pack_reduction(self._reduction, self._uncoded.outliers)
        arrays |= {name: getattr(parts, name) for name in ("id_N", "beam_E", "visited_E")}
        with attach_path(arrays_path):
            np.savez(arrays_path, allow_pickle=False, **arrays)
        caption = _Caption(
            **self._describe_rows(parts.shift),
            params=parts.params,
            graph=written,
        )
        with attach_path(caption_path):
            caption_path.write_text(json.dumps(dataclasses.asdict(caption)) + "\n", encoding="utf-8")

    def find_faults(self, sample: int, seed: int) -> list[str]:
        """Compare the graph with the source, see `RescoredIndex.find_faults`; links are not recomputed."""
        parts = self._parts
        found = self._compare_ids(parts.id_N)
        if found:
            return found
        random = np.random.default_rng(seed)
        chosen = np.sort(random.permutation(len(parts.id_N))[:sample])
        rows_BF = scale_rows(self._source.take(parts.id_N[chosen]), parts.shift)
        own_BR, rounded_BR, step_R = _decode(parts.graph, chosen, self._reduction.apply(rows_BF))
        # Rounding can move a number to the next code.
        off = int((np.abs(own_BR - rounded_BR) > 1.01 * step_R).any(axis=1).sum())
        return [f"of {len(chosen):,} rows checked, {off:,} have wrong codes"] if off else []

    def propose_settings(self, recall_of: Callable[[Setting], float]) -> Iterator[Sequence[Setting]]:
        """Yield beams, each √2 times the one before."""
        beam = float(_SMALLEST_BEAM)
        while True:
            yield [Setting(round(beam))]
            beam *= math.sqrt(2)
            if round(beam) > _LARGEST_BEAM or self._parts.estimate_visited(round(beam)) >= len(self):
                return

    @property
    def params(self) -> GraphParams:
        """Return the parameters of the graph."""
        return self._parts.params

    @property
    def resident_bytes(self) -> int:
        """Return the bytes that the index uses in memory, without the features."""
        parts, basis = self._parts, self._reduction.basis_FR
        hnsw = parts.graph.hnsw
        links = 4 * hnsw.neighbors.size() + 8 * hnsw.offsets.size() + 4 * hnsw.levels.size()
        codes = len(parts.id_N) * (int(import_faiss().downcast_index(parts.graph.storage).code_size) + 8)
        return int(codes + links) + (0 if basis is None else basis.nbytes) + self._uncoded.outliers.nbytes

    def _count_candidates(self, k: int, setting: Setting) -> int:
        """Return how many rows of a beam are scored again, see `RescoredIndex`."""
        rescored = min(setting.codes, max(_LEAST_RESCORED, setting.codes // _SHARE_RESCORED))
        return max(rescored, super()._count_candidates(k, setting))

    def _is_scanned(self, k: int, setting: Setting, n_rows: int) -> bool:
        """Return whether a search would score as many rows as a scan of n_rows rows."""
        beam = min(setting.codes, max(1, len(self._parts.id_N)))
        return super()._is_scanned(k, setting, n_rows) or self._parts.estimate_visited(beam) >= n_rows

    def _find_candidates(
        self, reduced_QR: Float32, directions: Sequence[Direction], counts: Sequence[int], allowed: Int64 | None
    ) -> list[tuple[Int64, Int64]]:
        """Return the candidates that a walk finds for each direction, see `RescoredIndex`."""
        pairs = zip(directions, counts, strict=True)
        return [self._walk(each.sign * reduced_QR, count, each.setting, allowed) for each, count in pairs]

    def _walk(
        self, reduced_QR: Float32, n_candidates: int, setting: Setting, allowed: Int64 | None
    ) -> tuple[Int64, Int64]:
        """Return candidates for proponents [Q, M], and the estimated numbers of scored codes [Q]."""
        parts, beam = self._parts, max(setting.codes, n_candidates)
        if not len(parts.id_N):
            return np.full((len(reduced_QR), n_candidates), -1), np.zeros(len(reduced_QR), np.int64)
        positions = None
        if allowed is not None:
            positions = np.flatnonzero(np.isin(parts.id_N, allowed, assume_unique=True))
        position_QM = parts.find(reduced_QR, n_candidates, beam, positions)
        ids_QM = np.where(position_QM >= 0, parts.id_N[position_QM], -1)
        return ids_QM, np.full(len(reduced_QR), parts.estimate_visited(beam))


@dataclass(frozen=True)
class _CodedRows:
    """The rows of a source that get a code.

    Attributes:
        source: the source.
        measured: norms of its rows.
        reduction: reduction of its rows.
        block_rows: rows read at once.
    """

    source: RowSource
    measured: Survey
    reduction: Reduction
    block_rows: int

    def blocks(self) -> Iterator[Float32]:
        """Yield reduced rows [B, R], in blocks of equal size whatever the blocks of the source; the last is shorter."""
        start, waiting_BR = 0, np.zeros((0, self.reduction.width), np.float32)
        for _, rows_BF in self.source.blocks(self.block_rows):
            listed_B = self.measured.listed_N[start : start + len(rows_BF)]
            start += len(rows_BF)
            reduced_BR = self.reduction.apply(scale_rows(rows_BF[listed_B], self.measured.shift))
            waiting_BR = np.concatenate([waiting_BR, reduced_BR])
            while len(waiting_BR) >= self.block_rows:
                yield waiting_BR[: self.block_rows]
                waiting_BR = waiting_BR[self.block_rows :]
        if len(waiting_BR):
            yield waiting_BR


def _make_empty_graph(width: int, params: GraphParams) -> Any:
    """Return a FAISS index without rows."""
    faiss = import_faiss()
    graph = faiss.IndexHNSWSQ(width, faiss.ScalarQuantizer.QT_4bit, params.links, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = params.ef_construction
    return graph


def _draw_levels(n_rows: int, links: int, n_levels: int, seed: int) -> npt.NDArray[np.int32]:
    """Return the numbers of levels that rows are in, int32 [N]: each level has one of `links` rows of the one below."""
    uniform_N = 1 - np.random.Generator(np.random.Philox(seed)).random(n_rows)
    levels: npt.NDArray[np.int32] = np.minimum(1 + np.floor(-np.log(uniform_N) / math.log(links)), n_levels)
    return levels.astype(np.int32)


def _fill(
    graph: Any, rows: _CodedRows, params: GraphParams, progress: Callable[[int, int], None] | None
) -> tuple[Int64, Float64]:
    """Add the rows to the graph, and return the measurement of `_measure_visits`, with the last rows as queries."""
    faiss, n_rows = import_faiss(), int(rows.measured.listed_N.sum())
    level_N = _draw_levels(n_rows, params.links, graph.hnsw.cum_nneighbor_per_level.size() - 1, params.seed)
    visits = np.ones(1, np.int64), np.ones(1)
    n_measured = min(_MEASURED_QUERIES, n_rows // 2)
    for block_BR in rows.blocks():
        n_last = n_measured if graph.ntotal + len(block_BR) == n_rows else 0
        for part_BR in np.split(block_BR, [max(0, len(block_BR) - n_last)]):
            if len(part_BR) == n_last > 0:
                visits = _measure_visits(graph, part_BR)
            # FAISS uses the levels that it finds if there is one for each old and new row.
            faiss.copy_array_to_vector(level_N[: graph.ntotal + len(part_BR)], graph.hnsw.levels)
            graph.add(np.ascontiguousarray(part_BR))
        if progress is not None:
            progress(graph.ntotal, n_rows)
    return visits


def _measure_visits(graph: Any, rows_BR: Float32) -> tuple[Int64, Float64]:
    """Return lengths of beams [E], and the numbers of rows that a search scores [E]: the mean over the rows or −rows.

    The larger of the two means is returned.
    """
    faiss = import_faiss()
    parameters, statistics = faiss.SearchParametersHNSW(), faiss.cvar.hnsw_stats
    beam_E, visited_E = [1], [1.0]
    while beam_E[-1] < min(_LARGEST_BEAM, graph.ntotal):
        beam_E.append(min(max(_SMALLEST_BEAM, 2 * beam_E[-1]), _LARGEST_BEAM, graph.ntotal))
        parameters.efSearch = beam_E[-1]
        visited = visited_E[-1]
        for sign in (1, -1):
            before = statistics.ndis
            graph.search(np.float32(sign) * rows_BR, 1, params=parameters)
            visited = max(visited, (statistics.ndis - before) / len(rows_BR))
        visited_E.append(visited)
    return np.array(beam_E, np.int64), np.array(visited_E)


def _decode(graph: Any, position_B: Int64, reduced_BR: Float32) -> tuple[Float32, Float32, Float32]:
    """Return the rows of a graph at some positions [B, R], reduced rows rounded to codes [B, R], and the steps [R]."""
    storage = import_faiss().downcast_index(graph.storage)
    rounded_BR = storage.sa_decode(storage.sa_encode(np.ascontiguousarray(reduced_BR)))
    own_BR = np.stack([storage.reconstruct(int(at)) for at in position_B])
    codes = np.zeros((1, storage.code_size), np.uint8)
    lowest_1R, highest_1R = storage.sa_decode(codes), storage.sa_decode(codes + np.uint8(255))
    return own_BR, rounded_BR, (highest_1R - lowest_1R)[0] / np.float32(15)


def _check_arrays(id_N: Int64, beam_E: Int64, visited_E: Float64) -> tuple[Int64, Int64, Float64]:
    """Return the arrays.

    Raises:
        ValueError: they have other types or shapes, or values that do not increase.
    """
    types = [str(array.dtype) for array in (id_N, beam_E, visited_E)]
    if types != ["int64", "int64", "float64"] or id_N.ndim != 1 or beam_E.ndim != 1:
        raise ValueError(f"ids of {types[0]} {id_N.shape}, beams of {types[1:]} {beam_E.shape}")
    if visited_E.shape != beam_E.shape or not len(beam_E) or visited_E[0] < 1 or (np.diff(visited_E) < 0).any():
        raise ValueError(f"{len(beam_E)} beams that visit {visited_E} rows")
    if (np.diff(id_N, prepend=-1) <= 0).any() or (np.diff(beam_E, prepend=0) <= 0).any():
        raise ValueError("ids or beams do not increase")
    return id_N, beam_E, visited_E
