"""Approximate search with inverted lists (IVF): candidates from the codes of reduced rows, rescored with the rows.

A two-level coarse quantizer selects the lists to probe for a query; see `rescored` for the rest of a search.

Shapes: N rows, Q queries, L lists, W lists per query, M candidates, K results, F feature dimension, R reduced.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tracin_ann.errors import DamagedIndexError, attach_path, problem
from tracin_ann.files import map_array, open_regular, read_json, read_npz, read_record, report_damage, save_array
from tracin_ann.search.coarse_quantizer import Assigner, ListTree
from tracin_ann.search.construction import UnfinishedLists, fill_lists, scale_rows
from tracin_ann.search.gpu import GpuLists, LazyGpuLists, join_names
from tracin_ann.search.list_shards import ListShards, Scanner, ShardFile, list_shard_files
from tracin_ann.search.reduction import Reduction, multiply_rows, normalize, pack_reduction, unpack_reduction
from tracin_ann.search.rescored import Caption, Direction, RescoredIndex, UncodedRows
from tracin_ann.search.settings import IVFParams, Setting, choose_default_setting
from tracin_ann.types import Float32, Float64, Int64, RowSource

_CAPTION = "tracin_ann inverted lists"
_VERSION = 3
_ALPHAS = (0.0, 0.1, 0.2, 0.3)
_RATIOS = (0.5, 1.0, 2.0)
_SMALLEST_BUDGET = 128
_LARGEST_SHARE = 0.25
_MOVED_SHARE = 0.01
"""Share of checked rows that may be in the list of a neighboring centroid, because of rounding."""
_LIST_MARGIN = 3
"""The tree returns this many times the lists that the budget would fill at the mean size: the best lists are short."""


@dataclass(frozen=True, kw_only=True)
class _Caption(Caption):
    """The content of the JSON file beside the lists."""

    params: IVFParams
    lists_bytes: int
    caption: str = _CAPTION
    version: int = _VERSION


@dataclass(frozen=True)
class _Parts:
    """Lists, coarse quantizer, parameters, exponent of the scale of rows (see `Survey.shift`), device of searches."""

    lists: ListShards
    tree: ListTree
    params: IVFParams
    shift: int
    device: torch.device

    @cached_property
    def gpu_lists(self) -> LazyGpuLists:
        """Return the lists for searches on the device."""
        return LazyGpuLists(self.lists.whole, self.tree.centroid_LR, self.device)

    @cached_property
    def unit_group_RG(self) -> Float32:
        """Return the centers of the groups, scaled to norm 1, as columns."""
        return np.ascontiguousarray(normalize(self.tree.group_GR)[0].T)


class IVFIndex(RescoredIndex):
    """Approximate maximum inner product search; the scores of results are exact.

    The settings are those of `choose_default_setting`; `with_settings` returns the same index with other settings.
    """

    kind, name = "ivf", "inverted lists"
    OTHER_FILES = ("ivf.npz", "ivf-centroids.npy", "ivf.json")
    FILES = ("ivf.faiss", *OTHER_FILES)

    def __init__(
        self, source: RowSource, reduction: Reduction, uncoded: UncodedRows, device: torch.device, parts: _Parts
    ) -> None:
        """Wrap filled lists; use `build` or `load` to create an index."""
        super().__init__(source, reduction, uncoded, device)
        self._parts = parts
        if parts.params.shards > 1:
            self._codes_name = "the file of a shard"
        self.settings = (choose_default_setting(len(source)),) * 2

    @classmethod
    def build(
        cls,
        source: RowSource,
        params: IVFParams,
        device: torch.device,
        scratch: UnfinishedLists | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> IVFIndex:
        """Build an index of all rows of the source; see `construction.fill_lists` for the arguments.

        Raises:
            UsageError: there are no rows, or fewer rows than lists.
            NonFiniteError: a row contains NaN or infinity; the message has its id.
        """
        filled = fill_lists(source, params, scratch, progress)
        parts = _Parts(filled.lists, filled.tree, params, filled.measured.shift, device)
        return cls(source, filled.reduction, UncodedRows.find(filled.measured), device, parts)

    @classmethod
    def load(cls, directory: Path, source: RowSource, device: torch.device) -> IVFIndex:
        """Return the index that `save` wrote, see `RescoredIndex.load`."""
        arrays_path, centroids_path, caption_path = (Path(directory) / name for name in cls.OTHER_FILES)
        expected, remedy = "a file written by a build", "rebuild the index"
        content = read_json(caption_path, remedy)
        with report_damage(caption_path, expected, remedy):
            caption = read_record(_Caption, content)
        with report_damage(centroids_path, expected, remedy):
            # Mapped, because they are read only once, when FAISS copies them.
            centroids = map_array(centroids_path)
        with report_damage(arrays_path, expected, remedy), open_regular(arrays_path) as file:
            arrays = read_npz(file)
            tree = ListTree.from_arrays({**arrays, "centroid_LR": centroids})
            reduction, outliers = unpack_reduction(arrays, source.dim, caption.energy)
            first_id_S = _unpack_first_ids(arrays, caption.params.shards)
        list_paths = [Path(directory) / name for name in list_shard_files(caption.params.shards)]
        lists = ListShards.load(list_paths, (tree.n_lists, reduction.width), caption.params.codes, first_id_S)
        n_bytes, n_centroids, width = sum(path.stat().st_size for path in list_paths), *tree.centroid_LR.shape
        got = n_bytes, len(lists), lists.dim, lists.n_lists, int(tree.size_L.sum()), width, caption.rows
        n_listed = len(source) - caption.quiet_rows - len(outliers)
        consistent = caption.lists_bytes, n_listed, reduction.width, n_centroids, n_listed, reduction.width, len(source)
        if got != consistent or not np.array_equal(lists.sizes(), tree.size_L):
            raise DamagedIndexError(
                problem(
                    f"{caption_path} does not belong to {list_paths[0].name}, {arrays_path.name} and the features",
                    got=f"bytes, rows, dimensions, lists, rows in lists, dimensions, rows {got}",
                    expected=f"{consistent} and equal list sizes",
                    remedy=remedy,
                )
            )
        uncoded = UncodedRows(outliers, caption.quiet_rows, caption.quiet_norm)
        return cls(source, reduction, uncoded, device, _Parts(lists, tree, caption.params, caption.shift, device))

    def save(self, directory: Path) -> None:
        """Write the files `FILES`, see `RescoredIndex.save`."""
        arrays_path, centroids_path, caption_path = (Path(directory) / name for name in self.OTHER_FILES)
        parts = self._parts
        list_paths = [Path(directory) / name for name in list_shard_files(parts.params.shards)]
        parts.lists.save(list_paths)
        tree = {name: getattr(parts.tree, name) for name in ListTree.__dataclass_fields__}
        with attach_path(centroids_path), centroids_path.open("wb") as file:
            save_array(file, tree.pop("centroid_LR"))
        with attach_path(arrays_path):
            arrays = pack_reduction(self._reduction, self._uncoded.outliers) | tree
            if parts.params.shards > 1:
                arrays["first_id_S"] = parts.lists.first_id_S
            np.savez(arrays_path, allow_pickle=False, **arrays)
        # The size is stored because FAISS reads a file without its last few bytes and reports no error.
        caption = _Caption(
            **self._describe_rows(parts.shift),
            params=parts.params,
            lists_bytes=sum(path.stat().st_size for path in list_paths),
        )
        with attach_path(caption_path):
            caption_path.write_text(json.dumps(dataclasses.asdict(caption)) + "\n", encoding="utf-8")

    def find_faults(self, sample: int, seed: int) -> list[str]:
        """Compare the lists with the source and return descriptions of the differences.

        All ids are compared; codes and list numbers are recomputed for at least `sample` rows of random lists.
        """
        parts = self._parts
        ids, lists = parts.lists.ids()
        found = self._compare_ids(ids)
        misplaced = parts.lists.find_misplaced_rows()
        if misplaced:
            found.append(f"{misplaced:,} rows are in the file of another shard")
        if found:
            return found
        random = np.random.default_rng(seed)
        assigner = Assigner(parts.tree.group_GR, parts.tree.centroid_LR, parts.tree.parent_L)
        off = moved = seen = 0
        for number in random.permutation(np.unique(lists)):
            if seen >= sample:
                break
            rows = self._source.take(ids[lists == number])
            reduced_BR = self._reduction.apply(scale_rows(rows, parts.shift))
            rounded_BR, step_BR = parts.lists.quantize(reduced_BR)
            # Rounding can move a number to the next code, and a row between two centroids to the other list.
            off += int((np.abs(parts.lists.decode_list(int(number)) - rounded_BR) > 1.01 * step_BR).any(axis=1).sum())
            moved += int((assigner.assign(reduced_BR) != number).sum())
            seen += len(rows)
        if off or moved > _MOVED_SHARE * seen:
            found.append(f"of {seen:,} rows checked, {off:,} have wrong codes and {moved:,} are in wrong lists")
        return found

    def with_scanner(self, scanner: Scanner) -> IVFIndex:
        """Return an index with the same settings, whose lists `scanner` searches, shard by shard."""
        other = copy.copy(self)
        other._parts = replace(self._parts, lists=self._parts.lists.with_scanner(scanner))
        return other

    def propose_settings(self, recall_of: Callable[[Setting], float]) -> Iterator[Sequence[Setting]]:
        """Yield settings of increasing budget; α is the one with the highest recall at the default budget."""
        usual = choose_default_setting(len(self))
        alpha = max(_ALPHAS, key=lambda alpha: recall_of(replace(usual, alpha=alpha)))
        codes = min(_SMALLEST_BUDGET, len(self))
        while True:
            yield [Setting(codes, max(1, round(ratio * codes)), alpha) for ratio in _RATIOS]
            if codes >= _LARGEST_SHARE * len(self):
                return
            codes = math.ceil(codes * math.sqrt(2))

    @property
    def params(self) -> IVFParams:
        """Return the parameters of the lists."""
        return self._parts.params

    @property
    def lists(self) -> ListShards:
        """Return the lists."""
        return self._parts.lists

    def list_shards(self, directory: Path) -> list[ShardFile]:
        """Return the files of the shards in the directory of the index."""
        names, lists = list_shard_files(self.params.shards), self.lists
        return [ShardFile(Path(directory) / name, lists.n_lists, lists.dim, self.params.codes) for name in names]

    @property
    def tree(self) -> ListTree:
        """Return the coarse quantizer."""
        return self._parts.tree

    @property
    def resident_bytes(self) -> int:
        """Return the bytes that the index uses in memory or mapped, without the features."""
        basis = self._reduction.basis_FR
        rows = len(self._parts.lists) * self._parts.lists.bytes_per_row
        return rows + self.tree.resident_bytes + (0 if basis is None else basis.nbytes) + self._uncoded.outliers.nbytes

    def measure(self, queries_QF: Float32) -> tuple[Float64, Float64]:
        """Return the norm of each query [Q], and its largest |cosine| with the center of a group [Q].

        The cosines of a zero query are 0.
        """
        reduced_QR, norm_Q = self._reduce(queries_QF)
        cosine_QG = multiply_rows(reduced_QR, self._parts.unit_group_RG)
        return norm_Q, np.abs(cosine_QG).max(axis=1).astype(np.float64)

    def _find_candidates(
        self, reduced_QR: Float32, directions: Sequence[Direction], counts: Sequence[int], allowed: Int64 | None
    ) -> list[tuple[Int64, Int64]]:
        """Return candidates of the lists that are probed for each direction, see `RescoredIndex`."""
        pairs = zip(directions, counts, strict=True)
        return [self._probe(each.sign * reduced_QR, count, each.setting, allowed) for each, count in pairs]

    def _probe(
        self, reduced_QR: Float32, n_candidates: int, setting: Setting, allowed: Int64 | None
    ) -> tuple[Int64, Int64]:
        """Return candidates for proponents [Q, M], and the numbers of scored codes and centroids [Q]."""
        parts = self._parts
        n_groups = math.ceil(setting.centroids / parts.tree.centroids_per_group)
        n_lists = math.ceil(_LIST_MARGIN * setting.codes / max(self._mean_size, 1.0))
        probes = parts.tree.probe(reduced_QR, setting.alpha, n_groups, n_lists)
        size_QW = np.where(probes.list_QW >= 0, parts.tree.size_L[probes.list_QW], 0)
        before_QW = size_QW.cumsum(axis=1) - size_QW
        within_QW = (before_QW < setting.codes) & (probes.list_QW >= 0)
        width = max(1, int(within_QW.sum(axis=1).max(initial=1)))
        key_QW = np.where(within_QW, probes.list_QW, -1)[:, :width]
        on_gpus = parts.gpu_lists.find(n_candidates, allowed)
        if isinstance(on_gpus, GpuLists):
            ids_QM, _ = on_gpus.scan(reduced_QR, n_candidates, key_QW)
        else:
            ids_QM, _ = parts.lists.scan(reduced_QR, n_candidates, key_QW, allowed)
        return ids_QM, (size_QW * within_QW).sum(axis=1) + probes.scored_Q

    def _describe_code_search(self, k: int, allowed: Int64 | None) -> str:
        """Return where the lists are scanned, see `RescoredIndex`."""
        is_filtered = allowed is not None and len(allowed) < len(self)
        n_candidates = max(self._count_candidates(k, setting) for setting in self.settings)
        on_gpus = self._parts.gpu_lists.find(n_candidates, allowed if is_filtered else None)
        if not isinstance(on_gpus, GpuLists):
            return f"{self.name} searched on the CPU: {on_gpus}"
        return f"lists chosen on the CPU and scanned on {join_names(on_gpus.gpus)} by FAISS"

    @cached_property
    def _mean_size(self) -> float:
        """Return the mean number of rows of the lists with rows."""
        return len(self._parts.lists) / max(1, int((self.tree.size_L > 0).sum()))


def list_ivf_files(n_shards: int) -> tuple[str, ...]:
    """Return the names of the files of an index with this many shards."""
    return (*list_shard_files(n_shards), *IVFIndex.OTHER_FILES)


def _unpack_first_ids(arrays: Mapping[str, npt.NDArray[Any]], n_shards: int) -> Int64:
    """Return the first id of each shard.

    Raises:
        KeyError, ValueError: the arrays are not those of an index with this many shards.
    """
    if n_shards == 1:
        return np.zeros(1, np.int64)
    first_id_S = arrays["first_id_S"]
    if first_id_S.shape != (n_shards,) or first_id_S.dtype != np.int64 or (np.diff(first_id_S, prepend=0) < 0).any():
        raise ValueError(f"first ids {first_id_S.dtype} {first_id_S.shape} of {n_shards} shards")
    return first_id_S
