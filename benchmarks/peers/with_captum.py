"""Captum: TracInCP's raw gradients with a dense matrix of ours after them, and its projection of the last layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from captum.influence import TracInCP, TracInCPFastRandProj
from captum.influence._utils.nearest_neighbors import NearestNeighbors
from torch import Tensor, nn

from benchmarks.peers.cases import Case, Maker, NotApplicable, Row, Side, collated, count, linear_layers


class _Loss:
    """The model's loss in Captum's form: outputs and targets, with the reduction named."""

    def __init__(self, case: Case, reduction: str) -> None:
        self.loss, self.reduction = case.chosen.loss, reduction

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = self.loss(lambda _: outputs, (targets, targets))  # type: ignore[arg-type]
        return losses.sum() if self.reduction == "sum" else losses


class _NoNeighbours(NearestNeighbors):  # type: ignore[misc]
    """No search: only features are timed."""

    def setup(self, data: Tensor) -> None: ...

    def get_nearest_neighbors(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def _projected(
    case: Case, quantities: Callable[[tuple[Tensor, Tensor]], Tensor], parameters: int
) -> Callable[[Sequence[Row]], Tensor]:
    if case.block(parameters) < case.dim:
        raise MemoryError(f"the dense matrix alone takes {4e-9 * parameters * case.dim:.0f} GB")
    matrix = torch.randn(parameters, case.dim, generator=torch.Generator().manual_seed(0))
    return lambda rows: quantities(collated(rows)) @ matrix


def _tracin(case: Case, model: nn.Module, vectorised: bool, layers: list[str] | None) -> TracInCP:
    return TracInCP(
        model,
        case.rows(4),
        ["the model as it is"],
        checkpoints_load_func=lambda _model, _path: 1.0,
        layers=layers,
        loss_fn=_Loss(case, "sum" if vectorised else "none"),
        batch_size=4,
        sample_wise_grads_per_batch=vectorised,
    )


def every_parameter(case: Case) -> Side:
    """Return the vectorised path where it covers the model, else an autograd call for each example."""
    model = case.module()
    parameters = count(model.parameters())
    vectorised = parameters == count(p for layer in _vectorised(model) for p in model.get_submodule(layer).parameters())
    run = _projected(case, _tracin(case, model, vectorised, None).compute_intermediate_quantities, parameters)
    settings = f"sample_wise_grads_per_batch={vectorised}, dense product"
    return Side(run, case.dim, parameters, settings, (16, 32, 64, 128) if vectorised else (1, 4, 16))


def some_layers(case: Case) -> Side:
    """Return the vectorised path on the layers that it knows."""
    model = case.module()
    layers = _vectorised(model)
    covered = count(p for layer in layers for p in model.get_submodule(layer).parameters())
    if covered == count(model.parameters()):
        raise NotApplicable("the same as Captum + dense here")
    run = _projected(case, _tracin(case, model, True, layers).compute_intermediate_quantities, covered)
    return Side(run, case.dim, covered, "sample_wise_grads_per_batch=True, Linear and Conv2d layers, dense product")


def _vectorised(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def last_layer(case: Case) -> Side:
    model = case.module()
    settings: dict[str, Any] = {"batch_size": 4, "projection_dim": case.dim, "nearest_neighbors": _NoNeighbours()}
    last = list(linear_layers(model).values())[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = TracInCPFastRandProj(
            model,
            last,
            case.rows(4),
            ["the model as it is"],
            lambda _model, _path: 1.0,
            _Loss(case, "sum"),
            **settings,
        )
    quantities = lambda rows: fast.compute_intermediate_quantities(collated(rows))  # noqa: E731
    dim = quantities(case.rows(2)).shape[1]
    return Side(quantities, dim, last.weight.numel(), "last layer only, without its bias")


SIDES: dict[str, Maker] = {
    "Captum + dense": every_parameter,
    "Captum + dense, Linear and Conv2d layers": some_layers,
    "Captum FastRandProj, last layer only": last_layer,
}
