"""Batch to feature rows: per-example gradients, sketched into D, times the root of the learning rate."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracin_ann.choices import Norms, SideName
from tracin_ann.device import record_event
from tracin_ann.errors import NonFiniteError
from tracin_ann.features.passes import LoadedModel
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
from tracin_ann.sketch import ParameterKey, ParameterSketch, Sketch, TensorSketch, is_rank_one
from tracin_ann.task import CollatedBatch
from tracin_ann.types import Float32, Float64, Int64

# Batches under way when a batch's rows are fetched, by kind of device.
_BEHIND = {"cpu": 0}
FormSink = Callable[[str, Form, slice], None]
_LEAST_SQUARE = 1e-30


@dataclass(frozen=True)
class FeatureOptions:
    """What turns gradients into rows.

    Attributes:
        sketch: the family of maps, with D.
        seed: of its random numbers.
        rank_one: parameters whose gradients are outer products, as the index has recorded them.
        norms: squared gradient norms estimated from the sketch, or exact at about the sketch's cost.
    """

    sketch: Sketch
    seed: int
    rank_one: frozenset[str]
    norms: Norms = "sketch"


@dataclass(frozen=True)
class FeatureRows:
    """Rows of one checkpoint: features [n, D] (√η included), squared gradient norms and losses [n] (without η).

    `ids_N` are the rows' ids in the data set. A row that is skipped has a loss that isn't finite, and zeros.
    """

    ids_N: Int64
    feature_ND: Float32
    sqnorm_N: Float64
    loss_N: Float32


class FeatureExtractor:
    """Feature rows of a model's examples at its present checkpoint."""

    def __init__(self, model: LoadedModel, options: FeatureOptions) -> None:
        self._model, self._options = model, options
        self._rate = model.passes.task.checkpoints[model.checkpoint].learning_rate
        self._maps: dict[str, ParameterSketch] = {}
        self._scratch = Scratch()
        self._dtype = form_dtype(model.parameters.values())

    def rows(self, side: SideName, ids: Sequence[int]) -> FeatureRows:
        """Return the rows of these examples, in order."""
        return joined(list(self.stream(side, self._model.passes.read(side, ids))))

    def stream(self, side: SideName, batches: Iterable[CollatedBatch]) -> Iterator[FeatureRows]:
        """Yield the rows of batches that were read, a batch at a time.

        On an accelerator a batch's rows are fetched when the next is under way, so that nothing waits for it.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite, and such rows are not to be skipped.
            TaskError: the loss breaks the contract.
            GradientProofError: no step of the ladder agrees with autograd.
        """
        ahead = _BEHIND.get(self._model.passes.options.device.type, 1)
        under_way: deque[_UnderWay] = deque()
        for read in batches:
            under_way.append(self._started(side, self._model.batch(side, read)))
            while len(under_way) > ahead:
                yield self._fetched(under_way.popleft())
        while under_way:
            yield self._fetched(under_way.popleft())

    def of_gradients(self, grad_BP: Tensor) -> Float64:
        """Return the features [B, D] of whole gradients [B, P], the parameters one after another."""
        parameters = self._model.parameters
        sketch_BD = torch.zeros(len(grad_BP), self._options.sketch.dim, dtype=self._dtype, device=grad_BP.device)
        parts = torch.split(grad_BP.to(self._dtype), [p.numel() for p in parameters.values()], dim=1)
        for name, part_BP in zip(parameters, parts, strict=True):
            if part_BP.shape[1]:
                self._map(name).add(sketch_BD, Dense(part_BP))
        feature_BD: Float64 = (sketch_BD.double() * self._rate**0.5).cpu().numpy()
        return feature_BD

    def _started(self, side: SideName, batch: Batch) -> _UnderWay:
        sketch_BD = spectrum_BF = torch.zeros(0)
        forms: dict[tuple[str, int, int], list[Form]] = {}
        exact = self._options.norms == "exact"

        def start() -> FormSink:
            nonlocal sketch_BD, spectrum_BF, forms
            sketch_BD = torch.zeros(
                len(batch), self._options.sketch.dim, dtype=self._dtype, device=self._model.passes.options.device
            )
            spectrum_BF = torch.zeros(0)
            forms = defaultdict(list)

            def sink(name: str, form: Form, rows: slice) -> None:
                nonlocal spectrum_BF
                each = self._map(name)
                if isinstance(each, TensorSketch) and is_rank_one(form) and len(form.left_BTR) == len(batch):
                    # Transforms back cost a quarter of these sketches: all layers' at once.
                    spectrum = each.spectrum(form, self._options.sketch.dim)
                    spectrum_BF = spectrum_BF + spectrum if len(spectrum_BF) else spectrum
                else:
                    each.add(sketch_BD[rows], form)
                if exact:
                    forms[name, rows.start, rows.stop].append(form)

            return sink

        losses = self._losses(side, batch, start)
        if len(spectrum_BF):
            sketch_BD += torch.fft.irfft(spectrum_BF, n=self._options.sketch.dim)
        if exact:
            sqnorm_B = squared_norms(forms, len(batch), losses.device)
        else:
            # In float32, squares of what is past 10^19 are infinite and of what is under 10^-23 zero.
            sqnorm_B = torch.linalg.vector_norm(sketch_BD, dim=1, dtype=torch.float64).square()
        rows = (sketch_BD * self._rate**0.5).float(), sqnorm_B, losses.float()
        finite = torch.isfinite(rows[0].sum(1) + rows[1] + rows[2]).all()
        host = tuple(t.to("cpu", non_blocking=True) for t in rows)
        return _UnderWay(batch.ids, finite, host, record_event(losses.device))

    def _losses(self, side: SideName, batch: Batch, start: Callable[[], FormSink]) -> Tensor:
        """Run a batch and return its losses; NaN for rows that a proof could not be made with, if they are skipped."""
        engine = self._model.engine(side)
        try:
            return engine.run(batch, start)
        except NonFiniteError:
            if self._model.passes.options.on_nonfinite == "error":
                raise
        mended = replace_nonfinite(engine, batch)
        if mended is None:
            start()
            return torch.full((len(batch),), torch.nan, device=self._model.passes.options.device)
        others, replaced = mended
        losses = engine.run(others, start).clone()
        losses[list(replaced)] = torch.nan
        return losses

    def _fetched(self, done: _UnderWay) -> FeatureRows:
        done.wait()
        rows = FeatureRows(np.array(done.ids, np.int64), *(t.numpy() for t in done.host))
        # A sum that overflows is no reason to think ill of the rows.
        if not bool(done.finite) and (bad := find_nonfinite(rows)).any():
            if self._model.passes.options.on_nonfinite == "error":
                raise NonFiniteError(self._refusal(rows))
            rows.loss_N[bad & np.isfinite(rows.loss_N)] = np.nan
            rows.feature_ND[bad] = rows.sqnorm_N[bad] = 0
        return rows

    def _map(self, name: str) -> ParameterSketch:
        if name not in self._maps:
            shape = tuple(self._model.parameters[name].shape)
            rank_one = name in self._options.rank_one
            key = ParameterKey(self._options.seed, self._model.checkpoint, name, shape, rank_one)
            self._maps[name] = self._options.sketch.parameter(
                key, self._model.passes.options.device, self._dtype, self._scratch
            )
        return self._maps[name]

    def _refusal(self, rows: FeatureRows) -> str:
        """Return the message for the first of the rows that is not finite."""
        place = int(np.flatnonzero(find_nonfinite(rows))[0])
        row, loss = int(rows.ids_N[place]), float(rows.loss_N[place])
        if not np.isfinite(loss):
            return describe_nonfinite("loss", row, self._model.checkpoint, loss)
        what = "gradient" if not np.isfinite(rows.feature_ND[place]).all() else "squared norm of the gradient"
        return describe_nonfinite(what, row, self._model.checkpoint, f"NaN or inf at a loss of {loss:.6g}")


