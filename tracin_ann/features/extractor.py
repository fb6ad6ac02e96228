"""Extraction of feature rows from batches: per-example gradients, sketched and scaled by √(learning rate).

Shapes: N or n rows, B batch, D sketch dimension, P parameters.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracin_ann.choices import Norms, SideName
from tracin_ann.device import Fetched, Sent
from tracin_ann.errors import NonFiniteError, TaskError, first_line, problem
from tracin_ann.features.loaded_model import LoadedModel
from tracin_ann.gradients import (
    Batch,
    Dense,
    Form,
    Scratch,
    convert,
    describe_nonfinite,
    form_dtype,
    replace_nonfinite,
    squared_norm,
)
from tracin_ann.sketch import (
    ParameterKey,
    ParameterSketch,
    Rotation,
    Sketch,
    TensorSketch,
    is_rank_one,
    make_rotation,
)
from tracin_ann.task import CollatedBatch
from tracin_ann.types import Float32, Float64, Int64

FormSink = Callable[[str, Form, slice], None]
Forms = dict[tuple[str, int, int], list[Form]]
"""The gradient forms of a batch by parameter name and first and last row (exclusive)."""
T = TypeVar("T")
# Smaller squared norms are recomputed in float64.
_LEAST_SQUARE = 1e-30


@dataclass(frozen=True)
class FeatureOptions:
    """Options that turn gradients into feature rows.

    Attributes:
        sketch: the type of sketch, with its dimension D.
        seed: seed of the sketch's random numbers.
        rank_one: names of the parameters whose gradients are outer products, as recorded in the index.
        norms: `sketch` estimates squared gradient norms from the sketch; `exact` costs about as much as the sketch.
        rotates: whether sketches are rotated: those of an index that stores codes (`tracin_ann.store.is_coded`) are.
    """

    sketch: Sketch
    seed: int
    rank_one: frozenset[str]
    norms: Norms = "sketch"
    rotates: bool = False


@dataclass(frozen=True)
class FeatureRows:
    """Feature rows of examples at one checkpoint, with learning rate η.

    The loss of a skipped row is not finite; its feature and squared norm are 0.

    Attributes:
        ids_N: row ids in the data set [n].
        feature_ND: features [n, D] in float32, scaled by √η.
        sqnorm_N: squared norms [n] in float64 of the gradients that the engine passes on, not scaled by η.
        loss_N: losses [n] in float32.
    """

    ids_N: Int64
    feature_ND: Float32
    sqnorm_N: Float64
    loss_N: Float32


class FeatureExtractor:
    """Computes the feature rows of examples at the model's loaded checkpoint.

    Args:
        model: the model, with a checkpoint loaded.
        options: the sketch and the kind of norms.
    """

    def __init__(self, model: LoadedModel, options: FeatureOptions) -> None:
        self._model, self._options = model, options
        self._rate = model.rate
        self._sketches: dict[str, ParameterSketch] = {}
        self._scratch = Scratch()
        self._dtype = form_dtype(model.parameters.values())
        self._rotation: Rotation | None = None
        if options.rotates:
            device = model.runner.options.device
            self._rotation = make_rotation(options.seed, model.checkpoint, options.sketch.dim, device, self._dtype)

    def rows(self, side: SideName, ids: Sequence[int]) -> FeatureRows:
        """Return the feature rows of the examples with these ids, in this order."""
        return concatenate_rows(list(self.stream(side, self._model.runner.read(side, ids))))

    def stream(self, side: SideName, batches: Iterable[CollatedBatch]) -> Iterator[FeatureRows]:
        """Yield the feature rows of each collated batch.

        On an accelerator, a batch is copied to the device while the batch before it is computed, and its rows are
        fetched after the batch after it is launched, so that the device does not wait.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite, and the options do not skip such rows.
            TaskError: the loss breaks the contract, or the device reports an error.
            GradientProofError: no gradient method agrees with autograd.
        """
        sent = _Lookahead(partial(self._send_next, side, iter(batches)))
        launched = _Lookahead(partial(self._launch_next, side, sent))
        for each in launched:
            if self._model.copies.n_ahead:
                launched.advance()
            rows = self._collect(each)
            # The memory of the batch is free while the next one is computed.
            del each
            yield rows

    def _send_next(self, side: SideName, batches: Iterator[CollatedBatch]) -> Sent[Batch]:
        return self._model.send(side, next(batches))

    def _launch_next(self, side: SideName, sent: _Lookahead[Sent[Batch]]) -> _LaunchedBatch:
        launched = self._launch(side, self._model.copies.receive(next(sent)))
        if self._model.copies.n_ahead:
            sent.advance()
        return launched

    def sketch_gradients(self, grad_BP: Tensor) -> Float64:
        """Return the features [B, D] of scaled gradients [B, P] of all parameters, flattened in the model's order."""
        parameters = self._model.parameters
        sketch_BD = torch.zeros(len(grad_BP), self._options.sketch.dim, dtype=self._dtype, device=grad_BP.device)
        parts = torch.split(grad_BP.to(self._dtype), [p.numel() for p in parameters.values()], dim=1)
        for name, part_BP in zip(parameters, parts, strict=True):
            if part_BP.shape[1]:
                self._parameter_sketch(name).add(sketch_BD, Dense(part_BP))
        sketch_BD = self._rotate(sketch_BD)
        feature_BD: Float64 = (sketch_BD.double() * self._rate**0.5).cpu().numpy()
        return feature_BD

    def _launch(self, side: SideName, batch: Batch) -> _LaunchedBatch:
        sketch_BD = spectrum_BF = torch.zeros(0)
        forms: Forms = {}
        exact = self._options.norms == "exact"

        def start() -> FormSink:
            nonlocal sketch_BD, spectrum_BF, forms
            sketch_BD = torch.zeros(
                len(batch), self._options.sketch.dim, dtype=self._dtype, device=self._model.runner.options.device
            )
            spectrum_BF = torch.zeros(0)
            forms = defaultdict(list)

            def sink(name: str, form: Form, rows: slice) -> None:
                nonlocal spectrum_BF
                each = self._parameter_sketch(name)
                if isinstance(each, TensorSketch) and is_rank_one(form) and len(form.left_BTR) == len(batch):
                    # The inverse transform takes a quarter of the time of these sketches: one for all layers.
                    spectrum = each.spectrum(form, self._options.sketch.dim)
                    spectrum_BF = spectrum_BF + spectrum if len(spectrum_BF) else spectrum
                else:
                    each.add(sketch_BD[rows], form)
                if exact:
                    forms[name, rows.start, rows.stop].append(form)

            return sink

        losses = self._run_engine(side, batch, start)
        if len(spectrum_BF):
            sketch_BD += torch.fft.irfft(spectrum_BF, n=self._options.sketch.dim)
        sketch_BD = self._rotate(sketch_BD)
        if exact:
            sqnorm_B = sum_squared_norms(forms, len(batch), losses.device)
        else:
            # Squares in float32 overflow above 10^19 and underflow below 10^-23.
            sqnorm_B = torch.linalg.vector_norm(sketch_BD, dim=1, dtype=torch.float64).square()
        rows = (sketch_BD * self._rate**0.5).float(), sqnorm_B, losses.float()
        # One of the copies: reading it on the device would wait for the batches that are launched next.
        finite = torch.isfinite(rows[0].sum(1) + rows[1] + rows[2]).all()
        return _LaunchedBatch(batch, forms if exact else {}, self._model.copies.fetch((*rows, finite)))

    def _rotate(self, sketch_BD: Tensor) -> Tensor:
        return sketch_BD if self._rotation is None else self._rotation.apply(sketch_BD)

    def _run_engine(self, side: SideName, batch: Batch, start: Callable[[], FormSink]) -> Tensor:
        """Run a batch and return its losses [B]; NaN for non-finite rows that are replaced to verify the gradients."""
        engine = self._model.engine(side)
        try:
            return engine.run(batch, start)
        except NonFiniteError:
            if self._model.runner.options.on_nonfinite == "error":
                raise
        finite = replace_nonfinite(engine, batch)
        if finite is None:
            start()
            return torch.full((len(batch),), torch.nan, device=self._model.runner.options.device)
        finite_batch, replaced = finite
        losses = engine.run(finite_batch, start).clone()
        losses[list(replaced)] = torch.nan
        return losses

    def _collect(self, done: _LaunchedBatch) -> FeatureRows:
        """Return the rows of a batch after it is computed."""
        ids = done.batch.ids
        try:
            done.fetched.wait()
        except RuntimeError as error:
            raise TaskError(self._describe_failure(ids, error)) from error
        *values, finite = (tensor.numpy() for tensor in done.fetched.host)
        rows = FeatureRows(np.array(ids, np.int64), *values)
        if self._options.norms == "exact":
            correct_squared_norms(rows.sqnorm_N, done.forms)
        # The sum may overflow although every row is finite.
        if not finite and (bad := find_nonfinite(rows)).any():
            if self._model.runner.options.on_nonfinite == "error":
                raise NonFiniteError(self._describe_nonfinite(rows))
            rows.loss_N[bad & np.isfinite(rows.loss_N)] = np.nan
            rows.feature_ND[bad] = rows.sqnorm_N[bad] = 0
        return rows

    def _describe_failure(self, ids: Sequence[int], error: RuntimeError) -> str:
        return problem(
            f"the device failed in the batch of {len(ids)} rows that begins with row {ids[0]}, or in the next batch",
            got=first_line(error),
            expected="a batch that runs",
            remedy="run these rows with --device cpu, which names the cause, such as an index out of range",
        )

    def _parameter_sketch(self, name: str) -> ParameterSketch:
        if name not in self._sketches:
            shape = tuple(self._model.parameters[name].shape)
            rank_one = name in self._options.rank_one
            key = ParameterKey(self._options.seed, self._model.checkpoint, name, shape, rank_one)
            self._sketches[name] = self._options.sketch.parameter(
                key, self._model.runner.options.device, self._dtype, self._scratch
            )
        return self._sketches[name]

    def _describe_nonfinite(self, rows: FeatureRows) -> str:
        """Return the message for the first of the rows that is not finite."""
        place = int(np.flatnonzero(find_nonfinite(rows))[0])
        row, loss = int(rows.ids_N[place]), float(rows.loss_N[place])
        if not np.isfinite(loss):
            return describe_nonfinite("loss", row, self._model.checkpoint, loss)
        what = "gradient" if not np.isfinite(rows.feature_ND[place]).all() else "squared norm of the gradient"
        return describe_nonfinite(what, row, self._model.checkpoint, f"NaN or inf at a loss of {loss:.6g}")


