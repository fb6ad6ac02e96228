"""Automatic choice of batch size and memory format, by rules on the model, the size of the examples and the device.

Both settings change features by rounding. The choice therefore does not depend on measured times, and on free memory
only if a batch would not fit, which is logged. Equal inputs give equal choices. The constants of the rules were
measured (docs/design.md, "Batches").
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.choices import PRECISIONS, MemoryFormat, Precision
from tracin_ann.device import free_memory_bytes
from tracin_ann.errors import GradientProofError, TaskError, UsageError, problem
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.features.loaded_model import LoadedModel
from tracin_ann.gradients import require_grad
from tracin_ann.task import CollatedBatch, leaves, tensors_within

DEFAULT_BATCH_SIZE = 64
_MOST_BYTES = 2 * 10**9
"""Largest working memory of a batch, unless the user sets a limit."""
_SAMPLE_ROWS = 8
_REPEATS = 3
_SAME_LOSS = 1e-3
_NUMBER_BYTES = 4
_CLEARLY_SLOWER = 1.05
# Memory of forward and backward, relative to what forward leaves in memory.
_BACKWARD_FACTOR = 1.5
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _SizeRule:
    """The batch size on a type of device: the largest power of two whose batch takes at most `batch_bytes`.

    `fewest` and `most` bound the batch size.
    """

    batch_bytes: int
    fewest: int
    most: int

    def size(self, row_bytes: int) -> int:
        return _power_of_two(min(self.most, max(self.fewest, self.batch_bytes // row_bytes)))


_ON_CPU = _SizeRule(128 * 10**6, 32, 512)
_ON_ACCELERATOR = _SizeRule(10**9, 64, 2048)


@dataclass(frozen=True)
class TuningOptions:
    """Settings that a build fixes, and limits for those that tuning chooses.

    Attributes:
        batch_size: B; None lets the rule choose.
        memory_bytes: limit for the working memory of a batch and for rows read ahead; None uses the rule's limit.
        memory_format: memory format of images; `auto` lets the rule choose.
        known: (B, channels last) of the feature files that the index already has, which new files must match; None for
            a new index.
    """

    batch_size: int | None = None
    memory_bytes: int | None = None
    memory_format: MemoryFormat = "auto"
    known: tuple[int, bool] | None = None


@dataclass(frozen=True)
class BatchSettings:
    """Batch size and memory format of a build, with estimates of its costs.

    Features do not depend on `read_seconds` and `memory_bytes`.

    Attributes:
        batch_size: B.
        channels_last: images and convolution weights are stored with channels last.
        read_seconds: measured time to read and collate one row.
        row_bytes: size of a collated row.
        batch_bytes: estimated working memory of a batch.
        memory_bytes: main memory for rows read ahead: the requested limit, or half of the free memory.
    """

    batch_size: int
    channels_last: bool
    read_seconds: float
    row_bytes: int
    batch_bytes: int
    memory_bytes: int


def tune(model: LoadedModel, features: FeatureOptions, request: TuningOptions) -> BatchSettings:
    """Choose batch size and memory format, and apply them to the model and its runner.

    Raises:
        UsageError: one row needs more memory than is available, or the model does not support the memory format.
    """
    chosen = _Tuning(model, features, request).choose()
    logger.info("batches of %d rows%s", chosen.batch_size, ", channels last" if chosen.channels_last else "")
    return chosen


def measure_row_seconds(model: LoadedModel, features: FeatureOptions, repeats: int = _REPEATS) -> float:
    """Return the time per training row with the current settings, without reading: the fastest of several batches."""
    read, _ = _read_window(model)
    extractor = FeatureExtractor(model, features)
    _run_batch(extractor, read)
    times = []
    for _ in range(repeats):
        began = perf_counter()
        _run_batch(extractor, read)
        times.append(perf_counter() - began)
    return min(times) / len(read.ids)


def warn_of_slower_bf16(model: LoadedModel, features: FeatureOptions) -> None:
    """Log a warning if this model runs slower in bf16 than in fp32 on a CPU; GPUs are not measured."""
    runner = model.runner
    if runner.options.precision != "bf16" or runner.options.device.type != "cpu":
        return
    took: dict[Precision, float] = {}
    for precision in PRECISIONS:
        runner.options = replace(runner.options, precision=precision)
        took[precision] = measure_row_seconds(model, features)
    runner.options = replace(runner.options, precision="bf16")
    if took["bf16"] > _CLEARLY_SLOWER * took["fp32"]:
        logger.warning(
            "bf16 is slower than fp32 on this machine: %.0f µs per row, fp32 %.0f µs; --precision fp32 is faster "
            "and more precise",
            took["bf16"] * 1e6,
            took["fp32"] * 1e6,
        )


class _Tuning:
    """One choice of batch size and memory format; see `tune`."""

    def __init__(self, model: LoadedModel, features: FeatureOptions, request: TuningOptions) -> None:
        self._model, self._features, self._request = model, features, request
        self._options = model.runner.options

    def choose(self) -> BatchSettings:
        self._model.runner.options = replace(self._options, batch_size=_SAMPLE_ROWS)
        read, read_seconds = _read_window(self._model)
        working_bytes = self._estimate_row_bytes(read)
        row_bytes = working_bytes + self._count_bytes_ahead(read, working_bytes)
        known = self._request.known
        size = known[0] if known else self._request.batch_size or self._choose_batch_size(row_bytes)
        self._model.runner.options = replace(self._options, batch_size=size)
        if known:
            self._model.set_memory_format(channels_last=known[1])
        else:
            self._choose_format(read)
        # Rows that are read ahead are in main memory.
        free = free_memory_bytes(torch.device("cpu"))
        return BatchSettings(
            batch_size=size,
            channels_last=self._model.channels_last,
            read_seconds=read_seconds,
            row_bytes=_count_bytes(read.inputs) // len(read.ids),
            batch_bytes=row_bytes * size,
            memory_bytes=self._request.memory_bytes or free // 2,
        )

    def _choose_batch_size(self, row_bytes: int) -> int:
        """Return the rule's batch size, or a smaller one that fits the memory limit and the free memory."""
        device = self._options.device
        rule = _ON_CPU if device.type == "cpu" else _ON_ACCELERATOR
        most = self._request.memory_bytes or max(_MOST_BYTES, row_bytes)
        size = min(rule.size(row_bytes), self._largest_batch(row_bytes, most, "raise --memory"))
        if self._request.memory_bytes is not None:
            return size
        free = free_memory_bytes(device)
        fitting = min(size, self._largest_batch(row_bytes, free, "free memory"))
        if fitting < size:
            logger.warning(
                "batches of %d rows instead of %d: only %.0f MB of memory are free; on other machines, --batch-size %d "
                "gives bit-identical features",
                *(fitting, size, free / 1e6, fitting),
            )
        return fitting

    def _largest_batch(self, row_bytes: int, memory_bytes: int, remedy: str) -> int:
        if row_bytes > memory_bytes:
            raise UsageError(
                problem(
                    "one row needs more memory than is available",
                    got=f"about {row_bytes / 1e6:,.0f} MB per row",
                    expected=f"at most {memory_bytes / 1e6:,.0f} MB",
                    remedy=f"{remedy}, or try --batch-size 1",
                )
            )
        return _power_of_two(memory_bytes // row_bytes)

    def _estimate_row_bytes(self, read: CollatedBatch) -> int:
        """Return the estimated working memory per row: what forward leaves, plus the temporaries of backward."""
        batch = self._model.batch("train", read)
        with require_grad(self._model.parameters.values()):
            try:
                with _track_storages(self._model.module) as storages:
                    self._model.engine("train").losses(batch)
            except RuntimeError:
                # torch.func does not support saved-tensor hooks.
                with _track_storages(self._model.module, saved=False) as storages:
                    self._model.engine("train").losses(batch)
        return int(_BACKWARD_FACTOR * sum(storage.nbytes() for storage in storages.values()) / len(read.ids)) + 1

    def _count_bytes_ahead(self, read: CollatedBatch, working_bytes: int) -> int:
        """Return the memory per row of an accelerator for inputs of later batches, and for results of an earlier one.

        While a batch is computed, the next one is launched, and the one after that is copied. For exact norms, the
        gradient factors of a batch are kept until its results are fetched.
        """
        result_bytes = _NUMBER_BYTES * self._features.sketch.dim
        factor_bytes = working_bytes if self._features.norms == "exact" else 0
        input_bytes = 2 * _count_bytes(read.inputs) // len(read.ids)
        return self._model.copies.n_ahead * (input_bytes + result_bytes + factor_bytes)

    def _choose_format(self, read: CollatedBatch) -> None:
        """Use channels last if the rule or the user selects it and the model computes the same results with it.

        Raises:
            UsageError: the user selects it, and the model does not support it.
        """
        requested = self._request.memory_format
        if requested == "contiguous" or (requested == "auto" and not self._selects_channels_last()):
            return
        before = self._compute_results(read)
        self._model.set_memory_format(channels_last=True)
        try:
            why = "" if _agree(self._compute_results(read), before) else "different losses or gradient methods"
        except (RuntimeError, TaskError, GradientProofError) as error:
            # The model's code does not support it, for example a view of images.
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not why:
            return
        self._model.set_memory_format(channels_last=False)
        if requested == "auto":
            logger.info("images stay contiguous; channels last gives %s", why)
            return
        raise UsageError(
            problem(
                "the model does not support --memory-format channels-last",
                got=why,
                expected="the same results as with contiguous images",
                remedy="use --memory-format contiguous, or replace view by reshape in the model",
            )
        )

    def _selects_channels_last(self) -> bool:
        """Return whether the rule selects channels last: a model with 4-D weights and rows of equal size.

        On accelerators only bf16 kernels are faster with channels last. If rows differ in length, one batch is not
        enough to compare the results of both formats.
        """
        runner = self._model.runner
        images = any(p.dim() == 4 for p in self._model.parameters.values())  # noqa: PLR2004
        equal_sizes = runner.window("train") == runner.options.batch_size
        return images and equal_sizes and (self._options.device.type == "cpu" or self._options.precision == "bf16")

    def _compute_results(self, read: CollatedBatch) -> tuple[list[Tensor], Any]:
        """Return the losses of a batch of each side, and the gradient methods."""
        _run_batch(FeatureExtractor(self._model, self._features), read)
        ids = range(min(_SAMPLE_ROWS, self._model.runner.n_rows("query")))
        query = next(self._model.batches("query", ids))
        engines = self._model.engine("train"), self._model.engine("query")
        batches = self._model.batch("train", read), query
        losses = [engine.loss_values(batch).float() for engine, batch in zip(engines, batches, strict=True)]
        plan = engines[0].plan
        return losses, (plan.steps, plan.rank_one)


def _agree(one: tuple[list[Tensor], Any], other: tuple[list[Tensor], Any]) -> bool:
    for loss_B, expected_B in zip(one[0], other[0], strict=True):
        finite_B = expected_B[torch.isfinite(expected_B)]
        tolerance = _SAME_LOSS * float(finite_B.abs().mean()) if len(finite_B) else 0.0
        if not torch.allclose(loss_B, expected_B, rtol=_SAME_LOSS, atol=tolerance, equal_nan=True):
            return False
    return bool(one[1] == other[1])


def _read_window(model: LoadedModel) -> tuple[CollatedBatch, float]:
    """Return the batch of the longest rows of the first window, and the time per row to read it."""
    runner = model.runner
    window = range(min(runner.n_rows("train"), runner.window("train")))
    began = perf_counter()
    with runner.open_batches("train", [window], ahead=False) as reading:
        batches = list(reading.span())
    return batches[0], (perf_counter() - began) / len(window)


def _run_batch(extractor: FeatureExtractor, read: CollatedBatch) -> None:
    for _ in extractor.stream("train", [read]):
        pass


@contextmanager
def _track_storages(module: nn.Module, *, saved: bool = True) -> Any:
    """Yield the storages, by address, of layer inputs and outputs and, if `saved`, of what autograd saves.

    They stay alive until exit. Otherwise freed memory could be reused at the same address, and the sum would vary.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    # Tensor subclasses may have no storage.
    kinds = (Tensor, nn.Parameter)
    weights = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers()) if type(p) in kinds}

    def record(tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if type(tensor) not in kinds or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                continue
            if tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() not in weights:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage

    def pack(tensor: Tensor) -> Tensor:
        record([tensor])
        # A graph node that refers to its own output would never be freed.
        return tensor.detach()

    watched = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    hooks = [m.register_forward_hook(lambda _m, given, made: record([*given, *leaves(made)])) for m in watched]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor) if saved else nullcontext():
            yield storages
    finally:
        for hook in hooks:
            hook.remove()


def _power_of_two(number: int) -> int:
    """Return the largest power of two up to a number."""
    return 1 << (number.bit_length() - 1)


def _count_bytes(inputs: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_within(inputs))
