"""True TracInCP without projection: scores of given rows against given queries, and self-influence.

Σ_c η_c ⟨∇ℓ(w_c, z), ∇ℓ(w_c, z')⟩ (Pruthi et al. 2020, eq. 4) over all chosen parameters. The
queries' whole gradients are the directions; each row's forward and input-gradient backward is done
once for all of them, and its inner products come from the gradient's factors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.factors import Form, inner, materialised
from tracin_ann.features import squared_norms
from tracin_ann.gradients import Sink
from tracin_ann.loading import SideName
from tracin_ann.passes import LoadedModel, Passes
from tracin_ann.types import Float64, Int64

Directions = dict[str, Tensor]
_DIRECTION_BYTES = 1 << 30
_LARGEST_EXPONENT = 100


def exact_scores(
    passes: Passes,
    queries: tuple[SideName, Sequence[int]],
    rows: Sequence[int],
    checkpoints: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> Float64:
    """Return TracInCP scores [Q, N] of training rows against queries, over the chosen checkpoints.

    Args:
        passes: the task's data and model.
        queries: the side (`query`, or `train` for training rows as queries) and ids of the queries.
        rows: ids of training rows.
        checkpoints: positions of the checkpoints to sum over.
        progress: called with the number of rows done, each row once a checkpoint and query block.

    Raises:
        TaskError: the loss breaks the contract.
        NonFiniteError: a score is NaN or infinite.
    """
    side, query_ids = queries
    scores_QN = np.zeros((len(query_ids), len(rows)))
    with passes.at_precision("fp32").model() as model:
        entries = sum(p.numel() * p.element_size() for p in model.parameters.values())
        step = max(1, _DIRECTION_BYTES // entries)
        for checkpoint in checkpoints:
            model.load(checkpoint)
            rate = passes.task.checkpoints[checkpoint].learning_rate
            for first in range(0, len(query_ids), step):
                block = slice(first, first + step)
                directions = _directions(model, side, query_ids[block])
                exponent_Q = _scaled(directions)
                block_QN = np.zeros_like(scores_QN[block])
                _add_inner(model, directions, rows, rate, block_QN, progress)
                scores_QN[block] += np.ldexp(block_QN, exponent_Q[:, None])
    _refuse_infinite(scores_QN, rows)
    return scores_QN


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


def _directions(model: LoadedModel, side: SideName, ids: Sequence[int]) -> Directions:
    """Return the whole gradients of the queries, [Q, P] a parameter."""
    device = model.passes.options.device
    shapes = {name: (p.numel(), p.dtype) for name, p in model.parameters.items()}
    directions = {
        name: torch.zeros(
            len(ids), size, dtype=torch.float64 if dtype is torch.float64 else torch.float32, device=device
        )
        for name, (size, dtype) in shapes.items()
    }
    done = 0
    for batch in model.batches(side, ids):

        def start(first: int = done, last: int = done + len(batch)) -> Sink:
            for direction in directions.values():
                direction[first:last] = 0

            def sink(name: str, form: Form, rows: slice) -> None:
                directions[name][first + rows.start : first + rows.stop] += materialised(form)

            return sink

        model.engine(side).run(batch, start)
        done += len(batch)
    return directions


def _add_inner(
    model: LoadedModel,
    directions: Directions,
    ids: Sequence[int],
    rate: float,
    scores_QN: Float64,
    progress: Callable[[int], None] | None,
) -> None:
    n_queries, done = scores_QN.shape[0], 0
    some = next(iter(directions.values()))
    for batch in model.batches("train", ids):
        total = torch.zeros(0)

        def start(batch_size: int = len(batch)) -> Sink:
            nonlocal total
            total = torch.zeros(batch_size, n_queries, dtype=torch.float64, device=some.device)

            def sink(name: str, form: Form, rows: slice) -> None:
                total[rows] += inner(form, directions[name])

            return sink

        model.engine("train").run(batch, start)
        scores_QN[:, done : done + len(batch)] += rate * total.T.cpu().numpy()
        done += len(batch)
        if progress is not None:
            progress(len(batch))


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
