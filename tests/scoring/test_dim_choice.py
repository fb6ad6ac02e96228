"""The choice of D by a pilot: predictions against brute force, limits, dry run, resumed builds, commands and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

import oracle
from tracin_ann import BuildConfig, BuildReport, Checkpoint, InfluenceIndex, Task, build, plan
from tracin_ann.cli.build import main as build_command
from tracin_ann.errors import NonFiniteError, UsageError
from tracin_ann.scoring import pilot
from tracin_ann.scoring.sizes import IndexShape
from tracin_ann.store import Manifest
from tracin_ann.types import Float64

N, QUERIES, CANDIDATES = 900, 24, 20
AUTO = BuildConfig(dim="auto", candidates=CANDIDATES, target_true_recall=0.9, device="cpu", batch_size=100)


def make_rows(n: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 24, generator=g)
    labels = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return [(x[i], int(labels[i])) for i in range(n)]


def compute_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 4))


def make_task(folder: Path, n_rows: int = N) -> Task:
    torch.save(make_net().state_dict(), folder / "0.pt")
    return Task(
        model=make_net,
        loss=compute_loss,
        train_data=lambda: make_rows(n_rows, 1),
        query_data=lambda: make_rows(QUERIES, 2),
        checkpoints=[Checkpoint(str(folder / "0.pt"), learning_rate=0.1)],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("auto")


@pytest.fixture(scope="module")
def report(folder: Path) -> BuildReport:
    return build(make_task(folder), folder / "index", AUTO)


@pytest.fixture(scope="module")
def true_scores() -> Float64:
    gradients = [
        oracle.gradients(make_net(), compute_loss, make_rows(*some))[:, None] for some in ((QUERIES, 2), (N, 1))
    ]
    return oracle.tracin(*gradients, (0.1,))


def measure_recall(index: InfluenceIndex, true_scores: Float64, sign: int) -> float:
    """Return the share of the true top ten among the candidates of the stored ranking, by sorting all rows."""
    stored = index.features("query", range(QUERIES)) @ index.view().take(range(N)).T
    return oracle.recall(oracle.top_ids(sign * true_scores, 10), oracle.top_ids(sign * stored, CANDIDATES))


def test_the_smallest_dimension_that_reaches_the_target_is_chosen(report: BuildReport) -> None:
    choice = report.dim_choice
    assert choice is not None and choice.is_reached
    assert [row.dim for row in choice.table] == list(pilot.DIMS) and (choice.n_rows, choice.n_queries) == (N, 16)
    recalls = [row.recall for row in choice.table]
    assert recalls == sorted(recalls) and recalls[0] < 0.9 <= choice.chosen.recall
    below = [row for row in choice.table if row.dim < choice.chosen.dim]
    assert below and all(row.recall < 0.9 for row in below)
    assert report.manifest.build.spec.sketch.dim == choice.chosen.dim
    assert choice.summary.startswith(f"{choice.chosen.dim}; expected true recall@10 among 20 candidates: ")


def test_predictions_agree_with_brute_force(
    report: BuildReport, true_scores: Float64, folder: Path, tmp_path: Path
) -> None:
    choice, task = report.dim_choice, make_task(folder)
    assert choice is not None
    predicted = {row.dim: row for row in choice.table}
    for dim in (64, 256):
        build(task, tmp_path / str(dim), replace(AUTO, dim=dim, yardstick=False))
        index = InfluenceIndex.open(tmp_path / str(dim), task, device="cpu")
        for side, sign in (("proponents", 1), ("opponents", -1)):
            expected = getattr(predicted[dim], side)
            assert expected.mean == pytest.approx(measure_recall(index, true_scores, sign), abs=0.1), (dim, side)


def test_a_pilot_of_some_rows_extrapolates_to_all(
    report: BuildReport, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot, "ROWS", 300)
    some = plan(make_task(folder), folder / "elsewhere", AUTO).dim_choice
    assert some is not None and report.dim_choice is not None and some.n_rows == 300
    assert not (folder / "elsewhere").exists()
    for one, other in zip(some.table, report.dim_choice.table, strict=True):
        assert one.recall == pytest.approx(other.recall, abs=0.2)


def test_a_finished_index_keeps_its_dimension(report: BuildReport, folder: Path, tmp_path: Path) -> None:
    """Also where the options would lead to another one, and where rows are appended."""
    again = build(make_task(folder), folder / "index", replace(AUTO, target_true_recall=0.2))
    assert again.dim_choice is None and again.manifest == report.manifest
    assert plan(make_task(folder), folder / "index", AUTO).dim_choice is None
    build(make_task(tmp_path, 300), tmp_path / "index", replace(AUTO, dim=32))
    grown = build(make_task(tmp_path, 400), tmp_path / "index", replace(AUTO, append=True))
    assert grown.manifest.build.spec.sketch.dim == 32 and grown.dim_choice is None


def test_without_a_sufficient_dimension_the_largest_within_the_limits_is_used(folder: Path) -> None:
    size = IndexShape(N, 1, N, "float16", "auto", "sq8").estimate_size
    assert size(128).row_bytes == 256 and size(128).disk_bytes == N * (256 + 22)
    for limits in ({"disk_bytes": size(128).disk_bytes}, {"memory_bytes": size(128).memory_bytes}):
        choice = plan(make_task(folder), folder / "other", replace(AUTO, target_true_recall=0.99, **limits)).dim_choice
        assert choice is not None and choice.chosen.dim == 128 and not choice.is_reached
        assert [row.is_allowed for row in choice.table] == [True, True, *[False] * 6]
        assert "warning: no dimension within --disk and --memory reaches 0.99" in choice.summary
    with pytest.raises(UsageError, match="no sketch dimension is within --disk and --memory: got .* for D = 64"):
        plan(make_task(folder), folder / "other", replace(AUTO, disk_bytes=1000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": "large"}, "bad --dim: got 'large', expected a number or auto"),
        ({"target_true_recall": 1.0}, "bad --target-true-recall"),
        ({"candidates": 0}, "bad --candidates"),
        ({"disk_bytes": 0}, "bad --disk"),
        ({"allow_random_data": True}, "--dim auto scores training rows twice: got --allow-random-data"),
    ],
)
def test_options_that_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(AUTO, **options)


def test_rows_that_are_not_finite_are_left_out_of_a_pilot_or_stop_it(folder: Path) -> None:
    rows, query = make_rows(300, 1), make_rows(QUERIES, 2)
    rows[7] = (rows[7][0] * torch.nan, 0)
    for row in range(16):
        query[row] = (query[row][0] * torch.nan, 0)
    task = replace(make_task(folder), train_data=lambda: rows, query_data=lambda: query)
    with pytest.raises(NonFiniteError):
        plan(task, folder / "other", AUTO)
    choice = plan(task, folder / "other", replace(AUTO, on_nonfinite="skip")).dim_choice
    assert choice is not None and choice.n_rows == 299 and 1 <= choice.n_queries <= 16


@pytest.fixture
def words(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        f"from pathlib import Path\nfrom test_dim_choice import make_task\n\n\ndef task():\n"
        f"    return make_task(Path({str(folder)!r}))\n"
    )
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return ["--task", "mine.py:task", "--out", "made", "--batch-size", "100", "--device", "cpu"]


def test_the_command_prints_the_table_in_a_dry_run_and_the_choice_after_a_build(
    report: BuildReport, words: list[str]
) -> None:
    assert report.dim_choice is not None
    chosen = report.dim_choice.chosen.dim
    options = [*words, "--dim", "auto", "--candidates", "20", "--target-true-recall", "0.9"]
    dry = CliRunner().invoke(build_command, [*options, "--disk", "4MB", "--dry-run"])
    assert dry.exit_code == 0, dry.output
    lines = dry.stdout.splitlines()
    assert any(line.startswith(f"dim:       {chosen}; expected true recall@10 among 20 candidates") for line in lines)
    table = [line.split("│")[0].split() for line in lines[-8:]]
    assert [row[0] for row in table] == [str(dim) for dim in pilot.DIMS]
    assert [row[1:] for row in table if int(row[0]) == chosen] == [["*"]] and table[-1][1:] == ["-"]
    Path("build.toml").write_text('dim = "auto"\ncandidates = 20\ntarget_true_recall = 0.9\n')
    made = CliRunner().invoke(build_command, [*words, "--config", "build.toml"])
    assert made.exit_code == 0 and f"dim: {report.dim_choice.summary}" in made.stdout
    assert Manifest.read(Path("made")).build.spec.sketch.dim == chosen


@pytest.mark.parametrize("option", [["--candidates", "20"], ["--disk", "1GB"], ["--target-true-recall", "0.9"]])
def test_options_of_the_choice_need_it(words: list[str], option: list[str]) -> None:
    result = CliRunner().invoke(build_command, [*words, *option])
    assert result.exit_code == 2
    assert (
        f"{option[0]} is for the choice of the sketch dimension: got --dim 1024, expected --dim auto" in result.stderr
    )
    wrong = CliRunner().invoke(build_command, [*words, "--dim", "some"])
    assert wrong.exit_code == 2 and "'some' is not a valid" in wrong.stderr
