"""The inverse of a curvature matrix over all parameters, against dense matrices in float64."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from models import make_case
from tasks.toy import CONFIG, Toy, cross_entropy, make_rows, make_toy_task
from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.choices import CURVATURES
from tracin_ann.errors import NonFiniteError, UsageError
from tracin_ann.features import LoadedModel, RunOptions, TaskRunner
from tracin_ann.gradients import materialise
from tracin_ann.operations import remove
from tracin_ann.results import Answers
from tracin_ann.scoring import ekfac, exact_preconditioning, gram
from tracin_ann.scoring.computation import run_steps
from tracin_ann.scoring.ekfac import fit_ekfac
from tracin_ann.scoring.exact import compute_full_gradients
from tracin_ann.scoring.gram import compute_gram

CASES = ["mlp", "linear of rank 4", "conv2d", "gpt", "gpt tied", "attention", "gru", "called twice", "own norms"]
N, QUERIES = 9, [1, 7]
WEIGHTS = np.random.default_rng(0).uniform(0.2, 3, N)


@contextmanager
def load_case(name: str, folder: Path, n: int = N) -> Iterator[tuple[LoadedModel, Tensor, dict[str, torch.Size]]]:
    """Yield the loaded model of a case, its gradients [N, P] in float64 and the shapes of its parameters."""
    model, case, examples = make_case(name, n=n)
    torch.save(model.state_dict(), folder / "model.pt")
    grad_NP = oracle.gradients(model, case.loss, examples)
    shapes = {key: p.shape for key, p in model.named_parameters()}
    task = Task(lambda: model, case.loss, lambda: examples, lambda: examples, [Checkpoint(folder / "model.pt", 0.1)])
    with TaskRunner(task, RunOptions(torch.device("cpu"), 4)).model() as loaded:
        loaded.load(0)
        yield loaded, grad_NP, shapes


def invert_dense(grad_MP: Tensor, weight_M: np.ndarray, damping: float, grad_QP: Tensor) -> Tensor:
    matrix_PP = (grad_MP * torch.from_numpy(weight_M)[:, None]).T @ grad_MP / len(grad_MP)
    return torch.linalg.solve(matrix_PP + damping * torch.eye(len(matrix_PP)), grad_QP.T).T


def invert_ekfac(matrix_MRC: Tensor, weight_M: np.ndarray, damping: float, matrix_QRC: Tensor, longest: int) -> Tensor:
    """Return (F + λI)⁻¹ of matrices [Q, R, C] of one parameter, by one dense matrix of eigenvectors [P, P]."""
    weight = torch.from_numpy(weight_M) / len(matrix_MRC)
    rows, columns = matrix_MRC.shape[1:]
    left, right = torch.eye(rows).double(), torch.eye(columns).double()
    if rows <= longest:
        left = torch.linalg.eigh(sum(w * m @ m.T for w, m in zip(weight, matrix_MRC, strict=True)))[1]
    if columns <= longest:
        right = torch.linalg.eigh(sum(w * m.T @ m for w, m in zip(weight, matrix_MRC, strict=True)))[1]
    basis_PP = torch.kron(left.contiguous(), right.contiguous())
    eigenvalue_P = (weight[:, None] * (matrix_MRC.flatten(1) @ basis_PP).square()).sum(0)
    return ((matrix_QRC.flatten(1) @ basis_PP) / (eigenvalue_P + damping)) @ basis_PP.T


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_the_gram_matrix_inverts_the_curvature_of_every_layer(name, tmp_path, monkeypatch):
    with load_case(name, tmp_path) as (model, grad_NP, _):
        monkeypatch.setattr(gram, "_BLOCK_BYTES", 4 * 4 * grad_NP.shape[1])
        monkeypatch.setattr(gram, "_STRIP", 3)
        damping = 1e-2 * float(grad_NP.square().sum(1).mean())
        rows = [0, 2, 3, 4, 5, 7]
        curvature = compute_gram(model, rows, WEIGHTS[rows]).finish()
        solved = curvature.solve(model, compute_full_gradients(model, "query", QUERIES), damping)
        factor_N = curvature.weigh_rows(range(N), damping)
    assert_close(
        torch.cat(list(solved.values()), 1) / damping,
        invert_dense(grad_NP[rows], WEIGHTS[rows], damping, grad_NP[QUERIES]),
    )
    for row in range(N):
        # F without the row, and the factor 1 / M as with it.
        weight_M = np.where(np.array(rows) == row, 0, WEIGHTS[rows])
        own = invert_dense(grad_NP[rows], weight_M, damping, grad_NP[QUERIES]) @ grad_NP[row]
        full = invert_dense(grad_NP[rows], WEIGHTS[rows], damping, grad_NP[QUERIES]) @ grad_NP[row]
        torch.testing.assert_close(full * factor_N[row], own, rtol=1e-3, atol=0)


@pytest.mark.parametrize("longest", [4096, 8])
@pytest.mark.parametrize("name", CASES)
def test_ekfac_equals_its_definition_for_every_layer(name, longest, tmp_path, monkeypatch):
    monkeypatch.setattr(ekfac, "LARGEST_SIDE", longest)
    monkeypatch.setattr(ekfac, "_ELEMENTS", 300)
    with load_case(name, tmp_path) as (model, grad_NP, shapes):
        damping = 1e-2 * float(grad_NP.square().sum(1).mean())
        curvature = fit_ekfac(model, range(N), WEIGHTS).finish()
        solved = curvature.solve(model, compute_full_gradients(model, "query", QUERIES), damping)
    parts = torch.split(grad_NP, [prod(shape) for shape in shapes.values()], dim=1)
    for (key, shape), part_NP in zip(shapes.items(), parts, strict=True):
        matrix_NRC = part_NP.view(N, shape[0] if shape else 1, -1)
        expected = invert_ekfac(matrix_NRC, WEIGHTS, damping, matrix_NRC[QUERIES], longest)
        assert_close(solved[key] / damping, expected)
    assert ("diagonal on one side" in curvature.summary) == any(
        max(s[0], prod(s[1:])) > longest for s in shapes.values()
    )


def test_ekfac_of_a_vector_is_exact(tmp_path):
    with load_case("own norms", tmp_path) as (model, grad_NP, shapes):
        damping = 1e-3 * float(grad_NP.square().sum(1).mean())
        solved = (
            fit_ekfac(model, range(N), WEIGHTS)
            .finish()
            .solve(model, compute_full_gradients(model, "query", QUERIES), damping)
        )
    parts = dict(zip(shapes, torch.split(grad_NP, [prod(shape) for shape in shapes.values()], dim=1), strict=True))
    for key, part_NP in parts.items():
        if len(shapes[key]) == 1:
            assert_close(solved[key] / damping, invert_dense(part_NP, WEIGHTS, damping, part_NP[QUERIES]))


def weigh(name: str, loss_N: np.ndarray) -> np.ndarray:
    p_N = np.exp(-loss_N)
    return {"fisher": np.ones_like(p_N), "gauss-newton": p_N / (1 - p_N), "trak": (1 - p_N) ** -2}[name]


DAMPING = 0.05
N_TRAIN, N_QUERIES = 10, 5
SHARES = torch.tensor([0.25, 0.75])


@dataclass(frozen=True)
class Indexed:
    """An index, and of each checkpoint the gradients of rows and of queries in float64, and the losses of rows."""

    index: InfluenceIndex
    rows: list[Tensor]
    queries: list[Tensor]
    losses: list[np.ndarray]


def build_toy(folder: Path, **changes: Any) -> Indexed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Toy()
    task = make_toy_task(folder, model, **{"loss_is_nll": True, **changes})
    build(task, folder / "index", CONFIG)
    rows, queries = task.train_data(), task.query_data()
    found = Indexed(InfluenceIndex.open(folder / "index", task, device="cpu"), [], [], [])
    for checkpoint in task.checkpoints:
        model = Toy()
        model.load_state_dict(torch.load(checkpoint.path))
        found.rows.append(oracle.gradients(model, cross_entropy, rows))
        found.queries.append(oracle.gradients(model, task.query_loss or cross_entropy, queries))
        losses = cross_entropy(model, torch.utils.data.default_collate(rows))
        found.losses.append(losses.detach().double().numpy())
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    return build_toy(tmp_path_factory.mktemp("toy"), token_losses=lambda m, b: cross_entropy(m, b)[:, None] * SHARES)


def compute_scores(toy: Indexed, name: str, damping: float, chosen: Sequence[int]) -> np.ndarray:
    """Return Σ_c ⟨g'_c, g_z⟩ [Q, N], with F over the chosen rows except z, by dense matrices."""
    score_QN = np.zeros((len(toy.queries[0]), len(toy.rows[0])))
    for grad_NP, grad_QP, loss_N in zip(toy.rows, toy.queries, toy.losses, strict=True):
        weight_M = weigh(name, loss_N[chosen])
        solved_QP = invert_dense(grad_NP[chosen], weight_M, damping, grad_QP)
        norm_Q = (solved_QP * grad_QP).sum(1).sqrt().numpy()
        for row in chosen:
            own_QP = invert_dense(grad_NP[chosen], np.where(np.equal(chosen, row), 0, weight_M), damping, grad_QP)
            score_QN[:, row] += (own_QP @ grad_NP[row]).numpy() / norm_Q
    return score_QN


