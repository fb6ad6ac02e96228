"""BuildConfig: the options of a build, validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tracin_ann.choices import (
    DTYPES,
    INDEX_KINDS,
    MEMORY_FORMATS,
    NORMS,
    ON_NONFINITE,
    PRECISIONS,
    PRECONDITIONERS,
    Dtype,
    MemoryFormat,
    Norms,
    OnNonfinite,
    Precision,
    Preconditioner,
)
from tracin_ann.errors import IndexMismatchError, UsageError, problem
from tracin_ann.features import FeatureOptions
from tracin_ann.scoring import DimTarget, IndexShape
from tracin_ann.search import CODES, Codes
from tracin_ann.sketch import Sketch, make_sketch
from tracin_ann.store import BuildRecord, choose_partition_rows, is_coded


@dataclass(frozen=True)
class BuildConfig:
    """The options of a build.

    Attributes:
        dim: D, sketch dimensions a checkpoint. `auto`: that of the existing index; for a new one, the smallest of 64,
            128, ..., 8192 with which the expected recall of the true top ten reaches `target_true_recall`.
        sketch: `factored`, `kronecker`, `dense` or `dense-gaussian`.
        seed: of the sketch's random numbers.
        index: the search index: one of `INDEX_KINDS`; `auto` chooses by a diagnosis of the features.
        index_shards: number of files over which the rows of a search index are split; several processes can search them
            (`InfluenceIndex.open` with a launcher). More than one not with `index="flat"`, `"bounds"` or
            `"graph"`; `"auto"` then chooses `"ivf"` or `"codes"` for an index that is not flat.
        batch_size: examples per forward pass; None: chosen by a rule from the model, the rows and the device.
        memory_format: of images, `contiguous` or `channels-last`; `auto`: chosen by a rule.
        memory_bytes: limit for a batch whose size the rule chooses, and for rows that are read ahead; None: the rule's
            own limit, and half of the free memory. With `dim="auto"` also a limit for the rows of a partition, and for
            building the search index.
        workers: processes that read and collate rows ahead.
        precision: of forward and backward, `fp32` or `bf16`; sketches are summed in float32.
        preconditioner: weights of the entries of gradients from Adam's second moments (`Checkpoint.second_moments`):
            `adam` divides inner products by √v̂ + ε, `trackstar` divides the gradients of both sides by it.
        target_recall: recall@10, relative to an exact scan of the stored rows, that the search index is calibrated to.
        codes: how inverted lists store rows: `sq8`, `sq4` (half the memory) or `fp16`.
        yardstick: measure on a few queries how well the sketch ranks rows by exact scores; this runs some 2,500 rows
            per checkpoint once more, and the sample of an exact curvature if the default score has one.
        device: `auto` or a device's name, see `resolve_device`.
        dtype: of stored features: `float16` (with one exponent per row), `float32`, or codes of 8, 4, 2 or 1 bits a
            number (`int8`, `int4`, `int2`, `int1`) with two factors for each row and checkpoint.
        norms: squared gradient norms, estimated from the `sketch` or `exact`.
        partition_rows: rows per feature file; an interrupted build repeats at most two files. None: those of the
            existing index; for a new one, 8,192 for up to 262,144 rows, and more for larger indexes.
        on_nonfinite: `error`: a training row whose loss, gradient or squared norm is NaN or infinite at any checkpoint
            stops the build; `skip`: no answer contains it. None: as the existing index; for a new one, `error`.
        allow_random_data: accept rows that differ when they are read twice.
        append: extend a finished index by new rows at the end of train_data.
        add_checkpoint: extend a finished index by new checkpoints at the end of Task.checkpoints.
        rebuild_index: rebuild the search index of a finished index, without the removed rows.
        target_true_recall: for `dim="auto"`: the share of the true top ten, of proponents and of opponents,
        candidates: among this many first rows of the stored ranking.
        disk_bytes: for `dim="auto"`: the largest size of the index on disk; None: any.
    """

    dim: int | Literal["auto"] = 1024
    sketch: str = "factored"
    seed: int = 0
    index: str = "auto"
    index_shards: int = 1
    batch_size: int | None = None
    memory_format: MemoryFormat = "auto"
    memory_bytes: int | None = None
    workers: int = 0
    precision: Precision = "fp32"
    preconditioner: Preconditioner = "none"
    target_recall: float = 0.95
    codes: Codes = "sq8"
    yardstick: bool = True
    device: str = "auto"
    dtype: Dtype = "float16"
    norms: Norms = "sketch"
    partition_rows: int | None = None
    on_nonfinite: OnNonfinite | None = None
    allow_random_data: bool = False
    append: bool = False
    add_checkpoint: bool = False
    rebuild_index: bool = False
    target_true_recall: float = 0.95
    candidates: int = 1000
    disk_bytes: int | None = None

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            UsageError: names the option and its values.
        """
        choices: tuple[tuple[str, str | None, Sequence[str | None]], ...] = (
            ("--dtype", self.dtype, DTYPES),
            ("--norms", self.norms, NORMS),
            ("--precision", self.precision, PRECISIONS),
            ("--preconditioner", self.preconditioner, PRECONDITIONERS),
            ("--index", self.index, INDEX_KINDS),
            ("--codes", self.codes, CODES),
            ("--memory-format", self.memory_format, MEMORY_FORMATS),
            ("--on-nonfinite", self.on_nonfinite, (None, *ON_NONFINITE)),
        )
        for option, value, allowed in choices:
            if value not in allowed:
                expected = " or ".join(choice for choice in allowed if choice is not None)
                raise UsageError(
                    problem(f"bad {option}", got=repr(value), expected=expected, remedy=f"change {option}")
                )
        for option, share in (
            ("--target-recall", self.target_recall),
            ("--target-true-recall", self.target_true_recall),
        ):
            if not 0 < share < 1:
                expected = "over 0, under 1"
                raise UsageError(problem(f"bad {option}", got=share, expected=expected, remedy="change it"))
        if isinstance(self.dim, str) and self.dim != "auto":
            expected = "a number or auto"
            raise UsageError(problem("bad --dim", got=repr(self.dim), expected=expected, remedy="change --dim"))
        if self.dim == "auto" and self.allow_random_data:
            raise UsageError(
                problem(
                    "--dim auto scores training rows twice",
                    got="--allow-random-data",
                    expected="rows that are the same each time",
                    remedy="set --dim to a number",
                )
            )
        for name, number in (
            ("partition_rows", self.partition_rows),
            ("--memory", self.memory_bytes),
            ("--disk", self.disk_bytes),
            ("--candidates", self.candidates),
            ("--index-shards", self.index_shards),
        ):
            if number is not None and number < 1:
                raise UsageError(problem(f"bad {name}", got=number, expected="1 or more", remedy="change it"))

        if self.index_shards > 1 and self.index not in ("auto", "ivf", "codes"):
            what, got = "only inverted lists and coded scans have shards", f"--index {self.index}"
            expected, remedy = "--index auto, ivf or codes", "change it, or remove --index-shards"
            raise UsageError(problem(what, got=got, expected=expected, remedy=remedy))

    def choose_nonfinite_policy(self, existing: OnNonfinite | None, where: str) -> OnNonfinite:
        """Return how non-finite rows are treated, given the setting of the existing index, if any.

        Raises:
            IndexMismatchError: they are to be an error, but the existing index skips them.
        """
        if existing == "skip" and self.on_nonfinite == "error":
            raise IndexMismatchError(
                f"index {where} was built with --on-nonfinite skip, this command asks for error; "
                "leave the option out, or build a new index"
            )
        return self.on_nonfinite or existing or "error"

    def agree_on_partitions(self, existing: int | None, n_rows: int) -> int:
        """Return the number of rows of a partition, given that of the existing index, if any.

        An index keeps its size when it grows, so that its files remain valid.
        """
        return self.partition_rows or existing or choose_partition_rows(n_rows)

    def agree_on_batches(self, record: BuildRecord, n_missing: int, where: str) -> BuildRecord:
        """Return the build record with the batch size and memory format of the feature files that are reused, if any.

        Args:
            record: what the build produces, with the batch size and memory format of the existing files.
            n_missing: number of feature files to compute.
            where: the index directory.

        Raises:
            IndexMismatchError: the options name other values: rows of one index would differ by rounding.
        """
        known = record.batch_size, "channels-last" if record.channels_last else "contiguous"
        requested = self.batch_size or known[0], known[1] if self.memory_format == "auto" else self.memory_format
        if record.batch_size is None or requested == known:
            return record
        if n_missing == record.layout.n_partitions * record.layout.n_checkpoints:
            return replace(record, batch_size=None, channels_last=False)
        raise IndexMismatchError(
            f"the features in {where} were computed with batch size {known[0]} and memory format {known[1]}, this "
            f"build asks for {requested[0]} and {requested[1]}; leave out --batch-size and --memory-format, or use "
            "another --out"
        )

    def features(self, rank_one: frozenset[str]) -> FeatureOptions:
        """Return how gradients become feature rows, given the parameters whose gradients are outer products."""
        return FeatureOptions(self.make_sketch(), self.seed, rank_one, self.norms, is_coded(self.dtype))

    def make_sketch(self) -> Sketch:
        """Return the sketch; D has been chosen."""
        assert self.dim != "auto"
        return make_sketch(self.sketch, self.dim)

    @property
    def dim_target(self) -> DimTarget:
        """Return what D is chosen for."""
        return DimTarget(self.target_true_recall, self.candidates, self.disk_bytes, self.memory_bytes)

    def shape(self, n_rows: int, n_checkpoints: int, partition_rows: int) -> IndexShape:
        """Return what the size of the index follows from, besides D."""
        return IndexShape(n_rows, n_checkpoints, partition_rows, self.dtype, self.index, self.codes)
