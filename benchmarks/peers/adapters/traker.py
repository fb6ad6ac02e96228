"""Adapter for traker: per-example gradients by vmap, times a dense Gaussian matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType

from benchmarks.peers.cases import Case, Maker, Row, Side, collate, count_entries, use_math_attention


def project(case: Case) -> Side:
    class Loss(AbstractModelOutput):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(model, weights, buffers, x, y):  # type: ignore[no-untyped-def]
            return case.model.loss(lambda z: functional_call(model, (weights, buffers), (z,)), (x[None], y[None]))[0]

        def get_out_to_loss_grad(self, model, weights, buffers, batch):  # type: ignore[no-untyped-def]
            return torch.ones(len(batch[0]), 1)

    model = case.make_module()
    parameters = count_entries(model.parameters())
    block = case.count_columns(parameters)
    gradients = FunctionalGradientComputer(model, Loss(), grad_dim=parameters, dtype=torch.float32, device="cpu")
    projector = BasicProjector(parameters, case.dim, 0, ProjectionType.normal, "cpu", block_size=block)

    def run(rows: Sequence[Row]) -> Tensor:
        with use_math_attention():
            return projector.project(gradients.compute_per_sample_grad(collate(rows)), model_id=0)

    return Side(run, case.dim, parameters, f"normal, block_size={block}")


SIDES: dict[str, Maker] = {"traker": project}
