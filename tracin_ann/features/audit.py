"""Audit of gradients: stored feature rows compared with rows computed from single examples by plain autograd.

The gradient engine verifies the per-example gradients of one batch. The audit verifies rows on disk, whatever batch
they were computed in: reading, collating, gradients, sketch and storage together.

Shapes: B audited rows at one checkpoint, P parameters, D sketch dimension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tracin_ann.choices import DTYPES, Dtype
from tracin_ann.errors import GradientProofError, TaskError
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.features.loaded_model import LoadedModel
from tracin_ann.features.pipeline import ExtractionResult
from tracin_ann.gradients import Batch, Form, GradientEngine, Sink, materialise
from tracin_ann.store import AuditRecord, BuildStart, FeatureStore, find_unnamed_files, is_coded
from tracin_ann.task import CollatedBatch
from tracin_ann.types import Float64, Int64, ProgressCallback

N_DRAWN = 16
"""Number of random (row, checkpoint) pairs that each build audits."""
# Tolerated rounding of a row, as a share of its norm: computed in a dtype, in half precision, and stored in a dtype.
# Of codes, it is the rounding of the factor of a row (`FeatureStore.measure_differences`).
_COMPUTED = {torch.float64: 1e-6, torch.float32: 5e-4}
_COMPUTED_HALF = 5e-2
# A code also depends on the norm of the row, and its factor on the whole row.
_CODED_FACTOR = 4
_CODED = 2e-4
_STORED: dict[Dtype, float] = dict.fromkeys(DTYPES, _CODED)
_STORED |= {"float16": 2.0**-11, "float32": 2.0**-23}
# Gradients below this share of the largest norm may consist of rounding only.
_FLOOR = 1e-2
# The rounding of a row is measured in a batch of 16 copies, and with 8 slight changes of the weights. A difference
# of 8 times that rounding is tolerated, up to a share of the largest norm.
_COPIES, _CHANGES, _ROUNDING_FACTOR, _MOST_ROUNDING = 16, 8, 8.0, 0.1
# Gradients that are sketched at once have at most this many entries.
_ENTRIES = 1 << 22

Place = tuple[int, int]
"""A row id and the position of a checkpoint."""


@dataclass(frozen=True)
class Difference:
    """A stored row that differs from plain autograd.

    Attributes:
        row: the id of the row.
        checkpoint: the position of the checkpoint.
        share: the norm of the difference, relative to the norm of the row.
        allowed: the relative difference that rounding can explain.
        origin: in words, the parameter that differs most and its layer, or why it is unknown.
    """

    row: int
    checkpoint: int
    share: float
    allowed: float
    origin: str

    def __str__(self) -> str:
        """Return a one-line description without a remedy."""
        return (
            f"row {self.row} at checkpoint {self.checkpoint} differs from plain autograd: got a relative difference of "
            f"{self.share:.2g}, {self.origin}, expected at most {self.allowed:.2g}"
        )


@dataclass(frozen=True)
class AuditResult:
    """Result of an audit.

    Attributes:
        rows: number of (row, checkpoint) pairs compared.
        largest: the largest relative difference among the rows that agree.
        differences: the rows that differ.
    """

    rows: int
    largest: float
    differences: tuple[Difference, ...]

    @property
    def record(self) -> AuditRecord:
        """Return the record for the manifest."""
        return AuditRecord(self.rows, self.largest)


def draw_places(n_places: int, store: FeatureStore, without: Int64, seed: int) -> list[Place]:
    """Return distinct random (row, checkpoint) pairs from all checkpoints and all rows except those in `without`."""
    n_rows, n_checkpoints = store.layout.n_rows, store.layout.n_checkpoints
    rows: Sequence[int] = range(n_rows)
    if len(without):
        rows = np.setdiff1d(np.arange(n_rows, dtype=np.int64), without).tolist()
    total = len(rows) * n_checkpoints
    random = np.random.Generator(np.random.Philox(seed))
    chosen = random.choice(total, min(n_places, total), replace=False).tolist() if total else []
    return [(rows[k // n_checkpoints], k % n_checkpoints) for k in chosen]


@dataclass(frozen=True)
class UnpublishedRows:
    """The rows of a build before publication.

    Attributes:
        extracted: the result of the extraction of this run.
        start: the state of the directory before this run.
        missing: (partition, checkpoint) of each file that this run wrote.
        removed: ids of the rows that were removed from the index.
        seed: seed of the random draw.
    """

    extracted: ExtractionResult
    start: BuildStart
    missing: Sequence[tuple[int, int]]
    removed: Int64
    seed: int


@dataclass(frozen=True)
class BuildAudits:
    """The two audits of a build.

    Attributes:
        drawn: the audit of randomly drawn rows; None if the data is random. It does not depend on interruptions of the
            build, and neither does the manifest that stores it.
        uneven: the audit of the most uneven batch of this run; None if this run computed no batch.
    """

    drawn: AuditRecord | None = None
    uneven: AuditRecord | None = None


def audit_build(auditor: Auditor, built: UnpublishedRows) -> BuildAudits:
    """Audit the rows of a build, both those of the existing index and new ones.

    If the index was finished before and this run computed no rows, the recorded audit is returned. If a row differs,
    the feature files of this run and those that no manifest lists are removed, so that a later build recomputes them.

    Raises:
        GradientProofError: a row differs; the message names the row, the parameter and the layer.
    """
    start = built.start
    if start.record.random_data:
        return BuildAudits()
    if not built.missing and start.finished is not None:
        return BuildAudits(start.finished.audit)
    store = auditor.store
    without = np.union1d(store.skipped()[0], built.removed)
    # The uneven batch first: its checkpoint may still be loaded.
    uneven = auditor.audit([place for place in built.extracted.uneven if place[0] not in without])
    drawn = auditor.audit(draw_places(N_DRAWN, store, without, built.seed))
    _require_equal((*uneven.differences, *drawn.differences), store, start, built.missing)
    return BuildAudits(drawn.record, uneven.record if uneven.rows else None)


def audit_files(
    auditor: Auditor, places: Sequence[Place], start: BuildStart, written: Sequence[tuple[int, int]]
) -> None:
    """Audit rows of feature files that a worker has `written` as (partition, checkpoint); not if the data is random.

    Raises:
        GradientProofError: a row differs; all files that no manifest lists are deleted.
    """
    if start.record.random_data:
        return
    store = auditor.store
    chosen = []
    for row, checkpoint in places:
        partition, place = divmod(row, store.layout.partition_rows)
        if place not in store.file(partition, checkpoint).skipped_K:
            chosen.append((row, checkpoint))
    _require_equal(auditor.audit(chosen).differences, store, start, written)


def _require_equal(
    differences: Sequence[Difference], store: FeatureStore, start: BuildStart, written: Sequence[tuple[int, int]]
) -> None:
    """Delete the files that no manifest lists, or that were written in this run, if a row differs.

    Raises:
        GradientProofError: a row differs.
    """
    if not differences:
        return
    computed = find_unnamed_files(store, start.manifest, written)
    for path in computed:
        path.unlink(missing_ok=True)
    first = differences[0]
    is_new = store.path(first.row // store.layout.partition_rows, first.checkpoint) in computed
    raise GradientProofError(_describe_failure(differences, is_new=is_new))


def _describe_failure(differences: Sequence[Difference], *, is_new: bool) -> str:
    more = f" ({len(differences)} rows differ)" if len(differences) > 1 else ""
    remedy = "exclude that parameter with Task.parameters, or build with --batch-size 1"
    if not is_new:
        remedy = "the row belongs to the existing index: build a new index"
    return f"{differences[0]}{more}; nothing was published, and the files of this build were removed; {remedy}"


class Auditor:
    """Compares stored rows with plain autograd.

    Args:
        model: the model of the task, with the settings of the build.
        store: the stored rows.
        features: the options with which the rows were computed.
        progress: called with ("audit", rows done, rows in total).
    """

    def __init__(
        self, model: LoadedModel, store: FeatureStore, features: FeatureOptions, progress: ProgressCallback
    ) -> None:
        self.store = store
        self._model, self._features, self._progress = model, features, progress
        self._runner, self._data = model.runner, model.runner.data("train")

    def audit(self, places: Sequence[Place]) -> AuditResult:
        """Compare the stored rows at these (row, checkpoint) pairs; each checkpoint is loaded once."""
        by_checkpoint: dict[int, list[int]] = defaultdict(list)
        for row, checkpoint in dict.fromkeys(places):
            by_checkpoint[checkpoint].append(row)
        total, rows_done, largest = sum(map(len, by_checkpoint.values())), 0, 0.0
        differences: list[Difference] = []
        for checkpoint, rows in sorted(by_checkpoint.items()):
            found = self._audit_checkpoint(checkpoint, sorted(rows))
            largest = max(largest, found.largest)
            differences += found.differences
            rows_done += found.rows
            self._progress("audit", rows_done, total)
        return AuditResult(rows_done, largest, tuple(differences))

    @property
    def _engine(self) -> GradientEngine:
        return self._model.engine("train")

    def _audit_checkpoint(self, checkpoint: int, rows: Sequence[int]) -> AuditResult:
        if self._model.checkpoint != checkpoint:
            self._model.load(checkpoint)
        extractor = FeatureExtractor(self._model, self._features)
        parts = list(self._compute_expected(extractor, rows))
        expected_BD, norm_B = (np.concatenate(values) for values in zip(*parts, strict=True))
        off_B = self.store.measure_differences(checkpoint, rows, expected_BD)
        # The norms of rows that may consist of rounding are replaced by a floor.
        largest = float(np.max(norm_B[np.isfinite(norm_B)], initial=0.0))
        size_B = np.maximum(norm_B, _FLOOR * largest)
        share_B = np.divide(off_B, size_B, out=np.where(off_B == 0, 0.0, np.inf), where=size_B > 0)
        allowed_B = np.full(len(rows), self._tolerance(rows[0]))
        for i in np.flatnonzero(~(share_B <= allowed_B)).tolist():
            rounding = self._measure_rounding(extractor, rows[i], expected_BD[i])
            allowed_B[i] += min(_ROUNDING_FACTOR * rounding, _MOST_ROUNDING * largest) / max(float(size_B[i]), 1e-300)
        agrees_B: npt.NDArray[np.bool_] = share_B <= allowed_B
        return AuditResult(
            len(rows),
            float(np.max(share_B[agrees_B], initial=0.0)),
            tuple(
                Difference(rows[i], checkpoint, float(share_B[i]), float(allowed_B[i]), self._describe_origin(rows[i]))
                for i in np.flatnonzero(~agrees_B).tolist()
            ),
        )

    def _compute_expected(self, extractor: FeatureExtractor, rows: Sequence[int]) -> Iterator[tuple[Float64, Float64]]:
        """Yield features [b, D] by plain autograd, and norms [b], for b rows at a time.

        A norm is the larger one of the feature's norm and the gradient's norm, both scaled by √η.
        """
        rate = self._model.rate
        step = max(1, _ENTRIES // sum(p.numel() for p in self._model.parameters.values()))
        for start in range(0, len(rows), step):
            grad_BP = torch.stack([self._compute_gradient(row) for row in rows[start : start + step]])
            feature_BD = extractor.sketch_gradients(grad_BP)
            norm_B = torch.linalg.vector_norm(grad_BP, dim=1, dtype=torch.float64).cpu().numpy() * rate**0.5
            yield feature_BD, np.maximum(norm_B, np.linalg.norm(feature_BD, axis=1))

    def _compute_gradient(self, row: int) -> Tensor:
        """Return the scaled gradient [P] of one example, computed alone by plain autograd."""
        return self._engine.scale(self._engine.compute_alone(Batch((row,), [self._data[row]], None), 0)[1])

    def _tolerance(self, row: int) -> float:
        """Return the relative difference that rounding explains: of computation and of storage."""
        dtypes = {p.dtype for p in self._model.parameters.values()}
        computed = max(_COMPUTED.get(dtype, _COMPUTED_HALF) for dtype in dtypes)
        if self._engine.is_half_precision(self._engine.batch((row,), [self._data[row]])):
            computed = _COMPUTED_HALF
        dtype = self.store.layout.dtype
        return computed * (_CODED_FACTOR if is_coded(dtype) else 1) + _STORED[dtype]

    def _measure_rounding(self, extractor: FeatureExtractor, row: int, expected_D: Float64) -> float:
        """Return the largest distance between the row's feature and features that only rounding distinguishes from it.

        One is computed in a batch of copies of the example: it uses the kernels of a batch, but has no other example
        that could affect the row. The others are computed alone, with weights that differ in their last digits: the
        gradient of ReLU, for example, has a jump at 0, and rounding decides the side of an input close to it.
        """
        copies = self._engine.batch((row,) * _COPIES, [self._data[row]] * _COPIES)
        found = [self._engine.scale(self._engine.compute_in_batch(copies, _COPIES - 1)[1])]
        for seed in range(_CHANGES):
            with _change_last_digits(self._model.module, seed):
                found.append(self._compute_gradient(row))
        feature_KD = np.concatenate([extractor.sketch_gradients(grad_P[None]) for grad_P in found])
        return float(np.linalg.norm(feature_KD - expected_D, axis=1).max())

    def _describe_origin(self, row: int) -> str:
        """Run the row's batch again; describe the parameter whose gradient differs most, and its layer."""
        try:
            found = self._recompute_gradient(row)
        except TaskError as error:
            return f"and its batch fails when it runs again ({error})"
        parameters = self._model.parameters
        parts = torch.split(self._compute_gradient(row), [p.numel() for p in parameters.values()])
        true = dict(zip(parameters, parts, strict=True))
        off = {name: float((found[name] - grad if name in found else grad).norm()) for name, grad in true.items()}
        worst = max(off, key=off.__getitem__)
        if not off[worst] > self._tolerance(row) * float(true[worst].norm()):
            return "but its batch agrees with autograd when it runs again"
        return f"mostly in {worst} of {_describe_layer(self._model.module, parameters[worst])}"

    def _recompute_gradient(self, row: int) -> dict[str, Tensor]:
        """Return the flat gradient of each parameter for a row, computed in the batch that the build ran."""
        window = self._runner.window("train")
        first, stop = self.store.layout.rows(row // self.store.layout.partition_rows)
        first += (row - first) // window * window
        # An engine verifies its gradients on the first batch that it runs: here that of the build.
        self._run_batch(next(self._read_batches(0, self.store.layout.rows(0)[1])), 0)
        read = next(read for read in self._read_batches(first, stop) if row in read.ids)
        return self._run_batch(read, read.ids.index(row))

    def _read_batches(self, first: int, stop: int) -> Iterator[CollatedBatch]:
        span = range(first, min(first + self._runner.window("train"), stop))
        with self._runner.open_batches("train", [span], ahead=False) as reading:
            yield from reading.span()

    def _run_batch(self, read: CollatedBatch, place: int) -> dict[str, Tensor]:
        """Run a batch as a build does; return the flat gradients of one example by the parameters that it reaches."""
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


@contextmanager
def _change_last_digits(model: nn.Module, seed: int) -> Iterator[None]:
    """Change the weights of a model by a few units in the last place in the block; not those in half precision."""
    weights = [p.data for p in model.parameters() if p.dtype in _COMPUTED and type(p.data) is Tensor]
    saved = [weight.clone() for weight in weights]
    generator = torch.Generator().manual_seed(seed)
    try:
        for weight in weights:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.addcmul_(weight, noise, value=2 * torch.finfo(weight.dtype).eps)
        yield
    finally:
        for weight, value in zip(weights, saved, strict=True):
            weight.copy_(value)


def _describe_layer(model: Any, parameter: Tensor) -> str:
    """Return the path and class of the first module that has the parameter."""
    for path, module in model.named_modules():
        if any(own is parameter for own in module._parameters.values()):
            return f"layer {path} ({type(module).__name__})" if path else f"the root module ({type(module).__name__})"
    raise AssertionError("no module has the parameter")
