"""True TracInCP without projection: scores of given rows against given queries, and self-influence.

Σ_c η_c ⟨∇ℓ(w_c, z), ∇ℓ(w_c, z')⟩ (Pruthi et al. 2020, eq. 4) over all chosen parameters. The
queries' whole gradients are the directions; each row's forward and input-gradient backward is done
once for all of them that want it, and its inner products come from the gradient's factors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracin_ann.choices import SideName
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.features import LoadedModel, Passes, squared_norms
from tracin_ann.gradients import Form, Outer, Sink, form_dtype, inner_where, materialise
from tracin_ann.types import Float64, Int64

Directions = dict[str, Tensor]


@dataclass(frozen=True)
class Queries:
    """The examples that rows are scored against, each by itself or mixed.

    Attributes:
        side: `query`, or `train` for training rows as queries.
        ids: their positions there, Q of them.
        mixture_GQ: G weighted sums of the examples' gradients are asked instead of each example's; None: each.
    """

    side: SideName
    ids: Sequence[int]
    mixture_GQ: Float64 | None = None

    def __len__(self) -> int:
        """Return how many directions are scored against: G, or Q."""
        return len(self.ids) if self.mixture_GQ is None else len(self.mixture_GQ)


Wanted = npt.NDArray[np.bool_]
_DIRECTION_BYTES = 1 << 30
_LARGEST_EXPONENT = 100
_TOGETHER = 1024
"""Rows whose kept factors are multiplied with the directions at once."""


def exact_scores(
    passes: Passes,
    queries: tuple[SideName, Sequence[int]],
    rows: Sequence[int],
    checkpoints: Sequence[int],
) -> Float64:
    """Return TracInCP scores [Q, N] of training rows against queries, over the chosen checkpoints.

    Args:
        passes: the task's data and model.
        queries: the side (`query`, or `train` for training rows as queries) and ids of the queries.
        rows: ids of training rows.
        checkpoints: positions of the checkpoints to sum over.

    Raises:
        TaskError: the loss breaks the contract.
        NonFiniteError: a score is NaN or infinite.
    """
    with make_exact_scorer(passes, Queries(*queries), checkpoints) as scorer:
        return scorer.scores(rows)


@contextmanager
def make_exact_scorer(
    passes: Passes,
    queries: Queries,
    checkpoints: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> Iterator[ExactScorer]:
    """Yield what scores rows against these queries; asked more than once, it proves and differentiates them once."""
    with passes.at_precision("fp32").model() as model:
        yield ExactScorer(model, queries, checkpoints, progress)


class ExactScorer:
    """True TracInCP of rows against given queries, over given checkpoints; see `exact_scores`.

    `progress` is called with the number of rows done, each row once a checkpoint and query block.
    """

    def __init__(
        self,
        model: LoadedModel,
        queries: Queries,
        checkpoints: Sequence[int],
        progress: Callable[[int], None] | None,
    ) -> None:
        self._model, self._queries, self._checkpoints, self._progress = model, queries, checkpoints, progress
        entries = sum(p.numel() * p.element_size() for p in model.parameters.values())
        self._step = max(1, _DIRECTION_BYTES // entries)
        self._keep = len(checkpoints) * len(queries) * entries <= _DIRECTION_BYTES
        self._kept: dict[tuple[int, int], tuple[Directions, Int64]] = {}

    def scores(self, rows: Sequence[int], wanted_QN: Wanted | None = None) -> Float64:
        """Return scores [Q, N] of these training rows; where they are not wanted, 0.

        Raises:
            TaskError: the loss breaks the contract.
            NonFiniteError: a score is NaN or infinite.
        """
        n_queries = len(self._queries)
        scores_QN = np.zeros((n_queries, len(rows)))
        wanted_QN = np.ones(scores_QN.shape, dtype=bool) if wanted_QN is None else wanted_QN
        # Rows that the same queries want come together: a batch then needs few queries' directions.
        order_N = np.lexsort((wanted_QN.sum(0), wanted_QN.argmax(0)))
        for checkpoint in self._checkpoints:
            if self._model.checkpoint != checkpoint:
                self._model.load(checkpoint)
            rate = self._model.passes.task.checkpoints[checkpoint].learning_rate
            for first in range(0, n_queries, self._step):
                block = slice(first, first + self._step)
                chosen_N = order_N[wanted_QN[block][:, order_N].any(0)]
                directions, exponent_Q = self._directions(checkpoint, first)
                found_QN = _inner(
                    self._model,
                    directions,
                    [rows[i] for i in chosen_N],
                    wanted_QN[block][:, chosen_N],
                    self._progress,
                )
                scores_QN[block, chosen_N] += np.ldexp(rate * found_QN, exponent_Q[:, None])
        scores_QN[~wanted_QN] = 0
        _refuse_infinite(scores_QN, rows)
        return scores_QN

    def _directions(self, checkpoint: int, first: int) -> tuple[Directions, Int64]:
        """Return the queries' gradients, scaled, and the exponents [Q] that undo it."""
        found = self._kept.get((checkpoint, first))
        if found is None:
            directions = self._unscaled(first)
            found = directions, _scaled(directions)
            if self._keep:
                self._kept[checkpoint, first] = found
        return found

    def _unscaled(self, first: int) -> Directions:
        side, ids, mixture_GQ = self._queries.side, self._queries.ids, self._queries.mixture_GQ
        if mixture_GQ is None:
            return whole_gradients(self._model, side, ids[first : first + self._step])
        total: Directions = {}
        for start in range(0, len(ids), self._step):
            chosen = slice(start, start + self._step)
            weight_GQ = torch.from_numpy(np.ascontiguousarray(mixture_GQ[first : first + self._step, chosen]))
            for name, direction in whole_gradients(self._model, side, ids[chosen]).items():
                mixed = weight_GQ.to(direction) @ direction
                total[name] = total[name] + mixed if name in total else mixed
        return total


