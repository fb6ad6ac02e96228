"""Adapter for dattri: vmap gradients times a dense matrix, and its compressors LoGra and FactGraSS."""

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

from benchmarks.peers.cases import (
    Case,
    Maker,
    Row,
    Side,
    collate,
    count_entries,
    find_linear_layers,
    use_math_attention,
)


def _make_task(case: Case, model: nn.Module) -> AttributionTask:
    def loss(parameters: dict[str, Tensor], row: Row) -> Tensor:
        batch = (row[0][None], row[1][None])
        return case.model.loss(lambda z: functional_call(model, parameters, (z,)), batch)[0]  # type: ignore[arg-type]

    return AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])


def _make_gradients(case: Case) -> tuple[Callable[[Sequence[Row]], Tensor], int]:
    model = case.make_module()
    task = _make_task(case, model)
    function = task.get_grad_loss_func(in_dims=(None, 0))
    parameters, _ = task.get_param(ckpt_idx=0)

    def gradients(rows: Sequence[Row]) -> Tensor:
        with use_math_attention():
            return function(parameters, collate(rows))

    return gradients, count_entries(model.parameters())


def project_dense(case: Case) -> Side:
    """Return its dense projector with as many columns per block as fit in memory."""
    gradients, parameters = _make_gradients(case)
    block = case.count_columns(parameters)
    projector = BasicProjector(
        parameters, case.dim, 0, ProjectionType.normal, torch.device("cpu"), block_size=block, ensemble_id=0
    )
    run = lambda rows: projector.project(gradients(rows), 0)  # noqa: E731
    return Side(run, case.dim, parameters, f"BasicProjector, normal, block_size={block}")


def project_random(case: Case) -> Side:
    """Return random_project, which generates 100 columns of the matrix at a time, for every batch."""
    gradients, parameters = _make_gradients(case)
    settings: dict[str, Any] = {"proj_dim": case.dim, "proj_max_batch_size": 32, "proj_type": "normal", "device": "cpu"}
    project = random_project(torch.zeros(1, parameters), feature_batch_size=1, **settings)
    return Side(lambda rows: project(gradients(rows), ensemble_id=0), case.dim, parameters, "random_project, normal")


def _compress(case: Case, attributor: BlockProjectedIFAttributor, settings: str) -> Side:
    model, names = attributor.model, attributor.layer_names
    # Their step is compiled for each shape and stride; with the default limit, later layers are not compiled.
    torch._dynamo.config.recompile_limit = 256
    sample = collate(case.make_rows(1))[0]
    compressors = setup_model_compressors(
        model, names, attributor.sparsifier_kwargs, attributor.projector_kwargs, sample_inputs=(sample,), device="cpu"
    )
    manager = HookManager(model, names)
    manager.set_compressors(compressors)

    def run(rows: Sequence[Row]) -> Tensor:
        model.zero_grad()
        case.model.loss(model, collate(rows)).sum().backward()
        return torch.cat([g.flatten(1) for g in manager.get_compressed_grads()], dim=1)

    covered = count_entries(p for layer in find_linear_layers(model).values() for p in layer.parameters())
    return Side(run, run(case.make_rows(2)).shape[1], covered, settings)


def _choose_layer_side(case: Case, model: nn.Module) -> int:
    """Return p such that p × p entries per Linear layer sum to about D."""
    return max(2, round(math.sqrt(case.dim / max(1, len(find_linear_layers(model))))))


def compress_logra(case: Case) -> Side:
    model = case.make_module()
    side = _choose_layer_side(case, model)
    attributor = LoGraAttributor(_make_task(case, model), hessian="Identity", proj_dim=side * side)
    return _compress(case, attributor, f"LoGra, Linear layers, {side} x {side} per layer")


def compress_factgrass(case: Case) -> Side:
    model = case.make_module()
    side = _choose_layer_side(case, model)
    attributor = FactGraSSAttributor(_make_task(case, model), hessian="Identity", proj_dim=side * side)
    return _compress(case, attributor, f"FactGraSS, Linear layers, {side * side} per layer, dense second step (CPU)")


SIDES: dict[str, Maker] = {
    "dattri": project_dense,
    "dattri, random_project": project_random,
    "dattri, LoGra": compress_logra,
    "dattri, FactGraSS": compress_factgrass,
}
