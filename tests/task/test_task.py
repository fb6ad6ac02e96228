"""Task, Checkpoint and Description check their fields; parameters are selected by name, glob or predicate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tasks.toy import CONFIG, Toy, make_rows, make_toy_task
from tracin_ann import Checkpoint, Description, build, plan
from tracin_ann.errors import TaskError


@pytest.mark.parametrize(
    "rate",
    [
        -0.1,
        float("nan"),
        float("inf"),
        -float("inf"),
        "0.1",
        None,
        1j,
        10**400,
        torch.tensor(-1.0),
        torch.tensor(1j),
        torch.ones(2),
        torch.ones((), device="meta"),
        np.array([0.1, 0.2]),
        np.array(["0.1"]),
    ],
)
def test_a_learning_rate_that_is_negative_or_not_a_finite_number_is_rejected(rate):
    with pytest.raises(TaskError) as caught:
        Checkpoint("runs/last.pt", learning_rate=rate)
    message = str(caught.value)
    assert message.startswith("checkpoint runs/last.pt has a bad learning rate: got ")
    assert "expected a finite number, 0 or more; give the learning rate that training used" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "rate",
    [
        1,
        1e-9,
        0,
        0.0,
        -0.0,
        np.float32(0.5),
        np.float64(0.5),
        np.int64(2),
        np.array(0.25),
        np.array([0.25]),
        torch.tensor(0.5),
        torch.tensor([0.5], dtype=torch.float64),
        torch.tensor(3),
        torch.tensor(0.5, requires_grad=True),
        torch.tensor(0.5, dtype=torch.bfloat16),
    ],
)
def test_every_type_of_number_is_a_learning_rate_and_stored_as_a_float(rate):
    stored = Checkpoint(Path("last.pt"), learning_rate=rate).learning_rate
    assert type(stored) is float
    assert stored == (rate.item() if hasattr(rate, "item") else rate)
    assert str(stored)[0] != "-"


@pytest.mark.parametrize("n", [1, 2])
def test_a_task_with_only_learning_rates_of_0_is_rejected(tmp_path, n):
    got = f"{n} checkpoint{'s' if n > 1 else ''} with learning rate 0"
    with pytest.raises(TaskError, match=f"^every checkpoint has learning rate 0: got {got}, expected .* above 0"):
        make_toy_task(tmp_path, checkpoints=[Checkpoint(f"{i}.pt", 0) for i in range(n)])


@pytest.mark.parametrize("field", ["model", "loss", "train_data", "query_data", "query_loss", "collate", "load"])
def test_a_field_that_cannot_be_called_is_rejected_by_name(tmp_path, field):
    with pytest.raises(TaskError, match=rf"^Task.{field} is not callable: got list, expected a function; "):
        make_toy_task(tmp_path, **{field: [1, 2]})


@pytest.mark.parametrize("field", ["model", "loss", "train_data", "query_data"])
def test_a_required_field_cannot_be_none(tmp_path, field):
    with pytest.raises(TaskError, match=f"^Task.{field} is not callable: got NoneType"):
        make_toy_task(tmp_path, **{field: None})


def test_a_task_without_checkpoints_is_rejected(tmp_path):
    with pytest.raises(TaskError, match=r"^Task.checkpoints is empty: got no checkpoint, expected at least one; pass"):
        make_toy_task(tmp_path, checkpoints=[])


@pytest.mark.parametrize("checkpoints", [Checkpoint("a.pt", 0.1), ["a.pt"], None, "a.pt"])
def test_checkpoints_must_be_a_list_of_checkpoint(tmp_path, checkpoints):
    with pytest.raises(TaskError, match=r"^Task.checkpoints is not a list of checkpoints: got .*pass checkpoints=\["):
        make_toy_task(tmp_path, checkpoints=checkpoints)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (None, ["first.weight", "first.bias", "second.weight", "second.bias"]),
        ("*", ["first.weight", "first.bias", "second.weight", "second.bias"]),
        ("*.bias", ["first.bias", "second.bias"]),
        (["second.weight", "first.*"], ["first.weight", "first.bias", "second.weight"]),
        (("first.weight",), ["first.weight"]),
        (lambda name, p: p.dim() == 2 and "second" in name, ["second.weight"]),
    ],
)
def test_parameters_are_selected_by_glob_list_or_predicate_in_model_order(tmp_path, parameters, expected):
    model = Toy()
    assert list(make_toy_task(tmp_path, model, parameters=parameters).select_parameters(model)) == expected


def test_trainable_parameters_are_the_default_and_frozen_ones_can_be_selected(tmp_path):
    model = Toy()
    model.first.requires_grad_(False)
    assert list(make_toy_task(tmp_path, model).select_parameters(model)) == ["second.weight", "second.bias"]
    assert list(make_toy_task(tmp_path, model, parameters="first.*").select_parameters(model)) == [
        "first.weight",
        "first.bias",
    ]


def test_a_tied_parameter_is_used_once(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(make_toy_task(tmp_path, model).select_parameters(model)) == ["0.weight", "0.bias", "1.bias"]


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ("third.*", "Task.parameters names 'third.*'"),
        (["first.*", "frist.bias"], "Task.parameters names 'frist.bias'"),
        ([], "no parameter is selected"),
        (lambda name, p: False, "no parameter is selected"),
    ],
)
def test_a_selection_without_a_match_is_rejected_with_the_available_names(tmp_path, parameters, what):
    model = Toy()
    with pytest.raises(TaskError) as caught:
        make_toy_task(tmp_path, model, parameters=parameters).select_parameters(model)
    assert str(caught.value) == (
        f"{what}: got no match, expected some of the model's 4 parameters (first.weight, first.bias, second.weight, "
        "second.bias); correct Task.parameters, or requires_grad in the model"
    )


def test_a_parameter_that_is_not_real_is_rejected(tmp_path):
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(TaskError, match="^parameter weight cannot be used: got torch.complex64, expected a real float"):
        make_toy_task(tmp_path, model=lambda: model, checkpoints=[Checkpoint("a.pt", 1.0)]).select_parameters(model)


def test_a_description_may_be_a_string_or_a_description(tmp_path):
    picture = torch.zeros(2, 2)
    assert make_toy_task(tmp_path).describe_example(1) is None
    assert make_toy_task(tmp_path, describe=lambda e: f"row {e}").describe_example(1) == Description(text="row 1")
    assert make_toy_task(tmp_path, describe=lambda e: Description(image=picture)).describe_example(1).image is picture


@pytest.mark.parametrize("name", ["ids", "describe", "columns"])
def test_functions_of_rows_are_tried_before_the_build(tmp_path: Path, name: str) -> None:
    wrong = make_toy_task(tmp_path, **{name: lambda: ["of all rows"]})
    message = rf"^Task\.{name} fails on row 0 of train_data: got TypeError: .*{name}=lambda row"
    for ask in (plan, build):
        with pytest.raises(TaskError, match=message):
            ask(wrong, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


def test_columns_are_computed_for_training_rows_only(tmp_path: Path) -> None:
    labelled = make_toy_task(
        tmp_path, train_data=lambda: [(*row, "named") for row in make_rows(10)], columns=lambda row: {"name": row[2]}
    )
    drop = replace(labelled, collate=lambda given: torch.utils.data.default_collate([row[:2] for row in given]))
    assert build(drop, tmp_path / "out", CONFIG).manifest.columns is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "nonsense"}, "Task.score is unknown: got 'nonsense', expected tracin or cosine"),
        ({"score": "trak", "loss_is_nll": False}, "needs the probability of the label: got 'trak' and loss_is_nll=Fal"),
    ],
)
def test_a_default_score_that_does_not_exist_or_contradicts_the_loss_is_rejected(tmp_path, changes, message):
    with pytest.raises(TaskError, match=message):
        make_toy_task(tmp_path, **changes)
