"""Features of every missing row and checkpoint, in the cheaper order, written behind the compute; and the canaries.

A checkpoint is loaded once and the data read again for each, or, where data is dearer than loading, a
partition of rows is read once, held in memory, and all checkpoints run over it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tracin_ann.choices import SideName
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.features.autotune import RunSettings
from tracin_ann.features.canaries import Canaries, canary_ids
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions, FeatureRows, RowBuffer, find_nonfinite
from tracin_ann.features.passes import LoadedModel
from tracin_ann.gradients import Plan
from tracin_ann.store import FeatureBlock, FeatureStore, StoreLayout, WriteBehind
from tracin_ann.task import CollatedBatch
from tracin_ann.types import Int64, ProgressCallback

MOST_UNEVEN = 64
"""Rows of the most uneven batch that are kept, at most."""
SIDES: tuple[SideName, ...] = ("train", "query")
_HELD_SHARE = 0.5
_TRIES = 8
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractionResult:
    """What an extraction gives besides the files.

    Attributes:
        canaries: of both sides.
        plan: of gradients.
        rows: rows × checkpoints computed.
        uneven: (row, checkpoint) of the most uneven batch: those of its rows, at most 64, whose sizes are least like
            the others'; empty where nothing was computed. Batches of an earlier run that was killed take no part.
    """

    canaries: tuple[Canaries, ...]
    plan: Plan
    rows: int
    uneven: tuple[tuple[int, int], ...]


class Extraction:
    """The features that a store lacks, by a model.

    Args:
        model: the task's, loaded with any checkpoint.
        store: where the features go.
        features: what turns gradients into rows.
        missing: (partition, checkpoint) of the files to write.
        report: called with (stage, done, total).
    """

    def __init__(
        self,
        model: LoadedModel,
        store: FeatureStore,
        features: FeatureOptions,
        missing: Sequence[tuple[int, int]],
        report: ProgressCallback,
    ) -> None:
        self.layout = store.layout
        self._model, self._store, self._features = model, store, features
        self._missing = missing
        total = sum(stop - start for start, stop in (self.layout.rows(p) for p, _ in self._missing))
        self._counted = _Counter(report, total)
        self._extractors: dict[int, FeatureExtractor] = {}
        self._canaries: dict[int, dict[SideName, FeatureRows]] = {}
        self._not_canaries: dict[SideName, Int64] = dict.fromkeys(SIDES, np.zeros(0, np.int64))
        self._plans: dict[int, Plan] = {}
        self._held = False
        self._uneven = _MostUneven()
        # Two: one is filled while the other is written.
        size = min(self.layout.partition_rows, self.layout.n_rows)
        self._buffers = itertools.cycle([RowBuffer(size, self.layout.dim) for _ in range(2)])

    def run(self, *, held: bool) -> ExtractionResult:
        """Write every feature file that is missing; `held`: partitions are read once for all checkpoints.

        Raises:
            NonFiniteError: a row is not finite, or where such rows are skipped, none is left.
        """
        self._held = held
        size = f"{self.layout.n_rows:,} rows at {self.layout.n_checkpoints} checkpoints"
        logger.info("features of %s: %d files to make", size, len(self._missing))
        units = sorted(self._missing, key=lambda unit: unit if held else unit[::-1])
        groups = itertools.groupby(units, key=lambda unit: unit[0]) if held else ((p, [(p, c)]) for p, c in units)
        work = [(partition, [c for _, c in group]) for partition, group in groups]
        spans = [range(*self.layout.rows(partition)) for partition, _ in work]
        with WriteBehind(self._store) as behind, self._model.passes.reading("train", spans) as reading:
            for partition, checkpoints in work:
                self._partition(partition, checkpoints, reading.span(), behind.write)
        return ExtractionResult(self._settled(), self._plans[0], self._counted.done, self._uneven.places)

    def _partition(
        self,
        partition: int,
        checkpoints: Sequence[int],
        span: Iterable[CollatedBatch],
        write: Callable[[int, int, FeatureBlock], None],
    ) -> None:
        start, stop = self.layout.rows(partition)
        batches = list(span) if len(checkpoints) > 1 else span
        for checkpoint in checkpoints:
            extractor = self._at(checkpoint)
            stream = extractor.stream("train", self._uneven.watching(batches, checkpoint))
            rows = next(self._buffers).filled(start, stop, self._counted(stream))
            write(partition, checkpoint, FeatureBlock(rows.ids_N, rows.feature_ND, rows.sqnorm_N, rows.loss_N))
            if checkpoint not in self._canaries:
                self._take_canaries(checkpoint, extractor)

    def _take_canaries(self, checkpoint: int, extractor: FeatureExtractor) -> None:
        n_rows, without = self._model.passes.n_rows, self._not_canaries
        taken = {side: extractor.rows(side, canary_ids(n_rows(side), without[side])) for side in SIDES}
        self._canaries[checkpoint] = taken
        if not find_nonfinite(taken["train"]).all():
            self._plans[checkpoint] = self._model.engine("train").plan

    def _settled(self) -> tuple[Canaries, ...]:
        """Return the canaries, none of which was skipped; others are looked for where a side has none left."""
        skipped, first = self._store.skipped()
        if len(skipped) == self.layout.n_rows:
            raise NonFiniteError(_nothing_left("training row", f"NaN or infinity first at checkpoint {first[0]}"))
        for _ in range(_TRIES):
            for checkpoint in range(self.layout.n_checkpoints):
                if checkpoint not in self._canaries:
                    self._take_canaries(checkpoint, self._at(checkpoint))
            found = {side: self._joined(side) for side in SIDES}
            lacking: list[SideName] = [side for side in SIDES if not len(found[side].ids_N)]
            if not lacking:
                return tuple(found[side] for side in SIDES)
            for side in lacking:
                self._not_canaries[side] = np.union1d(self._not_canaries[side], self._canaries[0][side].ids_N)
            self._not_canaries["train"] = np.union1d(self._not_canaries["train"], skipped)
            if any(len(self._not_canaries[side]) == self._model.passes.n_rows(side) for side in lacking):
                break
            self._canaries.clear()
        tried = self._not_canaries[lacking[0]][:_TRIES].tolist()
        raise NonFiniteError(_nothing_left(f"{lacking[0]} row", f"NaN or infinity for rows {tried}"))

    def _at(self, checkpoint: int) -> FeatureExtractor:
        """Load a checkpoint unless it is there, and return its extractor; kept if it will be needed again."""
        if self._model.checkpoint != checkpoint:
            self._model.load(checkpoint)
        if checkpoint not in self._extractors:
            if not self._held:
                self._extractors.clear()
            self._extractors[checkpoint] = FeatureExtractor(self._model, self._features)
        return self._extractors[checkpoint]

    def _joined(self, side: SideName) -> Canaries:
        taken = [self._canaries[checkpoint][side] for checkpoint in range(self.layout.n_checkpoints)]
        fine_N = ~np.any([find_nonfinite(rows) for rows in taken], axis=0)
        return Canaries(side, taken[0].ids_N[fine_N], np.stack([rows.feature_ND[fine_N] for rows in taken]))


def _nothing_left(what: str, got: str) -> str:
    return problem(
        f"no {what} is left: those looked at are all to be skipped",
        got=got,
        expected="some rows whose losses and gradients are finite at every checkpoint",
        remedy="leave out that checkpoint, or mend the loss or the data",
    )


def reading_costs_more(layout: StoreLayout, tuned: RunSettings, load_seconds: float) -> bool:
    """Return whether to read each partition once for all checkpoints, rather than load each checkpoint once.

    The clock may decide this: batches are the same in either order, and so are the features.
    """
    reading = (layout.n_checkpoints - 1) * layout.n_rows * tuned.read_seconds
    loading = (layout.n_partitions - 1) * layout.n_checkpoints * load_seconds
    fits = min(layout.partition_rows, layout.n_rows) * tuned.row_bytes <= _HELD_SHARE * tuned.memory_bytes
    return fits and reading > loading


class _Counter:
    """Passes rows on and reports how many there were so far."""

    def __init__(self, report: ProgressCallback, total: int) -> None:
        self._report, self._total = report, total
        self.done = 0

    def __call__(self, stream: Iterator[FeatureRows]) -> Iterator[FeatureRows]:
        for rows in stream:
            yield rows
            self.done += len(rows.loss_N)
            self._report("features", self.done, self._total)


class _MostUneven:
    """Passes batches on and keeps the one whose rows differ most in size; of equals, the last.

    Compared are, in this order: the largest size less the smallest, the distance of the mean size from that of the
    first batch, which the gradients were proven on, and the number of rows.
    """

    def __init__(self) -> None:
        self._first_mean: float | None = None
        self._most: tuple[float, float, int] = 0, 0, 0
        self._kept: tuple[CollatedBatch, int] | None = None

    def watching(self, batches: Iterable[CollatedBatch], checkpoint: int) -> Iterator[CollatedBatch]:
        """Yield the batches that run at a checkpoint."""
        for read in batches:
            sizes = read.sizes or (0,)
            mean = sum(sizes) / len(sizes)
            if self._first_mean is None:
                self._first_mean = mean
            found = max(sizes) - min(sizes), abs(mean - self._first_mean), len(read.ids)
            if found >= self._most:
                # Not its inputs, which would stay in memory.
                self._most, self._kept = found, (replace(read, inputs=None, examples=None), checkpoint)
            yield read

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Return (row, checkpoint) of the batch's rows, the most unlike sizes first."""
        if self._kept is None:
            return ()
        read, checkpoint = self._kept
        sizes = read.sizes or (0,) * len(read.ids)
        middle = sorted(sizes)[len(sizes) // 2]
        order = sorted(range(len(sizes)), key=lambda i: -abs(sizes[i] - middle))
        return tuple((read.ids[i], checkpoint) for i in order[:MOST_UNEVEN])
