"""The audit: stored rows held against the gradients of single examples, by plain autograd and sketched alike.

A proof on a batch asks whether the per-example gradients of that batch are right. The audit asks it of the rows on
disk, whatever batch they were computed in, and so of all that lies between an example and its row.

Shapes: N rows, B of them at one checkpoint, P parameters, D sketch dimension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracin_ann.errors import GradientProofError, TaskError
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.features.passes import LoadedModel
from tracin_ann.features.pipeline import ExtractionResult
from tracin_ann.gradients import Batch, Form, GradientEngine, Sink, materialise
from tracin_ann.store import AuditRecord, Dtype, FeatureStore, Start, find_unnamed_files
from tracin_ann.task import CollatedBatch
from tracin_ann.types import Float64, Int64, ProgressCallback

DRAWN = 16
"""(row, checkpoint) pairs that every build audits."""
_COMPUTED = {torch.float64: 1e-6, torch.float32: 5e-4}
_COMPUTED_HALF = 5e-2
_STORED: dict[Dtype, float] = {"float16": 2.0**-11, "float32": 2.0**-23}
# Of the largest norm: a gradient below it may be nothing but rounding.
_FLOOR = 1e-2
# How many copies of a row are run, how often the rounding seen in them is allowed, and the most, of the largest norm.
_COPIES, _TIMES, _MOST_ROUNDING = 16, 8.0, 0.1
_ENTRIES = 1 << 22

Place = tuple[int, int]


@dataclass(frozen=True)
class Difference:
    """A stored row that plain autograd does not confirm.

    Attributes:
        row: its id.
        checkpoint: the position of the checkpoint.
        share: the difference, as a share of the row's norm.
        allowed: the share that rounding explains.
        origin: the parameter that differs most and its layer, or what is known instead.
    """

    row: int
    checkpoint: int
    share: float
    allowed: float
    origin: str

    def __str__(self) -> str:
        """Say it in one line, without a remedy."""
        return (
            f"row {self.row} at checkpoint {self.checkpoint} differs from plain autograd: got a feature that is "
            f"{self.share:.2g} of its norm away, {self.origin}, expected at most {self.allowed:.2g}"
        )


@dataclass(frozen=True)
class AuditResult:
    """What an audit found: how many rows it compared, the largest share of those that agree, and those that differ."""

    rows: int
    largest: float
    differences: tuple[Difference, ...]

    @property
    def record(self) -> AuditRecord:
        """Return what a manifest keeps of it."""
        return AuditRecord(self.rows, self.largest)


def draw_places(n_places: int, store: FeatureStore, without: Int64, seed: int) -> list[Place]:
    """Return (row, checkpoint) pairs drawn at random from all rows but those `without`, at all checkpoints."""
    n_rows, n_checkpoints = store.layout.n_rows, store.layout.n_checkpoints
    rows: Sequence[int] = range(n_rows)
    if len(without):
        rows = np.setdiff1d(np.arange(n_rows, dtype=np.int64), without).tolist()
    total = len(rows) * n_checkpoints
    random = np.random.Generator(np.random.Philox(seed))
    chosen = random.choice(total, min(n_places, total), replace=False).tolist() if total else []
    return [(rows[k // n_checkpoints], k % n_checkpoints) for k in chosen]


@dataclass(frozen=True)
class BuiltRows:
    """What a build is about to publish.

    Attributes:
        extracted: what it computed.
        start: from where it went on.
        missing: (partition, checkpoint) of the files that it wrote.
        removed: ids of the rows that were removed from the answers.
        seed: of the rows that are drawn.
    """

    extracted: ExtractionResult
    start: Start
    missing: Sequence[tuple[int, int]]
    removed: Int64
    seed: int


@dataclass(frozen=True)
class Audits:
    """The audits of a build.

    Attributes:
        drawn: of the rows that the seed draws; None where the rows are random. The same however often a build was
            interrupted, so that its manifest is.
        uneven: of the most uneven batch among those that this run computed, if any.
    """

    drawn: AuditRecord | None = None
    uneven: AuditRecord | None = None


def audit_build(auditor: Auditor, built: BuiltRows) -> Audits:
    """Audit the rows of a build, old ones and new ones.

    Where nothing was computed for an index that is finished already, its own audit stands. Where a row differs, the
    feature files that no manifest names, and those that this run wrote, are removed: a later build computes them anew.

    Raises:
        GradientProofError: a row differs; names it, the parameter and the layer.
    """
    start = built.start
    if start.record.random_data:
        return Audits()
    if not built.missing and start.finished is not None:
        return Audits(start.finished.audit)
    store = auditor.store
    without = np.union1d(store.skipped()[0], built.removed)
    # The uneven batch first: its checkpoint is loaded.
    uneven = auditor.audit([place for place in built.extracted.uneven if place[0] not in without])
    drawn = auditor.audit(draw_places(DRAWN, store, without, built.seed))
    differences = *uneven.differences, *drawn.differences
    if differences:
        computed = find_unnamed_files(store, start.manifest, built.missing)
        for path in computed:
            path.unlink(missing_ok=True)
        first = differences[0]
        is_new = store.path(first.row // store.layout.partition_rows, first.checkpoint) in computed
        raise GradientProofError(_refusal(differences, is_new=is_new))
    return Audits(drawn.record, uneven.record if uneven.rows else None)


def _refusal(differences: Sequence[Difference], *, is_new: bool) -> str:
    more = f" ({len(differences)} rows differ)" if len(differences) > 1 else ""
    remedy = "leave that parameter out with Task.parameters, or build with --batch-size 1"
    if not is_new:
        remedy = "this row is of the index as it was before: build a new one"
    return f"{differences[0]}{more}; nothing is published and what this build computed is removed; {remedy}"


class Auditor:
    """Compares stored rows with plain autograd.

    Args:
        model: the task's, as the build runs it.
        store: the stored rows.
        features: what made them of gradients.
        progress: told the rows done.
    """

    def __init__(
        self, model: LoadedModel, store: FeatureStore, features: FeatureOptions, progress: ProgressCallback
    ) -> None:
        self.store = store
        self._model, self._features, self._progress = model, features, progress
        self._passes, self._data = model.passes, model.passes.data("train")

    def audit(self, places: Sequence[Place]) -> AuditResult:
        """Compare the rows at these places, each (row, checkpoint); every checkpoint is loaded once."""
        by_checkpoint: dict[int, list[int]] = defaultdict(list)
        for row, checkpoint in dict.fromkeys(places):
            by_checkpoint[checkpoint].append(row)
        total, rows_done, largest = sum(map(len, by_checkpoint.values())), 0, 0.0
        differences: list[Difference] = []
        for checkpoint, rows in sorted(by_checkpoint.items()):
            found = self._at(checkpoint, sorted(rows))
            largest = max(largest, found.largest)
            differences += found.differences
            rows_done += found.rows
            self._progress("audit", rows_done, total)
        return AuditResult(rows_done, largest, tuple(differences))

    @property
    def _engine(self) -> GradientEngine:
        return self._model.engine("train")

    def _at(self, checkpoint: int, rows: Sequence[int]) -> AuditResult:
        if self._model.checkpoint != checkpoint:
            self._model.load(checkpoint)
        extractor = FeatureExtractor(self._model, self._features)
        parts = list(self._expected(extractor, rows))
        expected_BD, norm_B = (np.concatenate(values) for values in zip(*parts, strict=True))
        stored_BD = self.store.view([checkpoint]).take(rows).astype(np.float64)
        off_B = np.linalg.norm(stored_BD - expected_BD, axis=1)
        # Rows that are nothing but rounding are measured by the others.
        largest = float(np.max(norm_B[np.isfinite(norm_B)], initial=0.0))
        size_B = np.maximum(norm_B, _FLOOR * largest)
        share_B = np.divide(off_B, size_B, out=np.where(off_B == 0, 0.0, np.inf), where=size_B > 0)
        allowed_B = np.full(len(rows), self._tolerance(rows[0]))
        for i in np.flatnonzero(~(share_B <= allowed_B)).tolist():
            seen = self._rounding(extractor, rows[i], expected_BD[i])
            allowed_B[i] += min(_TIMES * seen, _MOST_ROUNDING * largest) / max(float(size_B[i]), 1e-300)
        fine_B: npt.NDArray[np.bool_] = share_B <= allowed_B
        return AuditResult(
            len(rows),
            float(np.max(share_B[fine_B], initial=0.0)),
            tuple(
                Difference(rows[i], checkpoint, float(share_B[i]), float(allowed_B[i]), self._origin(rows[i]))
                for i in np.flatnonzero(~fine_B).tolist()
            ),
        )

    def _expected(self, extractor: FeatureExtractor, rows: Sequence[int]) -> Iterator[tuple[Float64, Float64]]:
        """Yield features [b, D] by plain autograd and the larger of their and the gradients' norms [b], with √η."""
        rate = self._passes.task.checkpoints[self._model.checkpoint].learning_rate
        step = max(1, _ENTRIES // sum(p.numel() for p in self._model.parameters.values()))
        for start in range(0, len(rows), step):
            grad_BP = torch.stack([self._alone(row) for row in rows[start : start + step]])
            feature_BD = extractor.sketch_gradients(grad_BP)
            norm_B = torch.linalg.vector_norm(grad_BP, dim=1, dtype=torch.float64).cpu().numpy() * rate**0.5
            yield feature_BD, np.maximum(norm_B, np.linalg.norm(feature_BD, axis=1))

    def _alone(self, row: int) -> Tensor:
        """Return a row's whole gradient [P], computed alone by plain autograd."""
        return self._engine.alone(Batch((row,), [self._data[row]], None), 0)[1]

    def _tolerance(self, row: int) -> float:
        """Return the share of its norm that rounding explains, of a row as it is computed and as it is stored."""
        dtypes = {p.dtype for p in self._model.parameters.values()}
        computed = max(_COMPUTED.get(dtype, _COMPUTED_HALF) for dtype in dtypes)
        if self._engine.is_half_precision(self._engine.batch((row,), [self._data[row]])):
            computed = _COMPUTED_HALF
        return computed + _STORED[self.store.layout.dtype]

    def _rounding(self, extractor: FeatureExtractor, row: int, expected_D: Float64) -> float:
        """Return how far the row's feature moves when it is computed in a batch of copies of itself.

        The kernels are those of a batch, and there is nothing else in it that could mix into the row.
        """
        copies = self._engine.batch((row,) * _COPIES, [self._data[row]] * _COPIES)
        together_P = self._engine.together(copies, _COPIES - 1)[1]
        return float(np.linalg.norm(extractor.sketch_gradients(together_P[None])[0] - expected_D))

    def _origin(self, row: int) -> str:
        """Return in words which parameter's gradient differs most when the row's batch runs again, and its layer."""
        try:
            found = self._run_again(row)
        except TaskError as error:
            return f"and its batch, run again, is refused ({error})"
        parameters = self._model.parameters
        parts = torch.split(self._alone(row), [p.numel() for p in parameters.values()])
        true = dict(zip(parameters, parts, strict=True))
        off = {name: float((found[name] - grad if name in found else grad).norm()) for name, grad in true.items()}
        worst = max(off, key=off.__getitem__)
        if not off[worst] > self._tolerance(row) * float(true[worst].norm()):
            return "though its batch, run again, gives what autograd gives"
        return f"most of it in {worst} of {_layer(self._model.module, parameters[worst])}"

    def _run_again(self, row: int) -> dict[str, Tensor]:
        """Return a row's gradient by parameter, each flat, from its batch as the build ran it."""
        window = self._passes.window("train")
        first, stop = self.store.layout.rows(row // self.store.layout.partition_rows)
        first += (row - first) // window * window
        # An engine is proven on the first batch that it runs.
        self._gradient(next(self._batches(0, self.store.layout.rows(0)[1])), 0)
        read = next(read for read in self._batches(first, stop) if row in read.ids)
        return self._gradient(read, read.ids.index(row))

    def _batches(self, first: int, stop: int) -> Iterator[CollatedBatch]:
        span = range(first, min(first + self._passes.window("train"), stop))
        with self._passes.reading("train", [span], ahead=False) as reading:
            yield from reading.span()

    def _gradient(self, read: CollatedBatch, place: int) -> dict[str, Tensor]:
        """Run a batch as a build does and return the gradient of one of its examples, by parameter that it reaches."""
        found: dict[str, Tensor] = {}

        def start() -> Sink:
            found.clear()

            def sink(name: str, form: Form, rows: slice) -> None:
                if rows.start <= place < rows.stop:
                    own = place - rows.start
                    grad_P = materialise(form[own : own + 1])[0]
                    found[name] = found[name] + grad_P if name in found else grad_P

            return sink

        self._engine.run(self._model.batch("train", read), start)
        return found


def _layer(model: Any, parameter: Tensor) -> str:
    """Return the path and class of the module that holds a parameter, of the first if several do."""
    for path, module in model.named_modules():
        if any(held is parameter for held in module._parameters.values()):
            return f"layer {path} ({type(module).__name__})" if path else f"the model itself ({type(module).__name__})"
    raise AssertionError("a parameter that no module holds")
