"""An open index of checkpoints that set a part of the model notices every change of the rest of the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tasks.toy import CONFIG, Toy, make_rows, make_toy_task
from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, build
from tracin_ann.errors import IndexMismatchError
from tracin_ann.task import PartialLoad

EVERY = QueryOptions(exact=True, k=20)


class Offset(Toy):
    """A Toy with a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.full((5,), 0.5))

    def forward(self, x):
        return super().forward(x + self.offset)


def replace_weight(model):
    model.first.weight.data = model.first.weight.data * 1.5


def replace_buffer(model):
    model.offset.data = model.offset.data - 2


def replace_buffer_object(model):
    model.offset = model.offset - 2


@pytest.fixture
def opened(tmp_path):
    torch.manual_seed(0)
    model, checkpoints = Offset(), []
    for c in range(3):
        state = {f"second.{name}": value for name, value in nn.Linear(6, 3).state_dict().items()}
        torch.save(state, tmp_path / f"{c}.pt")
        checkpoints.append(Checkpoint(tmp_path / f"{c}.pt", 0.1))

    def load(own, path):
        own.load_state_dict(torch.load(path), strict=False)

    task = make_toy_task(
        tmp_path,
        model,
        train_data=lambda: make_rows(20),
        checkpoints=checkpoints,
        load=PartialLoad(load, lambda own: ["second.weight", "second.bias"]),
        parameters="second.*",
    )
    build(task, tmp_path / "out", CONFIG)
    return model, InfluenceIndex.open(tmp_path / "out", task, device="cpu")


@pytest.mark.parametrize("n_before", [1, 3])
@pytest.mark.parametrize("change", [replace_weight, replace_buffer, replace_buffer_object])
def test_other_memory_of_what_no_checkpoint_sets_is_noticed(opened, change, n_before):
    model, index = opened
    expected = [index.query([0], options=EVERY)[0].hits for _ in range(n_before)][0]
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    change(model)
    changed = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        with pytest.raises(IndexMismatchError, match="has changed since index"):
            index.query([0], options=EVERY)
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())
    model.load_state_dict(kept)
    assert index.query([0], options=EVERY)[0].hits == expected
