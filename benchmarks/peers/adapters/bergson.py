"""Adapter for bergson: hooks on Linear layers, each gradient projected to p × p."""

from __future__ import annotations

import math
from collections.abc import Sequence

import faiss
import torch
from torch import Tensor, nn

from benchmarks.peers.cases import Case, Maker, Row, Side, collate, count_entries

if not hasattr(faiss, "GpuIndex"):  # bergson refers to it at import; the CPU wheel lacks it
    faiss.GpuIndex = type("GpuIndex", (), {})

from bergson.collector.gradient_collectors import StreamingGradientCollector
from bergson.gradients import GradientProcessor


def _make_side(case: Case, p: int | None) -> Side:
    model = case.make_module()
    # As in its own builds: gradients only of the embedding weights, which start the backward pass.
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if embeddings:
        model.requires_grad_(False)
        embeddings[0].requires_grad_(True)
    # Its builds hook Hugging Face models without the head: `base_model`.
    hooked = getattr(model, "base_model", model)
    modules = StreamingGradientCollector.discover_targets(hooked)
    p = p or max(2, round(math.sqrt(case.dim / len(modules))))
    collector = StreamingGradientCollector(
        model=hooked, processor=GradientProcessor(projection_dim=p), dtype=torch.float32
    )
    collector.with_batch(None).__enter__()  # the hooks stay until the process ends

    def run(rows: Sequence[Row]) -> Tensor:
        case.model.loss(model, collate(rows)).sum().backward()
        model.zero_grad()
        feature_BD = torch.cat([collector.mod_grads[name] for name in modules], dim=1)
        collector.mod_grads.clear()
        return feature_BD

    covered = count_entries(hooked.get_submodule(name).weight for name in modules)
    return Side(run, len(modules) * p * p, covered, f"two-sided, p={p}, {len(modules)} Linear layers without biases")


SIDES: dict[str, Maker] = {
    "bergson": lambda case: _make_side(case, None),
    "bergson, p=16 (its default)": lambda case: _make_side(case, 16),
}
