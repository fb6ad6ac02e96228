"""Batch to feature rows: per-example gradients, sketched into D, times the root of the learning rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tracin_ann.errors import NonFiniteError
from tracin_ann.factors import Form, squared_norm
from tracin_ann.gradients import Batch
from tracin_ann.passes import LoadedModel, SideName
from tracin_ann.proof import check_finite, not_finite
from tracin_ann.scratch import Scratch
from tracin_ann.sketch import ParameterKey, ParameterSketch, Sketch
from tracin_ann.types import Float32

Norms = Literal["sketch", "exact"]
FormSink = Callable[[str, Form, slice], None]


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
    """Rows of one checkpoint: features [n, D] (√η included), squared gradient norms and losses [n] (without η)."""

    feature_ND: Float32
    sqnorm_N: Float32
    loss_N: Float32


class FeatureExtractor:
    """Feature rows of a model's examples at its present checkpoint."""

    def __init__(self, model: LoadedModel, options: FeatureOptions) -> None:
        self._model, self._options = model, options
        self._rate = model.passes.task.checkpoints[model.checkpoint].learning_rate
        self._maps: dict[str, ParameterSketch] = {}
        self._scratch = Scratch()
        dtypes = {p.dtype for p in model.parameters.values()}
        self._dtype = torch.float64 if torch.float64 in dtypes else torch.float32

    def rows(self, side: SideName, ids: Sequence[int]) -> FeatureRows:
        """Return the rows of these examples, in order."""
        return RowBuffer(len(ids), self._options.sketch.dim).filled(self.stream(side, ids))

    def stream(self, side: SideName, ids: Sequence[int]) -> Iterator[FeatureRows]:
        """Yield the rows of these examples, a batch at a time.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite.
            TaskError: the loss breaks the contract.
            GradientProofError: no step of the ladder agrees with autograd.
        """
        for batch in self._model.batches(side, ids):
            yield self._extract(side, batch)

    def _extract(self, side: SideName, batch: Batch) -> FeatureRows:
        sketch_BD = torch.zeros(0)
        forms: dict[tuple[str, int, int], list[Form]] = {}
        exact = self._options.norms == "exact"

        def start() -> FormSink:
            nonlocal sketch_BD, forms
            sketch_BD = torch.zeros(
                len(batch), self._options.sketch.dim, dtype=self._dtype, device=self._model.passes.options.device
            )
            forms = defaultdict(list)

            def sink(name: str, form: Form, rows: slice) -> None:
                self._map(name).add(sketch_BD[rows], form)
                if exact:
                    forms[name, rows.start, rows.stop].append(form)

            return sink

        losses = self._model.engine(side).run(batch, start)
        sqnorm_B = squared_norms(forms, len(batch), losses.device, self._dtype) if exact else sketch_BD.square().sum(1)
        self._check(sketch_BD, losses, batch)
        feature_BD = sketch_BD * self._rate**0.5
        return FeatureRows(*(t.float().cpu().numpy() for t in (feature_BD, sqnorm_B, losses)))

    def _map(self, name: str) -> ParameterSketch:
        if name not in self._maps:
            shape = tuple(self._model.parameters[name].shape)
            rank_one = name in self._options.rank_one
            key = ParameterKey(self._options.seed, self._model.checkpoint, name, shape, rank_one)
            self._maps[name] = self._options.sketch.parameter(
                key, self._model.passes.options.device, self._dtype, self._scratch
            )
        return self._maps[name]

    def _check(self, sketch_BD: Tensor, losses: Tensor, batch: Batch) -> None:
        if bool(torch.isfinite(sketch_BD).all()) and bool(torch.isfinite(losses).all()):
            return
        check_finite(losses, batch.ids, self._model.checkpoint)
        row = int((~torch.isfinite(sketch_BD)).any(1).nonzero()[0])
        got = f"NaN or inf at a loss of {float(losses[row]):.6g}"
        raise NonFiniteError(not_finite("gradient", batch.ids[row], self._model.checkpoint, got))


def squared_norms(
    forms: dict[tuple[str, int, int], list[Form]], batch: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return exact squared gradient norms [B] from all forms of a batch, by (parameter, rows)."""
    total = torch.zeros(batch, dtype=dtype, device=device)
    for (_, first, last), uses in forms.items():
        total[first:last] += squared_norm(uses)
    return total


class RowBuffer:
    """Room for the rows of a partition, filled again and again: fresh memory of that size is dear to touch."""

    def __init__(self, n_rows: int, dim: int) -> None:
        self._room = FeatureRows(*(np.empty(s, np.float32) for s in ((n_rows, dim), (n_rows,), (n_rows,))))

    def filled(self, stream: Iterable[FeatureRows]) -> FeatureRows:
        """Return consecutive rows as one, in this buffer until it is filled again; they must fit."""
        done = 0
        for rows in stream:
            place = slice(done, done + len(rows.loss_N))
            for name, values in vars(rows).items():
                getattr(self._room, name)[place] = values
            done = place.stop
        return FeatureRows(*(values[:done] for values in vars(self._room).values()))
