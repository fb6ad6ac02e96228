"""Curvature matrices from stored features and the scores that use their inverse, against float64 oracles."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tasks.toy import CONFIG, cross_entropy, make_rows, make_toy_task
from tracin_ann import InfluenceIndex, QueryOptions, Task, build
from tracin_ann.choices import CURVATURES, CurvatureName, ScoreName
from tracin_ann.errors import NonFiniteError, UsageError
from tracin_ann.operations import remove
from tracin_ann.scoring import Curvature, CurvatureSource, curvature, scores, suggest_dim
from tracin_ann.store import read_arrays, write_arrays
from tracin_ann.types import Float64

N, QUERIES, RATES, STEPS = 40, 5, (0.5, 0.125), 200.0
DAMPED: tuple[ScoreName, ...] = (*CURVATURES, "trackstar")


def make_task(folder: Path, n: int = N, **changes: object) -> Task:
    task = make_toy_task(folder, train_data=lambda: make_rows(n), **changes)
    return replace(task, checkpoints=[replace(c, steps=STEPS) for c in task.checkpoints])


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> InfluenceIndex:
    folder = tmp_path_factory.mktemp("curvature")
    task = make_task(folder, loss_is_nll=True)
    build(task, folder / "index", CONFIG)
    return InfluenceIndex.open(folder / "index", task, device="cpu")


def read_gradients(index: InfluenceIndex, checkpoint: int) -> Float64:
    """Return the sketched gradients [N, D] of the rows, without the learning rate."""
    rows = np.arange(len(index))
    return index.view([checkpoint]).take(rows).astype(np.float64) / RATES[checkpoint] ** 0.5


def weigh(name: CurvatureName, index: InfluenceIndex, checkpoint: int) -> Float64:
    loss = index.view().store.losses([checkpoint])[:, 0].astype(np.float64)
    p = np.minimum(np.exp(-loss), 1 - 1e-4)
    weights: dict[str, Float64] = {"fisher": np.ones(len(loss)), "gauss-newton": p / (1 - p), "trak": (1 - p) ** -2}
    return weights[name]


def compute_matrix(name: CurvatureName, index: InfluenceIndex, checkpoint: int) -> Float64:
    total = np.zeros((CONFIG.dim, CONFIG.dim))
    for weight, gradient in zip(weigh(name, index, checkpoint), read_gradients(index, checkpoint), strict=True):
        total += weight * np.outer(gradient, gradient)
    return total / len(index)


def score_by_oracle(name: ScoreName, index: InfluenceIndex, damping: float | None = None) -> Float64:
    """Return the scores [Q, N] by dense solves in float64."""
    total = np.zeros((QUERIES, len(index)))
    for checkpoint, rate in enumerate(RATES):
        matrix = compute_matrix("fisher" if name == "trackstar" else name, index, checkpoint)  # type: ignore[arg-type]
        automatic = 5e-4 * np.trace(matrix) if name == "trak" else 1 / (rate * STEPS)
        inverse = np.linalg.inv(matrix + (damping or automatic) * np.eye(CONFIG.dim))
        queries = index.features("query", range(QUERIES), [checkpoint]).astype(np.float64) / rate**0.5
        rows = read_gradients(index, checkpoint)
        norm = np.sqrt(np.einsum("qd,de,qe->q", queries, inverse, queries))
        part = queries @ inverse @ rows.T / norm[:, None]
        if name == "trackstar":
            part /= np.sqrt(np.einsum("nd,de,ne->n", rows, inverse, rows)) * len(RATES)
        total += part
    return total


@pytest.mark.parametrize("name", CURVATURES)
def test_the_matrix_is_the_mean_of_weighted_outer_products(index: InfluenceIndex, name: CurvatureName) -> None:
    for checkpoint, found in enumerate(index.score_maker.load(name)):
        expected = compute_matrix(name, index, checkpoint)
        np.testing.assert_allclose(found.scale**2 * found.matrix_DD, expected, atol=1e-6 * np.abs(expected).max())
        assert found.n_rows == N
        assert found.trace == pytest.approx(np.trace(expected), rel=1e-5)
        eigenvalues = np.linalg.eigvalsh(expected)
        assert found.effective_dimension(0.01) == pytest.approx((eigenvalues / (eigenvalues + 0.01)).sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("dim", "effective", "expected"),
    [
        (32, 10.66, None),
        (32, 10.7, 64),
        (30, 10.0, None),
        (20, 9.0, 32),
        (1, 0.0, None),
        (1, 0.4, 2),
        (4096, 1400, 8192),
    ],
)
def test_the_sketch_has_three_times_the_effective_dimension(dim: int, effective: float, expected: int | None) -> None:
    assert suggest_dim(dim, effective) == expected


@pytest.mark.parametrize("damping", [None, 1e-3])
@pytest.mark.parametrize("name", DAMPED)
def test_scores_are_those_of_a_dense_solve(index: InfluenceIndex, name: ScoreName, damping: float | None) -> None:
    options = QueryOptions(score=name, damping=damping, k=6)
    expected = score_by_oracle(name, index, damping)
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(index.score_matrix("query", range(QUERIES), options), expected, atol=tolerance)
    for answer, score_N in zip(index.query(range(QUERIES), options=options), expected, strict=True):
        best = np.argsort(-score_N)[:6]
        assert [hit.row for hit in answer.proponents] == [row for row in best if score_N[row] > 0]
        for hit in answer.hits:
            assert hit.score == pytest.approx(score_N[hit.row], abs=tolerance)
            assert sum(hit.by_checkpoint) == pytest.approx(hit.score, abs=tolerance)
        assert answer.score == name
        automatic = "5e-4 of the trace" if name == "trak" else "1 / (learning rate × steps)"
        assert answer.how.startswith(f"score {name}, damping {damping or automatic};")


@pytest.mark.parametrize("name", CURVATURES)
def test_a_large_damping_gives_the_ranking_of_the_inner_product(index: InfluenceIndex, name: ScoreName) -> None:
    options = QueryOptions(score=name, damping=1e8, checkpoints=(0,))
    damped_QN = index.score_matrix("query", range(QUERIES), options)
    plain_QN = index.score_matrix("query", range(QUERIES), QueryOptions(score="tracin", checkpoints=(0,)))
    ratio_QN = damped_QN / plain_QN
    np.testing.assert_allclose(ratio_QN, ratio_QN[:, :1] * np.ones(N), rtol=1e-3)


@pytest.mark.parametrize("name", CURVATURES)
def test_a_group_has_the_mean_scores_and_a_contrast_their_difference(index: InfluenceIndex, name: ScoreName) -> None:
    options = QueryOptions(score=name, k=N)
    score_QN = score_by_oracle(name, index)
    tolerance = 1e-5 * np.abs(score_QN).max()
    (together,) = index.query(range(QUERIES), options=options, together=True)
    for hit in together.hits:
        assert hit.score == pytest.approx(score_QN[:, hit.row].mean(), abs=tolerance)
    (contrast,) = index.contrast([0, 1], [2, 3, 4], options=options)
    for hit in contrast.hits:
        means = score_QN[:2, hit.row].mean(), score_QN[2:, hit.row].mean()
        assert hit.of_means == pytest.approx(means, abs=tolerance)
        assert hit.score == pytest.approx(means[0] - means[1], abs=tolerance)


@pytest.mark.parametrize("name", CURVATURES)
def test_the_amount_is_the_step_of_newton_for_a_removed_row(index: InfluenceIndex, name: CurvatureName) -> None:
    (answer,) = index.query([2], options=QueryOptions(score=name, damping=0.02, k=4))
    for hit in answer.hits:
        parts = []
        for checkpoint, rate in enumerate(RATES):
            matrix = compute_matrix(name, index, checkpoint) + 0.02 * np.eye(CONFIG.dim)
            query = index.features("query", [2], [checkpoint])[0].astype(np.float64) / rate**0.5
            parts.append(query @ np.linalg.solve(matrix, read_gradients(index, checkpoint)[hit.row]) / N)
        assert hit.amount == pytest.approx(np.mean(parts), rel=1e-4)


@pytest.mark.parametrize("name", CURVATURES)
def test_the_self_influence_is_the_score_of_a_row_for_itself(index: InfluenceIndex, name: ScoreName) -> None:
    own_N = np.diag(index.score_matrix("train", range(N), QueryOptions(score=name)))
    seen: list[tuple[str, int, int]] = []
    ranked = index.self_influence(score=name, progress=lambda *at: seen.append(at))
    assert seen == [("self-influence", N, N)]
    assert [found.row for found in ranked] == np.argsort(-own_N, kind="stable").tolist()
    assert [found.score for found in ranked] == pytest.approx(sorted(own_N.tolist(), reverse=True), rel=1e-5)
    with pytest.raises(UsageError, match="the cosine of a row and itself is 1: got --score cosine"):
        index.self_influence(score="cosine")
    with pytest.raises(UsageError, match=f"leverages are computed from the stored features: got.*{name}"):
        index.self_influence(score=name, exact=True)


def test_a_matrix_of_scores_is_the_same_in_blocks_of_any_size(
    index: InfluenceIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in DAMPED:
        options = QueryOptions(score=name)
        expected = index.score_matrix("query", [1, 3], options)
        with monkeypatch.context() as patch:
            patch.setattr("tracin_ann.index._NUMBERS_AT_ONCE", 7 * CONFIG.dim * len(RATES))
            found = index.score_matrix("query", [1, 3], options)
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("ids", "message"), [([], "no query"), ([1, -1], "no such row.*got -1"), ([99], "got 99")])
def test_a_matrix_of_scores_needs_queries_that_exist(index: InfluenceIndex, ids: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        index.score_matrix("query", ids)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_error_bars_are_half_the_difference_of_the_halves_of_the_sketch(index: InfluenceIndex, k: int) -> None:
    # Few hits have the error bar of more rows.
    rows = sorted(hit.row for hit in index.query([1], options=QueryOptions(score="fisher", k=10))[0].hits)
    (answer,) = index.query([1], options=QueryOptions(score="fisher", k=k))
    half = CONFIG.dim // 2
    estimates = []
    for part in (slice(0, half), slice(half, None)):
        total = np.zeros(len(rows))
        for checkpoint, rate in enumerate(RATES):
            matrix = compute_matrix("fisher", index, checkpoint)[part, part] + np.eye(half) / (rate * STEPS)
            query = index.features("query", [1], [checkpoint])[0, part].astype(np.float64) / rate**0.5
            solved = np.linalg.solve(matrix, query)
            total += read_gradients(index, checkpoint)[rows][:, part] @ solved / np.sqrt(solved @ query)
        estimates.append(total)
    expected = np.sqrt(np.mean((estimates[0] - estimates[1]) ** 2)) / 2
    assert [hit.error for hit in answer.hits] == pytest.approx([expected] * len(answer.hits), rel=1e-4)


def test_the_default_score_of_a_new_index_follows_from_steps_and_loss(tmp_path: Path) -> None:
    known = make_task(tmp_path, n=12)
    unknown = replace(known, checkpoints=[replace(c, steps=None) for c in known.checkpoints])
    for task, default in (
        (unknown, "tracin"),
        (known, "fisher"),
        (replace(unknown, loss_is_nll=True), "gauss-newton"),
        (replace(known, loss_is_nll=True, score="trak"), "trak"),
    ):
        out = tmp_path / default
        build(task, out, CONFIG)
        # The build computes the matrices, so that the first query does not have to.
        kept = sorted(path.name for path in out.glob("generation-*/curvature-*"))
        opened = InfluenceIndex.open(out, task, device="cpu")
        assert opened.default_score == opened.query([0])[0].score == default
        assert kept == ([] if default == "tracin" else [f"curvature-{default}.npz"])
    # Steps that are added later make a new generation, with the same features.
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "tracin" / "features").iterdir())
    build(known, tmp_path / "tracin", CONFIG)
    assert InfluenceIndex.open(tmp_path / "tracin", known, device="cpu").default_score == "fisher"
    after = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "tracin" / "features").iterdir())
    assert after == before


@pytest.mark.parametrize("steps", [1e9, None])
def test_the_damping_is_the_larger_one_of_two_rules(tmp_path: Path, steps: float | None) -> None:
    # 1 / (rate × steps) falls without limit with the length of the run.
    task = make_task(tmp_path, n=12)
    task = replace(task, checkpoints=[task.checkpoints[0], replace(task.checkpoints[1], steps=steps)])
    build(task, tmp_path / "index", CONFIG)
    opened = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    damping = opened.score_maker.damp("fisher")
    assert damping.rule == "1 / (learning rate × steps) or 5e-4 of the trace"
    floors = [5e-4 * np.trace(compute_matrix("fisher", opened, checkpoint)) for checkpoint in range(2)]
    assert 1 / (RATES[0] * STEPS) > floors[0]
    assert damping.damping_C == pytest.approx([1 / (RATES[0] * STEPS), floors[1]], rel=1e-5)


def load_matrices(out: Path, task: Task, name: CurvatureName = "gauss-newton") -> list[Float64]:
    opened = InfluenceIndex.open(out, task, device="cpu")
    return [found.scale**2 * found.matrix_DD.astype(np.float64) for found in opened.score_maker.load(name)]


@pytest.mark.parametrize("change", ["append", "remove", "add a checkpoint"])
def test_a_changed_index_has_the_matrices_of_a_rebuilt_one(tmp_path: Path, change: str) -> None:
    whole = make_task(tmp_path, n=30, loss_is_nll=True)
    grown, rebuilt = tmp_path / "grown", tmp_path / "rebuilt"
    if change == "append":
        build(replace(whole, train_data=lambda: make_rows(30)[:19]), grown, CONFIG)
        build(whole, grown, replace(CONFIG, append=True))
        build(whole, rebuilt, CONFIG)
        pairs = whole, whole
    elif change == "add a checkpoint":
        build(replace(whole, checkpoints=whole.checkpoints[:1]), grown, CONFIG)
        build(whole, grown, replace(CONFIG, add_checkpoint=True))
        build(whole, rebuilt, CONFIG)
        pairs = whole, whole
    else:
        build(whole, grown, CONFIG)
        InfluenceIndex.open(grown, whole, device="cpu").query([0])
        remove(grown, [0, 7, 29])
        rest = [row for i, row in enumerate(make_rows(30)) if i not in (0, 7, 29)]
        pairs = whole, replace(whole, train_data=lambda: rest)
        build(pairs[1], rebuilt, CONFIG)
    for found, expected in zip(load_matrices(grown, pairs[0]), load_matrices(rebuilt, pairs[1]), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_a_sample_of_the_rows_estimates_the_matrix(index: InfluenceIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    source = index.score_maker.source
    whole = source.load("fisher")[0]
    errors = []
    for n_rows in (10, 20):
        monkeypatch.setattr(curvature, "_MOST_ROWS", n_rows)
        sampled = replace(source).load("fisher")[0]
        assert sampled.n_rows == n_rows
        difference = sampled.scale**2 * sampled.matrix_DD - whole.scale**2 * whole.matrix_DD
        error = float(np.linalg.norm(difference) / np.linalg.norm(whole.scale**2 * whole.matrix_DD))
        # A sample without replacement of half of the rows has 1 / √2 of the error of one with replacement.
        assert 0.3 * error < sampled.error < 4 * error
        errors.append(error)
    assert errors[1] < errors[0]


def zero_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return 0 * cross_entropy(model, batch)


def scaled_loss(factor: float) -> Callable[[nn.Module, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    return lambda model, batch: factor * cross_entropy(model, batch)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_scores_do_not_depend_on_the_scale_of_the_loss(tmp_path: Path, factor: float) -> None:
    task = make_task(tmp_path, n=12)
    scaled = replace(task, loss=scaled_loss(factor))
    found = []
    for name, each in (("plain", task), ("scaled", scaled)):
        build(each, tmp_path / name, replace(CONFIG, yardstick=False))
        opened = InfluenceIndex.open(tmp_path / name, each, device="cpu")
        options = QueryOptions(score="fisher", damping=1e-3 * (1 if name == "plain" else factor**2))
        found.append(opened.score_matrix("query", [0, 1], options))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5 * np.abs(found[0]).max())


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_rows_than_dimensions_have_finite_scores(tmp_path: Path, n: int) -> None:
    task = make_task(tmp_path, n=n, loss_is_nll=True)
    build(task, tmp_path / "index", CONFIG)
    opened = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    for name in DAMPED:
        assert np.isfinite(opened.score_matrix("query", range(QUERIES), QueryOptions(score=name))).all()


def test_zero_gradients_have_the_score_0(tmp_path: Path) -> None:
    task = make_task(tmp_path, n=8, loss=zero_loss, query_loss=cross_entropy)
    build(task, tmp_path / "index", replace(CONFIG, yardstick=False))
    opened = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    for name in ("fisher", "trackstar"):
        assert not opened.score_matrix("query", [0], QueryOptions(score=name)).any()  # type: ignore[arg-type]
        assert opened.query([0], options=QueryOptions(score=name))[0].hits == ()  # type: ignore[arg-type]


def test_exact_scores_of_zero_gradients_are_0(tmp_path: Path) -> None:
    task = make_toy_task(tmp_path, train_data=lambda: make_rows(8), loss=zero_loss, query_loss=cross_entropy)
    build(task, tmp_path / "index", replace(CONFIG, yardstick=False))
    opened = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    for options in (QueryOptions(score="fisher", exact=True), QueryOptions(score="fisher", rerank="exact")):
        assert opened.query([0], options=options)[0].hits == ()


def test_an_open_index_factorises_each_matrix_once(index: InfluenceIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    factorised: list[tuple[float, slice]] = []
    factorise = Curvature.factorise

    def count(self: Curvature, damping: float, part: slice) -> object:
        factorised.append((damping, part))
        return factorise(self, damping, part)

    monkeypatch.setattr(Curvature, "factorise", count)
    opened = InfluenceIndex.open(index.directory, index.task, device="cpu")
    opened.score_matrix("query", [0, 1], QueryOptions(score="fisher", damping=0.03))
    assert [part for _, part in factorised] == [slice(0, CONFIG.dim)] * len(RATES)
    whole = 3 * len(RATES)  # The matrix and both halves of the sketch.
    for damping, expected in ((0.03, whole), (0.03, whole), (0.07, 2 * whole), (0.03, 2 * whole)):
        opened.query([0, 1], options=QueryOptions(score="fisher", damping=damping))
        assert len(factorised) == expected
    # Where the memory is enough for the matrices of one damping, that of the last one is kept.
    monkeypatch.setattr(scores, "_KEPT_BYTES", 12 * CONFIG.dim**2 * len(RATES))
    opened = InfluenceIndex.open(index.directory, index.task, device="cpu")
    factorised.clear()
    for damping, expected in ((0.03, whole), (0.03, whole), (0.07, 2 * whole), (0.03, 3 * whole)):
        opened.query([0, 1], options=QueryOptions(score="fisher", damping=damping))
        assert len(factorised) == expected


def test_a_matrix_that_cannot_be_inverted_is_reported() -> None:
    matrix = Curvature(-np.eye(3, dtype=np.float32), 1.0, 4, 0.0)
    with pytest.raises(NonFiniteError, match="curvature matrix cannot be inverted: got a damping of 0.5.*--damping"):
        matrix.factorise(0.5)


@pytest.mark.parametrize(("is_nll", "factor"), [(False, 1.0), (None, -1.0)])
def test_scores_of_probabilities_need_a_log_likelihood(tmp_path: Path, is_nll: bool | None, factor: float) -> None:
    task = make_task(tmp_path, n=8, loss=scaled_loss(factor), query_loss=cross_entropy, loss_is_nll=is_nll)
    build(task, tmp_path / "index", replace(CONFIG, yardstick=False))
    opened = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    for name in ("gauss-newton", "trak"):
        with pytest.raises(UsageError, match=f"--score {name} needs the probability.*--score fisher"):
            opened.query([0], options=QueryOptions(score=name))  # type: ignore[arg-type]
    assert opened.query([0], options=QueryOptions(score="fisher"))[0].hits


def test_a_build_with_losses_that_exclude_its_default_score_publishes_nothing(tmp_path: Path) -> None:
    task = make_task(tmp_path, n=8, loss=scaled_loss(-1.0), query_loss=cross_entropy, loss_is_nll=True)
    with pytest.raises(UsageError, match="gauss-newton needs the probability.*a loss of -.*Task.score"):
        build(task, tmp_path / "index", replace(CONFIG, yardstick=False))
    assert not (tmp_path / "index" / "manifest.json").exists()
    build(replace(task, score="fisher"), tmp_path / "index", replace(CONFIG, yardstick=False))
    assert InfluenceIndex.open(tmp_path / "index", task, device="cpu").default_score == "fisher"


def test_a_damaged_or_missing_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = make_task(tmp_path, n=12)
    build(task, tmp_path / "index", CONFIG)
    (path,) = (tmp_path / "index").glob("generation-*/curvature-fisher.npz")
    expected, content = load_matrices(tmp_path / "index", task, "fisher"), path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:5000] + b"\xff" * 8 + content[5008:], b"", None):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            found = load_matrices(tmp_path / "index", task, "fisher")
        np.testing.assert_array_equal(found, expected)
        assert path.read_bytes() == content
        assert ("is computed again" in caplog.text) is (damaged is not None)
        caplog.clear()


@pytest.mark.parametrize("name", ["scale_C", "error_C", "matrix_CDD"])
def test_a_file_of_another_format_is_computed_again(tmp_path: Path, name: str) -> None:
    task = make_task(tmp_path, n=12)
    build(task, tmp_path / "index", CONFIG)
    (path,) = (tmp_path / "index").glob("generation-*/curvature-fisher.npz")
    expected, arrays = load_matrices(tmp_path / "index", task, "fisher"), read_arrays(path)
    for other in ({}, {name: arrays[name][:1]}):
        write_arrays(path, {key: array for key, array in arrays.items() if key != name} | other)
        np.testing.assert_array_equal(load_matrices(tmp_path / "index", task, "fisher"), expected)


def test_options_that_contradict_each_other_are_refused(index: InfluenceIndex) -> None:
    for changes, message in (
        ({"score": "nonsense"}, "bad --score: got nonsense"),
        ({"score": "fisher", "cosine": True}, "two scores"),
        ({"score": "fisher", "damping": 0.0}, "bad --damping: got 0.0"),
        ({"damping": float("nan")}, "bad --damping"),
    ):
        with pytest.raises(UsageError, match=message):
            QueryOptions(**changes)  # type: ignore[arg-type]
    assert QueryOptions(score="cosine") == QueryOptions(cosine=True)
    with pytest.raises(UsageError, match="--damping has no effect: got the score tracin"):
        index.query([0], options=QueryOptions(score="tracin", damping=0.1))


def test_other_rows_and_checkpoints_without_a_rate_are_left_out(index: InfluenceIndex, tmp_path: Path) -> None:
    store, rows = index.view().store, np.arange(5, 20)
    source = CurvatureSource(store, rows, [RATES[0], 0.0], True, tmp_path)
    with_rate, without_rate = source.load("fisher")
    gradient_ND = read_gradients(index, 0)[rows]
    expected = gradient_ND.T @ gradient_ND / len(rows)
    np.testing.assert_allclose(with_rate.scale**2 * with_rate.matrix_DD, expected, atol=1e-6 * np.abs(expected).max())
    assert not without_rate.matrix_DD.any()
