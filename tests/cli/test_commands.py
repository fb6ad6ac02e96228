"""tracin-build and tracin-query end to end: answers against float64 oracles, formats, resuming, errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import models
import oracle
import zoo
from invocation import run
from paths import ROOT
from tracin_ann import BuildConfig, InfluenceIndex, build
from tracin_ann.cli.build import main as build_command
from tracin_ann.cli.query import main as query_command
from tracin_ann.store import FeatureStore

ZOO = str(Path(zoo.__file__).resolve())


def parse_answers(*words: object) -> list[dict]:
    result = run(query_command, *words, "--format", "jsonl")
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@dataclass(frozen=True)
class Built:
    """An index built by the command, with its model and task."""

    out: Path
    words: list[str]
    scores: np.ndarray  # true TracInCP scores [Q, N], float64
    own: np.ndarray  # true self-influence [N]


def built(case: str, folder: Path, *options: object, seed: int = 0) -> Built:
    made = zoo.save_checkpoints(case, seed, folder)
    train_rows, query_rows = zoo.make_examples(case, seed)
    loss = models.CASES[case].loss
    grads = [[oracle.gradients(m, loss, rows) for m in made] for rows in (query_rows, train_rows)]
    queries, rows = (torch.stack(g, 1) for g in grads)
    own = (rows.square().sum(2) @ torch.tensor(zoo.RATES).double()).numpy()
    words = ["--task", f"{ZOO}:task", "--task-arg", f"case={case}", "--task-arg", f"folder={folder}"]
    words += ["--task-arg", f"seed={seed}", "--out", str(folder / "index")]
    result = run(build_command, *words, "--dim", 64, *options)
    assert result.exit_code == 0, result.stderr
    return Built(folder / "index", words, oracle.tracin(queries, rows, zoo.RATES), own)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built("mlp", tmp_path_factory.mktemp("mlp"), "--norms", "exact")


@pytest.mark.slow
@pytest.mark.parametrize("case", models.CASES)
def test_exact_scores_of_every_model_equal_brute_force(case: str, tmp_path: Path) -> None:
    index = built(case, tmp_path, seed=3)
    for options in (["--exact"], ["--rerank", "exact"]):
        answers = parse_answers(index.out, "--ids", "0-2", "-k", 14, *options)
        largest = np.abs(index.scores).max()
        for true, answer in zip(index.scores, answers, strict=True):
            found = {int(hit["id"]): hit["score"] for hit in answer["proponents"] + answer["opponents"]}
            assert len(found) == (np.abs(true) > 0).sum()
            assert max(abs(true[i] - score) for i, score in found.items()) < 1e-4 * largest
    own = parse_answers(index.out, "--self-influence", "-k", 14, "--exact")
    found = np.array([row["score"] for row in sorted(own, key=lambda row: int(row["id"]))])
    assert np.abs(found - index.own).max() < 1e-4 * index.own.max()


def test_stdout_has_one_json_object_per_query_and_nothing_else(digits: Built) -> None:
    result = run(query_command, digits.out, "--ids", "0,2", "--train-ids", "5", "-k", 3, "--format", "jsonl")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(a["query"], a["side"]) for a in answers] == [(0, "query"), (2, "query"), (5, "train")]
    assert "rows scored" in result.stderr
    for answer in answers:
        up, down = ([hit["score"] for hit in answer[side]] for side in ("proponents", "opponents"))
        assert up == sorted(up, reverse=True)
        assert down == sorted(down)
        assert all(score > 0 for score in up)
        assert all(score < 0 for score in down)
        assert all(hit["id"] == hit["row"] for hit in answer["proponents"] + answer["opponents"])
        assert answer["text"].startswith("class ")
    assert answers[2]["proponents"][0]["id"] == 5


def test_exactly_rescored_hits_equal_the_oracle(digits: Built) -> None:
    answers = parse_answers(digits.out, "--ids", "0-2", "-k", 4, "--rerank", "exact")
    for true, answer in zip(digits.scores, answers, strict=True):
        assert [int(hit["id"]) for hit in answer["proponents"]] == [i for i in np.argsort(-true)[:4] if true[i] > 0]
        assert [int(hit["id"]) for hit in answer["opponents"]] == [i for i in np.argsort(true)[:4] if true[i] < 0]
        assert all("stored_score" in hit for hit in answer["proponents"])


def test_a_table_is_printed_without_json(digits: Built) -> None:
    result = run(query_command, digits.out, "--ids", "1", "-k", 2)
    assert result.exit_code == 0
    best = parse_answers(digits.out, "--ids", "1", "-k", 2)[0]["proponents"][0]
    assert "proponent" in result.stdout
    assert "query 1: class" in result.stdout
    assert re.search(rf"^ *{best['id']} ", result.stdout, re.M)


def test_self_influence_is_ranked_and_needs_no_task(digits: Built, tmp_path: Path) -> None:
    rows = parse_answers(digits.out, "--self-influence", "-k", 5)
    assert [set(row) for row in rows] == [{"schema", "rank", "id", "row", "score", "text"}] * 5
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    assert [int(row["id"]) for row in rows] == np.argsort(-digits.own)[:5].tolist()
    elsewhere = parse_answers(digits.out, "--self-influence", "-k", 5, "--task", "no/such/file.py:task")
    assert elsewhere == [{name: row[name] for name in row if name != "text"} for row in rows]


def test_checkpoints_can_be_selected(digits: Built, tmp_path: Path) -> None:
    full = parse_answers(digits.out, "--ids", "0", "-k", 14, "--exact")[0]
    parts = [parse_answers(digits.out, "--ids", "0", "-k", 14, "--exact", "--checkpoints", c)[0] for c in "01"]
    total: dict[int, float] = {}
    for part in parts:
        for hit in part["proponents"] + part["opponents"]:
            total[hit["id"]] = total.get(hit["id"], 0) + hit["score"]
    for hit in full["proponents"] + full["opponents"]:
        assert total[hit["id"]] == pytest.approx(hit["score"], rel=1e-5, abs=1e-7)
    own = [parse_answers(digits.out, "--self-influence", "-k", 14, "--checkpoints", c) for c in ("0", "1", "0,1")]
    by_id = [{row["id"]: row["score"] for row in rows} for rows in own]
    assert all(by_id[2][i] == pytest.approx(by_id[0][i] + by_id[1][i], rel=1e-6) for i in by_id[2])


def test_the_cosine_of_a_row_with_itself_is_one(digits: Built) -> None:
    hits = parse_answers(digits.out, "--train-ids", "3,4", "-k", 14, "--cosine")
    for answer in hits:
        assert answer["proponents"][0]["id"] == answer["query"]
        assert answer["proponents"][0]["score"] == pytest.approx(1, abs=1e-3)
        assert all(-1.001 < hit["score"] < 1.001 for hit in answer["proponents"] + answer["opponents"])


def test_a_dry_run_prints_the_plan_and_writes_nothing(digits: Built, tmp_path: Path) -> None:
    out = tmp_path / "new"
    words = [str(out) if word == str(digits.out) else word for word in digits.words]
    result = run(build_command, *words, "--dry-run")
    assert result.exit_code == 0
    for part in ("rows:      14 x 2,048", "layer rule, 6 parameters, 100.0%", "0.weight: 9x6", "index:     flat"):
        assert part in result.stdout, result.stdout
    assert not out.exists()


def test_an_interrupted_build_resumes(tmp_path: Path) -> None:
    index = built("conv1d", tmp_path)
    before = parse_answers(index.out, "--ids", "0-2", "-k", 14)
    lost = sorted((index.out / "features").glob("*.h5"))[1]
    remaining = {path: path.stat().st_mtime_ns for path in (index.out / "features").glob("*.h5") if path != lost}
    content = lost.read_bytes()
    lost.write_bytes(content[: len(content) // 2])
    refused = run(query_command, index.out, "--ids", "0")
    assert refused.exit_code == 4
    assert lost.name in refused.stderr
    again = run(build_command, *index.words, "--dim", 64)
    assert again.exit_code == 0, again.stderr
    assert "14 rows x checkpoints" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in remaining} == remaining
    assert lost.read_bytes() == content
    assert parse_answers(index.out, "--ids", "0-2", "-k", 14) == before
    assert "were already stored" in run(build_command, *index.words, "--dim", 64).stdout


def test_ivf_and_flat_agree_when_the_candidates_cover_all(tmp_path: Path) -> None:
    flat = built("mlp", tmp_path)
    ivf = [str(tmp_path / "ivf") if word == str(flat.out) else word for word in flat.words]
    result = run(build_command, *ivf, "--dim", 64, "--index", "ivf")
    assert result.exit_code == 0, result.stderr
    assert "index: ivf" in result.stdout
    ask = ("--ids", "0-2", "-k", "14")
    assert parse_answers(tmp_path / "ivf", *ask) == parse_answers(flat.out, *ask)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--ids", "0-2", "--seed", "1"], 3, ["seed 0", "asks for seed 1", "pass --seed 0"]),
        (["--ids", "0", "--dim", "32"], 3, ["dimension 64", "dimension 32"]),
        (["--ids", "0", "--sketch", "dense"], 3, ["sketch factored", "sketch dense"]),
        (["--ids", "0-3"], 2, ["no such row in query_data", "got 3", "0 to 2"]),
        (["--train-ids", "14"], 2, ["no such row in train_data", "got 14"]),
        ([], 2, ["no query", "--ids"]),
        (["--ids", "2-1"], 2, ["expected a range from low to high"]),
        (["--ids", "x"], 2, ["0-9,17"]),
        (["--ids", "0", "--checkpoints", "2"], 2, ["bad --checkpoints", "got 2", "0 to 1"]),
        (["--ids", "0", "--cosine", "--exact"], 2, ["--cosine", "remove one"]),
        (["--self-influence", "--ids", "0"], 2, ["--self-influence", "--ids"]),
        (["--self-influence", "--rerank", "exact"], 2, ["--self-influence", "--rerank", "remove one"]),
        (["--ids", "0", "--exact", "--candidates", "5"], 2, ["--exact", "--candidates", "remove one"]),
        (["--ids", "0", "-k", "0"], 2, ["-k"]),
        (["--ids", "0", "--task", "nowhere.py:task"], 2, ["file is missing", "nowhere.py"]),
        (["--ids", "0", "--device", "quantum"], 2, ["unknown device", "quantum"]),
        (["--ids", "0", "--task-arg", "case"], 2, ["key=value"]),
    ],
)
def test_invalid_queries_are_rejected(digits: Built, words: list[str], status: int, message: list[str]) -> None:
    files = sorted(path for path in digits.out.rglob("*"))
    result = run(query_command, digits.out, *words)
    assert result.exit_code == status
    assert result.stdout == ""
    assert all(part in result.stderr for part in message), result.stderr
    if status == 3:
        assert len(result.stderr.splitlines()) == 1
    assert sorted(path for path in digits.out.rglob("*")) == files


def test_a_query_with_another_task_than_the_index_is_rejected(digits: Built, tmp_path: Path) -> None:
    zoo.save_checkpoints("conv1d", 0, tmp_path)
    other = ["--task", f"{ZOO}:task", "--task-arg", "case=conv1d", "--task-arg", f"folder={tmp_path}"]
    result = run(query_command, digits.out, "--ids", "0", *other)
    assert result.exit_code == 3
    assert "was built with" in result.stderr
    zoo.save_checkpoints("mlp", 1, tmp_path)
    mine = ["--task", f"{ZOO}:task", "--task-arg", "case=mlp", "--task-arg", f"folder={tmp_path}"]
    result = run(query_command, digits.out, "--ids", "0", *mine)
    assert result.exit_code == 3
    assert "checkpoint 0 (0.pt) of digest" in result.stderr


def test_another_build_in_the_same_directory_is_rejected(digits: Built) -> None:
    before = {path: path.read_bytes() for path in digits.out.rglob("*") if path.is_file()}
    result = run(build_command, *digits.words, "--dim", 64, "--norms", "exact", "--seed", 1)
    assert result.exit_code == 3
    assert "was built with seed 0, this command asks for seed 1; pass --seed 0 or build a new index" in result.stderr
    assert {path: path.read_bytes() for path in digits.out.rglob("*") if path.is_file()} == before


def test_a_directory_with_other_files_is_rejected(digits: Built, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    words = [str(tmp_path) if word == str(digits.out) else word for word in digits.words]
    result = run(build_command, *words)
    assert result.exit_code == 2
    assert "choose another --out" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_missing_index_is_an_error(tmp_path: Path) -> None:
    result = run(query_command, tmp_path / "nothing", "--ids", "0")
    assert result.exit_code == 4
    assert "manifest.json" in result.stderr


def test_the_installed_scripts_run(digits: Built) -> None:
    command = [sys.executable, "query.py", str(digits.out), "--ids", "0", "-k", "1", "--format", "jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == parse_answers(digits.out, "--ids", "0", "-k", "1")[0]
    helped = subprocess.run(
        [sys.executable, "build_index.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--task" in helped.stdout


def test_many_partitions_store_the_same_rows_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row buffers are reused while files are written (here slowly); no file may contain rows of another."""
    write = FeatureStore.write

    def slow(*args: object) -> object:
        time.sleep(0.1)
        return write(*args)

    monkeypatch.setattr(FeatureStore, "write", slow)
    zoo.save_checkpoints("conv2d", 0, tmp_path)
    task = zoo.task("conv2d", str(tmp_path))
    rows = []
    for partition_rows in (14, 3):
        out = tmp_path / f"index-{partition_rows}"
        build(task, out, BuildConfig(dim=64, dtype="float32", batch_size=2, partition_rows=partition_rows))
        index = InfluenceIndex.open(out, task)
        rows.append(index.view().take(range(14)))
        fresh = index.features("train", range(14))
        assert np.abs(rows[-1] - fresh).max() <= 1e-5 * np.linalg.norm(fresh, axis=1).max()
    for others in rows[1:]:
        assert np.abs(others - rows[0]).max() <= 1e-5 * np.linalg.norm(rows[0], axis=1).max()
