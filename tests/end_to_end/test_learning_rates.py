"""Learning rates: a checkpoint with rate 0 contributes nothing; tensors and arrays are accepted as rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import oracle
from tasks.toy import CONFIG, Toy, cross_entropy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, build
from tracin_ann.analysis.explanation import explain
from tracin_ann.analysis.mislabelled import find_mislabelled
from tracin_ann.errors import IndexMismatchError, UsageError
from tracin_ann.store.manifest import Manifest

GIVEN = (0, torch.tensor(0.5), np.float32(0.125))
RATES = (0.0, 0.5, 0.125)
COLUMNS = {"columns": lambda row: {"label": int(row[1])}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rates")


@pytest.fixture(scope="module")
def task(folder):
    model = Toy()
    torch.save(model.state_dict(), folder / "first.pt")
    paths = [folder / "first.pt", *(c.path for c in save_checkpoints(model, folder))]
    checkpoints = [Checkpoint(path, rate) for path, rate in zip(paths, GIVEN, strict=True)]
    return make_toy_task(folder, model, checkpoints=checkpoints, train_data=lambda: make_rows(40), **COLUMNS)


@pytest.fixture(scope="module", params=["flat", "ivf"])
def index(request, folder, task):
    out = folder / request.param
    build(task, out, replace(CONFIG, index=request.param, norms="exact"))
    return InfluenceIndex.open(out, task, device="cpu")


@pytest.fixture(scope="module")
def gradients(task):
    """Return the gradients [C, N, P] of the queries and of the training rows, in float64."""
    found = []
    for data in (make_rows(5, seed=2), make_rows(40)):
        each = []
        for checkpoint in task.checkpoints:
            model = Toy()
            model.load_state_dict(torch.load(checkpoint.path, weights_only=True))
            each.append(oracle.gradients(model, cross_entropy, data))
        found.append(torch.stack(each))
    return found


def assert_close(found, expected):
    assert np.abs(np.asarray(found) - np.asarray(expected)).max() < 1e-5 * np.abs(np.asarray(expected)).max()


def true_scores(gradients):
    queries, train = (grads.transpose(0, 1) for grads in gradients)
    return oracle.tracin(queries, train, RATES)


@pytest.mark.parametrize("options", [QueryOptions(exact=True), QueryOptions(rerank="exact", candidates=40)])
def test_exact_scores_equal_the_oracle(index, gradients, options):
    expected = true_scores(gradients)
    for answer in index.query(range(5), options=replace(options, k=40)):
        hits = [*answer.proponents, *answer.opponents]
        assert_close([hit.score for hit in hits], [expected[answer.query][hit.row] for hit in hits])
        assert all(hit.by_checkpoint[0] == 0 for hit in hits)


def test_stored_features_cosines_and_error_bars_are_numbers(index):
    assert not index.view().take(range(40))[:, :32].any()
    for options in (QueryOptions(k=40), QueryOptions(k=40, cosine=True)):
        for answer in index.query(range(5), options=options):
            assert len(answer.proponents) + len(answer.opponents) == 40
            assert all(np.isfinite(hit.score) and hit.score for hit in (*answer.proponents, *answer.opponents))
            bars = [hit.error for hit in answer.proponents]
            assert all(bar is None if options.cosine else bar > 0 for bar in bars)
    fidelity = index.manifest.fidelity
    assert fidelity.error_scale > 0
    assert np.isfinite([value for value in vars(fidelity).values() if not isinstance(value, tuple)]).all()


@pytest.mark.parametrize("exact", [False, True])
def test_self_influence_equals_the_oracle(index, gradients, exact):
    expected = sum(rate * grads.square().sum(1) for rate, grads in zip(RATES, gradients[1], strict=True))
    found = index.self_influence(exact=exact)
    assert_close([row.score for row in found], expected[[row.row for row in found]])


def test_a_checkpoint_of_rate_0_has_no_contribution_in_an_explanation(index, gradients):
    found = explain(index, 3, 1)
    assert {part.checkpoint for part in found} == {0, 1, 2}
    assert all(part.contribution == 0 for part in found if part.checkpoint == 0)
    assert found.score == pytest.approx(true_scores(gradients)[1, 3], rel=1e-5)


def test_suspected_labels_have_finite_scores(index):
    assert all(np.isfinite(row.score) for row in find_mislabelled(index, "label"))


@pytest.mark.parametrize("ask", ["query", "self-influence", "explain", "mislabelled"])
def test_a_selection_of_checkpoints_of_rate_0_only_is_rejected(index, ask):
    with pytest.raises(
        UsageError, match="^bad --checkpoints: got only checkpoints of learning rate 0, expected one with"
    ):
        {
            "query": lambda: index.query([0], options=QueryOptions(checkpoints=(0,))),
            "self-influence": lambda: index.self_influence(checkpoints=(0,)),
            "explain": lambda: explain(index, 3, 1, checkpoints=(0,)),
            "mislabelled": lambda: find_mislabelled(index, "label", checkpoints=(0,)),
        }[ask]()


def test_the_manifest_stores_floats_and_another_rate_is_rejected(index, task):
    spec = Manifest.read(index.directory).build.spec
    assert [(type(c.learning_rate), c.learning_rate) for c in spec.checkpoints] == [(float, rate) for rate in RATES]
    other = [replace(task.checkpoints[0], learning_rate=0.25), *task.checkpoints[1:]]
    with pytest.raises(IndexMismatchError, match="learning rate 0 at checkpoint 0, the task has 0.25; restore"):
        InfluenceIndex.open(index.directory, replace(task, checkpoints=other), device="cpu").query([0])


def test_changed_losses_are_detected_at_the_other_checkpoints(index, task):
    moved = replace(task, loss=lambda model, batch: 1.5 * cross_entropy(model, batch))
    with pytest.raises(IndexMismatchError, match="the gradient of .* has changed since index .* at checkpoint 1"):
        InfluenceIndex.open(index.directory, moved, device="cpu").query([0])


def test_a_checkpoint_of_rate_0_can_be_added(folder, task):
    out = folder / "grown"
    begun = replace(task, checkpoints=task.checkpoints[1:])
    build(begun, out, CONFIG)
    grown = replace(task, checkpoints=[*task.checkpoints[1:], task.checkpoints[0]])
    build(grown, out, replace(CONFIG, add_checkpoint=True))
    before = [hit.score for hit in InfluenceIndex.open(out, grown, device="cpu").query([0])[0].proponents]
    build(begun, folder / "as it was", CONFIG)
    after = [
        hit.score for hit in InfluenceIndex.open(folder / "as it was", begun, device="cpu").query([0])[0].proponents
    ]
    assert before == pytest.approx(after, rel=1e-6)