@dataclass(frozen=True)
class _LaunchedBatch:
    """A batch whose kernels are launched.

    Attributes:
        batch: the batch, whose memory is in use.
        forms: the gradient forms, for exact norms; otherwise empty.
        fetched: features, squared norms, losses, and whether the sum of all values is finite.
    """

    batch: Batch
    forms: Forms
    fetched: Fetched


class _Lookahead(Iterator[T]):
    """Items in order, of which some are taken in advance; an error is raised in the place of its item.

    Args:
        take: returns the next item, or raises StopIteration.
    """

    def __init__(self, take: Callable[[], T]) -> None:
        self._take = take
        self._taken: deque[T | Exception] = deque()

    def advance(self) -> None:
        """Take one more item in advance."""
        try:
            self._taken.append(self._take())
        except StopIteration:
            return
        except Exception as error:
            self._taken.append(error)

    def __next__(self) -> T:
        """Return the next item."""
        if not self._taken:
            return self._take()
        item = self._taken.popleft()
        if isinstance(item, Exception):
            raise item
        return item


def find_nonfinite(rows: FeatureRows) -> npt.NDArray[np.bool_]:
    """Return a mask [n] of the rows with a NaN or infinite value, skipped rows included."""
    finite_N = np.isfinite(rows.loss_N) & np.isfinite(rows.sqnorm_N)
    nonfinite_N: npt.NDArray[np.bool_] = ~(finite_N & np.isfinite(rows.feature_ND).all(axis=1))
    return nonfinite_N


