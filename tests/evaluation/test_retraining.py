"""Retrained losses: compared with training by hand; folders that are continued, foreign or damaged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks import retrained
from tasks.retrained import QUERIES, N, make_task, train
from tracin_ann import Task
from tracin_ann.errors import (
    CheckpointError,
    DamagedIndexError,
    IndexMismatchError,
    NonFiniteError,
    TaskError,
    TracinAnnError,
    UsageError,
)
from tracin_ann.evaluation import Retraining, draw_subsets
from tracin_ann.evaluation.retraining import HEADER
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.files import atomic_path

SUBSETS = draw_subsets(np.arange(N), 3)
SEEDS = (0, 4)


def open_folder(task: Task, folder: Path, query_ids: Sequence[int] = range(QUERIES)) -> Retraining:
    return Retraining.open(TaskRunner(task, RunOptions(torch.device("cpu"), batch_size=5)), folder, query_ids)


class Recorder:
    """A `retrain` that records its calls, and fails from a given call on."""

    def __init__(self, fails_at: int = 1_000) -> None:
        self.calls: list[tuple[list[int], int]] = []
        self.fails_at = fails_at

    def __call__(self, rows: Sequence[int], seed: int, out: Path) -> None:
        if len(self.calls) >= self.fails_at:
            raise KeyboardInterrupt
        self.calls.append((list(rows), seed))
        train(rows, seed, out)


def losses_by_hand(rows: Sequence[int], seed: int, folder: Path) -> list[float]:
    train(rows, seed, folder / "own.pt")
    model = retrained.make_model()
    model.load_state_dict(torch.load(folder / "own.pt", weights_only=True))
    model.requires_grad_(False)
    return [
        float(F.cross_entropy(model(x[None]), torch.tensor([label]))) for x, label in retrained.make_rows(QUERIES, 2)
    ]


def test_losses_are_those_of_models_trained_on_the_subsets(tmp_path: Path) -> None:
    recorder, seen = Recorder(), []
    found = open_folder(make_task(tmp_path, retrain=recorder), tmp_path / "truth").measure(
        SUBSETS, SEEDS, lambda *message: seen.append(message)
    )
    assert found.shape == (3, 2, QUERIES)
    assert found.dtype == np.float64
    for m, rows in enumerate(SUBSETS):
        for s, seed in enumerate(SEEDS):
            np.testing.assert_allclose(found[m, s], losses_by_hand(rows.tolist(), seed, tmp_path), rtol=1e-5)
    assert sorted(recorder.calls) == sorted((rows.tolist(), seed) for rows in SUBSETS for seed in SEEDS)
    assert seen[-1] == ("retrained models", 6, 6)


def test_an_interrupted_run_continues_with_the_missing_models(tmp_path: Path) -> None:
    folder, broken, rest = tmp_path / "truth", Recorder(fails_at=4), Recorder()
    with pytest.raises(KeyboardInterrupt):
        open_folder(make_task(tmp_path, retrain=broken), folder).measure(SUBSETS, SEEDS)
    again = open_folder(make_task(tmp_path, retrain=rest), folder)
    assert again.count_missing(SUBSETS, SEEDS) == 2
    found = again.measure(SUBSETS, SEEDS)
    assert len(rest.calls) == 2
    whole = open_folder(make_task(tmp_path), tmp_path / "whole").measure(SUBSETS, SEEDS)
    assert np.array_equal(found, whole)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json"] + [".npy"] * 6


def test_processes_share_the_models_of_a_folder(tmp_path: Path) -> None:
    """A second run that starts before the first one has ended trains nothing again."""
    task, recorder, other = make_task(tmp_path), Recorder(), Recorder()
    units = [(rows, seed) for rows in SUBSETS for seed in SEEDS]

    def start_another(rows: Sequence[int], seed: int, out: Path) -> None:
        recorder(rows, seed, out)
        if len(recorder.calls) == 1:
            open_folder(replace(task, retrain=other), tmp_path / "truth").measure(SUBSETS[1:], SEEDS)

    found = open_folder(replace(task, retrain=start_another), tmp_path / "truth").measure(SUBSETS, SEEDS)
    assert len(recorder.calls) + len(other.calls) <= len(units) + 1
    assert np.array_equal(found, open_folder(task, tmp_path / "whole").measure(SUBSETS, SEEDS))


def test_a_complete_folder_needs_no_retrain_and_serves_some_of_its_queries(tmp_path: Path) -> None:
    folder = tmp_path / "truth"
    whole = open_folder(make_task(tmp_path), folder).measure(SUBSETS, SEEDS)
    some = open_folder(make_task(tmp_path, retrain=None), folder, [7, 2])
    assert np.array_equal(some.measure(SUBSETS, SEEDS), whole[:, :, [7, 2]])
    with pytest.raises(TaskError, match="got a task without retrain, expected Task.retrain"):
        some.measure(SUBSETS, [9])


def test_checkpoints_of_the_tasks_own_form_are_loaded_like_those_of_the_task(tmp_path: Path) -> None:
    """A folder that `Task.load` reads, and an entry of a file that `Checkpoint.key` names."""
    plain = make_task(tmp_path)
    expected = open_folder(plain, tmp_path / "plain").measure(SUBSETS, [3])

    def load(model: torch.nn.Module, path: str) -> None:
        file = Path(path) / "weights.pt" if Path(path).is_dir() else Path(path)
        model.load_state_dict(torch.load(file, weights_only=True))

    def write_folder(rows: Sequence[int], seed: int, out: Path) -> None:
        out.mkdir()
        train(rows, seed, out / "weights.pt")

    folders = replace(plain, load=load, retrain=write_folder)
    assert np.array_equal(open_folder(folders, tmp_path / "folders").measure(SUBSETS, [3]), expected)

    def write_entry(rows: Sequence[int], seed: int, out: Path) -> None:
        train(rows, seed, out)
        torch.save({"ema": torch.load(out, weights_only=True)}, out)

    keyed = replace(plain, checkpoints=[replace(c, key="ema") for c in plain.checkpoints], retrain=write_entry)
    assert np.array_equal(open_folder(keyed, tmp_path / "keyed").measure(SUBSETS, [3]), expected)


def test_rows_in_any_order_are_one_subset(tmp_path: Path) -> None:
    recorder = Recorder()
    opened = open_folder(make_task(tmp_path, retrain=recorder), tmp_path / "truth")
    opened.measure([np.array([5, 1, 9])], [0])
    opened.measure([np.array([9, 5, 1])], [0])
    assert recorder.calls == [([1, 5, 9], 0)]


@pytest.mark.parametrize(
    ("change", "ids", "message"),
    [
        ({"train_data": lambda: retrained.make_rows(N, 3)}, range(QUERIES), "expected losses for train data"),
        ({"train_data": lambda: retrained.TRAIN[:-1]}, range(QUERIES), "expected losses for train rows 59"),
        ({"query_data": lambda: retrained.make_rows(QUERIES, 3)}, range(QUERIES), "expected losses for query data"),
        ({"query_data": lambda: retrained.make_rows(9, 2)}, range(9), "expected losses of 9 queries"),
        ({"model": lambda: torch.nn.Sequential(retrained.make_model())}, range(QUERIES), "expected losses for model"),
        ({"query_data": lambda: retrained.make_rows(20, 2)}, [3, 12], "expected losses of query 12"),
    ],
)
def test_a_folder_of_another_evaluation_is_refused(
    tmp_path: Path, change: dict[str, Any], ids: Sequence[int], message: str
) -> None:
    task = make_task(tmp_path)
    open_folder(task, tmp_path / "truth")
    with pytest.raises(IndexMismatchError, match=message) as error:
        open_folder(make_task(tmp_path, **change), tmp_path / "truth", ids)
    assert "\n" not in str(error.value)


def test_other_folders_files_and_versions_are_refused(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for path in (other, other / "notes.txt"):
        with pytest.raises(UsageError, match="is not a folder of retrained losses"):
            open_folder(task, path)
    (tmp_path / "truth").mkdir()
    with atomic_path(tmp_path / "truth" / HEADER) as temporary:  # of another process that starts now
        open_folder(task, tmp_path / "truth")
        temporary.write_bytes((tmp_path / "truth" / HEADER).read_bytes())
    header = json.loads((tmp_path / "truth" / HEADER).read_text())
    (tmp_path / "truth" / HEADER).write_text(json.dumps(header | {"version": 2}))
    with pytest.raises(UsageError, match="of version 2, expected tracin_ann retraining of version 1"):
        open_folder(task, tmp_path / "truth")
    (tmp_path / "truth" / HEADER).write_text(json.dumps(header | {"more": 2}))
    with pytest.raises(DamagedIndexError, match="the header of retrained losses"):
        open_folder(task, tmp_path / "truth")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_a_damaged_file_of_losses_is_reported(tmp_path: Path, content: bytes | None) -> None:
    opened = open_folder(make_task(tmp_path), tmp_path / "truth")
    opened.measure(SUBSETS[:1], [0])
    (path,) = (tmp_path / "truth").glob("*.npy")
    if content is None:
        np.save(path, np.zeros(QUERIES - 1))
    else:
        path.write_bytes(content)
    with pytest.raises(DamagedIndexError, match="expected 12 losses; delete the file"):
        opened.measure(SUBSETS[:1], [0])


def write_nan(rows: Sequence[int], seed: int, out: Path) -> None:
    train(rows, seed, out)
    state = torch.load(out, weights_only=True)
    state["bias"][0] = torch.nan
    torch.save(state, out)


@pytest.mark.parametrize(
    ("retrain", "kind", "message"),
    [
        (lambda rows, seed, out: None, CheckpointError, "Task.retrain wrote no checkpoint: got no file"),
        (write_nan, NonFiniteError, "got a loss that is NaN or infinite for query 0"),
        (lambda rows, seed, out: torch.save({"weight": torch.ones(3, 5)}, out), CheckpointError, "bias"),
    ],
)
def test_a_model_that_cannot_be_used_is_reported_and_not_kept(
    tmp_path: Path, retrain: Any, kind: type[TracinAnnError], message: str
) -> None:
    opened = open_folder(make_task(tmp_path, retrain=retrain), tmp_path / "truth")
    with pytest.raises(kind, match=message):
        opened.measure(SUBSETS, [0])
    assert opened.count_missing(SUBSETS, [0]) == 3


@pytest.mark.parametrize(("ids", "message"), [([], "no query"), ([QUERIES], "no such row")])
def test_invalid_queries_are_rejected(tmp_path: Path, ids: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_folder(make_task(tmp_path), tmp_path / "truth", ids)
    assert not (tmp_path / "truth").exists()


def test_data_that_changes_when_it_is_read_is_not_compared(tmp_path: Path) -> None:
    task = make_task(tmp_path, query_data=lambda: [(torch.rand(5), 0) for _ in range(3)])
    runner = TaskRunner(task, RunOptions(torch.device("cpu"), allow_random_data=True))
    for _ in range(2):
        Retraining.open(runner, tmp_path / "truth", [0, 2])
