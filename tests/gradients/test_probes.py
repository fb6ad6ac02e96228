"""Checks of the first batch: a task that breaks the contract raises one line with the remedy, and leaves no files."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tasks.toy import CONFIG, Toy, cross_entropy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import InfluenceIndex, build, plan
from tracin_ann.errors import IndexMismatchError, NonFiniteError, TaskError

RANDOM = replace(CONFIG, allow_random_data=True)


def error_of(tmp_path, task, kind=TaskError):
    """Return the error message of build, which plan raises as well; neither may leave files."""
    messages = []
    for verb in (plan, build):
        with pytest.raises(kind) as caught:
            verb(task, tmp_path / "out", CONFIG)
        assert type(caught.value) is kind
        assert not (tmp_path / "out").exists()
        messages.append(str(caught.value))
    assert "\n" not in messages[0]
    assert ", expected " in messages[0] and "; " in messages[0]
    return messages[1]


def contrastive(model, batch):
    views = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(
        views @ F.normalize(batch[0][:, :3], dim=1).T * 10, torch.arange(len(views)), reduction="none"
    )


class Normalised(Toy):
    def __init__(self, functional):
        super().__init__()
        self.norm = None if functional else nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x):
        hidden = self.first(x)
        hidden = self.norm(hidden) if self.norm else F.batch_norm(hidden, None, None, training=True)
        return self.second(hidden)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda m, b: cross_entropy(m, b).mean(), "a tensor of shape []"),
        (lambda m, b: cross_entropy(m, b).sum(0, keepdim=True), "a tensor of shape [1]"),
        (lambda m, b: m(b[0]), "a tensor of shape [4, 3]"),
        (lambda m, b: cross_entropy(m, b).tolist(), "list"),
        (lambda m, b: cross_entropy(m, b).detach().numpy(), "ndarray"),
        (lambda m, b: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("side", ["loss", "query_loss"])
def test_a_loss_that_is_not_one_number_per_example_raises(tmp_path, loss, got, side):
    assert error_of(tmp_path, make_toy_task(tmp_path, **{side: loss})) == (
        f"the loss is not one number per example: got {got}, expected a tensor of shape [4]; return per-example losses "
        "(reduction='none', and the mean over positions of each example)"
    )


def test_a_loss_with_a_last_dimension_of_one_raises_with_the_remedy(tmp_path):
    assert error_of(tmp_path, make_toy_task(tmp_path, loss=lambda m, b: cross_entropy(m, b)[:, None])) == (
        "the loss is not one number per example: got a tensor of shape [4, 1], expected a tensor of shape [4]; "
        "return losses.squeeze(1)"
    )


@pytest.mark.parametrize(
    ("loss", "dtype"),
    [
        (lambda m, b: (m(b[0]).argmax(1) != b[1]).long(), "torch.int64"),
        (lambda m, b: m(b[0]).argmax(1) != b[1], "torch.bool"),
        (lambda m, b: cross_entropy(m, b).cfloat(), "torch.complex64"),
    ],
)
@pytest.mark.parametrize("side", ["loss", "query_loss"])
def test_a_loss_that_is_not_floating_point_raises(tmp_path, loss, dtype, side):
    assert error_of(tmp_path, make_toy_task(tmp_path, **{side: loss})) == (
        f"the loss has no gradient: got losses of {dtype}, expected floating-point losses; remove what has no "
        "derivative (argmax, comparisons, casts to integers), or take the real part"
    )


MIXING = {
    "mean over the batch": (Toy, lambda m, b: cross_entropy(m, b).mean().expand(len(b[1]))),
    "softmax over the batch": (Toy, lambda m, b: cross_entropy(m, b) * cross_entropy(m, b).detach().softmax(0)),
    "in-batch negatives": (Toy, contrastive),
    "batch norm without running statistics": (lambda: Normalised(False), cross_entropy),
    "functional batch norm in training mode": (lambda: Normalised(True), cross_entropy),
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("side", ["loss", "query_loss"])
def test_a_loss_in_which_examples_mix_raises(tmp_path, name, side):
    model, loss = MIXING[name]
    message = error_of(tmp_path, make_toy_task(tmp_path, model(), **{side: loss}))
    assert message.startswith("examples of a batch mix in the loss: got for row ")
    assert message.endswith(
        "expected a loss that is a function of its own example alone; use no batch statistics (batch norm outside "
        "eval mode) and no in-batch negatives in Task.loss"
    )


def test_examples_that_mix_in_the_gradient_alone_raise(tmp_path):
    def loss(model, batch):
        logits = model(batch[0])
        return cross_entropy(model, batch) + (logits - logits.detach()).sum()

    message = error_of(tmp_path, make_toy_task(tmp_path, loss=loss))
    assert message.startswith("examples of a batch mix in the loss: got for row 0 a gradient ")
    assert "of its norm from that of the example alone" in message


def test_batch_norm_with_running_statistics_is_supported(tmp_path):
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).train()
    build(make_toy_task(tmp_path, model), tmp_path / "out", CONFIG)
    assert model.training


class Augmented:
    """Rows with noise from a global generator, different at every reading."""

    def __init__(self, n, draw):
        self.rows, self.draw = make_rows(n), draw

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        x, y = self.rows[i]
        return x + self.draw(), y


@pytest.mark.parametrize("draw", [lambda: torch.randn(5), random.random])
@pytest.mark.parametrize("side", ["train", "query"])
def test_random_rows_raise_unless_they_are_allowed(tmp_path, side, draw):
    task = make_toy_task(tmp_path, **{f"{side}_data": lambda: Augmented(10, draw)})
    assert error_of(tmp_path, task) == (
        f"rows of {side}_data change when they are read twice: got two different readings of row 0, expected the same "
        "example each time; remove random augmentation from the task's data, or pass --allow-random-data"
    )
    build(task, tmp_path / "out", RANDOM)
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu", batch_size=4)
    assert len(index.query([0, 1])) == 2
    with pytest.raises(IndexMismatchError, match="training data of digest random, this task has [0-9a-f]+; restore"):
        build(task, tmp_path / "out", CONFIG)


def test_a_random_loss_raises(tmp_path):
    def loss(model, batch):
        return F.cross_entropy(F.dropout(model(batch[0])), batch[1], reduction="none")

    assert error_of(tmp_path, make_toy_task(tmp_path, loss=loss)) == (
        "the loss is random: got two different losses of one batch, expected the same loss each time; remove "
        "operations that draw random numbers in eval mode (functional dropout, sampled noise)"
    )


@torch.no_grad()
def without_graph(model, batch):
    return cross_entropy(model, batch)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda m, b: cross_entropy(m, b).detach(), "losses that depend on none of the chosen parameters"),
        (lambda m, b: b[0].sum(1), "losses that depend on none of the chosen parameters"),
        (without_graph, "losses that depend on none of the chosen parameters"),
        (lambda m, b: torch.from_numpy(cross_entropy(m, b).numpy()), "RuntimeError: Can't call numpy() on Tensor that"),
    ],
)
@pytest.mark.parametrize("side", ["loss", "query_loss"])
def test_a_loss_without_a_gradient_raises(tmp_path, loss, got, side):
    message = error_of(tmp_path, make_toy_task(tmp_path, **{side: loss}))
    assert message.startswith(f"the loss has no gradient: got {got}")
    assert message.endswith("in PyTorch without .detach(), .item() or no_grad, or change Task.parameters")


def test_a_loss_that_depends_on_none_of_the_chosen_parameters_raises(tmp_path):
    model = Toy()
    model.unused = nn.Linear(2, 2)
    message = error_of(tmp_path, make_toy_task(tmp_path, model, parameters="unused.*"))
    assert message.startswith("the loss has no gradient: got losses that depend on none of the chosen parameters")


def with_nan(row, n=10):
    data = make_rows(n)
    data[row] = (torch.full((5,), float("nan")), 0)
    return data


def test_a_nan_loss_in_the_first_batch_raises(tmp_path):
    assert error_of(tmp_path, make_toy_task(tmp_path, train_data=lambda: with_nan(2)), NonFiniteError) == (
        "the loss of row 2 at checkpoint 0 is not finite: got nan, expected finite numbers; "
        "inspect this row and the weights of this checkpoint"
    )
    infinite = make_toy_task(tmp_path, query_loss=lambda m, b: cross_entropy(m, b) / (b[1] != 1))
    assert "the loss of row 1 at checkpoint 0 is not finite: got inf" in error_of(tmp_path, infinite, NonFiniteError)


def test_a_nan_loss_later_names_row_and_checkpoint_and_writes_no_manifest(tmp_path):
    with pytest.raises(
        NonFiniteError, match="^the loss of row 7 at checkpoint 0 is not finite: got nan, expected finite"
    ):
        build(make_toy_task(tmp_path, train_data=lambda: with_nan(7)), tmp_path / "out", CONFIG)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert list((tmp_path / "out" / "features").iterdir()) == []


def test_a_later_checkpoint_with_nan_weights_raises_with_its_number(tmp_path):
    checkpoints = save_checkpoints(Toy(), tmp_path)
    state = torch.load(checkpoints[1].path, weights_only=True)
    state["second.bias"][1] = float("nan")
    torch.save(state, checkpoints[1].path)
    with pytest.raises(NonFiniteError, match="^the loss of row 0 at checkpoint 1 is not finite: got nan"):
        build(make_toy_task(tmp_path, checkpoints=checkpoints), tmp_path / "out", CONFIG)
    assert not (tmp_path / "out" / "manifest.json").exists()


def cornered(model, batch):
    """Return a finite loss whose gradient is NaN for rows of label 2: the root of zero."""
    logits = model(batch[0])
    return cross_entropy(model, batch) + (logits.square().sum(1) * (batch[1] != 2)).sqrt()


@pytest.mark.parametrize("rowwise", [False, True], ids=["layer rules", "loop"])
def test_a_nan_gradient_of_a_finite_loss_in_the_first_batch_raises(tmp_path, rowwise):
    def loss(model, batch):
        return torch.cat([cornered(model, (x[None], y[None])) for x, y in zip(*batch, strict=True)])

    message = error_of(tmp_path, make_toy_task(tmp_path, loss=loss if rowwise else cornered), NonFiniteError)
    assert message.startswith("the gradient of row 2 at checkpoint 0 is not finite: got NaN or inf at a loss of ")


def test_a_nan_gradient_later_names_the_row(tmp_path):
    data = [(x, min(y, 1)) for x, y in make_rows(10)]
    data[6] = (data[6][0], 2)
    task = make_toy_task(tmp_path, loss=cornered, train_data=lambda: data, query_data=lambda: data[:3])
    with pytest.raises(
        NonFiniteError, match="^the gradient of row 6 at checkpoint 0 is not finite: got NaN or inf at a"
    ):
        build(task, tmp_path / "out", CONFIG)


LIST = "a list or a torch.utils.data.Dataset that is not empty"
MATERIALISE = "tracin_ann.materialise(data), which reads it into a list"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(make_rows(10))

    def __len__(self):
        return 10


class Lost:
    def __len__(self):
        raise ValueError("lost")

    def __getitem__(self, i):
        return make_rows(3)[i]


class NoLength:
    def __getitem__(self, i):
        return make_rows(3)[i]


@pytest.mark.parametrize(
    ("data", "got", "remedy"),
    [
        ([], "no rows", LIST),
        (NoLength(), "a NoLength without a length", LIST),
        (Lost(), "a Lost whose len() fails with ValueError: lost (test_probes.py:", LIST),
        (None, "a NoneType without a length", LIST),
        (iter(make_rows(3)), "a list_iterator without a length", MATERIALISE),
        (set(range(3)), "a set that cannot be indexed", MATERIALISE),
        (Stream(), "Stream, an IterableDataset", MATERIALISE),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("side", ["train", "query"])
def test_data_that_is_not_a_map_style_data_set_with_rows_raises(tmp_path, data, got, remedy, side):
    message = error_of(tmp_path, make_toy_task(tmp_path, **{f"{side}_data": lambda: data}))
    assert message.startswith(f"Task.{side}_data cannot be used: got {got}")
    assert message.endswith(
        f", expected a map-style data set (len(data), data[i]) with at least one row; return {remedy}"
    )


class Frequent(nn.Module):
    """An embedding whose gradient is scaled by the frequency of a word in the batch."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 5, scale_grad_by_freq=True)
        self.head = nn.Linear(5, 3)

    def forward(self, index):
        return self.head(self.words(index).mean(1))


def test_gradients_scaled_by_frequency_in_the_batch_raise(tmp_path):
    data = [(torch.tensor([i % 7, (i + 1) % 7, i % 7]), i % 3) for i in range(10)]
    task = make_toy_task(tmp_path, Frequent(), train_data=lambda: data, query_data=lambda: data[:5])
    message = error_of(tmp_path, task)
    assert message.startswith("examples of a batch mix in the loss: got for row 0 a gradient ")
    build(
        make_toy_task(tmp_path, Frequent(), parameters="head.*", train_data=lambda: data, query_data=lambda: data[:5]),
        tmp_path / "out",
        CONFIG,
    )