def _scaled(directions: Directions) -> Int64:
    """Scale each query's gradient in place by a power of two, so that no inner product overflows or vanishes.

    Returns the exponents [Q] that undo it.
    """
    peaks = [torch.linalg.vector_norm(d, ord=torch.inf, dim=1) for d in directions.values()]
    exponent_Q = torch.stack(peaks).amax(0).double().frexp().exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    for direction in directions.values():
        direction.mul_(torch.ldexp(direction.new_ones(len(direction)), -exponent_Q)[:, None])
    return exponent_Q.cpu().numpy().astype(np.int64)


def _refuse_infinite(scores: Float64, rows: Sequence[int]) -> None:
    bad = np.flatnonzero(~np.isfinite(np.atleast_2d(scores)).all(axis=0))
    if len(bad):
        raise NonFiniteError(
            problem(
                f"the exact score of row {rows[bad[0]]} is not finite",
                got="NaN or infinity",
                expected="finite gradients whose inner products a float32 can hold",
                remedy="leave out this row (--without), or build with --on-nonfinite skip",
            )
        )


def whole_gradients(model: LoadedModel, side: SideName, ids: Sequence[int]) -> Directions:
    """Return the whole gradients of examples at the checkpoint that is loaded, [Q, P] a parameter."""
    device = model.passes.options.device
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
    return directions


def _inner(
    model: LoadedModel,
    directions: Directions,
    ids: Sequence[int],
    wanted_QN: Wanted,
    progress: Callable[[int], None] | None,
) -> Float64:
    """Return the inner products [Q, N] of rows' gradients with directions, where they are wanted."""
    found = [torch.zeros(0, len(wanted_QN), dtype=torch.float64)]
    parts: list[_Part] = []
    done = 0
    for batch in model.batches("train", ids):
        wanted_BQ = torch.from_numpy(np.ascontiguousarray(wanted_QN[:, done : done + len(batch)].T))
        made: list[_Part] = []

        def start(wanted_BQ: Tensor = wanted_BQ, made: list[_Part] = made) -> Sink:
            made.append(_Part(directions, wanted_BQ))
            return made[-1].sink

        model.engine("train").run(batch, start)
        # A batch that had to be proven anew was begun more than once.
        parts.append(made[-1])
        done += len(batch)
        if sum(len(part.total_BQ) for part in parts) >= _TOGETHER:
            found.append(_finished(parts, directions).cpu())
            parts = []
        if progress is not None:
            progress(len(batch))
    if parts:
        found.append(_finished(parts, directions).cpu())
    total: Float64 = torch.cat(found).T.numpy()
    return total


class _Part:
    """A batch's inner products with the directions, and the factors of layers called once an example, kept for later.

    Those are small and the directions large: many batches' factors are multiplied together.
    """

    def __init__(self, directions: Directions, wanted_BQ: Tensor) -> None:
        self._directions, self.wanted_BQ = directions, wanted_BQ
        some = next(iter(directions.values()))
        self.total_BQ = torch.zeros(wanted_BQ.shape, dtype=torch.float64, device=some.device)
        self.kept: list[tuple[str, slice, Outer]] = []

    def sink(self, name: str, form: Form, rows: slice) -> None:
        """Take a parameter's form for some rows of the batch."""
        if isinstance(form, Outer) and form.left_BTR.shape[1] == 1:
            self.kept.append((name, rows, Outer(form.left_BTR.clone(), form.right_BTC.clone())))
        else:
            self.total_BQ[rows] += inner_where(form, self._directions[name], self.wanted_BQ[rows])


def _finished(parts: Sequence[_Part], directions: Directions) -> Tensor:
    """Return the parts' inner products [B, Q], those of the kept factors added."""
    for name in {name for part in parts for name, _, _ in part.kept}:
        own = [(part, rows, form) for part in parts for kept, rows, form in part.kept if kept == name]
        joined = Outer(torch.cat([f.left_BTR for *_, f in own]), torch.cat([f.right_BTC for *_, f in own]))
        wanted_BQ = torch.cat([part.wanted_BQ[rows] for part, rows, _ in own])
        added_BQ = inner_where(joined, directions[name], wanted_BQ)
        for (part, rows, _), added in zip(own, torch.split(added_BQ, [len(f.left_BTR) for *_, f in own]), strict=True):
            part.total_BQ[rows] += added
    return torch.cat([part.total_BQ for part in parts])


def exact_self_influence(
    passes: Passes,
    rows: Sequence[int],
    checkpoints: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> Float64:
    """Return Σ_c η_c ‖∇ℓ(w_c, z)‖² of these training rows, [n] (Pruthi et al. 2020, section 3.4).

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    scores_N = np.zeros(len(rows))
    with passes.at_precision("fp32").model() as model:
        for checkpoint in checkpoints:
            model.load(checkpoint)
            rate = passes.task.checkpoints[checkpoint].learning_rate
            done = 0
            for batch in model.batches("train", rows):
                forms: dict[tuple[str, int, int], list[Form]] = {}

                def start() -> Sink:
                    nonlocal forms
                    forms = defaultdict(list)
                    return lambda name, form, rows: forms[name, rows.start, rows.stop].append(form)

                model.engine("train").run(batch, start)
                total = squared_norms(forms, len(batch), passes.options.device)
                scores_N[done : done + len(batch)] += rate * total.cpu().numpy()
                done += len(batch)
                if progress is not None:
                    progress(len(batch))
    _refuse_infinite(scores_N, rows)
    return scores_N
