"""The inverse of a curvature matrix over all parameters, against dense matrices in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracle
from models import make_case
from tracin_ann import Checkpoint, Task
from tracin_ann.errors import NonFiniteError
from tracin_ann.features import LoadedModel, RunOptions, TaskRunner
from tracin_ann.scoring import ekfac, gram
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
    monkeypatch.setattr(gram, "_BLOCK_BYTES", 1 << 12)
    with load_case(name, tmp_path) as (model, grad_NP, _):
        damping = 1e-2 * float(grad_NP.square().sum(1).mean())
        rows = [0, 2, 3, 4, 5, 7]
        curvature = compute_gram(model, rows, WEIGHTS[rows])
        solved = curvature.solve(model, compute_full_gradients(model, "query", QUERIES), damping)
        factor_N = curvature.weigh_rows(range(N), damping)
    assert_close(
        torch.cat(list(solved.values()), 1), invert_dense(grad_NP[rows], WEIGHTS[rows], damping, grad_NP[QUERIES])
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
    monkeypatch.setattr(ekfac, "_LARGEST_SIDE", longest)
    monkeypatch.setattr(ekfac, "_ELEMENTS", 300)
    with load_case(name, tmp_path) as (model, grad_NP, shapes):
        damping = 1e-2 * float(grad_NP.square().sum(1).mean())
        curvature = fit_ekfac(model, range(N), WEIGHTS)
        solved = curvature.solve(model, compute_full_gradients(model, "query", QUERIES), damping)
    parts = torch.split(grad_NP, [prod(shape) for shape in shapes.values()], dim=1)
    for (key, shape), part_NP in zip(shapes.items(), parts, strict=True):
        matrix_NRC = part_NP.view(N, shape[0] if shape else 1, -1)
        expected = invert_ekfac(matrix_NRC, WEIGHTS, damping, matrix_NRC[QUERIES], longest)
        assert_close(solved[key], expected)
    assert ("diagonal on one side" in curvature.summary) == any(
        max(s[0], prod(s[1:])) > longest for s in shapes.values()
    )


def test_ekfac_of_a_vector_is_exact(tmp_path):
    with load_case("own norms", tmp_path) as (model, grad_NP, shapes):
        damping = 1e-3 * float(grad_NP.square().sum(1).mean())
        solved = fit_ekfac(model, range(N), WEIGHTS).solve(
            model, compute_full_gradients(model, "query", QUERIES), damping
        )
    parts = dict(zip(shapes, torch.split(grad_NP, [prod(shape) for shape in shapes.values()], dim=1), strict=True))
    for key, part_NP in parts.items():
        if len(shapes[key]) == 1:
            assert_close(solved[key], invert_dense(part_NP, WEIGHTS, damping, part_NP[QUERIES]))
