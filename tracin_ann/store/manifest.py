"""The manifest: what an index directory holds, written last; and the build record, written first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from tracin_ann.choices import NORMS, PRECISIONS, OnNonfinite
from tracin_ann.errors import DamagedIndexError, UsageError, problem
from tracin_ann.files import describe_difference, file_digest, read_json, read_record, write_json_atomic
from tracin_ann.search import CODES, Calibration, IVFIndex
from tracin_ann.sketch import make_sketch
from tracin_ann.store.feature_file import FileRecord
from tracin_ann.store.feature_store import StoreLayout
from tracin_ann.store.spec import FeatureSpec
from tracin_ann.task import TaskReference

FORMAT = 4
MANIFEST = "manifest.json"
BUILD_RECORD = "build.json"
FEATURES = "features"
UNLISTED = "unlisted.npy"
_CONTENT_ERRORS = (TypeError, ValueError, OverflowError, UsageError)
_LARGEST_DIM = 2**31


@dataclass(frozen=True)
class BuildRecord:
    """What a build set out to make; a build that is run again must set out to make the same.

    Attributes:
        spec: all that determines the rows.
        task: how the task was named.
        partition_rows: rows a partition.
        random_data: the task's rows may change when read twice (`--allow-random-data`).
        batch_size: examples a forward; features differ by rounding with it, so that all files are made with one.
        channels_last: the memory format of pictures, likewise.
        on_nonfinite: whether rows that are NaN or infinite are an `error`, or are to `skip`.
    """

    spec: FeatureSpec
    task: TaskReference
    partition_rows: int
    random_data: bool
    batch_size: int | None = None
    channels_last: bool = False
    on_nonfinite: OnNonfinite = "error"

    @property
    def layout(self) -> StoreLayout:
        """Return the store's layout."""
        return StoreLayout(
            n_rows=self.spec.train_rows,
            partition_rows=self.partition_rows,
            dim=self.spec.sketch.dim,
            dtype=self.spec.dtype,  # type: ignore[arg-type]
            digests=tuple(self.spec.row_digest(c) for c in range(len(self.spec.checkpoints))),
        )


@dataclass(frozen=True)
class IndexRecord:
    """The search index: its kind, why that kind, its files; of lists, the recall that was measured and the codes."""

    kind: str
    reason: str
    files: tuple[FileRecord, ...]
    calibration: Calibration | None = None
    codes: str = ""


@dataclass(frozen=True)
class StepRecord:
    """Which step of the ladder served a parameter, and why not a higher one."""

    parameter: str
    step: str
    reason: str


@dataclass(frozen=True)
class Fidelity:
    """What was measured.

    Attributes:
        queries: Q.
        rows: M, over all queries.
        proponents: recall@10 of the sketch's ranking against the true one.
        opponents: the same of the most negative scores.
        deep_proponents: share of the true ten among the sketch's first 100: what re-scoring those can reach.
        deep_opponents: the same of opponents.
        correlation: Pearson's, of scores of the sample within a query, mean over queries.
        error_scale: root mean square of (sketch score - true score) / the sketch's standard deviation,
            √(Σ_c ‖z_c‖²‖q_c‖² / D).
    """

    queries: int
    rows: int
    proponents: float
    opponents: float
    deep_proponents: float
    deep_opponents: float
    correlation: float
    error_scale: float


@dataclass(frozen=True)
class AuditRecord:
    """An audit of stored rows against plain autograd in which none differed.

    Attributes:
        rows: (row, checkpoint) pairs compared.
        largest: the largest difference, as a share of the row's norm.
    """

    rows: int
    largest: float

    def summary(self, uneven: AuditRecord | None = None) -> str:
        """Say in words what was audited, with the rows of the most uneven batch if there were any."""
        rows = f"{self.rows:,} {'row' if self.rows == 1 else 'rows'}"
        largest = self.largest
        if uneven is not None:
            rows += f" and {uneven.rows} of the most uneven batch"
            largest = max(largest, uneven.largest)
        return f"{rows} against plain autograd: largest difference {largest:.0e} of a row's norm"


