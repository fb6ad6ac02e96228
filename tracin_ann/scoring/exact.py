"""Exact scores without projection: of given rows against given queries, and self-influence.

TracInCP is Σ_c η_c ⟨∇ℓ(w_c, z), ∇ℓ(w_c, z')⟩ (Pruthi et al. 2020, eq. 4) over all chosen parameters. The full gradients
of the queries are the directions; a preconditioner replaces them by others. The forward and backward of a row runs once
for all of its queries, and the inner products are computed from the factors of the row's gradient.

Shapes: N rows, Q queries, G weighted sums of queries, B batch, P parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracin_ann.choices import SideName
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.features import LoadedModel, TaskRunner, group_by_rows, squared_norms
from tracin_ann.gradients import Form, Outer, Sink, form_dtype, inner_where, materialise
from tracin_ann.scoring.computation import Steps, run_steps
from tracin_ann.types import Float64, Int64, ProgressCallback, ignore_progress

Directions = dict[str, Tensor]


@dataclass(frozen=True)
class Queries:
    """The examples that rows are scored against: each example, or weighted sums of them.

    Attributes:
        side: `query`, `train` for training rows as queries, or `input` for examples that are lent to the runner.
        ids: their Q positions.
        mixture_GQ: weights of the examples' gradients in G sums, which are the directions; None: each example's
            gradient is a direction.
    """

    side: SideName
    ids: Sequence[int]
    mixture_GQ: Float64 | None = None

    def __len__(self) -> int:
        """Return the number of directions: G, or Q."""
        return len(self.ids) if self.mixture_GQ is None else len(self.mixture_GQ)


class DirectionMap(Protocol):
    """A map of the gradient of each query, at each checkpoint, for a score that is not TracInCP."""

    @property
    def summary(self) -> str:
        """Return the map in a few words for users, after it was applied."""

    def apply(
        self, model: LoadedModel, directions: Directions, progress: ProgressCallback = ignore_progress
    ) -> Directions:
        """Return the directions [Q, P] by parameter for gradients of queries at the loaded checkpoint.

        Args:
            model: the model.
            directions: the gradients.
            progress: called with (stage, done, total) of this call.
        """

    def weigh_rows(
        self, model: LoadedModel, rows: Sequence[int], progress: ProgressCallback = ignore_progress
    ) -> Float64:
        """Return the factors [N] of the inner products of training rows with the directions."""


@dataclass(frozen=True)
class ExactProgress:
    """What is called while exact scores are computed, between batches. What it raises ends the computation.

    Attributes:
        add_rows: called with the number of finished rows; each row counts once per checkpoint and block of queries.
        report: called with (stage, done, total) of other work, over all checkpoints.
    """

    add_rows: Callable[[int], None] | None = None
    report: ProgressCallback = ignore_progress

    @property
    def uncounted(self) -> ExactProgress:
        """Return the progress of scores whose rows are not counted."""
        return replace(self, add_rows=None)


Mask = npt.NDArray[np.bool_]


class RowScorer(Protocol):
    """Exact scores of rows against given queries."""

    def scores(self, rows: Sequence[int], requested_QN: Mask | None = None) -> Float64:
        """Return scores [Q, N] of these training rows, see `ExactScorer.scores`."""


_DIRECTION_BYTES = 1 << 30
"""Memory of the directions of one block of queries."""
_LARGEST_EXPONENT = 100
_DEFERRED_ROWS = 1024
"""Rows whose deferred factors are multiplied with the directions at once."""


def exact_scores(
    runner: TaskRunner,
    queries: tuple[SideName, Sequence[int]],
    rows: Sequence[int],
    checkpoints: Sequence[int],
) -> Float64:
    """Return TracInCP scores [Q, N] of training rows against queries, over the chosen checkpoints.

    Args:
        runner: the task's data and model.
        queries: the side (`query`, or `train` for training rows as queries) and ids of the queries.
        rows: ids of training rows.
        checkpoints: positions of the checkpoints to sum over.

    Raises:
        TaskError: the loss breaks the contract.
        NonFiniteError: a score is NaN or infinite.
    """
    with make_exact_scorer(runner, Queries(*queries), checkpoints) as scorer:
        return scorer.scores(rows)


@contextmanager
def make_exact_scorer(
    runner: TaskRunner,
    queries: Queries,
    checkpoints: Sequence[int],
    progress: ExactProgress | None = None,
    direction_map: DirectionMap | None = None,
) -> Iterator[ExactScorer]:
    """Yield a scorer for these queries; it computes their gradients once, however often it is called."""
    with runner.model("fp32") as model:
        yield ExactScorer(model, queries, checkpoints, progress or ExactProgress(), direction_map)


def report_part(progress: ProgressCallback, place: int, parts: int) -> ProgressCallback:
    """Return a callback for one of several parts of equal size, which reports the progress of all parts."""

    def report(stage: str, done: int, total: int) -> None:
        progress(stage, place * total + done, parts * total)

    return report


class ExactScorer:
    """Exact scores of rows against given queries, over given checkpoints; see `exact_scores`.

    With a map of the directions, the score is the sum over checkpoints of its products, without η_c, and it is applied
    to each example's gradient before gradients are mixed.
    """

    def __init__(
        self,
        model: LoadedModel,
        queries: Queries,
        checkpoints: Sequence[int],
        progress: ExactProgress,
        direction_map: DirectionMap | None = None,
    ) -> None:
        self.model, self.progress, self._queries, self.checkpoints = model, progress, queries, checkpoints
        self._map = direction_map
        entries = sum(p.numel() * p.element_size() for p in model.parameters.values())
        self._block_queries = max(1, _DIRECTION_BYTES // entries)
        self._caches = len(checkpoints) * len(queries) * entries <= _DIRECTION_BYTES
        self._cache: dict[tuple[int, int], tuple[Directions, Int64]] = {}

    def scores(self, rows: Sequence[int], requested_QN: Mask | None = None) -> Float64:
        """Return scores [Q, N] of these training rows; scores that are not requested are 0.

        Raises:
            TaskError: the loss breaks the contract.
            NonFiniteError: a score is NaN or infinite.
        """
        n_queries = len(self._queries)
        scores_QN = np.zeros((n_queries, len(rows)))
        requested_QN = np.ones(scores_QN.shape, dtype=bool) if requested_QN is None else requested_QN
        # Rows of the same queries are adjacent, so that a batch needs the directions of few queries.
        order_N = np.lexsort((requested_QN.sum(0), requested_QN.argmax(0)))
        for rate, block, directions, exponent_Q in self.blocks():
            chosen_N = order_N[requested_QN[block][:, order_N].any(0)]
            weight_N = self.weigh_rows([rows[i] for i in chosen_N])
            products_QN = compute_inner_products(
                self.model,
                directions,
                [rows[i] for i in chosen_N],
                requested_QN[block][:, chosen_N],
                self.progress.add_rows,
            )
            products_QN *= weight_N
            scores_QN[block, chosen_N] += np.ldexp(rate * products_QN, exponent_Q[:, None])
        scores_QN[~requested_QN] = 0
        _check_finite(scores_QN, rows)
        return scores_QN

    def weigh_rows(self, rows: Sequence[int]) -> Float64:
        """Return the factors [N] of the inner products of these training rows at the loaded checkpoint."""
        if self._map is None or self.model.rate == 0:
            return np.ones(len(rows))
        return self._map.weigh_rows(self.model, rows, self._report_part(0))

    def blocks(self) -> Iterator[tuple[float, slice, Directions, Int64]]:
        """Load one checkpoint after another, and yield blocks of queries at each.

        Yields:
            η_c, or 1 with a map of the directions; the place of the block; its scaled directions; the exponents [Q]
            that undo the scaling.
        """
        for checkpoint in self.checkpoints:
            if self.model.checkpoint != checkpoint:
                self.model.load(checkpoint)
            rate = self.model.rate if self._map is None else float(self.model.rate > 0)
            for first in range(0, len(self._queries), self._block_queries):
                yield (
                    rate,
                    slice(first, first + self._block_queries),
                    *self._load_directions(checkpoint, first),
                )

    def _load_directions(self, checkpoint: int, first: int) -> tuple[Directions, Int64]:
        """Return the scaled directions of a block of queries, and the exponents [Q] that undo the scaling."""
        cached = self._cache.get((checkpoint, first))
        if cached is None:
            directions = self._compute_directions(first)
            cached = directions, scale_in_place(directions)
            if self._caches:
                self._cache[checkpoint, first] = cached
        return cached

    def _compute_directions(self, first: int) -> Directions:
        side, ids, mixture_GQ = self._queries.side, self._queries.ids, self._queries.mixture_GQ
        if mixture_GQ is None:
            return self._compute_each(side, first)
        total: Directions = {}
        for start in range(0, len(ids), self._block_queries):
            chosen = slice(start, start + self._block_queries)
            weight_GQ = torch.from_numpy(np.ascontiguousarray(mixture_GQ[first : first + self._block_queries, chosen]))
            for name, direction in self._compute_each(side, start).items():
                mixed = weight_GQ.to(direction) @ direction
                total[name] = total[name] + mixed if name in total else mixed
        return total

    def _compute_each(self, side: SideName, first: int) -> Directions:
        """Return the directions of a block of examples."""
        gradients = compute_full_gradients(self.model, side, self._queries.ids[first : first + self._block_queries])
        if self._map is None or self.model.rate == 0:
            return gradients
        return self._map.apply(self.model, gradients, self._report_part(first))

    def _report_part(self, first: int) -> ProgressCallback:
        """Return a callback for a block of examples at the loaded checkpoint, which reports for all of them."""
        used = [checkpoint for checkpoint in self.checkpoints if self.model.rates[checkpoint].rate > 0]
        blocks = -(-len(self._queries.ids) // self._block_queries)
        place, parts = used.index(self.model.checkpoint) * blocks + first // self._block_queries, len(used) * blocks

        return report_part(self.progress.report, place, parts)


def scale_in_place(directions: Directions) -> Int64:
    """Scale each direction by a power of two, so that inner products neither overflow nor underflow.

    Returns the exponents [Q] that undo the scaling.
    """
    peaks = [torch.linalg.vector_norm(d, ord=torch.inf, dim=1) for d in directions.values()]
    exponent_Q = torch.stack(peaks).amax(0).double().frexp().exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    for direction in directions.values():
        direction.mul_(torch.ldexp(direction.new_ones(len(direction)), -exponent_Q)[:, None])
    return exponent_Q.cpu().numpy().astype(np.int64)


def _check_finite(scores: Float64, rows: Sequence[int]) -> None:
    bad = np.flatnonzero(~np.isfinite(np.atleast_2d(scores)).all(axis=0))
    if len(bad):
        raise NonFiniteError(
            problem(
                f"the exact score of row {rows[bad[0]]} is not finite",
                got="NaN or infinity",
                expected="finite gradients whose inner products fit into float32",
                remedy="leave out this row (--without), or build with --on-nonfinite skip",
            )
        )


def compute_full_gradients(model: LoadedModel, side: SideName, ids: Sequence[int]) -> Directions:
    """Return the full gradients of examples at the loaded checkpoint, by parameter, [Q, P] each."""
    return run_steps(step_through_gradients(model, side, ids))


def step_through_gradients(model: LoadedModel, side: SideName, ids: Sequence[int]) -> Steps[Directions]:
    """Compute full gradients, as `compute_full_gradients`; a step is a batch, whose examples are its units."""
    device = model.runner.options.device
    dtype = form_dtype(model.parameters.values())
    directions = {
        name: torch.zeros(len(ids), p.numel(), dtype=dtype, device=device)
        for name, p in model.parameters.items()
        if p.numel()
    }
    done = 0
    for batch in model.batches(side, ids):

        def start(first: int = done, last: int = done + len(batch)) -> Sink:
            for direction in directions.values():
                direction[first:last] = 0

            def sink(name: str, form: Form, rows: slice) -> None:
                directions[name][first + rows.start : first + rows.stop] += materialise(form)

            return sink

        model.engine(side).run(batch, start)
        done += len(batch)
        yield len(batch)
    return directions


def collect_forms(
    model: LoadedModel, side: SideName, ids: Sequence[int]
) -> Iterator[tuple[int, list[tuple[str, slice, list[Form]]]]]:
    """Yield the gradients of examples at the loaded checkpoint, batch after batch.

    Yields:
        the number of examples of a batch; and a list of: a parameter's name; places of consecutive examples in `ids`;
        forms that add up to their gradients.
    """
    forms: dict[tuple[str, int, int], list[Form]] = {}

    def start() -> Sink:
        # A batch starts again when its gradients have to be verified again.
        forms.clear()
        return lambda name, form, rows: forms.setdefault((name, rows.start, rows.stop), []).append(form)

    done = 0
    for batch in model.batches(side, ids):
        model.engine(side).run(batch, start)
        grouped = group_by_rows(forms)
        yield len(batch), [(name, slice(done + first, done + last), uses) for name, first, last, uses in grouped]
        done += len(batch)


def compute_inner_products(
    model: LoadedModel,
    directions: Directions,
    ids: Sequence[int],
    requested_QN: Mask,
    progress: Callable[[int], None] | None = None,
) -> Float64:
    """Return the inner products [Q, N] of rows' gradients with the directions that are requested for them."""
    products = [torch.zeros(0, len(requested_QN), dtype=torch.float64)]
    batches: list[_BatchProducts] = []
    done = 0
    for batch in model.batches("train", ids):
        requested_BQ = torch.from_numpy(np.ascontiguousarray(requested_QN[:, done : done + len(batch)].T))
        attempts: list[_BatchProducts] = []

        def start(requested_BQ: Tensor = requested_BQ, attempts: list[_BatchProducts] = attempts) -> Sink:
            attempts.append(_BatchProducts(directions, requested_BQ))
            return attempts[-1].sink

        model.engine("train").run(batch, start)
        # A batch starts again when its gradients have to be verified again.
        batches.append(attempts[-1])
        done += len(batch)
        if sum(len(batch_products.total_BQ) for batch_products in batches) >= _DEFERRED_ROWS:
            products.append(_finish(batches, directions).cpu())
            batches = []
        if progress is not None:
            progress(len(batch))
    if batches:
        products.append(_finish(batches, directions).cpu())
    total_QN: Float64 = torch.cat(products).T.numpy()
    return total_QN


