"""How rows are run: batch size and memory format, chosen by rules that know the model, the rows and the device.

Both change features by rounding, so no clock decides them, and free memory only where a batch would not fit, which is
said. Equal inputs give equal choices; the constants were measured (docs/design.md, "Batches").
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
from tracin_ann.features.passes import LoadedModel
from tracin_ann.gradients import require_grad
from tracin_ann.task import CollatedBatch, leaves, tensors_within

USUAL_SIZE = 64
_MOST_BYTES = 2 * 10**9
"""Working memory of a batch that is not exceeded unless asked for."""
_ROWS_LOOKED_AT = 8
_REPEATS = 3
_SAME_LOSS = 1e-3
_CLEARLY_SLOWER = 1.05
# Backward's own temporaries, beside what forward left.
_BACKWARD = 1.5
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _SizeRule:
    """The batch size of a kind of device: the largest power of two within `batch_bytes`, `fewest` and `most`."""

    batch_bytes: int
    fewest: int
    most: int

    def size(self, row_bytes: int) -> int:
        return _power_of_two(min(self.most, max(self.fewest, self.batch_bytes // row_bytes)))


_ON_CPU = _SizeRule(128 * 10**6, 32, 512)
_ON_ACCELERATOR = _SizeRule(10**9, 64, 2048)


@dataclass(frozen=True)
class TuningRequest:
    """What a build asks of tuning.

    Attributes:
        batch_size: B, or None for the rule's.
        memory_bytes: a batch's working memory and rows read ahead stay within it; None: the rule's own bounds.
        memory_format: of pictures; `auto` for the rule's.
        known: what the index was begun with, (B, channels last), which is kept; None for a new one.
    """

    batch_size: int | None = None
    memory_bytes: int | None = None
    memory_format: MemoryFormat = "auto"
    known: tuple[int, bool] | None = None


@dataclass(frozen=True)
class RunSettings:
    """How rows are run. Nothing that determines a feature depends on `read_seconds` and `memory_bytes`.

    Attributes:
        batch_size: B.
        channels_last: pictures are kept with channels last.
        read_seconds: time to read and collate one row.
        row_bytes: of a collated row.
        batch_bytes: estimated working memory of a batch.
        memory_bytes: for rows read ahead: what was asked for, or half of what is free.
    """

    batch_size: int
    channels_last: bool
    read_seconds: float
    row_bytes: int
    batch_bytes: int
    memory_bytes: int


def tune(model: LoadedModel, features: FeatureOptions, wanted: TuningRequest) -> RunSettings:
    """Choose how rows are run, and leave the model and its passes set to it.

    Raises:
        UsageError: one row alone needs more memory than there may be, or the model does not take the memory format.
    """
    chosen = _Tuning(model, features, wanted).result()
    logger.info("batches of %d rows%s", chosen.batch_size, ", channels last" if chosen.channels_last else "")
    return chosen


def measure_row_seconds(model: LoadedModel, features: FeatureOptions, repeats: int = _REPEATS) -> float:
    """Return the seconds a training row takes as the model is set, reading left out: the best of several batches."""
    read, _ = _read(model)
    extractor = FeatureExtractor(model, features)
    _run(extractor, read)
    times = []
    for _ in range(repeats):
        began = perf_counter()
        _run(extractor, read)
        times.append(perf_counter() - began)
    return min(times) / len(read.ids)


def warn_of_slower_bf16(model: LoadedModel, features: FeatureOptions) -> None:
    """Log a warning where rows of this model take longer in bf16 than in fp32 on a CPU; a GPU is not measured."""
    passes = model.passes
    if passes.options.precision != "bf16" or passes.options.device.type != "cpu":
        return
    took: dict[Precision, float] = {}
    for precision in PRECISIONS:
        passes.options = replace(passes.options, precision=precision)
        took[precision] = measure_row_seconds(model, features)
    passes.options = replace(passes.options, precision="bf16")
    if took["bf16"] > _CLEARLY_SLOWER * took["fp32"]:
        logger.warning(
            "bf16 was slower than fp32 here: %.0f µs a row against %.0f; --precision fp32 is exacter as well",
            took["bf16"] * 1e6,
            took["fp32"] * 1e6,
        )


class _Tuning:
    def __init__(self, model: LoadedModel, features: FeatureOptions, wanted: TuningRequest) -> None:
        self._model, self._features, self._wanted = model, features, wanted
        self._options = model.passes.options

    def result(self) -> RunSettings:
        self._model.passes.options = replace(self._options, batch_size=_ROWS_LOOKED_AT)
        read, read_seconds = _read(self._model)
        row_bytes = self._working_bytes(read)
        known = self._wanted.known
        size = known[0] if known else self._wanted.batch_size or self._fitting_size(row_bytes)
        self._model.passes.options = replace(self._options, batch_size=size)
        if known:
            self._model.set_memory_format(channels_last=known[1])
        else:
            self._choose_format(read)
        free = free_memory_bytes(self._options.device)
        return RunSettings(
            batch_size=size,
            channels_last=self._model.channels_last,
            read_seconds=read_seconds,
            row_bytes=_bytes(read.inputs) // len(read.ids),
            batch_bytes=row_bytes * size,
            memory_bytes=self._wanted.memory_bytes or free // 2,
        )

    def _fitting_size(self, row_bytes: int) -> int:
        """Return the rule's batch size, less where memory that was given or is free cannot hold it."""
        device = self._options.device
        rule = _ON_CPU if device.type == "cpu" else _ON_ACCELERATOR
        most = self._wanted.memory_bytes or max(_MOST_BYTES, row_bytes)
        size = min(rule.size(row_bytes), self._most(row_bytes, most, "raise --memory"))
        if self._wanted.memory_bytes is not None:
            return size
        free = free_memory_bytes(device)
        fitting = min(size, self._most(row_bytes, free, "free some"))
        if fitting < size:
            logger.warning(
                "batches of %d rows instead of %d: only %.0f MB of memory are free; --batch-size %d elsewhere "
                "gives the same features to the bit",
                *(fitting, size, free / 1e6, fitting),
            )
        return fitting

    def _most(self, row_bytes: int, memory_bytes: int, remedy: str) -> int:
        if row_bytes > memory_bytes:
            raise UsageError(
                problem(
                    "one row needs more than the memory there is for it",
                    got=f"about {row_bytes / 1e6:,.0f} MB a row",
                    expected=f"at most {memory_bytes / 1e6:,.0f} MB",
                    remedy=f"{remedy}, or set --batch-size 1 to try",
                )
            )
        return _power_of_two(memory_bytes // row_bytes)

    def _working_bytes(self, read: CollatedBatch) -> int:
        """Return about the bytes a row that forward leaves for backward and the layer rules, and backward's own."""
        batch = self._model.batch("train", read)
        with require_grad(self._model.parameters.values()):
            try:
                with _held_bytes(self._model.module) as held:
                    self._model.engine("train").losses(batch)
            except RuntimeError:
                # A loss by torch.func refuses to have what autograd saves seen.
                with _held_bytes(self._model.module, saved=False) as held:
                    self._model.engine("train").losses(batch)
        return int(_BACKWARD * sum(storage.nbytes() for storage in held.values()) / len(read.ids)) + 1

    def _choose_format(self, read: CollatedBatch) -> None:
        """Put channels last where the rule or the user wants it and the model computes the same with it.

        Raises:
            UsageError: it was asked for, and the model does not take it.
        """
        asked = self._wanted.memory_format
        if asked == "contiguous" or (asked == "auto" and not self._gains_by_channels_last()):
            return
        before = self._outcome(read)
        self._model.set_memory_format(channels_last=True)
        try:
            why = "" if _alike(self._outcome(read), before) else "other losses or another plan of gradients"
        except (RuntimeError, TaskError, GradientProofError) as error:
            # The model's own code does not take it (a view of pictures, say).
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not why:
            return
        self._model.set_memory_format(channels_last=False)
        if asked == "auto":
            logger.info("pictures stay contiguous: with channels last, %s", why)
            return
        raise UsageError(
            problem(
                "the model does not take --memory-format channels-last",
                got=why,
                expected="what it computes with contiguous pictures",
                remedy="use --memory-format contiguous, or flatten with reshape where the model uses view",
            )
        )

    def _gains_by_channels_last(self) -> bool:
        """Return whether pictures with channels last run faster by rule.

        On accelerators only the kernels of bf16 gain. Where rows differ in length, a batch that is looked at says
        little of those to come.
        """
        passes = self._model.passes
        pictures = any(p.dim() == 4 for p in self._model.parameters.values())  # noqa: PLR2004
        alike = passes.window("train") == passes.options.batch_size
        return pictures and alike and (self._options.device.type == "cpu" or self._options.precision == "bf16")

    def _outcome(self, read: CollatedBatch) -> tuple[list[Tensor], Any]:
        """Return the losses of a batch of both sides, and the plan of gradients."""
        _run(FeatureExtractor(self._model, self._features), read)
        ids = range(min(_ROWS_LOOKED_AT, self._model.passes.n_rows("query")))
        query = next(self._model.batches("query", ids))
        train, asked = self._model.engine("train"), self._model.engine("query")
        losses = [train.loss_values(self._model.batch("train", read)).float(), asked.loss_values(query).float()]
        plan = train.plan
        return losses, (plan.steps, plan.rank_one)


def _alike(one: tuple[list[Tensor], Any], other: tuple[list[Tensor], Any]) -> bool:
    for loss_B, expected_B in zip(one[0], other[0], strict=True):
        finite_B = expected_B[torch.isfinite(expected_B)]
        tolerance = _SAME_LOSS * float(finite_B.abs().mean()) if len(finite_B) else 0.0
        if not torch.allclose(loss_B, expected_B, rtol=_SAME_LOSS, atol=tolerance, equal_nan=True):
            return False
    return bool(one[1] == other[1])


def _read(model: LoadedModel) -> tuple[CollatedBatch, float]:
    """Return a batch, the longest rows of its window, and the seconds a row that reading it took."""
    passes = model.passes
    window = range(min(passes.n_rows("train"), passes.window("train")))
    began = perf_counter()
    with passes.reading("train", [window], ahead=False) as reading:
        batches = list(reading.span())
    return batches[0], (perf_counter() - began) / len(window)


def _run(extractor: FeatureExtractor, read: CollatedBatch) -> None:
    for _ in extractor.stream("train", [read]):
        pass


@contextmanager
def _held_bytes(module: nn.Module, *, saved: bool = True) -> Any:
    """Yield the memory that autograd saves (`saved`) or a layer takes or gives meanwhile, by address; all kept alive.

    Memory that was freed could be given out again at the same address, or not: then the sum would be chance.
    """
    held: dict[int, torch.UntypedStorage] = {}
    # A tensor of a subclass may have no memory of its own.
    kinds = (Tensor, nn.Parameter)
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers()) if type(p) in kinds}

    def seen(tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if type(tensor) not in kinds or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                continue
            if tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() not in own:
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage

    def pack(tensor: Tensor) -> Tensor:
        seen([tensor])
        # A node that keeps its own output by itself is never freed.
        return tensor.detach()

    watched = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    hooks = [m.register_forward_hook(lambda _m, given, made: seen([*given, *leaves(made)])) for m in watched]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor) if saved else nullcontext():
            yield held
    finally:
        for hook in hooks:
            hook.remove()


def _power_of_two(number: int) -> int:
    """Return the largest power of two that is not larger."""
    return 1 << (number.bit_length() - 1)


def _bytes(inputs: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_within(inputs))