@dataclass(frozen=True)
class Manifest:
    """Everything one generation of an index holds; its presence means that the generation is whole.

    Attributes:
        generation: counts from 1; every change of a finished index makes another.
        build: what was built.
        features: the feature files, partition by partition, each with all its checkpoints.
        canaries: the file of canary rows.
        index: the search index.
        steps: the plan of gradients at the first checkpoint.
        fidelity: how well the sketch was seen to stand for true scores; None with random data.
        columns: the file of the rows' columns, where the task gives any.
        removed: the file of the removed rows' ids, where there are any.
        skipped: the file of the rows that were skipped as not finite, where there are any.
        audit: of stored rows drawn by the seed; None with random data, and where an earlier version built it.
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

    @property
    def own_files(self) -> tuple[FileRecord, ...]:
        """Return the files besides the features: those in the generation's own directory."""
        more = (record for record in (self.columns, self.removed, self.skipped) if record is not None)
        return self.canaries, *self.index.files, *more

    @property
    def quality_summary(self) -> str:
        """Say in one line what may be believed from end to end, and what exact re-scoring would lift it to."""
        found, calibration = self.fidelity, self.index.calibration
        if found is None:
            return "true TracInCP was not measured: the rows are random"
        lists = (1.0, 1.0)
        if calibration is not None:
            points = [
                calibration.reaching(side, calibration.target) or calibration.best(side)
                for side in ("proponents", "opponents")
            ]
            lists = points[0].recall, points[1].recall
        plain = found.proponents * lists[0], found.opponents * lists[1]
        deep = found.deep_proponents * lists[0], found.deep_opponents * lists[1]
        return (
            f"about {plain[0]:.0%} of the true ten proponents and {plain[1]:.0%} of the opponents as stored, "
            f"about {deep[0]:.0%} and {deep[1]:.0%} with --rerank exact --candidates 100"
        )

    def audit_summary(self, uneven: AuditRecord | None = None) -> str:
        """Say in one line what was audited, or why nothing was; `uneven`: of the most uneven batch."""
        if self.audit is not None:
            return self.audit.summary(uneven)
        return "nothing: the rows are random" if self.build.random_data else "nothing: built by an earlier version"

    def write(self, directory: Path) -> None:
        """Write the manifest durably."""
        _write_checked(directory / MANIFEST, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Return the manifest of a finished index.

        Raises:
            DamagedIndexError: there is none, or it cannot be understood.
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


def write_build_record(directory: Path, record: BuildRecord) -> None:
    """Write what the build sets out to make."""
    _write_checked(directory / BUILD_RECORD, asdict(record))


def read_build_record(directory: Path) -> BuildRecord:
    """Return what the build in a directory set out to make.

    Raises:
        DamagedIndexError: there is none, or it cannot be understood.
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
        DamagedIndexError: it is missing, of another size or (if `deep`) of another digest.
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
    """Refuse what no build sets out to make.

    Raises:
        ValueError, UsageError: names it.
    """
    spec = record.spec
    if spec.sketch.dim > _LARGEST_DIM:
        raise ValueError(f"{spec.sketch.dim} dimensions")
    make_sketch(spec.sketch.name, spec.sketch.dim)
    _ = record.layout
    if spec.precision not in PRECISIONS or spec.norms not in NORMS:
        raise ValueError(f"precision {spec.precision!r}, norms {spec.norms!r}")
    if record.batch_size is not None and record.batch_size < 1:
        raise ValueError(f"batches of {record.batch_size}")
    if any(checkpoint.learning_rate < 0 for checkpoint in spec.checkpoints):
        raise ValueError("a negative learning rate")


def _check_consistency(manifest: Manifest) -> None:
    """Refuse a manifest whose files are not those of what it says was built: readers find files by either.

    Raises:
        ValueError: names the contradiction.
    """
    layout, index = manifest.build.layout, manifest.index
    if manifest.generation < 1:
        raise ValueError(f"generation {manifest.generation}")
    # Counted first: a forged number of rows may be any.
    n_files = layout.n_partitions * layout.n_checkpoints
    if len(manifest.features) != n_files:
        raise ValueError(f"{len(manifest.features)} feature files, not {n_files}")
    names = [layout.file_name(p, c) for p in range(layout.n_partitions) for c in range(layout.n_checkpoints)]
    wrong = [record.name for record, name in zip(manifest.features, names, strict=True) if record.name != name]
    if wrong:
        raise ValueError(f"a feature file {wrong[0]!r}")
    listed = [record.name for record in index.files]
    expected = {"flat": ([],), "ivf": ([*IVFIndex.FILES], [*IVFIndex.FILES, UNLISTED])}.get(index.kind, ())
    if listed not in expected or index.codes not in (("",) if index.kind == "flat" else CODES):
        raise ValueError(f"an index {index.kind!r} of codes {index.codes!r} and files {listed}")
    own = [record.name for record in manifest.own_files]
    if len({*own, MANIFEST}) <= len(own):
        raise ValueError("two files of one name")


def _write_checked(path: Path, content: dict[str, Any]) -> None:
    write_json_atomic(path, {"format": FORMAT, "digest": content_digest(content), **content})


def _read_checked(path: Path) -> dict[str, Any]:
    """Return what `_write_checked` wrote, without its format and digest.

    Raises:
        DamagedIndexError: it is missing, of another format, or altered.
    """
    content: dict[str, Any] = read_json(path)
    _check_format(content.pop("format", None), path)
    try:
        written, found = content.pop("digest", None), content_digest(content)
    except RecursionError as error:
        raise DamagedIndexError(_describe_invalid_file(path, error)) from error
    if written != found:
        raise DamagedIndexError(
            problem(
                f"{path} is damaged",
                got=f"content of digest {found}",
                expected=f"{written}, as it was written",
                remedy="restore the file, or build a new index",
            )
        )
    return content


def content_digest(content: Mapping[str, Any]) -> str:
    """Return the digest of a manifest or build record, its format and digest left out."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _check_format(found: object, path: Path) -> None:
    if found != FORMAT:
        raise DamagedIndexError(
            problem(
                f"{path} has another format",
                got=found,
                expected=FORMAT,
                remedy="use the tracin_ann that wrote it, or build a new index",
            )
        )


def _describe_invalid_file(path: Path, error: Exception) -> str:
    return problem(
        f"{path} cannot be understood",
        got=f"{type(error).__name__}: {error}",
        expected="what a build writes",
        remedy="restore the file, or build a new index",
    )