class _BatchProducts:
    """The inner products of a batch with the directions, and the factors that are not yet multiplied with them.

    Factors of layers that are called once per example are small, the directions are large: `_finish` multiplies the
    factors of many batches at once.
    """

    def __init__(self, directions: Directions, requested_BQ: Tensor) -> None:
        self._directions, self.requested_BQ = directions, requested_BQ
        direction = next(iter(directions.values()))
        self.total_BQ = torch.zeros(requested_BQ.shape, dtype=torch.float64, device=direction.device)
        self.deferred: list[tuple[str, slice, Outer]] = []

    def sink(self, name: str, form: Form, rows: slice) -> None:
        """Add a parameter's gradients of some rows of the batch."""
        if isinstance(form, Outer) and form.left_BTR.shape[1] == 1:
            self.deferred.append((name, rows, Outer(form.left_BTR.clone(), form.right_BTC.clone())))
        else:
            self.total_BQ[rows] += inner_where(form, self._directions[name], self.requested_BQ[rows])


def _finish(batches: Sequence[_BatchProducts], directions: Directions) -> Tensor:
    """Return the inner products [B, Q] of all batches, including those of the deferred factors."""
    for name in {name for batch in batches for name, _, _ in batch.deferred}:
        own = [(batch, rows, form) for batch in batches for other, rows, form in batch.deferred if other == name]
        joined = Outer(torch.cat([f.left_BTR for *_, f in own]), torch.cat([f.right_BTC for *_, f in own]))
        requested_BQ = torch.cat([batch.requested_BQ[rows] for batch, rows, _ in own])
        added_BQ = inner_where(joined, directions[name], requested_BQ)
        for (batch, rows, _), added in zip(own, torch.split(added_BQ, [len(f.left_BTR) for *_, f in own]), strict=True):
            batch.total_BQ[rows] += added
    return torch.cat([batch.total_BQ for batch in batches])


def exact_self_influence(
    runner: TaskRunner,
    rows: Sequence[int],
    checkpoints: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> Float64:
    """Return Σ_c η_c ‖∇ℓ(w_c, z)‖² of these training rows, [n] (Pruthi et al. 2020, section 3.4).

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    scores_N = np.zeros(len(rows))
    with runner.model("fp32") as model:
        for checkpoint in checkpoints:
            model.load(checkpoint)
            rate = model.rate
            done = 0
            for batch in model.batches("train", rows):
                forms: dict[tuple[str, int, int], list[Form]] = {}

                def start() -> Sink:
                    nonlocal forms
                    forms = defaultdict(list)
                    return lambda name, form, rows: forms[name, rows.start, rows.stop].append(form)

                model.engine("train").run(batch, start)
                total = squared_norms(forms, len(batch), runner.options.device)
                scores_N[done : done + len(batch)] += rate * total.cpu().numpy()
                done += len(batch)
                if progress is not None:
                    progress(len(batch))
    _check_finite(scores_N, rows)
    return scores_N
