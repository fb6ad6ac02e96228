"""True TracInCP scores by brute force, and recall against them.

Shapes: N train, Q queries, B batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from tracin_ann.task import Task


def compute_gradients(
    task: Task, model: nn.Module, side: str, ids: Sequence[int], size: int = 64
) -> Iterator[torch.Tensor]:
    """Yield gradients [B, P] of all parameters by vmap(grad), without the library's gradient code."""
    rows = task.train_data() if side == "train" else task.query_data()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(model, values, (x[None],)), y[None])

    for start in range(0, len(ids), size):
        x, y = torch.utils.data.default_collate([rows[i] for i in ids[start : start + size]])
        each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
        yield torch.cat([g.flatten(1) for g in each.values()], dim=1)


def compute_scores(task: Task, queries: Sequence[int], n_rows: int) -> np.ndarray:
    """Return TracInCP scores [Q, N] over all parameters and checkpoints, without a projection."""
    scores = np.zeros((len(queries), n_rows))
    for checkpoint in task.checkpoints:
        model = task.model().eval()
        model.load_state_dict(torch.load(checkpoint.path, weights_only=True))
        query_QP = torch.cat(list(compute_gradients(task, model, "query", queries)))
        start = 0
        for grad_BP in compute_gradients(task, model, "train", range(n_rows)):
            product_QB = (query_QP @ grad_BP.T).double().numpy()
            scores[:, start : start + len(grad_BP)] += checkpoint.learning_rate * product_QB
            start += len(grad_BP)
    return scores


def find_top(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the ids [Q, k] of the largest scores, best first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def compute_recalls(true: np.ndarray, found: Sequence[Sequence[int]]) -> np.ndarray:
    """Return, for each query, the share of the true ids that were found [Q]."""
    return np.array([len(set(t.tolist()) & set(f)) / len(t) for t, f in zip(true, found, strict=True)])