def squared_norms(forms: Forms, batch: int, device: torch.device) -> Tensor:
    """Return exact squared gradient norms [B] in float64.

    Norms that are too large or too small for the model's precision are recomputed in float64.

    Args:
        forms: all gradient forms of the batch, by parameter name and first and last row (exclusive).
        batch: B.
        device: the device of the result.
    """
    total_B = sum_squared_norms(forms, batch, device).cpu()
    correct_squared_norms(total_B.numpy(), forms)
    return total_B.to(device)


def sum_squared_norms(forms: Forms, batch: int, device: torch.device) -> Tensor:
    """Return exact squared gradient norms [B] in float64, computed in the model's precision."""
    total_B = torch.zeros(batch, dtype=torch.float64, device=device)
    for _, first, last, uses in group_by_rows(forms):
        total_B[first:last] += squared_norm(uses)
    return total_B


def correct_squared_norms(sqnorm_B: Float64, forms: Forms) -> None:
    """Replace squared norms that are too large or too small for the model's precision by those in float64."""
    far_M = np.flatnonzero(~(np.isfinite(sqnorm_B) & (sqnorm_B > _LEAST_SQUARE)))
    if not len(far_M):
        return
    sqnorm_B[far_M] = 0
    for _, first, last, uses in group_by_rows(forms):
        rows = far_M[(far_M >= first) & (far_M < last)]
        if len(rows):
            where = torch.from_numpy(rows - first)
            parts = [convert(form[where], torch.float64) for form in uses]
            sqnorm_B[rows] += squared_norm(parts).cpu().numpy()


