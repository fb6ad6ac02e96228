"""Parts of scores by token with weights in half precision, whose range preconditioned directions exceed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tasks.toy import CONFIG, Toy, cross_entropy, make_rows, make_toy_task
from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, build


def by_class(model, batch):
    """Return the cross-entropy in two positions, a quarter and three quarters."""
    loss_B = cross_entropy(lambda x: model(x).float(), batch)
    return torch.stack([0.25 * loss_B, 0.75 * loss_B], 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "moment"), [("trackstar", 0.0), ("trackstar", 1e-30), ("adam", 0.0), ("adam", 1e30)])
def test_the_parts_sum_to_the_score(dtype, kind, moment, tmp_path):
    torch.manual_seed(0)
    model = Toy().to(dtype)
    torch.save(model.state_dict(), tmp_path / "0.pt")
    moments = {name: torch.full(value.shape, moment) for name, value in model.named_parameters()}
    task = make_toy_task(
        tmp_path,
        model,
        checkpoints=[Checkpoint(tmp_path / "0.pt", {"first.*": 0.1, "second.*": 0.03}, second_moments=lambda: moments)],
        train_data=lambda: [(x.to(dtype), y) for x, y in make_rows(10)],
        query_data=lambda: [(x.to(dtype), y) for x, y in make_rows(3, seed=2)],
        loss=lambda own, batch: by_class(own, batch).sum(1),
        token_losses=by_class,
    )
    build(task, tmp_path / "out", replace(CONFIG, preconditioner=kind))
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu")
    for answer in index.query(range(3), options=QueryOptions(exact=True, k=10, tokens=True)):
        scores = np.array([hit.score for hit in answer.hits])
        parts = np.array([hit.tokens for hit in answer.hits])
        assert len(scores) == 10
        expected = scores[:, None] * [0.25, 0.75]
        assert np.abs(parts - expected).max() < 2e-2 * np.abs(scores).max()
