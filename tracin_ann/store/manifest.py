"""The manifest, which describes one generation of an index, and the build record, which describes a build.

A build writes its record first and the manifest last. Both are JSON files with a format number and a digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tracin_ann.choices import CURVATURES, NORMS, PRECISIONS, PRECONDITIONERS, SCORES, OnNonfinite, ScoreName
from tracin_ann.errors import DamagedIndexError, UsageError, problem
from tracin_ann.files import describe_difference, file_digest, read_json, read_record, write_json_atomic
from tracin_ann.search import Calibration, list_codes, list_files
from tracin_ann.sketch import make_sketch
from tracin_ann.store.feature_file import FileRecord
from tracin_ann.store.layout import StoreLayout
from tracin_ann.store.spec import FeatureSpec
from tracin_ann.task import TaskReference

FORMAT = 4
MANIFEST = "manifest.json"
BUILD_RECORD = "build.json"
FEATURES = "features"
UNLISTED = "unlisted.npy"
_CONTENT_ERRORS = (TypeError, ValueError, OverflowError, UsageError)
_LARGEST_DIM = 2**31
_ENOUGH = 0.95
"""The recall for which the number of candidates is stated."""


@dataclass(frozen=True)
class BuildRecord:
    """The options that determine what a build produces; a build can be resumed only with the same options.

    Attributes:
        spec: everything that determines the feature rows.
        task: the name of the task and its arguments.
        partition_rows: rows of a partition.
        random_data: training rows may differ each time they are read (`--allow-random-data`).
        batch_size: examples in a forward pass. Features depend on it by rounding, so one size is used for all files.
        channels_last: memory format of images; features depend on it by rounding, too.
        on_nonfinite: `error` or `skip`, for rows whose loss or gradient is NaN or infinite.
    """

    spec: FeatureSpec
    task: TaskReference
    partition_rows: int
    random_data: bool
    batch_size: int | None = None
    channels_last: bool = False
    on_nonfinite: OnNonfinite = "error"

    def content(self) -> dict[str, Any]:
        """Return the fields as JSON values, without those that earlier versions did not have and that are not set."""
        return {**asdict(self), "spec": self.spec.content()}

    @cached_property
    def layout(self) -> StoreLayout:
        """Return the layout of the feature store."""
        return StoreLayout(
            n_rows=self.spec.train_rows,
            partition_rows=self.partition_rows,
            dim=self.spec.sketch.dim,
            dtype=self.spec.dtype,  # type: ignore[arg-type]
            digests=tuple(self.spec.row_digest(c) for c in range(len(self.spec.checkpoints))),
        )


@dataclass(frozen=True)
class IndexRecord:
    """The search index.

    Attributes:
        kind: `flat` (exact scan), or a kind of index with codes, such as `ivf` (inverted lists).
        reason: why the build chose this kind.
        files: the files of the index.
        calibration: the measured recall of the index; None for `flat`.
        codes: how inverted lists store rows; empty for other kinds.
        requested: the kind that the build asked for, such as `auto`; empty if an earlier version built the index.
        score: the score whose recall was measured, and that searches use the index for.
        shards: number of files over which inverted lists or codes are split by ranges of rows.
    """

    kind: str
    reason: str
    files: tuple[FileRecord, ...]
    calibration: Calibration | None = None
    codes: str = ""
    requested: str = ""
    score: ScoreName = "tracin"
    shards: int = 1


@dataclass(frozen=True)
class StepRecord:
    """The gradient method of a parameter.

    Attributes:
        parameter: its name.
        step: the gradient method that computes its gradients.
        reason: why no faster method applies.
    """

    parameter: str
    step: str
    reason: str


@dataclass(frozen=True)
class Estimate:
    """An estimated recall with its 95% interval."""

    mean: float
    lower: float
    upper: float

    @property
    def summary(self) -> str:
        """Return the mean and the interval as text."""
        return f"{self.mean:.2f} ({self.lower:.2f} to {self.upper:.2f})"

    def times(self, factor: float) -> Estimate:
        """Return the estimate times a factor."""
        return Estimate(self.mean * factor, self.lower * factor, self.upper * factor)


@dataclass(frozen=True)
class TrueRecall:
    """The expected share of the true top ten, that of exact scores, in the first rows of the stored ranking.

    Attributes:
        candidates: m, the number of these rows in each direction.
        proponents: of the largest scores.
        opponents: of the most negative scores.
    """

    candidates: int
    proponents: Estimate
    opponents: Estimate


@dataclass(frozen=True)
class Fidelity:
    """The measured agreement of the sketch's scores with exact scores.

    Attributes:
        queries: Q, the queries measured.
        rows: the rows scored exactly, over all queries.
        proponents: recall@10 of the sketch's ranking with respect to the exact ranking.
        opponents: the same for the most negative scores.
        deep_proponents: share of the exact top ten among the sketch's top 100: the recall@10 of re-scoring those 100.
        deep_opponents: the same for opponents.
        correlation: Pearson correlation of sketch and exact scores within a query, mean over queries.
        error_scale: root mean square of (sketch score - exact score) / the sketch's standard deviation,
            √(Σ_c ‖z_c‖²‖q_c‖² / D), where q is the vector that rows are multiplied with.
        true_recall: the recall at several depths, by increasing depth; empty if an earlier version built the index: the
            four values above are then upper estimates.
    """

    queries: int
    rows: int
    proponents: float
    opponents: float
    deep_proponents: float
    deep_opponents: float
    correlation: float
    error_scale: float
    true_recall: tuple[TrueRecall, ...] = ()

    def __post_init__(self) -> None:
        """Check the depths.

        Raises:
            ValueError: they do not increase, or there is only one.
        """
        numbers = [depth.candidates for depth in self.true_recall]
        if len(numbers) == 1 or numbers != sorted({*numbers}):
            raise ValueError(f"recall at the depths {numbers}")

    @property
    def depths(self) -> tuple[TrueRecall, ...]:
        """Return the recall at the measured depths; for upper estimates, the intervals begin at 0."""
        shallow, deep = (self.proponents, self.opponents), (self.deep_proponents, self.deep_opponents)
        return self.true_recall or tuple(
            TrueRecall(m, *(Estimate(upper, 0.0, upper) for upper in sides))
            for m, sides in ((10, shallow), (100, deep))
        )

    def expect(self, candidates: int) -> TrueRecall:
        """Return the recall among this number of candidates.

        Between two measured depths it is linear, which is a lower bound, because a row further down in the ranking is
        less likely to be in the true top ten. Beyond the last depth it is the recall there.
        """
        depths = self.depths
        places = [0.0, *(depth.candidates for depth in depths)]
        sides = []
        for side in ("proponents", "opponents"):
            each: list[Estimate] = [getattr(depth, side) for depth in depths]
            columns = ([getattr(one, name) for one in each] for name in ("mean", "lower", "upper"))
            sides.append(Estimate(*(float(np.interp(candidates, places, [0.0, *column])) for column in columns)))
        return TrueRecall(candidates, *sides)


@dataclass(frozen=True)
class ScoreFidelity:
    """The fidelity for a score with a curvature matrix, over all checkpoints.

    Attributes:
        score: the name of the score.
        summary: the score and where its damping comes from, as answers state it; the fidelity is that of answers with
            the same summary.
        fidelity: the agreement of its stored scores with its exact ones.
    """

    score: ScoreName
    summary: str
    fidelity: Fidelity


@dataclass(frozen=True)
class AuditRecord:
    """An audit, a comparison of stored rows with gradients by plain autograd, in which no row differed.

    Attributes:
        rows: the number of (row, checkpoint) pairs compared.
        largest: the largest difference, as a fraction of the row's norm.
    """

    rows: int
    largest: float

    def summary(self, uneven: AuditRecord | None = None) -> str:
        """Return one line about the audit; `uneven` is the audit of the most uneven batch, if there was one."""
        rows, largest = self._count, self.largest
        if uneven is not None:
            rows += f" and {uneven._count} of the most uneven batch"
            largest = max(largest, uneven.largest)
        return f"{rows}; largest difference from autograd {largest:.0e} of a row's norm"

    @property
    def _count(self) -> str:
        return f"{self.rows:,} {'row' if self.rows == 1 else 'rows'}"


@dataclass(frozen=True)
class ScoreRecord:
    """What the scores of an index need besides its features.

    Attributes:
        default: the score of queries that name none.
        steps: optimizer updates of the run of each checkpoint, see `Checkpoint.steps`; None: not known.
        runs: the name of the run of each checkpoint.
        loss_is_nll: whether the training loss is −log p of one label; None: not known.
    """

    default: ScoreName
    steps: tuple[float | None, ...]
    runs: tuple[str, ...]
    loss_is_nll: bool | None = None


@dataclass(frozen=True)
class Manifest:
    """The description of one generation of an index; a generation is complete if its manifest exists.

    Attributes:
        generation: its number, from 1; every change of a finished index makes a new generation.
        build: the build record.
        features: the feature files, partition by partition, each partition with all its checkpoints.
        canaries: the file of canary rows.
        index: the search index.
        steps: the gradient method of each parameter at the first checkpoint.
        fidelity: the measured fidelity of the sketch for TracIn; None with random data or without a measurement.
        columns: the file of columns and ids, if the task defines any.
        removed: the file of removed rows, if there are any.
        skipped: the file of rows skipped because they are not finite, if there are any.
        audit: the audit of randomly drawn rows; None with random data, or if an earlier version built the index.
        score: the default score and what scores need; None if an earlier version built the index.
        score_fidelity: the fidelity for the default score, if it has a curvature matrix; None if it was not measured,
            or if rows were removed since: they are not part of the matrix any more.
    """

    generation: int
    build: BuildRecord
    features: tuple[FileRecord, ...]
    canaries: FileRecord
    index: IndexRecord
    steps: tuple[StepRecord, ...]
    fidelity: Fidelity | None = None
    columns: FileRecord | None = None
    removed: FileRecord | None = None
    skipped: FileRecord | None = None
    audit: AuditRecord | None = None
    score: ScoreRecord | None = None
    score_fidelity: ScoreFidelity | None = None

    @property
    def default_score(self) -> ScoreName:
        """Return the score of queries that name none."""
        return "tracin" if self.score is None else self.score.default

    @property
    def own_files(self) -> tuple[FileRecord, ...]:
        """Return the files in the generation's own directory: all except the feature files."""
        more = (record for record in (self.columns, self.removed, self.skipped) if record is not None)
        return self.canaries, *self.index.files, *more

    @property
    def quality_summary(self) -> str:
        """Return one line with the expected recall of the true top ten, without and with re-scoring of candidates.

        It is that of the default score, or of TracIn if it was measured for TracIn only. The recall of a query is the
        product of the sketch's recall and that of the search index, if there is one for the score. The number of
        candidates is the smallest measured one with a recall of .95, or the largest.
        """
        if self.fidelity is None:
            why = ", because the training data is random" if self.build.random_data else " (--no-yardstick)"
            return f"recall was not measured{why}"
        default = self.default_score
        if default == "tracin":
            return self._summarise_recall("recall@10", "tracin", self.fidelity)
        if self.score_fidelity is not None:
            return self._summarise_recall(f"recall@10 by {default}", default, self.score_fidelity.fidelity)
        compare = ": compare some answers with those of --exact" if default in CURVATURES else ""
        return (
            f"{self._summarise_recall('recall@10 by tracin', 'tracin', self.fidelity)}; "
            f"that by {default} was not measured{compare}"
        )

    def _summarise_recall(self, what: str, score: ScoreName, fidelity: Fidelity) -> str:
        calibration, lists = self.index.calibration, (1.0, 1.0)
        if calibration is not None and self.index.score == score:
            lists = calibration.usual_point("proponents").recall, calibration.usual_point("opponents").recall
        first, *deep = fidelity.depths
        enough = [depth for depth in deep if min(depth.proponents.mean, depth.opponents.mean) >= _ENOUGH]
        exact = (*enough, deep[-1])[0]
        (p, o), (exact_p, exact_o) = (
            (depth.proponents.mean * lists[0], depth.opponents.mean * lists[1]) for depth in (first, exact)
        )
        return (
            f"{what} {p:.2f} (proponents), {o:.2f} (opponents) from stored features; "
            f"{exact_p:.2f}, {exact_o:.2f} with --rerank exact --candidates {exact.candidates}"
        )

    def audit_summary(self, uneven: AuditRecord | None = None) -> str:
        """Return one line about the audit, or why there was none; `uneven` is the audit of the most uneven batch."""
        if self.audit is not None:
            return self.audit.summary(uneven)
        why = "the training data is random" if self.build.random_data else "an earlier version built the index"
        return f"no rows, because {why}"

    def write(self, directory: Path) -> None:
        """Write the manifest durably."""
        _write_checked(directory / MANIFEST, {**asdict(self), "build": self.build.content()})

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Return the manifest of a finished index.

        Raises:
            DamagedIndexError: there is no manifest, or it is damaged.
        """
        path = directory / MANIFEST
        content = _read_checked(path)
        try:
            manifest = read_record(cls, content)
            _check_build_record(manifest.build)
            _check_consistency(manifest)
            return manifest
        except _CONTENT_ERRORS as error:
            raise DamagedIndexError(_describe_invalid_file(path, error)) from error


def write_build_record(directory: Path, record: BuildRecord, *, exclusive: bool = False) -> None:
    """Write the record of a build, durably; `exclusive`: only if there is none.

    Raises:
        FileExistsError: there is one, and the write is exclusive.
    """
    _write_checked(directory / BUILD_RECORD, record.content(), exclusive=exclusive)


def read_build_record(directory: Path) -> BuildRecord:
    """Return the record of the last build in a directory.

    Raises:
        DamagedIndexError: there is no record, or it is damaged.
    """
    path = directory / BUILD_RECORD
    content = _read_checked(path)
    try:
        record = read_record(BuildRecord, content)
        _check_build_record(record)
        return record
    except _CONTENT_ERRORS as error:
        raise DamagedIndexError(_describe_invalid_file(path, error)) from error


def record_file(path: Path) -> FileRecord:
    """Return the record of a file just written."""
    return FileRecord(path.name, path.stat().st_size, file_digest(path))


def check_file(directory: Path, record: FileRecord, *, deep: bool) -> None:
    """Compare a file with its record.

    Raises:
        DamagedIndexError: the file is missing or has another size or, if `deep`, another digest.
    """
    path = directory / record.name
    got = describe_difference(path, record.size, record.digest if deep else None)
    if not got:
        return
    raise DamagedIndexError(
        problem(
            f"{path} is damaged",
            got=got,
            expected=f"{record.size} bytes of digest {record.digest}",
            remedy="restore the file, or run tracin-verify --repair",
        )
    )


def _check_build_record(record: BuildRecord) -> None:
    """Reject values that no build writes.

    Raises:
        ValueError, UsageError: a value is out of range; the message names it.
    """
    spec = record.spec
    if spec.sketch.dim > _LARGEST_DIM:
        raise ValueError(f"{spec.sketch.dim} dimensions")
    make_sketch(spec.sketch.name, spec.sketch.dim)
    _ = record.layout
    if spec.precision not in PRECISIONS or spec.norms not in NORMS:
        raise ValueError(f"precision {spec.precision!r}, norms {spec.norms!r}")
    if spec.preconditioner not in PRECONDITIONERS:
        raise ValueError(f"preconditioner {spec.preconditioner!r}")
    if record.batch_size is not None and record.batch_size < 1:
        raise ValueError(f"batches of {record.batch_size}")
    for checkpoint in spec.checkpoints:
        rates = checkpoint.rates or {}
        if min([checkpoint.learning_rate, *rates.values()]) < 0:
            raise ValueError("a negative learning rate")
        if checkpoint.rates is not None and set(rates) != {parameter.name for parameter in spec.parameters}:
            raise ValueError("learning rates of other parameters")


def _check_consistency(manifest: Manifest) -> None:
    """Check that the files a manifest lists are those of its build record: readers derive file names from both.

    Raises:
        ValueError: manifest and record disagree; the message says where.
    """
    layout, index = manifest.build.layout, manifest.index
    if manifest.generation < 1:
        raise ValueError(f"generation {manifest.generation}")
    # Compare the counts first: a forged number of rows may be huge.
    n_files = layout.n_partitions * layout.n_checkpoints
    if len(manifest.features) != n_files:
        raise ValueError(f"{len(manifest.features)} feature files, not {n_files}")
    names = [layout.file_name(p, c) for p in range(layout.n_partitions) for c in range(layout.n_checkpoints)]
    wrong = [record.name for record, name in zip(manifest.features, names, strict=True) if record.name != name]
    if wrong:
        raise ValueError(f"a feature file {wrong[0]!r}")
    listed = [record.name for record in index.files]
    if index.shards > max(1, len(listed)):
        raise ValueError(f"{index.shards} shards in {len(listed)} files")
    names = list(list_files(index.kind, index.shards))
    expected = ([*names], [*names, UNLISTED]) if names else ([],)
    if listed not in expected or index.codes not in list_codes(index.kind):
        raise ValueError(f"an index {index.kind!r} with codes {index.codes!r} and files {listed}")
    score = manifest.score
    if score is not None and (
        score.default not in SCORES
        or not len(score.steps) == len(score.runs) == layout.n_checkpoints
        or min((steps for steps in score.steps if steps is not None), default=1.0) <= 0
    ):
        raise ValueError(f"the scores {score}")
    measured = manifest.score_fidelity
    if measured is not None and (measured.score not in CURVATURES or measured.score != manifest.default_score):
        raise ValueError(f"the fidelity of the score {measured.score!r}")
    own = [record.name for record in manifest.own_files]
    if len({*own, MANIFEST}) <= len(own):
        raise ValueError("two files with the same name")


def _write_checked(path: Path, content: dict[str, Any], *, exclusive: bool = False) -> None:
    write_json_atomic(path, {"format": FORMAT, "digest": content_digest(content), **content}, exclusive=exclusive)


def _read_checked(path: Path) -> dict[str, Any]:
    """Return the content of a file that `_write_checked` wrote, without format and digest.

    Raises:
        DamagedIndexError: the file is missing, of another format, or altered.
    """
    content: dict[str, Any] = read_json(path)
    _check_format(content.pop("format", None), path)
    try:
        expected, actual = content.pop("digest", None), content_digest(content)
    except RecursionError as error:
        raise DamagedIndexError(_describe_invalid_file(path, error)) from error
    if actual != expected:
        raise DamagedIndexError(
            problem(
                f"{path} is damaged",
                got=f"content of digest {actual}",
                expected=f"digest {expected}",
                remedy="restore the file, or build a new index",
            )
        )
    return content


def content_digest(content: Mapping[str, Any]) -> str:
    """Return the digest of a manifest or build record; `content` excludes its format and digest."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _check_format(number: object, path: Path) -> None:
    if number != FORMAT:
        raise DamagedIndexError(
            problem(
                f"{path} has another format",
                got=number,
                expected=FORMAT,
                remedy="use the tracin_ann that wrote it, or build a new index",
            )
        )


def _describe_invalid_file(path: Path, error: Exception) -> str:
    return problem(
        f"{path} cannot be understood",
        got=f"{type(error).__name__}: {error}",
        expected="the content that a build writes",
        remedy="restore the file, or build a new index",
    )
