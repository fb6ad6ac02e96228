"""Retraining: losses of queries after training on subsets of the rows, kept in a folder.

Each (subset, seed) has a file of its own, named after the digest of its rows, so an interrupted run continues where it
stopped, and several evaluations share a folder: subsets of the linear datamodeling score and removals of proponents.

Shapes: M subsets, S seeds, Q queries.
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from tracin_ann.errors import CheckpointError, IndexMismatchError, NonFiniteError, TaskError, UsageError, problem
from tracin_ann.evaluation.stepping import open_model
from tracin_ann.evaluation.subsets import digest_rows
from tracin_ann.features import TaskRunner, data_digest, model_digest
from tracin_ann.files import (
    atomic_write,
    is_temporary,
    make_directory,
    open_regular,
    read_array,
    read_json,
    read_record,
    report_damage,
    save_array,
    write_json_atomic,
)
from tracin_ann.types import Float64, Int64, ProgressCallback, ignore_progress

HEADER = "retraining.json"
FORMAT = "tracin_ann retraining"
VERSION = 1
_REMEDY = "name another folder, or delete this one"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetrainingHeader:
    """What the losses in a folder belong to.

    Attributes:
        format: `FORMAT`.
        version: `VERSION`.
        train_rows: number of rows of train_data.
        train_data: digest of train_data; `random` if its rows change when they are read twice.
        model: digest of the model's layers.
        query_ids: positions of the queries in query_data, in the order of the losses.
        query_data: digest of these queries.
    """

    format: str
    version: int
    train_rows: int
    train_data: str
    model: str
    query_ids: tuple[int, ...]
    query_data: str


class Retraining:
    """Losses of queries after retraining on subsets of the rows, by `Task.retrain`; open it by `Retraining.open`.

    Attributes:
        folder: where the losses are kept.
        query_ids: positions of the queries in query_data.
    """

    def __init__(self, runner: TaskRunner, folder: Path, query_ids: Sequence[int], stored_ids: Sequence[int]) -> None:
        self._runner, self.folder, self.query_ids = runner, folder, tuple(query_ids)
        self._stored_ids = tuple(stored_ids)
        places = {query: place for place, query in enumerate(stored_ids)}
        self._places = [places[query] for query in query_ids]

    @classmethod
    def open(cls, runner: TaskRunner, folder: str | os.PathLike[str], query_ids: Sequence[int]) -> Retraining:
        """Open a folder of losses; it is created if it does not exist.

        `Task.retrain` is not part of what is compared: after a change of it, use a new folder.

        Args:
            runner: the task's data and model, such as `InfluenceIndex.runner`.
            folder: the folder.
            query_ids: positions in query_data; in an existing folder, some of those that it was created for.

        Raises:
            UsageError: there is no query, an id is out of range, or the folder contains something else.
            IndexMismatchError: the losses in the folder belong to another model, other data or other queries.
            DamagedIndexError: the header cannot be read.
        """
        path, ids = Path(folder), tuple(dict.fromkeys(query_ids))
        if not ids:
            raise UsageError(problem("no query", got="no ids", expected="one or more", remedy="name at least one row"))
        runner.check_ids("query", ids)
        if (path / HEADER).exists():
            stored = _read_header(path)
            _check_header(path, stored, ids, runner)
            return cls(runner, path, ids, stored.query_ids)
        if path.exists() and (not path.is_dir() or any(not is_temporary(entry) for entry in path.iterdir())):
            raise UsageError(
                problem(
                    f"{path} is not a folder of retrained losses",
                    got=f"no {HEADER}" if path.is_dir() else "a file",
                    expected="a new or empty folder, or one of an earlier evaluation",
                    remedy="name another folder",
                )
            )
        make_directory(path)
        write_json_atomic(path / HEADER, asdict(_make_header(runner, ids)))
        return cls(runner, path, ids, ids)

    def measure(
        self, subsets: Sequence[Int64], seeds: Sequence[int], progress: ProgressCallback | None = None
    ) -> Float64:
        """Return the losses of the queries after retraining on each subset with each seed; missing ones are computed.

        Missing models are trained in random order, so that several processes can share the work of a folder.

        Args:
            subsets: M arrays of positions in train_data.
            seeds: S seeds, which `Task.retrain` gets.
            progress: called with ("retrained models", done, total).

        Returns:
            losses, float64 [M, S, Q].

        Raises:
            TaskError: a model is missing and the task has no `retrain`, or it wrote no checkpoint.
            CheckpointError: the checkpoint cannot be loaded.
            NonFiniteError: a loss is NaN or infinite.
            DamagedIndexError: a file of the folder is damaged.
        """
        report, units = progress or ignore_progress, [(rows, seed) for rows in subsets for seed in seeds]
        missing = [unit for unit in units if not self._path(*unit).exists()]
        random.SystemRandom().shuffle(missing)
        for done, (rows, seed) in enumerate(missing, start=len(units) - len(missing) + 1):
            # Another process, or an equal subset, may have finished it.
            if not self._path(rows, seed).exists():
                self._retrain(rows, seed)
            report("retrained models", done, len(units))
        loss_UQ = np.array([self._read(rows, seed) for rows, seed in units])
        return loss_UQ.reshape(len(subsets), len(seeds), -1)

    def count_missing(self, subsets: Sequence[Int64], seeds: Sequence[int]) -> int:
        """Return how many models `measure` would train."""
        return sum(not self._path(rows, seed).exists() for rows in subsets for seed in seeds)

    def _read(self, rows: Int64, seed: int) -> Float64:
        path = self._path(rows, seed)
        with report_damage(path, f"{len(self._stored_ids)} losses", "delete the file"), open_regular(path) as file:
            stored_Q = read_array(file, os.fstat(file.fileno()).st_size)
            if stored_Q.dtype != np.float64 or stored_Q.shape != (len(self._stored_ids),):
                raise ValueError(f"{stored_Q.dtype} {list(stored_Q.shape)}")
        found_Q: Float64 = stored_Q[self._places]
        return found_Q

    def _path(self, rows: Int64, seed: int) -> Path:
        return self.folder / f"{digest_rows(rows)}-{seed}.npy"

    def _retrain(self, rows: Int64, seed: int) -> None:
        """Train a model and keep the losses of all queries of the folder."""
        task = self._runner.task
        if task.retrain is None:
            raise TaskError(
                problem(
                    f"{self.folder} lacks a model trained on {len(rows):,} rows with seed {seed}",
                    got="a task without retrain",
                    expected="Task.retrain, which trains it",
                    remedy="define retrain(rows, seed, out), see Task.retrain",
                )
            )
        with tempfile.TemporaryDirectory(prefix="tracin-retrained-") as folder:
            out = Path(folder) / "checkpoint.pt"
            logger.info("training on %d rows with seed %d", len(rows), seed)
            task.retrain(np.sort(rows).tolist(), seed, out)
            if not out.exists():
                raise CheckpointError(
                    problem(
                        "Task.retrain wrote no checkpoint",
                        got=f"no file {out.name} after training on {len(rows):,} rows with seed {seed}",
                        expected="a checkpoint at the path `out`",
                        remedy="save the trained weights to `out`",
                    )
                )
            loss_Q = compute_query_losses(self._runner, out, self._stored_ids)
        if not np.isfinite(loss_Q).all():
            query = self._stored_ids[int(np.flatnonzero(~np.isfinite(loss_Q))[0])]
            raise NonFiniteError(
                problem(
                    f"the model retrained on {len(rows):,} rows with seed {seed} cannot be used",
                    got=f"a loss that is NaN or infinite for query {query}",
                    expected="finite losses",
                    remedy="correct Task.retrain, or leave out this query",
                )
            )
        with atomic_write(self._path(rows, seed)) as file:
            save_array(file, loss_Q)


def compute_query_losses(runner: TaskRunner, checkpoint: Path, query_ids: Sequence[int]) -> Float64:
    """Return the losses [Q] of queries at a checkpoint file that the task loads like its last checkpoint.

    Raises:
        CheckpointError: the file is unreadable or does not match the model.
    """
    last = runner.task.checkpoints[-1]
    with open_model(runner, replace(last, path=checkpoint, second_moments=None)) as model:
        return model.query_losses(query_ids)


def _make_header(runner: TaskRunner, query_ids: Sequence[int]) -> RetrainingHeader:
    n_rows = runner.n_rows("train")
    with runner.model() as model:
        layers = model_digest(model.module)
    return RetrainingHeader(
        FORMAT,
        VERSION,
        n_rows,
        "random" if runner.options.allow_random_data else runner.data_digest(n_rows),
        layers,
        tuple(query_ids),
        "random" if runner.options.allow_random_data else _digest_queries(runner, query_ids),
    )


def _digest_queries(runner: TaskRunner, query_ids: Sequence[int]) -> str:
    return data_digest(_Queries(runner, query_ids), len(query_ids), runner.task.collate_rows, "query_data")


class _Queries:
    """The queries with these ids, by position."""

    def __init__(self, runner: TaskRunner, query_ids: Sequence[int]) -> None:
        self._data, self._ids = runner.data("query"), query_ids

    def __getitem__(self, place: int) -> object:
        return self._data[self._ids[place]]


def _read_header(folder: Path) -> RetrainingHeader:
    path = folder / HEADER
    content = read_json(path, _REMEDY)
    if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise UsageError(
            problem(
                f"{path} cannot be read",
                got=f"{content.get('format')} of version {content.get('version')}",
                expected=f"{FORMAT} of version {VERSION}",
                remedy=_REMEDY,
            )
        )
    with report_damage(path, "the header of retrained losses", _REMEDY):
        return read_record(RetrainingHeader, content)


def _check_header(folder: Path, stored: RetrainingHeader, query_ids: Sequence[int], runner: TaskRunner) -> None:
    """Compare the header of a folder with the task and the queries that are asked for.

    Raises:
        IndexMismatchError: they differ.
    """
    n_queries = runner.n_rows("query")
    differences = [
        (f"of query {query}", f"losses of {len(stored.query_ids)} other queries")
        for query in query_ids
        if query not in set(stored.query_ids)
    ]
    differences += [
        (f"of {n_queries} queries", f"losses of query {query}") for query in stored.query_ids if query >= n_queries
    ]
    if not differences:
        own = _make_header(runner, stored.query_ids)
        differences = [
            (f"for {name.replace('_', ' ')} {value}", f"losses for {name.replace('_', ' ')} {getattr(stored, name)}")
            for name, value in _list_fields(own)
            if value != getattr(stored, name)
        ]
    for expected, got in differences[:1]:
        raise IndexMismatchError(
            problem(f"{folder} belongs to another evaluation", got=got, expected=f"losses {expected}", remedy=_REMEDY)
        )


def _list_fields(header: RetrainingHeader) -> Iterator[tuple[str, object]]:
    yield from ((name, getattr(header, name)) for name in ("train_rows", "train_data", "model", "query_data"))
