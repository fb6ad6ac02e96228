"""Learning rates per parameter: scores, features and norms against float64 brute force, and the record of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch

import models
import oracle
from invocation import run
from tasks.toy import CONFIG, Toy, make_toy_task, save_checkpoints
from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, build
from tracin_ann.analysis.explanation import explain
from tracin_ann.cli.info import main as info_command
from tracin_ann.errors import GradientProofError, IndexMismatchError, TaskError
from tracin_ann.gradients import GradientEngine, GradientScales
from tracin_ann.store.manifest import MANIFEST, Manifest

CASES = ["mlp", "gpt tied", "conv2d", "places of a row", "no linear layer", "gru", "called twice"]
GROUPS = {"first.*": 0.5, "second.*": 0.02}
EVERY = QueryOptions(exact=True, k=20)


def make_case_task(case, folder, rates_of):
    """Return a task of a case and its models, with `rates_of(checkpoint, position)` as the rate of each parameter."""
    model, chosen, rows = models.make_case(case, 0, 12)
    names = [name for name, _ in model.named_parameters()]
    trained = []
    for c, saved in enumerate(save_checkpoints(model, folder)):
        rates = {name: rates_of(c, position) for position, name in enumerate(names)}
        trained.append((Checkpoint(saved.path, rates), torch.load(saved.path, weights_only=True), rates))
    task = make_toy_task(
        folder,
        model,
        loss=chosen.loss,
        train_data=lambda: rows[:9],
        query_data=lambda: rows[9:],
        checkpoints=[checkpoint for checkpoint, *_ in trained],
    )
    weighted = []
    for _, state, rates in trained:
        other = models.make_case(case, 0, 12)[0]
        other.load_state_dict(state)
        weight = [torch.full((p.numel(),), sqrt(rates[name])).double() for name, p in other.named_parameters()]
        weighted.append(oracle.gradients(other, chosen.loss, rows) * torch.cat(weight))
    gradients_CNP = torch.stack(weighted)
    return task, gradients_CNP[:, :9], gradients_CNP[:, 9:]


def assert_close(found, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    assert np.abs(np.asarray(found) - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_sum_over_parameters_with_their_own_rates(case, tmp_path):
    cycle = (0.5, 0.03, 0.0, 0.2)
    task, train_CNP, query_CQP = make_case_task(case, tmp_path, lambda c, position: cycle[(position + c) % 4])
    build(task, tmp_path / "out", replace(CONFIG, norms="exact", yardstick=False))
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu")
    expected_QN = torch.einsum("cqp,cnp->qn", query_CQP, train_CNP).numpy()
    for answer in index.query(range(3), options=EVERY):
        hits = [*answer.proponents, *answer.opponents]
        assert len(hits) == 9
        assert_close([hit.score for hit in hits], expected_QN[answer.query][[hit.row for hit in hits]])
    own_N = train_CNP.square().sum((0, 2)).numpy()
    for exact in (False, True):
        found = index.self_influence(exact=exact)
        assert_close([row.score for row in found], own_N[[row.row for row in found]])
    parts = explain(index, 4, 1)
    assert parts.score == pytest.approx(expected_QN[1, 4], rel=1e-4, abs=1e-5 * np.abs(expected_QN).max())
    rates = [checkpoint.rates_of(parts.by_parameter) for checkpoint in task.checkpoints]
    assert all(part.contribution == 0 for part in parts if rates[part.checkpoint][part.parameter] == 0)
    assert any(part.contribution for part in parts)


def build_features(folder, name, rates, **changes):
    """Return the features of the training rows of the toy task and the report, with one rate for each layer."""
    task = make_toy_task(folder, Toy(), checkpoints=[Checkpoint(folder / "toy.pt", rates)], **changes)
    report = build(task, folder / name, CONFIG)
    return InfluenceIndex.open(folder / name, task, device="cpu").view().take(range(10)), report


@pytest.fixture
def folder(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(Toy().state_dict(), tmp_path / "toy.pt")
    return tmp_path


def test_features_are_the_sum_of_the_parameters_features_times_the_roots_of_their_rates(folder):
    first, _ = build_features(folder, "first", {"first.*": 1.0, "second.*": 0.0})
    second, _ = build_features(folder, "second", {"first.*": 0.0, "second.*": 1.0})
    both, report = build_features(folder, "both", GROUPS)
    assert np.abs(first).max() > 0 < np.abs(second).max()
    assert_close(both, sqrt(0.5) * first + sqrt(0.02) * second)
    assert report.manifest.audit.rows == 10


@pytest.mark.parametrize("rates", [{"*": 0.3}, {"first.*": 0.3, "second.*": np.float64(0.3)}])
def test_groups_of_the_same_rate_give_the_same_bytes_as_a_number(folder, rates):
    plain, one = build_features(folder, "plain", 0.3)
    groups, other = build_features(folder, "groups", rates)
    assert np.array_equal(plain, groups)
    assert one.manifest.build == other.manifest.build
    for file in (folder / "plain").rglob("*.h5"):
        assert file.read_bytes() == (folder / "groups" / file.relative_to(folder / "plain")).read_bytes()
    assert "rates" not in (folder / "groups" / MANIFEST).read_text()


def test_rates_of_other_parameters_have_no_effect(folder):
    rates = {"first.*": 0.3, "second.*": 0.1}
    alone, one = build_features(folder, "alone", 0.1, parameters="second.*")
    groups, other = build_features(folder, "groups", rates, parameters="second.*")
    assert np.array_equal(alone, groups)
    assert one.manifest.build.spec.digest() == other.manifest.build.spec.digest()


def test_the_manifest_records_the_rates_by_parameter(folder):
    _, report = build_features(folder, "out", GROUPS)
    (spec,) = Manifest.read(folder / "out").build.spec.checkpoints
    expected = {"first.weight": 0.5, "first.bias": 0.5, "second.weight": 0.02, "second.bias": 0.02}
    assert (spec.learning_rate, spec.rates) == (0.5, expected)
    assert report.manifest == Manifest.read(folder / "out")
    content = json.loads((folder / "out" / MANIFEST).read_text())["build"]["spec"]["checkpoints"]
    assert [each["rates"] for each in content] == [expected]
    shown = run(info_command, folder / "out").output
    assert re.search(r"rates: +checkpoint 0: 0.5 for 2 parameters, 0.02 for 2 parameters\n", shown)


@pytest.mark.parametrize(
    ("rates", "difference"),
    [
        (
            {"first.*": 0.5, "second.*": 0.03},
            "0.02 of parameter second.weight at checkpoint 0, the task has 0.03, ",
        ),
        ({"first.*": 0.5, "second.w*": 0.02, "second.b*": 0.01}, "0.02 of parameter second.bias at .* has 0.01; rest"),
        (0.5, "learning rate 0.02 of parameter second.weight at checkpoint 0, the task has 0.5, and other rates of 1 "),
    ],
)
def test_an_index_with_other_rates_is_rejected(folder, rates, difference):
    build_features(folder, "out", GROUPS)
    task = make_toy_task(folder, Toy(), checkpoints=[Checkpoint(folder / "toy.pt", rates)])
    with pytest.raises(IndexMismatchError, match=f"out was built with .*{difference}"):
        InfluenceIndex.open(folder / "out", task, device="cpu").query([0])
    with pytest.raises(IndexMismatchError, match=difference):
        build(task, folder / "out", CONFIG)


def test_an_index_with_one_rate_is_rejected_with_groups(folder):
    build_features(folder, "out", 0.5)
    task = make_toy_task(folder, Toy(), checkpoints=[Checkpoint(folder / "toy.pt", GROUPS)])
    with pytest.raises(IndexMismatchError, match="learning rate 0.5 of parameter second.weight at .* has 0.02, and"):
        InfluenceIndex.open(folder / "out", task, device="cpu").query([0])


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"first.*": 1.0}, "has no learning rates for parameter second.weight: got no match of 'first.*', expected"),
        (
            {"*": 1.0, "second.*": 0.1},
            "has several learning rates for parameter second.weight: got matches of '*', 'second.*', expected",
        ),
        ({"*": 1.0, "first.bias": 0.1}, "has several learning rates for parameter first.bias: got matches of '*', 'fi"),
        ({"*": 0.0, "elsewhere": 1.0}, "every selected parameter has learning rate 0 at every checkpoint: got 4 param"),
    ],
)
def test_a_parameter_without_one_rate_is_rejected_in_one_line(folder, rates, message):
    with pytest.raises(TaskError) as caught:
        build_features(folder, "out", rates)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({}, "has bad learning rates: got {}, expected a learning rate for each glob"),
        ({3: 0.1}, "has bad learning rates: got {3: 0.1}, expected a learning rate for each glob"),
        ({"a": 0.1, "b": -1.0}, "has a bad learning rate for 'b': got -1.0, expected a finite number, 0 or more"),
        ({"a": "0.1"}, "has a bad learning rate for 'a': got '0.1', expected a finite number"),
    ],
)
def test_a_mapping_with_bad_keys_or_rates_is_rejected(rates, message):
    with pytest.raises(TaskError) as caught:
        Checkpoint("last.pt", rates)
    assert str(caught.value).startswith(f"checkpoint last.pt {message}")


def test_a_mapping_stays_readable():
    checkpoint = Checkpoint("last.pt", {"a.*": 1, "b[0].w": np.float32(0.5), "c?": torch.tensor(0.25)})
    assert checkpoint.learning_rate == {"a.*": 1.0, "b[0].w": 0.5, "c?": 0.25}
    assert checkpoint.largest_rate == 1
    assert checkpoint.rates_of(["a.x", "b[0].w", "c1"]) == {"a.x": 1.0, "b[0].w": 0.5, "c1": 0.25}
    assert Checkpoint("last.pt", 0.1).rates_of(["x", "y"]) == {"x": 0.1, "y": 0.1}
    assert checkpoint == replace(checkpoint) and hash(checkpoint) == hash(replace(checkpoint))


def test_a_gradient_that_is_not_finite_has_no_effect_with_rate_0():
    scales = GradientScales({"a": 0.0, "b": 0.5})
    flat = torch.tensor([torch.nan, 1.0, 2.0])
    assert scales.apply_flat(flat, {"a": 1, "b": 1, "c": 1}).tolist() == [0, 0.5, 2]


def test_the_audit_compares_scaled_rows(folder, monkeypatch):
    """An audit that leaves the scales out reports every row, and names a parameter whose scale is not 1."""
    monkeypatch.setattr(GradientEngine, "scale", lambda engine, grad_P: grad_P)
    with pytest.raises(GradientProofError, match=r"^row \d .* mostly in second.weight .* rows differ"):
        build_features(folder, "out", GROUPS)
