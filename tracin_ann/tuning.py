"""How rows are run fastest here: memory format and batch size by measurement, within a memory budget.

Neither changes a feature but for rounding. Small builds are not measured: it would not pay.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.device import free_memory_bytes
from tracin_ann.errors import GradientProofError, TaskError, UsageError, problem
from tracin_ann.features import FeatureExtractor, FeatureOptions
from tracin_ann.gradients import PRECISIONS, Precision
from tracin_ann.loading import Collated
from tracin_ann.nested import leaves, tensors_within
from tracin_ann.passes import LoadedModel

USUAL_SIZE = 64
LARGEST = 2048
_ROWS_WORTH_MEASURING = 64 * USUAL_SIZE
_REPEATS = 3
_BETTER = 0.95
_SHARE_OF_BUILD = 0.05
logger = logging.getLogger(__name__)
_SAME_LOSS = 1e-3
_CLEARLY_SLOWER = 1.05
# Backward's own temporaries, beside what forward left.
_BACKWARD = 1.5


@dataclass(frozen=True)
class Wanted:
    """What tuning may choose.

    Attributes:
        batch_size: B, or None to measure.
        memory_bytes: for a batch's activations and for rows read ahead, or None for half of what is free.
        passes: rows × checkpoints of the build, which the measuring must be worth.
        channels_last: the memory format, or None to measure.
    """

    batch_size: int | None
    memory_bytes: int | None
    passes: int
    channels_last: bool | None = None


@dataclass(frozen=True)
class Tuned:
    """What was chosen and measured.

    Attributes:
        batch_size: B.
        channels_last: pictures are kept with channels last.
        row_seconds: time for one row at one checkpoint, reading not counted.
        read_seconds: time to read and collate one row.
        row_bytes: of a collated row.
        batch_bytes: estimated working memory of a batch.
        memory_bytes: the budget.
    """

    batch_size: int
    channels_last: bool
    row_seconds: float
    read_seconds: float
    row_bytes: int
    batch_bytes: int
    memory_bytes: int


def tuned(model: LoadedModel, features: FeatureOptions, wanted: Wanted) -> Tuned:
    """Return the fastest way to run rows, and leave the model and its passes set to it.

    Raises:
        UsageError: one row alone needs more than the memory budget.
    """
    chosen = _Tuning(model, features, wanted).result()
    logger.info("batches of %d rows%s", chosen.batch_size, ", channels last" if chosen.channels_last else "")
    return chosen


def refuse_slower_bf16(model: LoadedModel, features: FeatureOptions) -> None:
    """Refuse bf16 on a CPU where rows of this model take longer in it than in fp32; a GPU is not measured.

    Raises:
        UsageError: they do.
    """
    passes = model.passes
    if passes.options.precision != "bf16" or passes.options.device.type != "cpu":
        return
    took: dict[Precision, float] = {}
    for precision in PRECISIONS:
        passes.options = replace(passes.options, precision=precision)
        took[precision] = _Tuning(model, features, Wanted(None, None, 0)).seconds(
            min(USUAL_SIZE, passes.n_rows("train"))
        )
    if took["bf16"] > _CLEARLY_SLOWER * took["fp32"]:
        raise UsageError(
            problem(
                "bf16 is slower than fp32 here",
                got=f"{took['bf16'] * 1e6:,.0f} µs a row against {took['fp32'] * 1e6:,.0f} on this CPU",
                expected="a model and machine that gain by it",
                remedy="use --precision fp32",
            )
        )


class _Tuning:
    def __init__(self, model: LoadedModel, features: FeatureOptions, wanted: Wanted) -> None:
        self._model, self._wanted = model, wanted
        self._device = model.passes.options.device
        self._budget = wanted.memory_bytes or free_memory_bytes(self._device) // 2
        self._extractor = FeatureExtractor(model, features)
        self._n_rows = model.passes.n_rows("train")
        self._read: dict[int, tuple[Collated, float]] = {}
        self._began = perf_counter()

    def result(self) -> Tuned:
        size = self._wanted.batch_size or min(USUAL_SIZE, self._n_rows)
        row_bytes = self._working_bytes(min(size, self._n_rows, 8))
        if self._wanted.batch_size is None:
            size = min(size, self._largest(row_bytes))
        if self._wanted.channels_last:
            self._model.lay_out(channels_last=True)
        seconds = self.seconds(size, 1)
        if self._wanted.channels_last is None and self._wanted.passes >= _ROWS_WORTH_MEASURING:
            seconds = self._with_format(size)
            if self._wanted.batch_size is None:
                size, seconds = self._with_size(size, seconds, row_bytes, seconds * self._wanted.passes)
        self._model.passes.options = replace(self._model.passes.options, batch_size=size)
        read, read_seconds = self._collated(size)
        return Tuned(
            batch_size=size,
            channels_last=self._model.channels_last,
            row_seconds=seconds,
            read_seconds=read_seconds,
            row_bytes=_bytes(read.inputs) // len(read.ids),
            batch_bytes=row_bytes * size,
            memory_bytes=self._budget,
        )

    def _largest(self, row_bytes: int) -> int:
        if row_bytes > self._budget:
            raise UsageError(
                problem(
                    "one row needs more than the memory budget",
                    got=f"about {row_bytes / 1e6:,.0f} MB a row",
                    expected=f"at most {self._budget / 1e6:,.0f} MB",
                    remedy="raise --memory, or set --batch-size 1 to try",
                )
            )
        return self._budget // row_bytes

    def _collated(self, size: int) -> tuple[Collated, float]:
        """Return a batch, the longest rows of its window, and the seconds a row that reading it took."""
        if size not in self._read:
            passes = self._model.passes
            passes.options = replace(passes.options, batch_size=size)
            window = range(min(self._n_rows, passes.window("train")))
            began = perf_counter()
            with passes.reading("train", [window], ahead=False) as reading:
                batches = list(reading.span())
            self._read[size] = batches[0], (perf_counter() - began) / len(window)
        return self._read[size]

    def _run(self, read: Collated) -> None:
        for _ in self._extractor.stream("train", [read]):
            pass

    def seconds(self, size: int, repeats: int = _REPEATS) -> float:
        """Return the seconds a row in a batch of this size, the best of several after one to warm up."""
        read, _ = self._collated(size)
        self._run(read)
        times = []
        for _ in range(repeats):
            began = perf_counter()
            self._run(read)
            times.append(perf_counter() - began)
        return min(times) / len(read.ids)

    def _working_bytes(self, size: int) -> int:
        """Return about the bytes a row that forward leaves for backward and the layer rules, and backward's own."""
        read, _ = self._collated(size)
        batch, parameters = self._model.batch("train", read), self._model.parameters.values()
        with _held_bytes(self._model.module) as held:
            for parameter in parameters:
                parameter.requires_grad_(True)
            try:
                self._model.engine("train").losses(batch)
            finally:
                for parameter in parameters:
                    parameter.requires_grad_(False)
        return int(_BACKWARD * sum(held.values()) / len(read.ids)) + 1

    def _with_format(self, size: int) -> float:
        """Put channels last if that is right and faster; return the seconds a row."""
        usual = self.seconds(size)
        if not any(p.dim() == 4 for p in self._model.parameters.values()):  # noqa: PLR2004
            return usual
        read, _ = self._collated(size)
        before = self._losses(read), self._model.engine("train").plan
        self._model.lay_out(channels_last=True)
        try:
            other = self.seconds(size)
            losses, plan = self._losses(read), self._model.engine("train").plan
        except (RuntimeError, TaskError, GradientProofError):
            # The model's own code does not take it (a view of pictures, say).
            other = float("inf")
        else:
            tolerance = _SAME_LOSS * float(before[0][torch.isfinite(before[0])].abs().mean())
            alike = torch.allclose(losses, before[0], rtol=_SAME_LOSS, atol=tolerance, equal_nan=True)
            if not alike or plan.steps != before[1].steps or plan.rank_one != before[1].rank_one:
                other = float("inf")
        if other < _BETTER * usual:
            return other
        self._model.lay_out(channels_last=False)
        return usual

    def _losses(self, read: Collated) -> Tensor:
        with torch.no_grad():
            return self._model.engine("train").losses(self._model.batch("train", read)).float()

    def _with_size(self, size: int, seconds: float, row_bytes: int, build: float) -> tuple[int, float]:
        """Double the batch while rows get cheaper, or else halve it; return the best size and its seconds a row."""
        best, limit = (seconds, size), min(self._n_rows, self._largest(row_bytes), LARGEST)
        for factor in (2.0, 0.5):
            trial = int(size * factor)
            while 1 <= trial <= limit and perf_counter() - self._began < _SHARE_OF_BUILD * build:
                found = self.seconds(trial)
                if found > _BETTER * best[0]:
                    break
                best, trial = (found, trial), int(trial * factor)
            if best[1] != size:
                break
        return best[1], best[0]


@contextmanager
def _held_bytes(module: nn.Module) -> Any:
    """Yield the bytes of all memory that autograd saves or a layer takes or gives meanwhile, by address."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}

    def seen(tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if (
                isinstance(tensor, Tensor)
                and tensor.layout is torch.strided
                and tensor.untyped_storage().data_ptr() not in own
            ):
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = max(storage.nbytes(), held.get(storage.data_ptr(), 0))

    def pack(tensor: Tensor) -> Tensor:
        seen([tensor])
        return tensor

    hooks = [m.register_forward_hook(lambda _m, given, made: seen([*given, *leaves(made)])) for m in module.modules()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield held
    finally:
        for hook in hooks:
            hook.remove()


def _bytes(inputs: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_within(inputs))
