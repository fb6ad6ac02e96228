"""Adapters: scores of an index in the form in which evaluations of dattri and quanda take them.

Neither package is imported here.

Shapes: N training rows, Q queries, M subsets, K rows of a subset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracin_ann.index import InfluenceIndex
from tracin_ann.scoring import QueryOptions
from tracin_ann.types import Float32, Float64, Int64


def make_dattri_arguments(
    score_QN: Float32 | Float64, subsets: Sequence[Int64], loss_MSQ: Float64
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the arguments of `dattri.metric.lds`: scores [N, Q], and (targets [M, Q], rows of the subsets [M, K]).

    The targets are the negative losses, averaged over the seeds, so that a higher score predicts a higher target.

    Args:
        score_QN: scores of all training rows, [Q, N].
        subsets: M subsets of the same size.
        loss_MSQ: losses of retrained models, [M, S, Q].
    """
    targets = torch.from_numpy(-loss_MSQ.mean(axis=1)), torch.from_numpy(np.stack(subsets))
    return torch.from_numpy(np.ascontiguousarray(score_QN.T, dtype=np.float64)), targets


class QuandaExplainer:
    """An index as an explainer of quanda: `explain` and `self_influence`.

    quanda makes explainers as `explainer_cls(model=..., train_dataset=..., **expl_kwargs)`. Pass `expl_kwargs={"index":
    index}`; the model and the data of quanda are not used, and must be those of the task.

    Args:
        index: an open index.
        options: `score`, `damping` and `checkpoints` of the scores; None: the index's defaults.
        make_example: (input, target) -> an example as query_data has it; None: the pair (input, int(target)).
        unused: the other arguments of quanda.
    """

    def __init__(
        self,
        *,
        index: InfluenceIndex,
        options: QueryOptions | None = None,
        make_example: Callable[[Any, Any], Any] | None = None,
        **unused: Any,
    ) -> None:
        self._index, self._options = index, options
        self._make_example = make_example or (lambda given, target: (given, int(target)))

    def explain(self, test_data: Any, targets: Sequence[int] | Tensor) -> Tensor:
        """Return the scores [Q, N] of all training rows for test samples with these targets.

        Args:
            test_data: a tensor with a sample in each row, or a mapping of names to such tensors.
            targets: the label of each sample.

        Raises:
            TaskError: the task's collate or loss fails on the samples.
            NonFiniteError: the loss or gradient of a sample is NaN or infinite.
        """
        examples = [self._make_example(*pair) for pair in zip(_split(test_data), targets, strict=True)]
        with self._index.lend(examples):
            return torch.from_numpy(self._index.score_matrix("input", range(len(examples)), self._options))

    def self_influence(self, batch_size: int = 32) -> Tensor:
        """Return the score [N] of each training row for itself; 0 for removed and skipped rows."""
        row_N, own_N = self._index.present(), torch.zeros(len(self._index))
        for start in range(0, len(row_N), batch_size):
            rows = row_N[start : start + batch_size]
            score_BN = self._index.score_matrix("train", rows.tolist(), self._options)
            own_N[rows] = torch.from_numpy(score_BN[np.arange(len(rows)), rows])
        return own_N


def _split(test_data: Any) -> Iterator[Any]:
    """Yield the samples of a batch."""
    if not isinstance(test_data, Mapping):
        yield from test_data
        return
    for values in zip(*test_data.values(), strict=True):
        yield dict(zip(test_data, values, strict=True))
