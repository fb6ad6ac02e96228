"""Approximate search with a scan of all codes: candidates from product codes of reduced rows, rescored with the rows.

For rows without clusters, such as the features of language models: lists would have to be probed for a large part of
the rows. The codes are so short that a scan of all of them takes a small part of the time of a scan of the rows.
See `product_codes` for the codes, `product_scan` for a scan of them, `code_shards` for their files, and `rescored` for
the rest of a search.

Shapes: N rows, Q queries, M candidates, F feature dimension, R reduced dimension.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tracin_ann.errors import DamagedIndexError, attach_path, problem
from tracin_ann.files import open_regular, read_json, read_npz, read_record, report_damage
from tracin_ann.search.clustering import stratified_ids, survey
from tracin_ann.search.code_shards import CodeFile, CodeScanner, CodeShards, list_code_files
from tracin_ann.search.construction import SAMPLE_NUMBERS, count_block_rows, scale_rows
from tracin_ann.search.faiss_file import REMEDY, WrittenFile
from tracin_ann.search.product_codes import CODE_BITS, TRAIN_ROWS, Layout, ProductCoder
from tracin_ann.search.product_scan import select_candidates
from tracin_ann.search.reduction import Reduction, fit_axes, pack_reduction, unpack_reduction
from tracin_ann.search.rescored import Caption, Direction, RescoredIndex, UncodedRows
from tracin_ann.search.settings import Setting, check_fields
from tracin_ann.types import Float32, Int64, RowSource

if TYPE_CHECKING:
    from typing_extensions import Self

_CAPTION = "tracin_ann coded scan"
_VERSION = 1
_DIMS_PER_CODE = 3
_LEAST_BITS = 64
_DEFAULT_CANDIDATES = 256
_SMALLEST_BUDGET = 32
_LARGEST_BUDGET = 4096
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class CodedScanParams:
    """Parameters of a coded scan.

    Attributes:
        width: largest number of dimensions to which rows are reduced; None: 3 per code of 4 bits.
        bits: largest number of bits of the codes of a row.
        seed: seed of the training sample, the reduction and the centroids.
        shards: number of files over which the rows are split by their ids.
    """

    width: int | None = None
    bits: int = 1536
    seed: int = 0
    shards: int = 1

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UsageError: a field is out of range.
        """
        check_fields(
            ("width", self.width, self.width is None or self.width >= 1, "at least 1"),
            ("bits", self.bits, self.bits >= _LEAST_BITS, f"at least {_LEAST_BITS}"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
            ("shards", self.shards, self.shards >= 1, "at least 1"),
        )

    @property
    def n_codes(self) -> int:
        """Return the largest number of codes of a row."""
        return self.bits // CODE_BITS

    def count_dims(self, dim: int) -> int:
        """Return the largest number of dimensions of reduced rows of F numbers."""
        return min(dim, self.width or _DIMS_PER_CODE * self.n_codes)

    def estimate_bytes(self, n_rows: int, dim: int) -> int:
        """Return the approximate size in bytes of the files for N rows of F numbers: codes, ids, factors, reduction."""
        width = self.count_dims(dim)
        per_row = min(self.n_codes, width) * CODE_BITS / 8 + 8 + 4
        return round(n_rows * per_row + 4 * dim * width)


@dataclass(frozen=True, kw_only=True)
class _Caption(Caption):
    """The content of the JSON file beside the codes; `others` are the files of all shards but the first."""

    params: CodedScanParams
    codes: WrittenFile
    others: tuple[WrittenFile, ...] = ()
    caption: str = _CAPTION
    version: int = _VERSION


@dataclass(frozen=True)
class _Parts:
    """Codes, parameters, and the exponent of the scale of rows (see `Survey.shift`)."""

    codes: CodeShards
    params: CodedScanParams
    shift: int


class CodedScan(RescoredIndex):
    """Approximate maximum inner product search; the scores of results are exact.

    `Setting.codes` is the number of candidates that are scored again.
    """

    kind = "codes"
    name = "coded scan"
    OTHER_FILES = ("codes.npz", "codes.json")
    FILES = ("codes.faiss", *OTHER_FILES)
    # The best 1,000 of 1,500 contain as many of the true ten as those of 2,000 or 3,000; see docs/design.md#coded-scan.
    candidates_per_result = 1.5
    rescores_budget = True

    def __init__(
        self, source: RowSource, reduction: Reduction, uncoded: UncodedRows, device: torch.device, parts: _Parts
    ) -> None:
        """Wrap codes; use `build` or `load` to create an index."""
        super().__init__(source, reduction, uncoded, device)
        self._parts = parts
        if parts.params.shards > 1:
            self._codes_name = "the file of a shard"
        self.settings = (Setting(_DEFAULT_CANDIDATES),) * 2

    @classmethod
    def build(
        cls,
        source: RowSource,
        params: CodedScanParams,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Build an index of all rows of the source; reads all rows twice, and the training sample once more.

        Args:
            source: the rows.
            params: parameters of the codes.
            device: device of exact scans.
            progress: called with (rows done, rows).

        Raises:
            NonFiniteError: a row contains NaN or infinity; the message has its id.
        """
        block_rows = count_block_rows(source)
        measured = survey(source, block_rows)
        sample_ids = stratified_ids(measured, SAMPLE_NUMBERS // source.dim, params.seed)
        sample_BF = scale_rows(source.take(sample_ids), measured.shift)
        if not len(sample_BF):
            sample_BF = np.zeros((1, source.dim), np.float32)
        axes = fit_axes(sample_BF, params.count_dims(source.dim), params.seed)
        layout = Layout.allocate(axes.square_R, params.n_codes)
        reduction = axes.reduce(layout.width, layout.make_rotation(params.seed))
        coder = ProductCoder.train(reduction.apply(sample_BF[:: -(-len(sample_BF) // TRAIN_ROWS)]), layout, params.seed)
        del sample_BF, axes
        coders = [coder, *(coder.make_empty_copy() for _ in range(1, params.shards))]
        first_id_S = _split_ids(measured.ids_N[measured.listed_N], params.shards)
        start = 0
        for ids_B, rows_BF in source.blocks(block_rows):
            coded_B = measured.listed_N[start : start + len(ids_B)]
            id_B, row_BR = ids_B[coded_B], reduction.apply(scale_rows(rows_BF[coded_B], measured.shift))
            edges = [0, *np.searchsorted(id_B, first_id_S[1:]).tolist(), len(id_B)]
            for each, (first, last) in zip(coders, itertools.pairwise(edges), strict=True):
                each.add(row_BR[first:last], id_B[first:last])
            start += len(ids_B)
            if progress is not None:
                progress(start, len(source))
        shards = CodeShards.hold([each.finish() for each in coders], first_id_S)
        return cls(source, reduction, UncodedRows.find(measured), device, _Parts(shards, params, measured.shift))

    @classmethod
    def load(cls, directory: Path, source: RowSource, device: torch.device) -> Self:
        """Return the index that `save` wrote, see `RescoredIndex.load`."""
        arrays_path, caption_path = (Path(directory) / name for name in cls.OTHER_FILES)
        expected = "a file written by a build"
        content = read_json(caption_path, REMEDY)
        with report_damage(caption_path, expected, REMEDY):
            caption = read_record(_Caption, content)
        with report_damage(arrays_path, expected, REMEDY), open_regular(arrays_path) as file:
            arrays = read_npz(file)
            reduction, outliers = unpack_reduction(arrays, source.dim, caption.energy)
            layout = Layout(arrays["size_C"])
            factors, first_id_S = _unpack_shards(arrays, caption.params.shards)
        paths = [Path(directory) / name for name in list_code_files(caption.params.shards)]
        with report_damage(caption_path, expected, REMEDY):
            written = zip(paths, (caption.codes, *caption.others), factors, strict=True)
            files = [CodeFile(path, each, layout, factor_N) for path, each, factor_N in written]
        codes = CodeShards.load(files, first_id_S)
        got = caption.rows, layout.width, len(codes)
        consistent = len(source), reduction.width, len(source) - caption.quiet_rows - len(outliers)
        if got != consistent:
            raise DamagedIndexError(
                problem(
                    f"{caption_path} does not belong to {paths[0].name}, {arrays_path.name} and the features",
                    got=f"rows, dimensions, rows with codes {got}",
                    expected=str(consistent),
                    remedy=REMEDY,
                )
            )
        uncoded = UncodedRows(outliers, caption.quiet_rows, caption.quiet_norm)
        return cls(source, reduction, uncoded, device, _Parts(codes, caption.params, caption.shift))

    def save(self, directory: Path) -> None:
        """Write the files `FILES`, see `RescoredIndex.save`."""
        arrays_path, caption_path = (Path(directory) / name for name in self.OTHER_FILES)
        codes = self._parts.codes
        arrays = pack_reduction(self._reduction, self._uncoded.outliers)
        arrays |= {"size_C": codes.layout.size_C, "factor_N": np.concatenate(codes.factors)}
        if self.params.shards > 1:
            arrays |= {"first_id_S": codes.first_id_S, "rows_S": np.array(list(map(len, codes.factors)))}
        with attach_path(arrays_path):
            np.savez(arrays_path, allow_pickle=False, **arrays)
        first, *others = codes.save([Path(directory) / name for name in list_code_files(self.params.shards)])
        caption = _Caption(
            **self._describe_rows(self._parts.shift),
            params=self.params,
            codes=first,
            others=tuple(others),
        )
        with attach_path(caption_path):
            caption_path.write_text(json.dumps(dataclasses.asdict(caption)) + "\n", encoding="utf-8")

    def find_faults(self, sample: int, seed: int) -> list[str]:
        """Compare the codes with the source, see `RescoredIndex.find_faults`."""
        codes = self._parts.codes
        coded_N = codes.list_ids()
        found, misplaced = self._compare_ids(coded_N), codes.count_misplaced()
        if misplaced:
            found.append(f"{misplaced:,} rows are in the file of another shard")
        if found:
            return found
        random = np.random.default_rng(seed)
        ids = np.sort(random.permutation(coded_N)[:sample])
        wrong = 0
        for at in range(0, len(ids), _ROWS_AT_ONCE):
            rows_BF = scale_rows(self._source.take(ids[at : at + _ROWS_AT_ONCE]), self._parts.shift)
            wrong += codes.count_wrong(self._reduction.apply(rows_BF), ids[at : at + _ROWS_AT_ONCE])
        return [f"of {len(ids):,} rows checked, {wrong:,} have wrong codes"] if wrong else []

    def with_scanner(self, scanner: CodeScanner) -> Self:
        """Return an index with the same settings, whose codes `scanner` searches, shard by shard."""
        other = copy.copy(self)
        other._parts = dataclasses.replace(self._parts, codes=self._parts.codes.with_scanner(scanner))
        return other

    def list_shards(self, directory: Path) -> list[CodeFile]:
        """Return the files of the shards of a loaded index, which are in the directory."""
        return [dataclasses.replace(file, path=Path(directory) / file.path.name) for file in self._parts.codes.files]

    def propose_settings(self, recall_of: Callable[[Setting], float]) -> Iterator[Sequence[Setting]]:
        """Yield numbers of candidates, each twice the one before."""
        budget = _SMALLEST_BUDGET
        while budget <= min(_LARGEST_BUDGET, max(len(self), _SMALLEST_BUDGET)):
            yield [Setting(budget)]
            budget *= 2

    @property
    def params(self) -> CodedScanParams:
        """Return the parameters of the codes."""
        return self._parts.params

    @property
    def resident_bytes(self) -> int:
        """Return the bytes that the index uses in memory, without the features."""
        basis = self._reduction.basis_FR
        rows = len(self._parts.codes) * self._parts.codes.bytes_per_row
        return rows + (0 if basis is None else basis.nbytes) + self._uncoded.outliers.nbytes

    def _find_candidates(
        self, reduced_QR: Float32, directions: Sequence[Direction], counts: Sequence[int], allowed: Int64 | None
    ) -> list[tuple[Int64, Int64]]:
        """Return the candidates of all directions from one scan, see `RescoredIndex`."""
        signed = np.concatenate([direction.sign * reduced_QR for direction in directions])
        ids_XM, scores_XM = self._parts.codes.scan(signed, max(counts), allowed)
        found: list[tuple[Int64, Int64]] = []
        for number, count in enumerate(counts):
            own = slice(number * len(reduced_QR), (number + 1) * len(reduced_QR))
            ids_QM, _ = select_candidates(ids_XM[own], scores_XM[own], count)
            found.append((ids_QM, len(self._parts.codes) + (ids_QM >= 0).sum(axis=1)))
        return found


def list_coded_files(n_shards: int) -> tuple[str, ...]:
    """Return the names of the files of an index with this many shards."""
    return (*list_code_files(n_shards), *CodedScan.OTHER_FILES)


def _split_ids(ids_N: Int64, n_shards: int) -> Int64:
    """Return the first id of each of several shards of about equal numbers of rows with these ids, increasing."""
    if not len(ids_N):
        return np.zeros(n_shards, np.int64)
    return ids_N[np.arange(n_shards) * len(ids_N) // n_shards]


def _unpack_shards(arrays: Mapping[str, npt.NDArray[Any]], n_shards: int) -> tuple[list[Float32], Int64]:
    """Return the factors of the rows of each shard, and the first ids.

    Raises:
        ValueError: they are not those of this many shards.
    """
    factor_N = arrays["factor_N"]
    if n_shards == 1:
        return [factor_N], np.zeros(1, np.int64)
    first_id_S, rows_S = arrays["first_id_S"], arrays["rows_S"]
    for array in (first_id_S, rows_S):
        if array.dtype != np.int64 or array.shape != (n_shards,) or (array < 0).any():
            raise ValueError(f"shards of {array.dtype} {array.shape}")
    if (np.diff(first_id_S) < 0).any() or rows_S.sum() != len(factor_N):
        raise ValueError("shards that are not those of the rows")
    return np.split(factor_N, rows_S.cumsum()[:-1]), first_id_S
