"""Extraction pipeline: the missing feature files of a store, written in the background, and the canaries.

The pipeline runs in the faster of two orders. Either it loads each checkpoint once and reads the data again for each
checkpoint, or it reads each partition of rows once, keeps it in memory, and runs all checkpoints on it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tracin_ann.choices import SideName
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.features.autotune import BatchSettings
from tracin_ann.features.canaries import Canaries, canary_ids
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions, FeatureRows, RowBuffer, find_nonfinite
from tracin_ann.features.loaded_model import LoadedModel
from tracin_ann.gradients import Plan
from tracin_ann.store import FeatureBlock, FeatureStore, StoreLayout, WriteBehind
from tracin_ann.task import CollatedBatch
from tracin_ann.types import Int64, ProgressCallback

FEWEST_UNEVEN, MOST_UNEVEN = 8, 64
"""Limits of the number of rows of the most uneven batch that are recorded for the audit: a quarter of the batch."""
SIDES: tuple[SideName, ...] = ("train", "query")
# A partition that stays in memory takes at most this share of the memory for rows.
_MEMORY_SHARE = 0.5
# How many times other rows are chosen as canaries, if no canary of a side is finite.
_TRIES = 8
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractionResult:
    """Result of an extraction, besides the feature files.

    Attributes:
        canaries: the canaries of both sides.
        plan: the gradient method of each parameter at checkpoint 0.
        rows: number of rows × checkpoints computed.
        uneven: (row, checkpoint) pairs of the batch with the most uneven example sizes: a quarter of its rows, but from
            8 to 64, those furthest from its median size first. Empty if this run computed nothing; batches of earlier,
            interrupted runs do not count.
    """

    canaries: tuple[Canaries, ...]
    plan: Plan
    rows: int
    uneven: tuple[tuple[int, int], ...]


class Extraction:
    """Computes feature files of a store.

    Args:
        model: the model of the task.
        store: the destination of the features.
        features: options of the features.

    Attributes:
        layout: the layout of the store.
        uneven: the batch with the most uneven example sizes that was computed.
    """

    def __init__(self, model: LoadedModel, store: FeatureStore, features: FeatureOptions) -> None:
        self.layout = store.layout
        self._model, self._store, self._features = model, store, features
        self._extractors: dict[int, FeatureExtractor] = {}
        self._canaries: dict[int, dict[SideName, FeatureRows]] = {}
        self._excluded: dict[SideName, Int64] = dict.fromkeys(SIDES, np.zeros(0, np.int64))
        self._plans: dict[int, Plan] = {}
        self._by_partition = False
        self.uneven = MostUnevenBatch()
        # One buffer is filled while the other is written.
        size = min(self.layout.partition_rows, self.layout.n_rows)
        self._buffers = itertools.cycle([RowBuffer(size, self.layout.dim) for _ in range(2)])

    def run(
        self, files: Sequence[tuple[int, int]], report: ProgressCallback, *, by_partition: bool
    ) -> ExtractionResult:
        """Write feature files, and compute the canaries.

        Args:
            files: (partition, checkpoint) of each file.
            report: called with (stage, done, total).
            by_partition: read each partition once for all checkpoints, instead of once per checkpoint.

        Raises:
            NonFiniteError: a row is not finite and such rows are not skipped, or no finite row is left.
        """
        done, total = 0, self.layout.count_rows(files)
        for n_rows in self.write(files, by_partition=by_partition, canaries=True):
            done += n_rows
            report("features", done, total)
        return ExtractionResult(self._collect_canaries(), self._plans[0], done, self.uneven.places)

    def write(self, files: Sequence[tuple[int, int]], *, by_partition: bool, canaries: bool = False) -> Iterator[int]:
        """Write feature files; yield the number of rows of each batch after it is computed.

        Args:
            files: (partition, checkpoint) of each file.
            by_partition: read each partition once for all checkpoints, instead of once per checkpoint.
            canaries: compute the canaries of each checkpoint while it is loaded.

        Raises:
            NonFiniteError: a row is not finite and such rows are not skipped.
        """
        self._by_partition = by_partition
        size = f"{self.layout.n_rows:,} rows at {self.layout.n_checkpoints} checkpoints"
        logger.info("features of %s: %d files to write", size, len(files))
        units = sorted(files, key=lambda unit: unit if by_partition else unit[::-1])
        groups = [list(group) for _, group in itertools.groupby(units, key=lambda unit: unit[not by_partition])]
        runs = [_Run.of(group) for group in groups]
        spans = [range(*self.layout.rows(partition)) for run in runs for partition in run.partitions]
        with WriteBehind(self._store) as behind, self._model.runner.open_batches("train", spans) as reading:
            for run in runs:
                batches: Iterable[CollatedBatch] = itertools.chain.from_iterable(reading.span() for _ in run.partitions)
                if len(run.checkpoints) > 1:
                    batches = list(batches)
                for checkpoint in run.checkpoints:
                    yield from self._extract(run.partitions, checkpoint, batches, behind.write, canaries=canaries)

    def _extract(
        self,
        partitions: Sequence[int],
        checkpoint: int,
        batches: Iterable[CollatedBatch],
        write: Callable[[int, int, FeatureBlock], None],
        *,
        canaries: bool,
    ) -> Iterator[int]:
        """Compute partitions at a checkpoint, one after the other, in one stream of batches."""
        extractor = self._load_extractor(checkpoint)
        computed = extractor.stream("train", self.uneven.watch(batches, checkpoint))
        for partition in partitions:
            buffer = next(self._buffers)
            buffer.begin(*self.layout.rows(partition))
            while buffer.n_missing:
                rows = next(computed)
                buffer.add(rows)
                yield len(rows.loss_N)
            full = buffer.take()
            write(partition, checkpoint, FeatureBlock(full.ids_N, full.feature_ND, full.sqnorm_N, full.loss_N))
            if canaries and checkpoint not in self._canaries:
                self._compute_canaries(checkpoint, extractor)

    def _compute_canaries(self, checkpoint: int, extractor: FeatureExtractor) -> None:
        n_rows, without = self._model.runner.n_rows, self._excluded
        taken = {side: extractor.rows(side, canary_ids(n_rows(side), without[side])) for side in SIDES}
        self._canaries[checkpoint] = taken
        if not find_nonfinite(taken["train"]).all():
            self._plans[checkpoint] = self._model.engine("train").plan

    def _collect_canaries(self) -> tuple[Canaries, ...]:
        """Return canaries that are finite at every checkpoint; choose other rows if a side has none."""
        skipped, first = self._store.skipped()
        if len(skipped) == self.layout.n_rows:
            raise NonFiniteError(_describe_none_left("training row", f"NaN or infinity first at checkpoint {first[0]}"))
        for _ in range(_TRIES):
            for checkpoint in range(self.layout.n_checkpoints):
                if checkpoint not in self._canaries:
                    self._compute_canaries(checkpoint, self._load_extractor(checkpoint))
            found = {side: self._select_finite(side) for side in SIDES}
            lacking: list[SideName] = [side for side in SIDES if not len(found[side].ids_N)]
            if not lacking:
                return tuple(found[side] for side in SIDES)
            for side in lacking:
                self._excluded[side] = np.union1d(self._excluded[side], self._canaries[0][side].ids_N)
            self._excluded["train"] = np.union1d(self._excluded["train"], skipped)
            if any(len(self._excluded[side]) == self._model.runner.n_rows(side) for side in lacking):
                break
            self._canaries.clear()
        tried = self._excluded[lacking[0]][:_TRIES].tolist()
        raise NonFiniteError(_describe_none_left(f"{lacking[0]} row", f"NaN or infinity for rows {tried}"))

    def _load_extractor(self, checkpoint: int) -> FeatureExtractor:
        """Load a checkpoint if needed, and return its extractor, which is cached if it is used again."""
        if self._model.checkpoint != checkpoint:
            self._model.load(checkpoint)
        if checkpoint not in self._extractors:
            if not self._by_partition:
                self._extractors.clear()
            self._extractors[checkpoint] = FeatureExtractor(self._model, self._features)
        return self._extractors[checkpoint]

    def _select_finite(self, side: SideName) -> Canaries:
        taken = [self._canaries[checkpoint][side] for checkpoint in range(self.layout.n_checkpoints)]
        finite_N = ~np.any([find_nonfinite(rows) for rows in taken], axis=0)
        return Canaries(side, taken[0].ids_N[finite_N], np.stack([rows.feature_ND[finite_N] for rows in taken]))


@dataclass(frozen=True)
class _Run:
    """Partitions that are computed one after the other at each of some checkpoints; one of the two has one element.

    Attributes:
        partitions: in order.
        checkpoints: in order.
    """

    partitions: tuple[int, ...]
    checkpoints: tuple[int, ...]

    @classmethod
    def of(cls, files: Sequence[tuple[int, int]]) -> _Run:
        """Return the run of files (partition, checkpoint) with one partition or one checkpoint."""
        partitions, checkpoints = (tuple(dict.fromkeys(numbers)) for numbers in zip(*files, strict=True))
        return cls(partitions, checkpoints)


def _describe_none_left(what: str, got: str) -> str:
    return problem(
        f"no {what} is left after non-finite rows are skipped",
        got=got,
        expected="rows whose loss and gradient are finite at every checkpoint",
        remedy="leave out that checkpoint, or fix the loss or the data",
    )


def reading_costs_more(layout: StoreLayout, tuned: BatchSettings, load_seconds: float) -> bool:
    """Return whether reading the data once per checkpoint costs more time than loading checkpoints once per partition.

    If so, each partition is read once for all checkpoints, provided that it fits into memory. Measured times may
    decide this: both orders run the same batches and give the same features.
    """
    reading = (layout.n_checkpoints - 1) * layout.n_rows * tuned.read_seconds
    loading = (layout.n_partitions - 1) * layout.n_checkpoints * load_seconds
    fits = min(layout.partition_rows, layout.n_rows) * tuned.row_bytes <= _MEMORY_SHARE * tuned.memory_bytes
    return fits and reading > loading


class MostUnevenBatch:
    """Finds the batch with the most uneven example sizes; of equal batches, the last.

    Batches are compared by the range of their sizes, then by the distance of their mean size from the mean of the first
    batch, on which the gradients were verified, then by the number of rows.

    Attributes:
        measure: these three numbers of the batch.
    """

    def __init__(self) -> None:
        self.measure: tuple[float, float, int] = 0, 0, 0
        self._first_mean: float | None = None
        self._batch: tuple[CollatedBatch, int] | None = None

    def watch(self, batches: Iterable[CollatedBatch], checkpoint: int) -> Iterator[CollatedBatch]:
        """Yield the batches that run at a checkpoint unchanged, and compare each with the most uneven one so far."""
        for read in batches:
            sizes = read.sizes or (0,)
            mean = sum(sizes) / len(sizes)
            if self._first_mean is None:
                self._first_mean = mean
            found = max(sizes) - min(sizes), abs(mean - self._first_mean), len(read.ids)
            if found >= self.measure:
                # Without its inputs and examples, which would stay in memory.
                self.measure, self._batch = found, (replace(read, inputs=None, examples=None), checkpoint)
            yield read

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Return (row, checkpoint) of the batch's rows, those furthest from its median size first."""
        if self._batch is None:
            return ()
        read, checkpoint = self._batch
        sizes = read.sizes or (0,) * len(read.ids)
        middle = sorted(sizes)[len(sizes) // 2]
        order = sorted(range(len(sizes)), key=lambda i: -abs(sizes[i] - middle))
        most = min(MOST_UNEVEN, max(FEWEST_UNEVEN, len(order) // 4))
        return tuple((read.ids[i], checkpoint) for i in order[:most])
