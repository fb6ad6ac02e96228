"""Slow oracles in float64: a loop of autograd, dense projection matrices, argsort."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def gradients(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    examples: Sequence[Any],
    names: Sequence[str] | None = None,
    collate: Callable[[list[Any]], Any] = torch.utils.data.default_collate,
) -> Tensor:
    """Return per-example gradients [N, P] in float64, one example at a time, parameters in the model's order."""
    model = to_double(model).eval()
    chosen = [p for n, p in model.named_parameters() if (p.requires_grad if names is None else n in names)]
    for parameter in chosen:
        parameter.requires_grad_(True)
    rows = []
    for example in examples:
        batch = to_double_batch(collate([example]))
        grads = torch.autograd.grad(loss(model, batch).sum(), chosen, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g).flatten()
                    for g, p in zip(grads, chosen, strict=True)
                ]
            )
        )
    return torch.stack(rows).double()


def to_double(model: nn.Module) -> nn.Module:
    # Copies of TorchScript's parameters are leaves only if no graph is recorded.
    with torch.no_grad():
        return copy.deepcopy(model).double()


def to_double_batch(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: to_double_batch(value) for key, value in batch.items()}
    return type(batch)(to_double_batch(item) for item in batch) if isinstance(batch, (list, tuple)) else batch


def tracin(gradients_QCP: Tensor, gradients_NCP: Tensor, rates: Sequence[float]) -> np.ndarray:
    """Return TracInCP scores [Q, N]: Σ_c η_c ⟨g_c, g'_c⟩ (Pruthi et al. 2020, eq. 4)."""
    return torch.einsum("qcp,ncp,c->qn", gradients_QCP, gradients_NCP, torch.tensor(rates).double()).numpy()


def top_ids(scores_QN: np.ndarray, k: int, *, largest: bool = True) -> list[np.ndarray]:
    """Return the ids of the k best rows of each query, equal scores by rising id."""
    signed = -scores_QN if largest else scores_QN
    return [np.lexsort((np.arange(len(row)), row))[:k] for row in signed]


def recall(true: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Return the mean share of the true ids that were found."""
    return float(np.mean([len(set(map(int, t)) & set(map(int, f))) / len(t) for t, f in zip(true, found, strict=True)]))
