"""The kinds of search index, and the choice among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.search.test_search_contract import Rows
from tracin_ann.errors import UsageError
from tracin_ann.search.backend import (
    NAMES,
    IndexNeeds,
    IndexRequest,
    build_index,
    choose_index,
    count_shards,
    estimate_bytes,
    expect_index,
    list_files,
    load_index,
)
from tracin_ann.search.diagnosis import Diagnosis, diagnose
from tracin_ann.types import Float32

CLUSTERED = Diagnosis(directions=20.0, energy=0.9, bounded_share=0.5)
MANY = Diagnosis(directions=500.0, energy=0.3, bounded_share=1.0)


def choose(requested: str, n_rows: int, found: Diagnosis = CLUSTERED, **needs_of: Any) -> list[str]:
    needs = IndexNeeds(**needs_of)
    return [choice.kind for choice in choose_index(requested, n_rows, 768, lambda: found, needs)]


def refuse() -> Diagnosis:
    raise AssertionError("the choice does not depend on the rows")


def test_few_rows_are_scanned() -> None:
    (choice,) = choose_index("auto", 1400, 3072, refuse)
    assert (choice.kind, choice.reason) == (
        "flat",
        "exact scan: 1,400 rows of 3,072 numbers (17 MB); search indexes are used from 20,000 rows on",
    )
    assert choose("auto", 19_999) == ["flat"]


def test_a_requested_kind_is_built() -> None:
    (choice,) = choose_index("ivf", 10, 4, refuse)
    assert (choice.kind, choice.reason) == (
        "ivf",
        "inverted lists: 10 rows of 4 numbers (0 MB); requested by --index ivf",
    )
    for kind in ("flat", "codes", "bounds", "graph"):
        assert choose(kind, 10**6, found=MANY) == [kind]
    with pytest.raises(UsageError, match="'hnsw', expected auto, flat, ivf, codes, bounds or graph"):
        choose("hnsw", 10)


def test_the_choice_depends_on_the_directions_of_the_rows() -> None:
    choices = choose_index("auto", 20_000, 768, lambda: CLUSTERED)
    assert [choice.kind for choice in choices] == ["ivf", "codes"]
    assert choices[0].reason == (
        "inverted lists: 20,000 rows of 768 numbers (61 MB); the rows vary in about 20 directions"
    )
    assert choose("auto", 20_000, found=MANY) == ["codes"]


def test_bounds_are_chosen_for_a_recall_that_other_indexes_may_not_reach() -> None:
    few = Diagnosis(directions=5.0, energy=0.9, bounded_share=0.02)
    assert choose("auto", 10**6, found=few) == ["ivf", "codes"]
    assert choose("auto", 10**6, found=few, target_recall=0.995) == ["bounds"]
    assert choose("auto", 10**6, found=CLUSTERED, target_recall=0.995) == ["ivf", "codes"]


def test_an_index_in_shards_is_of_a_kind_that_has_them() -> None:
    few = Diagnosis(directions=5.0, energy=0.9, bounded_share=0.02)
    assert choose("auto", 10**6, found=few, target_recall=0.995, shards=4) == ["ivf", "codes"]
    assert choose("auto", 10**6, found=MANY, target_recall=0.995, shards=4) == ["codes"]
    assert choose("auto", 10**4, shards=4) == ["flat"]
    assert [count_shards(kind, 4) for kind in ("flat", "ivf", "codes", "bounds", "graph")] == [1, 4, 4, 1, 1]


def test_scores_with_a_curvature_matrix_need_no_diagnosis() -> None:
    for kind, n_rows, expected in (("auto", 20_000, "codes"), ("auto", 19_999, "flat"), ("ivf", 20_000, "ivf")):
        choices = choose_index(kind, n_rows, 768, refuse, IndexNeeds(is_damped=True))
        assert [choice.kind for choice in choices] == [expected]


def test_an_estimate_before_the_features_leaves_the_choice_open() -> None:
    kinds = ("auto", "flat", "ivf", "codes", "bounds", "graph")
    assert [expect_index(kind, 20_000, 768).kind for kind in kinds] == list(kinds)
    assert expect_index("auto", 19_999, 768).kind == "flat"
    assert estimate_bytes("auto", 19_999, 768, "sq8") == 0
    sizes = [estimate_bytes(kind, 10**6, 768, "sq8") for kind in kinds]
    assert sizes[0] == max(sizes[2:])
    assert sizes[1] == 0
    assert min(sizes[2:]) > 10**8


@pytest.mark.parametrize("kind", ["ivf", "codes", "bounds", pytest.param("graph", marks=pytest.mark.slow)])
def test_files_have_about_the_estimated_size(kind: str, tmp_path: Path) -> None:
    rows = noise(40, n_rows=5000, dim=300)
    request = IndexRequest(0, "sq8", torch.device("cpu"), tmp_path / "scratch", ("rows",))
    index = build_index(kind, Rows(rows), request, lambda done, total: None)
    (tmp_path / "index").mkdir()
    index.save(tmp_path / "index")
    size = sum((tmp_path / "index" / name).stat().st_size for name in list_files(kind))
    # Rows of few directions need a narrower basis for bounds than the estimate assumes.
    assert size / estimate_bytes(kind, *rows.shape, "sq8") == pytest.approx(0.3 if kind == "bounds" else 1.0, rel=0.5)
    loaded = load_index(kind, tmp_path / "index", Rows(rows), torch.device("cpu"))
    assert (loaded.kind, NAMES[kind]) == (kind, loaded.name)


def noise(directions: int, n_rows: int = 3000, dim: int = 400) -> Float32:
    """Return rows of equal variance in some of the directions."""
    random = np.random.default_rng(0)
    rows = np.zeros((n_rows, dim))
    rows[:, :directions] = random.standard_normal((n_rows, directions))
    return (rows @ np.linalg.qr(random.standard_normal((dim, dim)))[0]).astype(np.float32)


@pytest.mark.parametrize("directions", [1, 5, 50, 400])
@pytest.mark.parametrize("scale", [2.0**-60, 1.0, 2.0**60])
def test_the_diagnosis_counts_the_directions_of_noise(directions: int, scale: float) -> None:
    rows = noise(directions) * np.float32(scale)
    found = diagnose(Rows(rows), np.arange(len(rows)), seed=0)
    # The ratio is (E‖x‖²)² / E(x·y)² for independent x and y, which is the number of directions here.
    assert found.directions == pytest.approx(directions, rel=0.05)
    assert found.energy == pytest.approx(1.0, abs=1e-5) if directions <= 50 else found.energy < 0.6


def test_the_diagnosis_tells_where_bounds_exclude_rows() -> None:
    few, many = noise(5), noise(400)
    ids = np.arange(len(few))
    assert diagnose(Rows(few), ids, seed=0).bounded_share < 0.01
    assert diagnose(Rows(many), ids, seed=0).bounded_share > 0.9


def test_the_share_that_bounds_leave_is_that_of_brute_force() -> None:
    random = np.random.default_rng(1)
    rows = np.concatenate([noise(10) * 3, noise(400)], axis=0) * random.exponential(size=(6000, 1)).astype(np.float32)
    found = diagnose(Rows(rows), np.arange(len(rows)), seed=0)
    wide = rows.astype(np.float64)
    leading = np.linalg.svd(wide, full_matrices=False)[2][:128].T
    near, rest = wide @ leading, np.linalg.norm(wide - wide @ leading @ leading.T, axis=1)
    shares = []
    for query in range(0, 6000, 60):
        others = np.arange(6000) != query
        scores = wide[others] @ wide[query]
        bound = near[others] @ near[query] + rest[others] * rest[query]
        shares.append((bound >= np.sort(scores)[-10]).mean())
    assert found.bounded_share == pytest.approx(np.mean(shares), rel=0.3)


@pytest.mark.parametrize("rows", [np.zeros((50, 8), np.float32), np.ones((1, 8), np.float32)])
def test_a_diagnosis_of_nothing_is_finite(rows: Float32) -> None:
    assert diagnose(Rows(rows), np.arange(len(rows)), seed=0) == Diagnosis(1.0, 1.0, 1.0)
