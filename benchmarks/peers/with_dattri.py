"""dattri: vmap gradients times a dense matrix; and its two-sided compressors of Linear layers, LoGra and FactGraSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from dattri.algorithm.block_projected_if.block_projected_if import BlockProjectedIFAttributor
from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
from dattri.algorithm.block_projected_if.core.hook import HookManager
from dattri.algorithm.factgrass import FactGraSSAttributor
from dattri.algorithm.logra import LoGraAttributor
from dattri.func.projection import BasicProjector, ProjectionType, random_project
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.peers.cases import Case, Maker, Row, Side, collated, count, linear_layers, vmappable_attention


def _task(case: Case, model: nn.Module) -> AttributionTask:
    def loss(parameters: dict[str, Tensor], row: Row) -> Tensor:
        batch = (row[0][None], row[1][None])
        return case.chosen.loss(lambda z: functional_call(model, parameters, (z,)), batch)[0]  # type: ignore[arg-type]

    return AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])


def _gradients(case: Case) -> tuple[Callable[[Sequence[Row]], Tensor], int]:
    model = case.module()
    task = _task(case, model)
    function = task.get_grad_loss_func(in_dims=(None, 0))
    parameters, _ = task.get_param(ckpt_idx=0)

    def gradients(rows: Sequence[Row]) -> Tensor:
        with vmappable_attention():
            return function(parameters, collated(rows))

    return gradients, count(model.parameters())


def dense(case: Case) -> Side:
    """Return its dense projector with as many columns at once as fit, rather than a hundred."""
    gradients, parameters = _gradients(case)
    block = case.block(parameters)
    projector = BasicProjector(
        parameters, case.dim, 0, ProjectionType.normal, torch.device("cpu"), block_size=block, ensemble_id=0
    )
    run = lambda rows: projector.project(gradients(rows), 0)  # noqa: E731
    return Side(run, case.dim, parameters, f"BasicProjector, normal, block_size={block}")


def as_documented(case: Case) -> Side:
    """Return random_project, which makes a hundred columns of the matrix at a time, for every batch."""
    gradients, parameters = _gradients(case)
    settings: dict[str, Any] = {"proj_dim": case.dim, "proj_max_batch_size": 32, "proj_type": "normal", "device": "cpu"}
    project = random_project(torch.zeros(1, parameters), feature_batch_size=1, **settings)
    return Side(lambda rows: project(gradients(rows), ensemble_id=0), case.dim, parameters, "random_project, normal")


def _compressed(case: Case, attributor: BlockProjectedIFAttributor, settings: str) -> Side:
    model, names = attributor.model, attributor.layer_names
    # Their step is compiled, once for a layer's shape and strides; the default limit leaves the later layers slow.
    torch._dynamo.config.recompile_limit = 256
    sample = collated(case.rows(1))[0]
    compressors = setup_model_compressors(
        model, names, attributor.sparsifier_kwargs, attributor.projector_kwargs, sample_inputs=(sample,), device="cpu"
    )
    manager = HookManager(model, names)
    manager.set_compressors(compressors)

    def run(rows: Sequence[Row]) -> Tensor:
        model.zero_grad()
        case.chosen.loss(model, collated(rows)).sum().backward()
        return torch.cat([g.flatten(1) for g in manager.get_compressed_grads()], dim=1)

    covered = count(p for layer in linear_layers(model).values() for p in layer.parameters())
    return Side(run, run(case.rows(2)).shape[1], covered, settings)


def _of_a_layer(case: Case, model: nn.Module) -> int:
    """Return the side p of the square p × p that each Linear layer gets, for about D in all."""
    return max(2, round(math.sqrt(case.dim / max(1, len(linear_layers(model))))))


def logra(case: Case) -> Side:
    model = case.module()
    side = _of_a_layer(case, model)
    attributor = LoGraAttributor(_task(case, model), hessian="Identity", proj_dim=side * side)
    return _compressed(case, attributor, f"LoGra, Linear layers, {side} x {side} a layer")


def factgrass(case: Case) -> Side:
    model = case.module()
    side = _of_a_layer(case, model)
    attributor = FactGraSSAttributor(_task(case, model), hessian="Identity", proj_dim=side * side)
    return _compressed(case, attributor, f"FactGraSS, Linear layers, {side * side} a layer, dense second step (CPU)")


SIDES: dict[str, Maker] = {
    "dattri": dense,
    "dattri, random_project": as_documented,
    "dattri, LoGra": logra,
    "dattri, FactGraSS": factgrass,
}
