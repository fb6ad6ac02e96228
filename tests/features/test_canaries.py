"""Canaries: a query detects that the code, the loss or the data changed since the build."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tasks.toy import CONFIG, Toy, cross_entropy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import InfluenceIndex, QueryOptions, build
from tracin_ann.errors import IndexMismatchError
from tracin_ann.features.canaries import canary_ids

N = 31


def make_train_rows(row=None, shift=0.0):
    """Return the training rows, with one of them changed."""
    data = make_rows(N)
    if row is not None:
        data[row] = (data[row][0] + shift, data[row][1])
    return data


def queries(row=None):
    data = make_rows(5, seed=2)
    if row is not None:
        data[row] = (-data[row][0], data[row][1])
    return data


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canaries")
    checkpoints = save_checkpoints(Toy(), folder)

    def task(model=None, **changes):
        fields = {"checkpoints": checkpoints, "train_data": make_train_rows, "query_data": queries, **changes}
        return make_toy_task(folder, model, **fields)

    build(task(), folder / "out", CONFIG)
    return folder / "out", task


def run_query(built, task, ids=(0,), **options):
    index = InfluenceIndex.open(built[0], task, device="cpu", batch_size=4)
    return index.query(list(ids), options=QueryOptions(**options))


def test_the_same_task_gives_the_same_answers_at_any_batch_size(built):
    out, task = built
    found = [
        InfluenceIndex.open(out, task(), device="cpu", batch_size=size).query([0, 1, 2, 3, 4]) for size in (1, 3, 64)
    ]
    assert len({tuple(hit.id for answer in answers for hit in answer.proponents) for answers in found}) == 1


def smoothed(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.1)


def twice(model, batch):
    return 2 * cross_entropy(model, batch)


CHANGED = {
    "another activation": ({"model": Toy(torch.relu)}, "the gradient of train row 0 has changed"),
    "a slightly different activation": (
        {"model": Toy(lambda x: torch.tanh(1.05 * x))},
        "the gradient of train row 0 has changed",
    ),
    "label smoothing": ({"loss": smoothed}, "the gradient of train row 0 has changed"),
    "a loss twice as large": ({"loss": twice}, "the gradient of train row 0 has changed"),
    "another query loss": ({"query_loss": smoothed}, "the gradient of query row 0 has changed"),
    "a query row": ({"query_data": lambda: queries(4)}, "the gradient of query row 4 has changed"),
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("options", [{}, {"checkpoints": (1,)}, {"rerank": "none"}, {"rerank": "exact"}])
def test_a_canary_detects_changed_code_loss_or_data(built, name, options):
    changes, message = CHANGED[name]
    with pytest.raises(IndexMismatchError) as caught:
        run_query(built, built[1](**changes), **options)
    checkpoint = options.get("checkpoints", (0,))[0]
    assert str(caught.value).startswith(f"{message}")
    assert f" since index {built[0]} was built: got a relative difference of " in str(caught.value)
    assert f" at checkpoint {checkpoint}, expected at most 0.01; " in str(caught.value)
    assert str(caught.value).endswith("restore the task's model code, loss and data, or build a new index")


def test_exact_queries_and_exact_self_influence_detect_changed_code(built):
    out, task = built
    index = InfluenceIndex.open(out, task(loss=smoothed), device="cpu", batch_size=4)
    with pytest.raises(IndexMismatchError, match="^the gradient of train row 0 has changed"):
        index.query([0], options=QueryOptions(exact=True))
    with pytest.raises(IndexMismatchError, match="^the gradient of train row 0 has changed"):
        index.self_influence(3, exact=True)


@pytest.mark.parametrize("row", canary_ids(N))
def test_changed_content_of_a_canary_row_is_detected(built, row):
    with pytest.raises(IndexMismatchError, match="was built with training data of digest .*; restore train_d"):
        run_query(built, built[1](train_data=lambda: make_train_rows(row, 0.5)))


def test_a_different_number_of_rows_is_detected(built):
    with pytest.raises(IndexMismatchError, match=f"with {N} training rows, this task has {N + 1}; build with"):
        run_query(built, built[1](train_data=lambda: make_rows(N + 1)))
    with pytest.raises(
        IndexMismatchError,
        match="^query_data is not the data that index .* was built with: got 4 rows, expected at least 5",
    ):
        run_query(built, built[1](query_data=lambda: queries()[:4]))


def test_different_parameters_model_or_checkpoints_are_detected(built, tmp_path):
    out, task = built
    with pytest.raises(
        IndexMismatchError, match=r"parameter first.weight \(\[6, 5\] torch.float32\), the task does not"
    ):
        run_query(built, task(parameters="second.*"))
    with pytest.raises(IndexMismatchError, match="a model with layers of digest"):
        run_query(built, task(torch.nn.Sequential(*Toy().children())))
    first, second = task().checkpoints
    with pytest.raises(
        IndexMismatchError, match="learning rate 0.125 at checkpoint 1, the task has 0.25; restore Task."
    ):
        run_query(built, task(checkpoints=[first, replace(second, learning_rate=0.25)]))
    with pytest.raises(IndexMismatchError, match=r"checkpoint 0 \(checkpoint0.pt\) of digest .*\(and 1 more diff"):
        run_query(built, task(checkpoints=save_checkpoints(Toy(), tmp_path, seed=9)))


def test_a_changed_task_cannot_resume_the_build(built):
    out, task = built
    with pytest.raises(IndexMismatchError, match="was built with training data of digest"):
        build(task(train_data=lambda: make_train_rows(0, 0.5)), out, CONFIG)
    with pytest.raises(
        IndexMismatchError, match="was built with seed 0, this command asks for seed 4; pass --seed 0 or"
    ):
        build(task(), out, replace(CONFIG, seed=4))
    assert build(task(), out, CONFIG).rows_extracted == 0
