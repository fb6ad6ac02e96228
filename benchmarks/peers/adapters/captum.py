"""Adapter for Captum: raw gradients of TracInCP times a dense matrix, and its projection of the last layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from captum.influence import TracInCP, TracInCPFastRandProj
from captum.influence._utils.nearest_neighbors import NearestNeighbors
from torch import Tensor, nn

from benchmarks.peers.cases import Case, Maker, NotApplicable, Row, Side, collate, count_entries, find_linear_layers


class _Loss:
    """The model's loss in the form that Captum expects: outputs and targets, with a named reduction."""

    def __init__(self, case: Case, reduction: str) -> None:
        self.loss, self.reduction = case.model.loss, reduction

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = self.loss(lambda _: outputs, (targets, targets))  # type: ignore[arg-type]
        return losses.sum() if self.reduction == "sum" else losses


class _NoNeighbours(NearestNeighbors):  # type: ignore[misc]
    """A placeholder, because only features are timed."""

    def setup(self, data: Tensor) -> None: ...

    def get_nearest_neighbors(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def _project(
    case: Case, quantities: Callable[[tuple[Tensor, Tensor]], Tensor], parameters: int
) -> Callable[[Sequence[Row]], Tensor]:
    if case.count_columns(parameters) < case.dim:
        raise MemoryError(f"the dense matrix alone takes {4e-9 * parameters * case.dim:.0f} GB")
    matrix = torch.randn(parameters, case.dim, generator=torch.Generator().manual_seed(0))
    return lambda rows: quantities(collate(rows)) @ matrix


def _make_tracin(case: Case, model: nn.Module, vectorised: bool, layers: list[str] | None) -> TracInCP:
    return TracInCP(
        model,
        case.make_rows(4),
        ["current weights"],
        checkpoints_load_func=lambda _model, _path: 1.0,
        layers=layers,
        loss_fn=_Loss(case, "sum" if vectorised else "none"),
        batch_size=4,
        sample_wise_grads_per_batch=vectorised,
    )


def project_all(case: Case) -> Side:
    """Return the vectorised method if it covers the model, else one autograd call per example."""
    model = case.make_module()
    parameters = count_entries(model.parameters())
    vectorised = parameters == count_entries(
        p for layer in _find_vectorised(model) for p in model.get_submodule(layer).parameters()
    )
    run = _project(case, _make_tracin(case, model, vectorised, None).compute_intermediate_quantities, parameters)
    settings = f"sample_wise_grads_per_batch={vectorised}, dense product"
    return Side(run, case.dim, parameters, settings, (16, 32, 64, 128) if vectorised else (1, 4, 16))


def project_layers(case: Case) -> Side:
    """Return the vectorised method for the layers that it supports."""
    model = case.make_module()
    layers = _find_vectorised(model)
    covered = count_entries(p for layer in layers for p in model.get_submodule(layer).parameters())
    if covered == count_entries(model.parameters()):
        raise NotApplicable("identical to Captum + dense on this model")
    run = _project(case, _make_tracin(case, model, True, layers).compute_intermediate_quantities, covered)
    return Side(run, case.dim, covered, "sample_wise_grads_per_batch=True, Linear and Conv2d layers, dense product")


def _find_vectorised(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def project_last_layer(case: Case) -> Side:
    model = case.make_module()
    settings: dict[str, Any] = {"batch_size": 4, "projection_dim": case.dim, "nearest_neighbors": _NoNeighbours()}
    last = list(find_linear_layers(model).values())[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = TracInCPFastRandProj(
            model,
            last,
            case.make_rows(4),
            ["current weights"],
            lambda _model, _path: 1.0,
            _Loss(case, "sum"),
            **settings,
        )
    quantities = lambda rows: fast.compute_intermediate_quantities(collate(rows))  # noqa: E731
    dim = quantities(case.make_rows(2)).shape[1]
    return Side(quantities, dim, last.weight.numel(), "last layer only, without its bias")


SIDES: dict[str, Maker] = {
    "Captum + dense": project_all,
    "Captum + dense, Linear and Conv2d layers": project_layers,
    "Captum FastRandProj, last layer only": project_last_layer,
}