def group_by_rows(forms: Forms) -> Iterator[tuple[str, int, int, list[Form]]]:
    """Yield (name, start, stop, forms): all forms of one parameter for the same rows; they add up to its gradient."""
    by_name: dict[str, list[tuple[int, int, Form]]] = defaultdict(list)
    for (name, first, last), uses in forms.items():
        by_name[name] += [(first, last, form) for form in uses]
    for name, uses_of in by_name.items():
        cuts = sorted({cut for first, last, _ in uses_of for cut in (first, last)})
        for start, stop in itertools.pairwise(cuts):
            parts = [form[start - first : stop - first] for first, last, form in uses_of if first <= start < last]
            if parts:
                yield name, start, stop, parts


def concatenate_rows(parts: Sequence[FeatureRows]) -> FeatureRows:
    """Return the concatenation of feature rows."""
    return FeatureRows(*(np.concatenate(values) for values in zip(*(vars(p).values() for p in parts), strict=True)))


class RowBuffer:
    """A reusable buffer for the feature rows of a partition. First access to newly allocated memory is slow.

    Args:
        n_rows: largest number of rows.
        dim: D.

    Attributes:
        n_missing: rows that have not been added since `begin`.
    """

    def __init__(self, n_rows: int, dim: int) -> None:
        self._memory = FeatureRows(
            np.empty(n_rows, np.int64),
            np.empty((n_rows, dim), np.float32),
            np.empty(n_rows, np.float64),
            np.empty(n_rows, np.float32),
        )

    def begin(self, start: int, stop: int) -> None:
        """Begin to collect rows start..stop-1."""
        self._start, self.n_missing = start, stop - start
        self._rows = FeatureRows(*(values[: stop - start] for values in vars(self._memory).values()))

    def add(self, rows: FeatureRows) -> None:
        """Add rows; they may come in any order."""
        place: slice | Int64 = rows.ids_N - self._start
        if (np.diff(rows.ids_N) == 1).all():
            place = slice(int(rows.ids_N[0]) - self._start, int(rows.ids_N[-1]) - self._start + 1)
        for name, values in vars(rows).items():
            getattr(self._rows, name)[place] = values
        self.n_missing -= len(rows.ids_N)

    def take(self) -> FeatureRows:
        """Return the rows in the order of their ids, after all were added; valid until the next `begin`."""
        assert not self.n_missing
        return self._rows
