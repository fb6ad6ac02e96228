"""Construction of the inverted lists: training on a sample, then filling in stretches of rows; resumable.

With `UnfinishedLists`, the trained state and the lists of each stretch are stored on disk. An interrupted build resumes
with the next stretch and does not read the rows of finished stretches again. The result is the same to the bit:
every stretch is filled into empty lists, and stretches are merged in order.

Shapes: N rows, B rows of a block, L lists, G groups, F feature dimension, R reduced dimension.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tracin_ann.device import import_faiss
from tracin_ann.errors import DamagedIndexError
from tracin_ann.files import (
    atomic_path,
    file_digest,
    open_regular,
    read_json,
    read_npz,
    report_damage,
    write_json_atomic,
)
from tracin_ann.search.clustering import Survey, stratified_ids, survey
from tracin_ann.search.coarse_quantizer import Assigner, Extents, ListTree, train_assigner
from tracin_ann.search.inverted_lists import Codes, InvertedLists
from tracin_ann.search.list_shards import ListShards
from tracin_ann.search.reduction import Reduction, fit_reduction
from tracin_ann.search.settings import IVFParams
from tracin_ann.types import Float32, RowSource

STRETCH_ROWS = 2**19
_VERSION = 1
_TRAIN_ROWS_PER_LIST = 16
SAMPLE_NUMBERS = 2**26
_BLOCK_ROWS = 65_536
_BLOCK_NUMBERS = 2**25
_LARGEST_SHIFT = 126
"""Up to this exponent, a power of two and its reciprocal are normal float32 numbers."""


@dataclass(frozen=True)
class UnfinishedLists:
    """A directory with the intermediate results of a build; results under another key are ignored.

    Attributes:
        directory: the directory; `save` creates it.
        key: identifies all inputs of the build (`digest_inputs`).
    """

    directory: Path
    key: str

    def save(self, name: str, lists: InvertedLists, arrays: Mapping[str, Any]) -> None:
        """Store lists and arrays under a name, durably; they are valid once the JSON file, written last, exists."""
        self.directory.mkdir(exist_ok=True)
        digests = []
        for path, write in (
            (self._path(name, ".faiss"), lists.save),
            (self._path(name, ".npz"), lambda temporary: np.savez(temporary, **arrays)),
        ):
            with atomic_path(path) as temporary:
                write(temporary)
                digests.append(file_digest(temporary))
        write_json_atomic(self._path(name, ".json"), {"key": self._key(), "digests": digests})

    def load(
        self, name: str, codes: Codes, like: InvertedLists | None = None
    ) -> tuple[InvertedLists, dict[str, Any]] | None:
        """Return the lists and arrays stored under a name; None if they are missing, damaged or of another build.

        The lists must have the shape of `like`, or without it the shape of the centroids among the arrays.
        """
        paths = self._path(name, ".faiss"), self._path(name, ".npz")
        try:
            if read_json(self._path(name, ".json")) != {"key": self._key(), "digests": [file_digest(p) for p in paths]}:
                return None
            with report_damage(paths[1], "arrays of a build", "run the build again"), open_regular(paths[1]) as file:
                arrays = read_npz(file)
                shape = arrays["centroid_LR"].shape if like is None else (like.n_lists, like.dim)
                return InvertedLists.load(paths[0], shape, codes, mapped=False), arrays
        except (DamagedIndexError, FileNotFoundError):
            return None

    def map(self, name: str, lists: InvertedLists, codes: Codes) -> InvertedLists:
        """Return the lists memory-mapped, after writing them under a name; `load` does not read them."""
        path = self._path(name, ".faiss")
        with atomic_path(path) as temporary:
            lists.save(temporary)
        return InvertedLists.load(path, (lists.n_lists, lists.dim), codes)

    def derive(self, name: str) -> UnfinishedLists:
        """Return the same directory with a key that also includes the digest of the files stored under a name."""
        return UnfinishedLists(self.directory, f"{self.key} {file_digest(self._path(name, '.json'))}")

    def _key(self) -> str:
        return f"{_VERSION}-{import_faiss().__version__}-{STRETCH_ROWS}-{self.key}"

    def _path(self, name: str, suffix: str) -> Path:
        return self.directory / f"{name}{suffix}"


@dataclass(frozen=True)
class FilledLists:
    """Lists with all rows, and the data that a search needs with them."""

    lists: ListShards
    tree: ListTree
    reduction: Reduction
    measured: Survey


@dataclass(frozen=True)
class _Training:
    """The result of training: empty lists, the assignment and reduction of rows, and the norms of all rows."""

    lists: InvertedLists
    assigner: Assigner
    reduction: Reduction
    measured: Survey


def fill_lists(
    source: RowSource,
    params: IVFParams,
    scratch: UnfinishedLists | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FilledLists:
    """Build lists of all rows of the source; reads all rows twice, and the training sample once more.

    With several shards and a scratch directory, a shard is memory-mapped as soon as it has all its rows, so that one
    shard is in memory at a time.

    Args:
        source: the rows.
        params: parameters of the lists.
        scratch: storage for intermediate results; the build resumes from those found there.
        progress: called with (rows done, rows).

    Raises:
        UsageError: there are no rows, or fewer rows than lists.
        NonFiniteError: a row contains NaN or infinity; the message has its id.
    """
    params.count_lists(len(source))
    training = _train(source, params, scratch)
    scratch = None if scratch is None else scratch.derive("trained")
    assigner, shards = training.assigner, ListShards.split(training.lists, params.shards, training.measured.ids_N)
    ends = [len(source) * number // params.shards for number in range(1, params.shards + 1)]
    extents = assigner.take_extents()
    starts = range(0, len(source), STRETCH_ROWS)
    for number, start in enumerate(starts):
        stop = min(start + STRETCH_ROWS, len(source))
        # The last stretch is not stored: it is merged immediately, and the complete index is saved next.
        storage = scratch if number + 1 < len(starts) else None
        done = storage.load(f"stretch-{number:06d}", params.codes, training.lists) if storage is not None else None
        if done is None:
            part = training.lists.make_empty_copy()
            _fill_stretch(part, source, training, start, stop)
            done = part, asdict(assigner.take_extents())
            if storage is not None:
                storage.save(f"stretch-{number:06d}", *done)
        shards.merge(done[0])
        extents = extents + Extents(**done[1])
        if scratch is not None and params.shards > 1:
            for shard in [shard for shard, end in enumerate(ends) if start < end <= stop]:
                shards.replace(shard, partial(scratch.map, f"shard-{shard:04d}", codes=params.codes))
        if progress is not None:
            progress(stop, len(source))
    return FilledLists(shards, assigner.make_tree(extents), training.reduction, training.measured)


def _fill_stretch(lists: InvertedLists, source: RowSource, training: _Training, start: int, stop: int) -> None:
    """Add the rows at positions start .. stop − 1 to the lists."""
    measured = training.measured
    for ids_B, rows_BF in source.blocks(count_block_rows(source), start):
        rows = slice(start, min(start + len(ids_B), stop))
        n_rows = rows.stop - rows.start
        listed_B = measured.listed_N[rows]
        if listed_B.any():
            reduced_BR = training.reduction.apply(scale_rows(rows_BF[:n_rows][listed_B], measured.shift))
            lists.add(reduced_BR, training.assigner.assign(reduced_BR), ids_B[:n_rows][listed_B])
        start = rows.stop
        if start == stop:
            return


def _train(source: RowSource, params: IVFParams, scratch: UnfinishedLists | None) -> _Training:
    """Return the trained state: loaded from the scratch directory, or else trained and stored there."""
    stored = None if scratch is None else scratch.load("trained", params.codes)
    if stored is not None:
        lists, arrays = stored
        basis = arrays["basis_FR"]
        return _Training(
            lists,
            Assigner(arrays["group_GR"], arrays["centroid_LR"], arrays["parent_L"]),
            Reduction(source.dim, basis if basis.size else None, float(arrays["energy"])),
            Survey(arrays["ids_N"], arrays["norm_N"]),
        )
    block_rows = count_block_rows(source)
    measured = survey(source, block_rows)
    n_lists = min(params.count_lists(len(source)), max(1, int(measured.listed_N.sum())))
    sample_ids = stratified_ids(measured, params.train_rows or _TRAIN_ROWS_PER_LIST * n_lists, params.seed)
    reduction_ids = stratified_ids(measured, SAMPLE_NUMBERS // source.dim, params.seed)
    reduction = fit_reduction(scale_rows(source.take(reduction_ids), measured.shift), params.width, params.seed)
    sample = [np.zeros((0, reduction.width), np.float32)]
    for at in range(0, len(sample_ids), block_rows):
        rows = source.take(sample_ids[at : at + block_rows])
        sample.append(reduction.apply(scale_rows(rows, measured.shift)))
    sample_BR = np.concatenate(sample) if len(sample_ids) else np.zeros((1, reduction.width), np.float32)
    assigner = train_assigner(sample_BR, n_lists, params.seed)
    training = _Training(InvertedLists.train(sample_BR, assigner.n_lists, params.codes), assigner, reduction, measured)
    if scratch is not None:
        basis = reduction.basis_FR
        arrays = {"basis_FR": np.zeros((0, 0), np.float32) if basis is None else basis, "energy": reduction.energy}
        arrays |= {"ids_N": measured.ids_N, "norm_N": measured.norm_N}
        scratch.save("trained", training.lists, arrays | assigner.arrays)
    return training


def count_block_rows(source: RowSource) -> int:
    """Return how many rows are read at once."""
    return max(1, min(_BLOCK_ROWS, _BLOCK_NUMBERS // source.dim))


def scale_rows(rows_BF: Float32, shift: int) -> Float32:
    """Return rows × 2^shift."""
    if abs(shift) > _LARGEST_SHIFT:
        far_BF: Float32 = np.ldexp(rows_BF, shift)
        return far_BF
    # A product takes a tenth of the time.
    return rows_BF * np.float32(2.0**shift)


def digest_inputs(params: IVFParams, *parts: object) -> str:
    """Return a key for `UnfinishedLists`: the parameters and all other inputs that determine the lists, as JSON."""
    return json.dumps([asdict(params), *parts], sort_keys=True)
