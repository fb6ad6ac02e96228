"""The user's model and global state are restored after every operation and error, in every surrounding mode."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tasks.toy import CONFIG, RATES, cross_entropy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, build, plan
from tracin_ann.errors import NonFiniteError, TaskError
from tracin_ann.features import RunOptions, TaskRunner

CPU = torch.device("cpu")


class Live(nn.Module):
    """A model with changeable state: batch statistics, dropout, fused attention, a hook, modes and flags."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)
        self.calls = 0
        self.head.register_forward_hook(self._count)
        self.train()
        self.drop.eval()
        self.head.bias.grad = torch.ones(3)

    def _count(self, module, args, output):
        self.calls += 1

    def forward(self, x):
        x = self.frozen(self.drop(self.norm(self.first(x))))[:, None]
        return self.head(self.attend(x, x, x, need_weights=False)[0][:, 0])


def draw_from_generators(value):
    """Return the value after a draw from every global generator."""
    torch.rand(1)
    np.random.rand()
    random.random()
    return value


@pytest.fixture
def live():
    return Live()


def drawing_task(folder, live):
    """Return a task in which every function draws from the global generators."""
    return make_toy_task(
        folder,
        live,
        model=lambda: draw_from_generators(live),
        train_data=lambda: draw_from_generators(make_rows(10)),
        query_data=lambda: draw_from_generators(make_rows(5, seed=2)),
        collate=lambda examples: draw_from_generators(torch.utils.data.default_collate(examples)),
        describe=lambda example: draw_from_generators("a row"),
    )


