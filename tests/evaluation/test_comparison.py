"""Comparisons of scores and the command: values compared with those of each protocol's own functions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy import stats

from tasks.retrained import QUERIES, N, make_task
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.cli.evaluate import main as evaluate_command
from tracin_ann.errors import UsageError
from tracin_ann.evaluation import (
    Candidate,
    Comparison,
    Retraining,
    compare_by_lds,
    compare_by_removal,
    compare_by_tail_patch,
    compute_ceiling,
    draw_random_rows,
    draw_subsets,
    find_top_rows,
    list_candidates,
    measure_removal,
    measure_tail_patch,
    recommend,
)

IDS = list(range(QUERIES))
SUBSETS, SEEDS = draw_subsets(np.arange(N), 20), (0, 1)


@pytest.fixture(scope="module")
def retraining(folder: Path, index: InfluenceIndex) -> Retraining:
    return Retraining.open(index.runner, folder / "retrained", IDS)


@pytest.fixture(scope="module")
def by_lds(index: InfluenceIndex, retraining: Retraining) -> Comparison:
    losses = retraining.measure(SUBSETS, SEEDS)
    return compare_by_lds(index, list_candidates(index, ("tracin", "gauss-newton")), IDS, SUBSETS, losses)


def test_candidates_are_all_combinations(index: InfluenceIndex) -> None:
    assert list_candidates(index, ("tracin", "fisher", "tracin"), (None, 0.1)) == [
        Candidate("tracin"),
        Candidate("tracin", None, (1,)),
        Candidate("fisher"),
        Candidate("fisher", None, (1,)),
        Candidate("fisher", 0.1),
        Candidate("fisher", 0.1, (1,)),
    ]
    assert list_candidates(index, ("cosine",), checkpoints=(0,)) == [Candidate("cosine", None, (0,))]


def test_the_last_checkpoint_of_every_run_is_a_candidate(folder: Path) -> None:
    task = make_task(folder)
    first, second = (replace(c, run="a") for c in task.checkpoints)
    (folder / "other.pt").write_bytes(Path(first.path).read_bytes())
    other = replace(first, path=folder / "other.pt", run="b")
    runs = replace(task, checkpoints=[first, second, other])
    build(runs, folder / "runs", BuildConfig(dim=16, device="cpu", index="flat"))
    index = InfluenceIndex.open(folder / "runs", runs, device="cpu")
    assert list_candidates(index, ("tracin",)) == [Candidate("tracin"), Candidate("tracin", None, (1, 2))]
    assert list_candidates(index, ("tracin",), checkpoints=(2, 1)) == [Candidate("tracin", None, (2, 1))]


def test_lds_is_that_of_spearman_for_every_candidate(
    index: InfluenceIndex, retraining: Retraining, by_lds: Comparison
) -> None:
    losses = retraining.measure(SUBSETS, SEEDS)
    assert len(by_lds) == 5
    for result in by_lds:
        if result.candidate is None:
            assert (result.name, result.value) == ("ceiling", compute_ceiling(losses))
            continue
        score = index.score_matrix("query", IDS, result.candidate.options).astype(np.float64)
        each = [
            stats.spearmanr([score[q, rows].sum() for rows in SUBSETS], -losses.mean(axis=1)[:, q]).statistic
            for q in IDS
        ]
        assert result.value == pytest.approx(np.mean(each))
    values = [result.value for result in by_lds]
    assert values == sorted(values, reverse=True)
    # Curvature predicts retraining better than the plain score.
    best = {name: max(r.value for r in by_lds if r.name == name) for name in ("tracin", "gauss-newton")}
    assert best["gauss-newton"] > best["tracin"] + 0.2


def test_features_are_computed_once_for_all_candidates(index: InfluenceIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [QueryOptions(score="fisher", checkpoints=chosen) for chosen in ((1,), None, (0,))]
    options.append(QueryOptions(score="cosine", checkpoints=(0,)))
    expected = [index.score_matrix("query", IDS, each) for each in options]
    compute, computed = InfluenceIndex.features, []

    def count(self: InfluenceIndex, *arguments: Any) -> Any:
        computed.append(arguments)
        return compute(self, *arguments)

    monkeypatch.setattr(InfluenceIndex, "features", count)
    for found, alone in zip(index.score_matrices("query", IDS, options), expected, strict=True):
        np.testing.assert_array_equal(found, alone)
    assert computed == [("query", IDS, [0, 1])]


def test_removal_is_compared_with_random_rows(index: InfluenceIndex, folder: Path) -> None:
    some = Retraining.open(index.runner, folder / "removed", IDS[:3])
    found = compare_by_removal(index, [Candidate("fisher")], some, 6, SEEDS)
    top = find_top_rows(index.score_matrix("query", IDS[:3], QueryOptions(score="fisher")), np.arange(N), 6)
    expected = measure_removal(some, np.arange(N), top, SEEDS)
    random = measure_removal(some, np.arange(N), draw_random_rows(np.arange(N), 6, 3), SEEDS)
    assert {result.name: result.value for result in found} == {
        "fisher": expected.rise.mean,
        "random": random.rise.mean,
    }
    assert expected.rise.mean > random.rise.mean
    assert {result.name: result.overturned for result in found} == {
        "fisher": expected.n_overturned,
        "random": random.n_overturned,
    }


def test_tail_patches_of_all_scores_are_those_of_each(index: InfluenceIndex) -> None:
    candidates = [Candidate("tracin"), Candidate("cosine")]
    found = compare_by_tail_patch(index, candidates, IDS, 4)
    for result in found:
        if result.candidate is None:
            rows = draw_random_rows(np.arange(N), 4, QUERIES)
        else:
            rows = find_top_rows(index.score_matrix("query", IDS, result.candidate.options), np.arange(N), 4)
        fall = measure_tail_patch(index.runner, IDS, rows)
        np.testing.assert_allclose(result.estimate.value_Q, fall.mean(axis=1), rtol=1e-6)  # type: ignore[union-attr]
    assert [result.name for result in found][-1] == "random"


@pytest.mark.parametrize("k", [0, N])
def test_more_rows_than_there_are_cannot_be_ranked(index: InfluenceIndex, k: int) -> None:
    with pytest.raises(UsageError, match="bad -k"):
        compare_by_tail_patch(index, [Candidate("tracin")], [0], k)


def test_the_best_candidate_is_recommended_with_those_that_are_no_worse(
    index: InfluenceIndex, by_lds: Comparison
) -> None:
    found = recommend(index, by_lds)
    best = next(result for result in by_lds if result.candidate is not None)
    assert found.candidate == best.candidate
    lines = dict(found.lines)
    low, high = best.estimate.interval  # type: ignore[union-attr]
    assert lines["recommendation"].endswith(f": lds {best.value:.3f}, 95% interval {low:.3f} to {high:.3f}")
    assert "D = 32" in lines["recommendation"]
    tied = [r for r in by_lds if r.estimate is not None and best.estimate.compare(r.estimate)[0] <= 0]  # type: ignore[union-attr]
    assert lines.get("no clear difference", "").count("--score") == len(tied) - 1


def rebuild(folder: Path, name: str, dim: int = 32, steps: float | None = 30, **changes: object) -> InfluenceIndex:
    task: Task = make_task(folder, **changes)
    task = replace(task, checkpoints=[replace(c, steps=steps) for c in task.checkpoints])
    build(task, folder / name, BuildConfig(dim=dim, device="cpu", dtype="float32", index="flat"))
    return InfluenceIndex.open(folder / name, task, device="cpu")


def test_without_retraining_the_rules_are_recommended(folder: Path) -> None:
    found = recommend(rebuild(folder, "classifier", dim=64))
    assert found.candidate == Candidate("gauss-newton")
    assert found.lines == (
        (
            "recommendation",
            "--score gauss-newton, damping 0.0667 (1 / (learning rate × steps)), all 2 checkpoints, D = 64, "
            "by rule and not by retraining",
        ),
    )
    assert recommend(rebuild(folder, "any", dim=64, loss_is_nll=None)).candidate == Candidate("fisher")


def test_a_small_dimension_and_unknown_steps_are_warned_of(folder: Path) -> None:
    lines = [line for label, line in recommend(rebuild(folder, "small", dim=8, steps=None)).lines if label == "warning"]
    assert len(lines) == 2
    assert "more than a third of D = 8: a build with --dim " in lines[0]
    # The effective dimension of a small sketch is an underestimate.
    assert lines[0].endswith(" or more may score better")
    assert "the number of steps of the run is not known" in lines[1]
    plain = Comparison([], lambda side, row: None)
    assert recommend(rebuild(folder, "known", dim=8), plain).candidate == Candidate("gauss-newton")


def run_command(folder: Path, *arguments: object, task: str = "task") -> Result:
    named = ("--task", folder / f"of_evaluation.py:{task}", "--task-arg", f"folder={folder}", "--device", "cpu")
    return CliRunner().invoke(evaluate_command, [str(word) for word in (folder / "index", *named, *arguments)])


def test_the_command_writes_the_results_of_the_functions(folder: Path, by_lds: Comparison, tmp_path: Path) -> None:
    words = ("--retrained", folder / "retrained", "--subsets", 20, "--seeds", 2, "--scores", "tracin,gauss-newton")
    result = run_command(folder, *words, "--format", "jsonl")
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == by_lds.lines()
    assert "retraining: 40 models, 0 to train" in result.stderr
    assert "recommendation:" in result.stderr
    done = run_command(folder, *words, "--output", tmp_path / "lds.csv", task="without")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "lds.csv").read_text().splitlines()[0].startswith("protocol,score,damping,checkpoints")


def test_the_command_runs_every_protocol(folder: Path) -> None:
    words = ("--retrained", folder / "all", "--subsets", 4, "--seeds", 1, "--queries", 5, "-k", 5, "--removals", 2)
    result = run_command(folder, *words, "--protocol", "all", "--scores", "fisher", "--damping", "auto,0.1", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [word for word in ("lds", "removal", "tail-patch") if word in result.stdout] == [
        *("lds", "removal", "tail-patch")
    ]
    assert result.stdout.count("0.1") >= 6
    one_out = run_command(folder, *words[:6], "--protocol", "leave-one-out", "--ids", "0,4,7", "--format", "jsonl")
    assert one_out.exit_code == 0, one_out.stderr
    assert {json.loads(line)["protocol"] for line in one_out.stdout.splitlines()} == {"leave-one-out"}
    assert "queries: " in one_out.stderr
    assert "all" not in one_out.stderr.split("recommendation")[0]


def test_the_command_needs_no_folder_for_tail_patches(folder: Path) -> None:
    result = run_command(folder, "--queries", 4, "-k", 3, "--format", "jsonl")
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["protocol"] for line in lines} == {"tail-patch"}
    assert {line["score"] for line in lines} == {"tracin", "cosine", "fisher", "gauss-newton", "random"}
    assert "by rule and not by retraining" in result.stderr


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--protocol", "lds"], 2, "--protocol lds needs retrained models: got no --retrained"),
        (["--scores", "tracin,best"], 2, "bad --scores: got best"),
        (["--damping", "auto,low"], 2, "bad --damping: got low"),
        (["--damping", "-1"], 2, "bad --damping: got -1.0"),
        (["--scores", "tracin", "--damping", "1"], 2, "--damping has no effect: got --scores tracin"),
        (["--ids", "0", "--queries", "3"], 2, "queries are given twice"),
        (["--ids", str(QUERIES)], 2, "no such row in query_data"),
        (["-k", str(N)], 2, "bad -k: got 60"),
        (["--subsets", "2"], 2, "--subsets"),
        (["--damping", "0", "--retrained", "NEW", "--seeds", "1"], 2, "bad --damping: got 0.0"),
        (["--checkpoints", "2", "--retrained", "NEW"], 2, "bad --checkpoints"),
        (["--fraction", "1", "--retrained", "NEW"], 2, "bad --fraction"),
        (["--retrained", "NEW", "--seeds", "1"], 1, "got a task without retrain"),
    ],
)
def test_the_command_reports_errors_in_one_line(
    folder: Path, tmp_path: Path, words: list[str], status: int, message: str
) -> None:
    words = [str(tmp_path / "new") if word == "NEW" else word for word in words]
    result = run_command(folder, *words, "-q", task="without")
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in result.stderr.splitlines()[-1]


def test_a_folder_of_another_evaluation_has_its_own_status(folder: Path, tmp_path: Path) -> None:
    words = ("--retrained", tmp_path / "new", "--subsets", 3, "--seeds", 1, "--scores", "tracin")
    assert run_command(folder, *words, "--ids", "0-2").exit_code == 0
    other = run_command(folder, *words, "--ids", "0-3", "-q")
    assert other.exit_code == 3
    assert "belongs to another evaluation: got losses of 3 other queries, expected losses of query 3" in other.stderr


def test_an_index_of_one_checkpoint_has_no_last_one_apart(folder: Path) -> None:
    task = make_task(folder)
    one = replace(
        task, checkpoints=[Checkpoint(task.checkpoints[1].path, 0.5), replace(task.checkpoints[0], learning_rate=0.0)]
    )
    build(one, folder / "one", BuildConfig(dim=16, device="cpu", index="flat"))
    index = InfluenceIndex.open(folder / "one", one, device="cpu")
    assert list_candidates(index, ("tracin",)) == [Candidate("tracin")]