@dataclass(frozen=True)
class _UnderWay:
    """A batch whose kernels are launched; what is on the host may be read after `wait`."""

    ids: tuple[int, ...]
    finite: Tensor
    host: tuple[Tensor, ...]
    wait: Callable[[], None]


def find_nonfinite(rows: FeatureRows) -> npt.NDArray[np.bool_]:
    """Return which rows [n] hold a number that is not finite; skipped ones do, their losses."""
    fine_N = np.isfinite(rows.loss_N) & np.isfinite(rows.sqnorm_N)
    unsound_N: npt.NDArray[np.bool_] = ~(fine_N & np.isfinite(rows.feature_ND).all(axis=1))
    return unsound_N


def squared_norms(forms: dict[tuple[str, int, int], list[Form]], batch: int, device: torch.device) -> Tensor:
    """Return exact squared gradient norms [B], float64, from all forms of a batch, by (parameter, rows).

    Those too large or too small for the models' own precision are computed again in float64.
    """
    total = torch.zeros(batch, dtype=torch.float64, device=device)
    parts = list(_norm_parts(forms))
    for first, last, uses in parts:
        total[first:last] += squared_norm(uses)
    far = (~(torch.isfinite(total) & (total > _LEAST_SQUARE))).nonzero().flatten()
    if len(far):
        total[far] = 0
        for first, last, uses in parts:
            rows = far[(far >= first) & (far < last)]
            if len(rows):
                total[rows] += squared_norm([convert(form[rows - first], torch.float64) for form in uses])
    return total


def _norm_parts(forms: dict[tuple[str, int, int], list[Form]]) -> Iterator[tuple[int, int, list[Form]]]:
    """Yield rows of the batch with all of one parameter's forms of just these rows: only together have they a norm."""
    by_name: dict[str, list[tuple[int, int, Form]]] = defaultdict(list)
    for (name, first, last), uses in forms.items():
        by_name[name] += [(first, last, form) for form in uses]
    for uses_of in by_name.values():
        cuts = sorted({cut for first, last, _ in uses_of for cut in (first, last)})
        for start, stop in itertools.pairwise(cuts):
            held = [form[start - first : stop - first] for first, last, form in uses_of if first <= start < last]
            if held:
                yield start, stop, held


def joined(parts: Sequence[FeatureRows]) -> FeatureRows:
    """Return rows one after another as one."""
    return FeatureRows(*(np.concatenate(values) for values in zip(*(vars(p).values() for p in parts), strict=True)))


class RowBuffer:
    """Room for the rows of a partition, filled again and again: fresh memory of that size is dear to touch."""

    def __init__(self, n_rows: int, dim: int) -> None:
        self._room = FeatureRows(
            np.empty(n_rows, np.int64),
            np.empty((n_rows, dim), np.float32),
            np.empty(n_rows, np.float64),
            np.empty(n_rows, np.float32),
        )

    def filled(self, start: int, stop: int, stream: Iterable[FeatureRows]) -> FeatureRows:
        """Return rows start..stop, each at its place however they come, in this buffer until it is filled again."""
        room = FeatureRows(*(values[: stop - start] for values in vars(self._room).values()))
        done = 0
        for rows in stream:
            place: slice | Int64 = rows.ids_N - start
            if (np.diff(rows.ids_N) == 1).all():
                place = slice(int(rows.ids_N[0]) - start, int(rows.ids_N[-1]) - start + 1)
            for name, values in vars(rows).items():
                getattr(room, name)[place] = values
            done += len(rows.ids_N)
        assert done == stop - start
        return room