def ask(toy: Indexed, **changes: Any) -> Answers:
    options = {"k": 100, "exact": True, "score": "gauss-newton", "damping": DAMPING, **changes}
    return toy.index.query(range(len(toy.queries[0])), options=QueryOptions(**options))


def read_scores(answers: Answers, n: int = N_TRAIN) -> np.ndarray:
    score_QN = np.zeros((len(answers), n))
    for row, answer in zip(score_QN, answers, strict=True):
        for hit in answer.hits:
            row[hit.row] = hit.score
    return score_QN


def assert_scores(answers: Answers, expected_QN: np.ndarray) -> None:
    np.testing.assert_allclose(read_scores(answers, expected_QN.shape[1]), expected_QN, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("how", [{}, {"exact": False, "rerank": "exact"}], ids=["all rows", "candidates"])
def test_exact_scores_equal_dense_matrices(toy, name, how):
    answers = ask(toy, score=name, **how)
    assert_scores(answers, compute_scores(toy, name, DAMPING, range(N_TRAIN)))
    assert f"exact scores with the curvature of {N_TRAIN} rows" in answers[0].how
    assert all(hit.is_exact for hit in answers[0].hits)


def test_scores_by_token_sum_to_the_exact_score(toy):
    for hit in ask(toy, tokens=True)[0].hits:
        np.testing.assert_allclose(hit.tokens, hit.score * SHARES, rtol=1e-4, atol=1e-7)


def test_the_automatic_damping_is_that_of_the_stored_scores(toy):
    damping_C = toy.index.make_score(QueryOptions(score="fisher")).damping.damping_C
    automatic = ask(toy, score="fisher", damping=None, checkpoints=(1,))
    given = ask(toy, score="fisher", damping=damping_C[1], checkpoints=(1,))
    np.testing.assert_array_equal(read_scores(automatic), read_scores(given))


def test_a_large_damping_ranks_by_inner_products_of_gradients(toy):
    expected_QN = sum(q @ g.T / q.norm(dim=1)[:, None] for g, q in zip(toy.rows, toy.queries, strict=True)).numpy()
    np.testing.assert_allclose(read_scores(ask(toy, damping=1e6)) * 1e3, expected_QN, rtol=1e-3, atol=1e-4)


def test_the_score_of_a_group_is_the_mean_of_the_scores(toy):
    options = QueryOptions(k=N_TRAIN, exact=True, score="gauss-newton", damping=DAMPING)
    each_QN = compute_scores(toy, "gauss-newton", DAMPING, range(N_TRAIN))
    assert_scores(toy.index.query(range(3), options=options, together=True), each_QN[:3].mean(0, keepdims=True))
    contrast = toy.index.contrast([0, 1], [3], options=options)
    assert_scores(contrast, each_QN[:2].mean(0, keepdims=True) - each_QN[3])
    for hit in contrast[0].hits:
        means = [each_QN[:2, hit.row].mean(), each_QN[3, hit.row]]
        np.testing.assert_allclose(hit.of_means, means, rtol=2e-3, atol=1e-4)


def test_opponents_are_the_proponents_of_the_negative_query(toy, tmp_path):
    negative = build_toy(tmp_path, query_loss=lambda model, batch: -cross_entropy(model, batch))
    np.testing.assert_allclose(read_scores(ask(negative)), -read_scores(ask(toy)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [1, 6])
def test_a_curvature_of_rank_one(tmp_path, n):
    copies = build_toy(tmp_path, train_data=lambda: make_rows(1) * n)
    assert_scores(ask(copies), compute_scores(copies, "gauss-newton", DAMPING, range(n)))


@pytest.mark.parametrize("scale", [1e22, 1e-22])
def test_a_scale_of_the_loss_changes_no_score(toy, scale, tmp_path):
    scaled = build_toy(tmp_path, loss=lambda model, batch: scale * cross_entropy(model, batch))
    answers = ask(scaled, score="fisher", damping=DAMPING * scale**2)
    assert_scores(answers, compute_scores(toy, "fisher", DAMPING, range(N_TRAIN)))


def test_ekfac_rejects_gradients_whose_squares_overflow(tmp_path, monkeypatch):
    monkeypatch.setattr(exact_preconditioning, "_MOST_PRODUCTS", 0)
    scaled = build_toy(tmp_path, loss=lambda model, batch: 1e22 * cross_entropy(model, batch))
    with pytest.raises(NonFiniteError, match="the curvature over all parameters is not finite"):
        ask(scaled, score="fisher", damping=DAMPING * 1e44)


def test_removed_rows_are_not_part_of_the_curvature(tmp_path):
    toy = build_toy(tmp_path)
    remove(tmp_path / "index", [2, 4])
    index = InfluenceIndex.open(tmp_path / "index", toy.index.task, device="cpu")
    assert_scores(
        ask(replace(toy, index=index)), compute_scores(toy, "gauss-newton", DAMPING, [0, 1, 3, 5, 6, 7, 8, 9])
    )


def test_a_sample_of_the_rows(toy, monkeypatch):
    monkeypatch.setattr(exact_preconditioning, "_MOST_ROWS", 4)
    toy = replace(toy, index=InfluenceIndex.open(toy.index.directory, toy.index.task, device="cpu"))
    sampled = compute_scores(toy, "fisher", DAMPING, [0, 3, 6, 9])
    found = read_scores(ask(toy, score="fisher"))
    np.testing.assert_allclose(found[:, [0, 3, 6, 9]], sampled[:, [0, 3, 6, 9]], rtol=2e-3, atol=1e-4)


def test_curvatures_are_computed_once_for_an_open_index(toy, monkeypatch):
    first = read_scores(ask(toy))
    monkeypatch.setattr(exact_preconditioning, "compute_gram", None)
    np.testing.assert_array_equal(read_scores(ask(toy)), first)


@pytest.mark.parametrize("option", [{}, {"exact": False, "rerank": "exact"}, {"exact": False, "tokens": True}])
def test_a_score_with_normalised_rows_has_no_exact_form(toy, option):
    with pytest.raises(UsageError, match=r"needs a score over all parameters: got the score trackstar"):
        ask(toy, score="trackstar", damping=None, **option)


def test_ekfac_serves_models_whose_gram_matrix_is_too_expensive(toy, monkeypatch):
    monkeypatch.setattr(exact_preconditioning, "_MOST_PRODUCTS", 0)
    index = InfluenceIndex.open(toy.index.directory, toy.index.task, device="cpu")
    answers = ask(replace(toy, index=index), score="fisher")
    expected_QN = np.zeros((N_QUERIES, N_TRAIN))
    shapes = [p.shape for p in Toy().parameters()]
    for grad_NP, grad_QP in zip(toy.rows, toy.queries, strict=True):
        solved = []
        for shape, row_NP, query_QP in zip(
            shapes, *(torch.split(g, [prod(s) for s in shapes], dim=1) for g in (grad_NP, grad_QP)), strict=True
        ):
            row_NRC, query_QRC = (part.view(len(part), shape[0], -1) for part in (row_NP, query_QP))
            solved.append(invert_ekfac(row_NRC, np.ones(N_TRAIN), DAMPING, query_QRC, 4096))
        solved_QP = torch.cat(solved, dim=1)
        expected_QN += ((solved_QP @ grad_NP.T) / (solved_QP * grad_QP).sum(1).sqrt()[:, None]).numpy()
    assert_scores(answers, expected_QN)
    assert "exact scores with the EK-FAC curvature of 10 rows" in answers[0].how


def test_most_curvatures_are_kept_where_memory_is_enough_for_all_but_one(monkeypatch):
    @dataclass
    class Loaded:
        checkpoint: int

    @dataclass
    class Fitted:
        n_bytes: int = 10
        summary: str = "a curvature"

    computed: list[tuple[str, int]] = []

    def compute(self, name, model, progress):
        computed.append((name, model.checkpoint))
        return Fitted()

    monkeypatch.setattr(exact_preconditioning.FullCurvatures, "_compute", compute)
    monkeypatch.setattr(exact_preconditioning, "_KEPT_BYTES", 35)
    curvatures = exact_preconditioning.FullCurvatures(None)
    for name, n_new in (("fisher", 4), ("fisher", 1), ("trak", 4), ("trak", 1), ("trak", 1)):
        computed.clear()
        for checkpoint in range(4):
            # Scores use the curvature of a checkpoint twice: for directions and for the factors of rows.
            curvatures.find(name, Loaded(checkpoint))
            curvatures.find(name, Loaded(checkpoint))
        assert len(computed) == n_new
        assert curvatures.summarise(name) == "a curvature"


def open_index(toy: Indexed, batch_size: int = 2) -> Indexed:
    """Return the same index, opened again, with no curvature."""
    return replace(
        toy, index=InfluenceIndex.open(toy.index.directory, toy.index.task, device="cpu", batch_size=batch_size)
    )


def test_a_curvature_that_is_dropped_frees_its_memory_at_once(tmp_path):
    with load_case("mlp", tmp_path) as (model, *_):
        curvature = compute_gram(model, range(N), WEIGHTS).finish()
        curvature.solve(model, compute_full_gradients(model, "query", QUERIES), 1e-2)
        dropped = weakref.ref(curvature)
        gc.disable()
        try:
            del curvature
            assert dropped() is None
        finally:
            gc.enable()


def test_two_blocks_of_gradients_are_in_memory(tmp_path, monkeypatch):
    compute_scaled, blocks, sizes = gram._compute_scaled, [], []

    def watch(model, rows):
        sizes.append(sum(block() is not None for block in blocks))
        block = yield from compute_scaled(model, rows)
        blocks.append(weakref.ref(block))
        return block

    with load_case("mlp", tmp_path) as (model, *_):
        monkeypatch.setattr(gram, "_BLOCK_BYTES", 2 * 4 * sum(p.numel() for p in model.parameters.values()))
        monkeypatch.setattr(gram, "_compute_scaled", watch)
        compute_gram(model, range(N), WEIGHTS).finish()
    n_blocks = -(-N // 2)
    assert len(sizes) == n_blocks * (n_blocks + 1) / 2
    assert max(sizes) == 1, "one, while the second one is computed"


def test_factors_of_outer_products_multiply_as_whole_gradients():
    """Also a block with factors and one without, whose layer was called twice for some example."""
    random = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-12, 1e-6, 1.0, 1e9, 0.0])
    sides = [[torch.randn(5, n, generator=random) for n in (3, 4)] for _ in range(2)]
    wholes = [(left * scales[:, None])[:, :, None] * right[:, None] for left, right in sides]
    factored, expanded = [], []
    for (left, right), whole in zip(sides, wholes, strict=True):
        # One factor is large and the other one small.
        own = {"a": (left * 1e25, right * scales[:, None] * 1e-25), "b": (right.clone() * scales[:, None],)}
        factored.append(gram._Block(own, gram._scale_factors(own, 5)))
        same = {"a": (whole.flatten(1).clone(),), "b": (right.clone() * scales[:, None],)}
        expanded.append(gram._Block(same, gram._scale_factors(same, 5)))
    flat = [torch.cat([w.flatten(1), r * scales[:, None]], 1).double() for w, (_, r) in zip(wholes, sides, strict=True)]
    for left, right in itertools.product((factored[0], expanded[0]), (factored[1], expanded[1])):
        product = torch.ldexp(run_steps(gram._multiply(left, right)), left.exponent_B[:, None] + right.exponent_B)
        torch.testing.assert_close(product, flat[0] @ flat[1].T, rtol=1e-4, atol=0)


def test_the_gram_matrix_of_linear_layers_needs_no_whole_gradients(tmp_path, monkeypatch):
    expanded = []
    monkeypatch.setattr(gram, "materialise", lambda form: expanded.append(form.shape) or materialise(form))
    with load_case("mlp", tmp_path) as (model, _, shapes):
        compute_gram(model, range(N), WEIGHTS).finish()
    vectors = {(shape[0], 1) for shape in shapes.values() if len(shape) == 1}
    assert {*expanded} == vectors


@pytest.fixture(params=["gram", "gram in blocks", "EK-FAC"])
def method(request, monkeypatch) -> str:
    """Choose how curvatures are computed, in several blocks and strips."""
    monkeypatch.setattr(gram, "_STRIP", 3)
    if request.param == "gram in blocks":
        monkeypatch.setattr(gram, "_BLOCK_BYTES", 4 * 4 * sum(p.numel() for p in Toy().parameters()))
    if request.param == "EK-FAC":
        monkeypatch.setattr(exact_preconditioning, "_MOST_PRODUCTS", 0)
    return request.param


def test_the_progress_of_a_curvature_rises_over_all_checkpoints(toy, method):
    seen: dict[str, list[tuple[int, int]]] = {}
    options = QueryOptions(exact=True, score="fisher", damping=DAMPING)
    stages = ["curvature", "exact scores"] if method == "EK-FAC" else ["curvature", "inverse curvature", "exact scores"]
    opened = open_index(toy)
    opened.index.query([0, 3], (), options, lambda stage, *done: seen.setdefault(stage, []).append(done))
    assert list(seen) == stages
    for reports in seen.values():
        dones, totals = zip(*reports, strict=True)
        assert list(dones) == sorted(dones) and len(set(totals)) == 1 and dones[-1] == totals[0]
    assert len(seen["curvature"]) >= 2 * N_TRAIN / 2, "each batch of both checkpoints"
    seen.clear()
    opened.index.query([0, 3], (), options, lambda stage, *done: seen.setdefault(stage, []).append(done))
    assert list(seen) == stages[1:], "the curvature is kept"


class StopError(BaseException):
    """Raised by a callback to end a query."""


@pytest.mark.parametrize("stage", ["curvature", "inverse curvature", "exact scores"])
def test_a_query_that_is_stopped_keeps_no_part_of_a_curvature(toy, method, stage):
    if (method, stage) == ("EK-FAC", "inverse curvature"):
        pytest.skip("EK-FAC has no passes over rows for an inverse")
    options = QueryOptions(k=N_TRAIN, exact=True, score="fisher", damping=DAMPING)
    expected = open_index(toy).index.query([0, 3], (), options).lines()
    opened, left = open_index(toy), 3

    def stop(found, done, total):
        nonlocal left
        left -= found == stage
        if not left:
            raise StopError

    with pytest.raises(StopError):
        opened.index.query([0, 3], (), options, stop)
    curvatures = opened.index.score_maker._full_curvatures
    assert not curvatures._computations
    assert (stage == "curvature") == (not curvatures._kept)
    assert opened.index.query([0, 3], (), options).lines() == expected


def test_scores_are_the_same_bits_with_other_uses_of_the_model_between_steps(toy, method):
    options = QueryOptions(k=N_TRAIN, exact=True, score="fisher", damping=DAMPING)
    expected = open_index(toy).index.query([0, 3], (), options).lines()
    opened, stored = open_index(toy), toy.index.query([1]).lines()
    stages = set()

    def use(stage, done, total):
        stages.add(stage)
        with opened.index.release_model(), ThreadPoolExecutor(1) as thread:
            found = thread.submit(opened.index.query, [1]).result(60)
        np.testing.assert_allclose(
            [hit["score"] for hit in found.lines()[0]["proponents"]],
            [hit["score"] for hit in stored[0]["proponents"]],
            rtol=1e-5,
        )

    assert opened.index.query([0, 3], (), options, use).lines() == expected
    assert {"curvature", "exact scores"} <= stages


def test_two_queries_compute_a_curvature_together(toy, method, monkeypatch):
    started: list[int] = []
    start = exact_preconditioning.FullCurvatures._start

    def record(self, name, model):
        started.append(model.checkpoint)
        return start(self, name, model)

    options = QueryOptions(k=N_TRAIN, exact=True, score="fisher", damping=DAMPING)
    expected = [open_index(toy).index.query([row], (), options).lines() for row in (0, 3)]
    monkeypatch.setattr(exact_preconditioning.FullCurvatures, "_start", record)
    opened, others = open_index(toy), []

    def join(stage, done, total):
        if stage == "curvature" and not others:
            with opened.index.release_model(), ThreadPoolExecutor(1) as thread:
                others.append(thread.submit(opened.index.query, [3], (), options).result(60).lines())

    assert [opened.index.query([0], (), options, join).lines(), *others] == expected
    assert started == [0, 1], "one computation for each checkpoint"


def test_the_split_by_token_has_progress(toy):
    seen = []
    options = QueryOptions(k=3, tokens=True, score="fisher", damping=DAMPING)
    answers = toy.index.query(
        [0, 3], (), options, lambda stage, *done: seen.append(done) if stage == "tokens" else None
    )
    n_hits = [len(answer.hits) for answer in answers]
    assert seen == [
        (done, 2 * sum(n_hits)) for done in (n_hits[0], sum(n_hits), sum(n_hits) + n_hits[0], 2 * sum(n_hits))
    ]
