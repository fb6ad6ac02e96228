"""Tail patch and TracInIdeal compared with loops of plain autograd in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.toy import cross_entropy, make_rows
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, Task, build
from tracin_ann.errors import UsageError
from tracin_ann.evaluation import TracedRun, measure_tail_patch, trace
from tracin_ann.features import RunOptions, TaskRunner

N, Q, HIDDEN = 24, 4, 6
RATES = {"0.*": 0.3, "2.weight": 0.1, "2.bias": 0.0}
TRAIN = [(x.double(), label) for x, label in make_rows(N, 1)]
QUERIES = [(x.double(), label) for x, label in make_rows(Q, 2)]


def make_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(5, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 3)).double()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    path = tmp_path_factory.mktemp("steps") / "last.pt"
    state = {name: 1.5 * value for name, value in make_model().state_dict().items()}
    torch.save(state, path)
    torch.save(make_model().state_dict(), path.with_name("first.pt"))
    return Task(
        model=make_model,
        loss=cross_entropy,
        train_data=lambda: TRAIN,
        query_data=lambda: QUERIES,
        checkpoints=[Checkpoint(path.with_name("first.pt"), 0.7), Checkpoint(path, RATES)],
    )


def make_runner(task: Task) -> TaskRunner:
    return TaskRunner(task, RunOptions(torch.device("cpu"), batch_size=3))


Weights = list[Tensor]


def loss_of(weights: Weights, row: tuple[Tensor, int]) -> Tensor:
    w, b, v, c = weights
    logits = v @ torch.tanh(w @ row[0] + b) + c
    return F.cross_entropy(logits[None], torch.tensor([row[1]]))


def gradient_of(weights: Weights, row: tuple[Tensor, int]) -> Weights:
    leaves = [weight.clone().requires_grad_() for weight in weights]
    return list(torch.autograd.grad(loss_of(leaves, row), leaves))


def losses_of(weights: Weights) -> np.ndarray:
    return np.array([float(loss_of(weights, row)) for row in QUERIES])


def read_weights(task: Task, checkpoint: int) -> Weights:
    return list(torch.load(task.checkpoints[checkpoint].path, weights_only=True).values())


def test_tail_patch_leaves_out_a_last_checkpoint_without_a_rate(task: Task) -> None:
    first, last = task.checkpoints
    decayed = replace(task, checkpoints=[first, replace(last, learning_rate=0.0)])
    rows = np.array([[3, 0]])
    found = measure_tail_patch(make_runner(decayed), [2], rows)
    assert found.all()
    np.testing.assert_array_equal(found, measure_tail_patch(make_runner(task), [2], rows, 0))


@pytest.mark.parametrize("checkpoint", [-1, 0])
def test_tail_patch_is_the_fall_of_the_loss_after_one_step(task: Task, checkpoint: int) -> None:
    rows = np.array([[3, 0, 17], [5, 3, 2]])
    found = measure_tail_patch(make_runner(task), [2, 1], rows, checkpoint)
    start, rates = read_weights(task, checkpoint), [0.7] * 4 if checkpoint == 0 else [0.3, 0.3, 0.1, 0]
    for place, query in enumerate([2, 1]):
        for k, row in enumerate(rows[place]):
            grads = gradient_of(start, TRAIN[row])
            after = [w - rate * g for w, rate, g in zip(start, rates, grads, strict=True)]
            fall = float(loss_of(start, QUERIES[query])) - float(loss_of(after, QUERIES[query]))
            assert found[place, k] == pytest.approx(fall, abs=1e-12)


def trace_by_hand(weights: Weights, batches: Sequence[Sequence[int]], rate: float) -> np.ndarray:
    fall_NQ = np.zeros((N, Q))
    for batch in batches:
        grads = [gradient_of(weights, TRAIN[row]) for row in batch]
        for row, grad in zip(batch, grads, strict=True):
            before = losses_of(weights)
            weights = [w - rate / len(batch) * g for w, g in zip(weights, grad, strict=True)]
            fall_NQ[row] += before - losses_of(weights)
    return fall_NQ


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("start", [None, 1])
def test_the_trace_is_that_of_a_loop_and_sums_to_the_whole_change(task: Task, size: int, start: int | None) -> None:
    order = np.random.default_rng(3).integers(0, 12, (10, size)).tolist()
    begin = None if start is None else task.checkpoints[start]
    seen: list[tuple[str, int, int]] = []
    found = trace(make_runner(task), range(Q), TracedRun(order, 0.2, begin), lambda *m: seen.append(m))
    weights = [p.detach() for p in make_model().parameters()] if start is None else read_weights(task, start)
    np.testing.assert_allclose(found.fall_QN, trace_by_hand(weights, order, 0.2).T, atol=1e-12)
    np.testing.assert_allclose(found.fall_QN.sum(axis=1), found.first_Q - found.last_Q, atol=1e-13)
    np.testing.assert_allclose(found.first_Q, losses_of(weights), atol=1e-13)
    assert found.visit_N.tolist() == np.bincount(np.ravel(order), minlength=N).tolist()
    assert (found.fall_QN[:, found.visit_N == 0] == 0).all()
    assert seen[-1] == ("steps", 10, 10)
    assert found.checkpoints == ()


def test_a_step_on_a_batch_is_the_step_of_its_mean_gradient(task: Task) -> None:
    found = trace(make_runner(task), range(Q), TracedRun([[1, 5, 9]], 0.4))
    weights = [p.detach() for p in make_model().parameters()]
    grads = [gradient_of(weights, TRAIN[row]) for row in (1, 5, 9)]
    after = [w - 0.4 * torch.stack(each).mean(0) for w, each in zip(weights, zip(*grads, strict=True), strict=True)]
    np.testing.assert_allclose(found.last_Q, losses_of(after), atol=1e-13)


def test_tracincp_of_the_checkpoints_agrees_with_the_trace(task: Task, tmp_path: Path) -> None:
    order = [[row] for _ in range(3) for row in np.random.default_rng(5).permutation(N).tolist()]
    run = TracedRun(order, 0.02, folder=tmp_path / "run", every=N // 4)
    found = trace(make_runner(task), range(Q), run)
    assert [Path(c.path).name for c in found.checkpoints] == [f"step{step}.pt" for step in range(0, 3 * N, N // 4)]
    assert sum(c.learning_rate for c in found.checkpoints) == pytest.approx(3 * 0.02)
    traced = replace(task, checkpoints=found.checkpoints)
    build(traced, tmp_path / "index", BuildConfig(dim=256, device="cpu", dtype="float32", index="flat"))
    index = InfluenceIndex.open(tmp_path / "index", traced, device="cpu")
    score = index.features("query", range(Q)) @ index.view().take(range(N)).T
    agreement = found.correlate(score)
    assert agreement.mean > 0.95
    assert found.correlate(-score).mean == pytest.approx(-agreement.mean)
    assert score.sum() == pytest.approx((found.first_Q - found.last_Q).sum(), rel=0.1)


def test_the_task_and_its_model_are_unchanged(task: Task) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    same = replace(task, model=lambda: model)
    measure_tail_patch(make_runner(same), [0], np.array([[1]]))
    trace(make_runner(same), [0], TracedRun([[1]], 0.4))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "bad batches"),
        ({"batches": [[1], []]}, "bad batches"),
        ({"batches": [[N]]}, "no such row in train_data"),
        ({"learning_rate": 0.0}, "bad learning_rate"),
        ({"learning_rate": float("nan")}, "bad learning_rate"),
        ({"every": 0}, "bad every"),
    ],
)
def test_invalid_runs_are_rejected(task: Task, change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trace(make_runner(task), [0], TracedRun(**({"batches": [[0]], "learning_rate": 0.1} | change)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no such row in query_data"):
        trace(make_runner(task), [Q], TracedRun([[0]], 0.1))