def read_global_state():
    return [
        torch.get_rng_state().tolist(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.enabled,
    ]


def read_model_state(model):
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": {name: tensor.tolist() for name, tensor in named},
        "storage": {name: (id(tensor), tensor.data_ptr()) for name, tensor in named},
        "flags": [(tensor.requires_grad, tensor.is_leaf) for _, tensor in named],
        "grads": {n: None if p.grad is None else (id(p.grad), p.grad.tolist()) for n, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "hooks": [
            (list(m._forward_hooks.items()), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
        ],
        "tensor hooks": [tensor._backward_hooks for _, tensor in named],
        "members": [sorted(vars(module)) for module in model.modules()],
    }


@contextlib.contextmanager
def assert_unchanged(model):
    """Check that the block changes neither the globals nor the model nor its earlier state_dict."""
    alias = model.state_dict()
    values = {key: value.clone() for key, value in alias.items()}
    before = read_global_state(), read_model_state(model)
    yield
    assert read_global_state() == before[0]
    after = read_model_state(model)
    for what, was in before[1].items():
        assert after[what] == was, what
    assert all(torch.equal(alias[key], value) for key, value in values.items())


@contextlib.contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64 default": double_by_default,
}


def run_operations(task, out):
    """Run every operation that uses the model, and return the results."""
    planned = plan(task, out, CONFIG)
    build(task, out, CONFIG)
    index = InfluenceIndex.open(out, task, device="cpu", batch_size=4)
    assert index.describe("train", 0).text == "a row"
    answers = index.query([0, 1], train_ids=[2])
    exact = index.query([3], options=QueryOptions(exact=True))
    return planned.rows, answers, exact, index.self_influence(3, exact=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    return run_operations(drawing_task(folder, Live()), folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize("around", AROUND)
def test_every_operation_restores_all_state_and_gives_the_same_result_in_any_mode(tmp_path, plain, around):
    torch.manual_seed(0)
    live = Live()
    task = drawing_task(tmp_path, live)
    with AROUND[around](), assert_unchanged(live):
        assert run_operations(task, tmp_path / "out") == plain
    assert live.calls > 0


def test_a_model_created_under_a_float64_default_is_used_in_float64(tmp_path):
    with double_by_default():
        model = nn.Linear(5, 3)
        data = [(x.double(), y) for x, y in make_rows(6)]
        task = make_toy_task(tmp_path, model, train_data=lambda: data, query_data=lambda: data)
        build(task, tmp_path / "out", CONFIG)
        found = InfluenceIndex.open(tmp_path / "out", task, device="cpu").query([0])[0]
    assert model.weight.dtype is torch.float64
    assert found.proponents[0].score > 0


class Boom(Exception):
    pass


def fails_at(call):
    """Return a loss that raises at its n-th call."""
    count = iter(range(1, 10_000))

    def loss(model, batch):
        if next(count) == call:
            raise Boom
        return cross_entropy(model, batch)

    return loss


@pytest.mark.parametrize("call", [1, 2, 4, 6, 12, 17, 20, 25, 29])
def test_all_state_is_restored_after_an_error_in_the_loss(tmp_path, live, call):
    task = make_toy_task(tmp_path, live, loss=fails_at(call))
    with pytest.raises(Boom), assert_unchanged(live):
        build(task, tmp_path / "out", CONFIG)


def test_all_state_is_restored_after_an_error_in_loading(tmp_path, live):
    def load(model, path):
        with torch.no_grad():
            model.first.weight.fill_(7)
        model.train().requires_grad_(True)
        raise Boom

    task = make_toy_task(tmp_path, live, load=load)
    with pytest.raises(Boom), assert_unchanged(live):
        plan(task, tmp_path / "out", CONFIG)


def test_weights_that_load_replaces_are_restored(tmp_path, live):
    def load(model, path):
        model.load_state_dict(torch.load(path, weights_only=True), assign=True)

    task = make_toy_task(tmp_path, live, load=load)
    with assert_unchanged(live):
        build(task, tmp_path / "out", CONFIG)


def test_all_state_is_restored_after_rejections_and_nan(tmp_path, live):
    bad = make_rows(10)
    bad[7] = (torch.full((5,), float("nan")), 0)
    refused = [
        (NonFiniteError, make_toy_task(tmp_path, live, train_data=lambda: bad)),
        (TaskError, make_toy_task(tmp_path, live, loss=lambda m, b: cross_entropy(m, b).mean())),
        (TaskError, make_toy_task(tmp_path, live, checkpoints=[Checkpoint("absent.pt", 1.0)])),
    ]
    for i, (error, task) in enumerate(refused):
        with pytest.raises(error), assert_unchanged(live):
            build(task, tmp_path / f"out{i}", CONFIG)


def test_changes_of_globals_by_a_model_end_with_the_session(tmp_path, live):
    def model():
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        torch.set_default_dtype(torch.float64)
        torch.backends.mha.set_fastpath_enabled(True)
        return live

    task = make_toy_task(tmp_path, live, model=model)
    with assert_unchanged(live):
        build(task, tmp_path / "out", CONFIG)


def test_within_a_session_the_model_is_in_eval_mode_and_nothing_requires_a_gradient(tmp_path, live):
    seen = set()

    def loss(model, batch):
        seen.update(module.training for module in model.modules())
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    build(make_toy_task(tmp_path, live, loss=loss), tmp_path / "out", CONFIG)
    assert seen == {False}
    with TaskRunner(make_toy_task(tmp_path, live), RunOptions(CPU)).model() as model:
        model.load(0)
        assert not any(parameter.requires_grad for parameter in live.parameters())
        assert not torch.backends.mha.get_fastpath_enabled()
        assert torch.is_grad_enabled()
        first = live.first.weight.clone()
        model.load(1)
        assert not torch.equal(live.first.weight, first)
        assert list(model.parameters) == [n for n, _ in live.named_parameters() if not n.startswith("frozen")]


def test_weights_of_all_checkpoints_equal_those_of_the_files(tmp_path, live):
    checkpoints = save_checkpoints(live, tmp_path)
    with TaskRunner(make_toy_task(tmp_path, live, checkpoints=checkpoints), RunOptions(CPU)).model() as model:
        for i in (1, 0, 1):
            model.load(i)
            state = torch.load(checkpoints[i].path, weights_only=True)
            assert all(torch.equal(live.state_dict()[key], value) for key, value in state.items())
            assert checkpoints[i].learning_rate == RATES[i]


@pytest.mark.parametrize("returned", [None, torch.zeros(3), {"model": 1}])
def test_a_model_function_that_returns_no_model_is_rejected(tmp_path, returned):
    with pytest.raises(
        TaskError, match=rf"^Task.model does not return a model: got {type(returned).__name__}, expected a torch.nn"
    ):
        plan(make_toy_task(tmp_path, model=lambda: returned), tmp_path / "out", CONFIG)


def test_a_model_with_uninitialized_layers_is_rejected(tmp_path):
    task = make_toy_task(tmp_path, model=lambda: nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(TaskError, match="with unknown parameter shapes: got an uninitialized 0.weight, .*one forward"):
        build(task, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()
