"""What a build may be told, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tracin_ann.choices import (
    MEMORY_FORMATS,
    NORMS,
    ON_NONFINITE,
    PRECISIONS,
    MemoryFormat,
    Norms,
    OnNonfinite,
    Precision,
)
from tracin_ann.errors import IndexMismatchError, UsageError, problem
from tracin_ann.features import FeatureOptions
from tracin_ann.search import CODES, Codes
from tracin_ann.sketch import make_sketch
from tracin_ann.store import BuildRecord, Dtype

_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class BuildConfig:
    """What a build may be told.

    Attributes:
        dim: D, sketch dimensions a checkpoint.
        sketch: `factored`, `kronecker`, `dense` or `dense-gaussian`.
        seed: of the sketch's random numbers.
        index: `auto`, `flat` or `ivf`.
        batch_size: examples a forward; None: by a rule that knows the model, the rows and the device.
        memory_format: of pictures, `contiguous` or `channels-last`; `auto`: by a rule likewise.
        memory_bytes: what a batch may take where the batch size is left to the rule, and rows read ahead; None: the
            rule's bound, and half of what is free.
        workers: processes that read and collate ahead.
        precision: of forward and backward, `fp32` or `bf16`; sketches are added up in float32.
        target_recall: recall@10 of the stored rows' own ranking that an index of lists is calibrated to.
        codes: how lists keep their rows: `sq8`, `sq4` (half the memory) or `fp16`.
        yardstick: measure, on a few queries, how well the sketch ranks rows by true scores; some 2,500 rows a
            checkpoint are run once more for that.
        device: `auto` or a device's name, as `resolve_device` takes it.
        dtype: how features are stored: `float16` (with an exponent a row) or `float32`.
        norms: squared gradient norms, estimated from the `sketch` or `exact`.
        partition_rows: rows a feature file; what a killed build repeats at most, for one checkpoint.
        on_nonfinite: a training row whose loss, gradient or squared norm is NaN or infinite at any checkpoint is an
            `error`, or to `skip`: it is in no answer. None: as the index was begun; a new one, `error`.
        allow_random_data: accept train or query rows that change when read twice.
        append: a finished index may grow by rows at the end of train_data.
        add_checkpoint: a finished index may grow by checkpoints at the end of the task's.
        rebuild_index: make the lists of a finished index anew, without the rows that were removed.
    """

    dim: int = 1024
    sketch: str = "factored"
    seed: int = 0
    index: str = "auto"
    batch_size: int | None = None
    memory_format: MemoryFormat = "auto"
    memory_bytes: int | None = None
    workers: int = 0
    precision: Precision = "fp32"
    target_recall: float = 0.95
    codes: Codes = "sq8"
    yardstick: bool = True
    device: str = "auto"
    dtype: Dtype = "float16"
    norms: Norms = "sketch"
    partition_rows: int = 8192
    on_nonfinite: OnNonfinite | None = None
    allow_random_data: bool = False
    append: bool = False
    add_checkpoint: bool = False
    rebuild_index: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no build can use.

        Raises:
            UsageError: naming the option.
        """
        choices: tuple[tuple[str, str | None, Sequence[str | None]], ...] = (
            ("--dtype", self.dtype, _DTYPES),
            ("--norms", self.norms, NORMS),
            ("--precision", self.precision, PRECISIONS),
            ("--index", self.index, ("auto", "flat", "ivf")),
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
        if not 0 < self.target_recall < 1:
            expected = "over 0, under 1"
            raise UsageError(
                problem("bad --target-recall", got=self.target_recall, expected=expected, remedy="change it")
            )
        for name, number in (("partition_rows", self.partition_rows), ("--memory", self.memory_bytes)):
            if number is not None and number < 1:
                raise UsageError(problem(f"bad {name}", got=number, expected="1 or more", remedy="change it"))

    def policy(self, begun: OnNonfinite | None, where: str) -> OnNonfinite:
        """Return what is done with rows that are not finite, given what the build there was begun with, if any.

        Raises:
            IndexMismatchError: they would be an error, and may have been skipped.
        """
        if begun == "skip" and self.on_nonfinite == "error":
            raise IndexMismatchError(
                f"index {where} was built with --on-nonfinite skip, this command asks for error; "
                "leave the option out, or build a new index"
            )
        return self.on_nonfinite or begun or "error"

    def agree_on_batches(self, record: BuildRecord, n_missing: int, where: str) -> BuildRecord:
        """Return what is made, with the batch size and memory format of the feature files that are kept, if any are.

        Args:
            record: what is made, and how what is there of it was begun.
            n_missing: feature files that are to be made.
            where: the index's directory.

        Raises:
            IndexMismatchError: others are asked for: rows of one index would differ by rounding.
        """
        known = record.batch_size, "channels-last" if record.channels_last else "contiguous"
        asked = self.batch_size or known[0], known[1] if self.memory_format == "auto" else self.memory_format
        if record.batch_size is None or asked == known:
            return record
        if n_missing == record.layout.n_partitions * record.layout.n_checkpoints:
            return replace(record, batch_size=None, channels_last=False)
        raise IndexMismatchError(
            f"the features in {where} were made with batch size {known[0]} and memory format {known[1]}, this build "
            f"asks for {asked[0]} and {asked[1]}; leave out --batch-size and --memory-format, or use another --out"
        )

    def features(self, rank_one: frozenset[str]) -> FeatureOptions:
        """Return what turns gradients into rows, given which parameters' gradients are outer products."""
        return FeatureOptions(make_sketch(self.sketch, self.dim), self.seed, rank_one, self.norms)
