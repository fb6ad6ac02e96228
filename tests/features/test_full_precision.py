"""Everything that a model computes for an index is in full float32 precision, whatever the task or the process sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks.toy import CONFIG, make_toy_task
from tracin_ann import InfluenceIndex, QueryOptions, Task, build

FULL = ("highest", False, False)
SEEN: list[tuple[str, bool, bool]] = []


@pytest.fixture(params=["medium", "high"])
def setting(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return a setting of the process that allows TF32; it is restored at the end."""
    SEEN.clear()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def make_task(folder: Path) -> Task:
    plain = make_toy_task(folder)
    own = plain.loss

    def loss(model: nn.Module, batch: Any) -> Tensor:
        backends = torch.backends
        precision = torch.get_float32_matmul_precision()
        SEEN.append((precision, backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32))
        return own(model, batch)

    return make_toy_task(folder, loss=loss)


def take_seen() -> set[tuple[str, bool, bool]]:
    seen, _ = set(SEEN), SEEN.clear()
    return seen


def test_features_canaries_and_exact_scores_are_in_full_precision(setting: str, tmp_path: Path) -> None:
    task, out = make_task(tmp_path), tmp_path / "index"
    build(task, out, CONFIG)
    assert take_seen() == {FULL}, "features, canaries, and the audit"
    index = InfluenceIndex.open(out, task)
    index.query([0], options=QueryOptions(k=3))
    assert take_seen() == {FULL}, "canaries, and the features of a query"
    index.query([0], options=QueryOptions(k=3, rerank="exact"))
    assert take_seen() == {FULL}, "exact scores"
    assert torch.get_float32_matmul_precision() == setting
    assert torch.backends.cudnn.allow_tf32
