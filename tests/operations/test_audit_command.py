"""tracin-verify --audit, the reports of audits by build and info, and the sample of rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import zoo
from blocks import LAYOUT
from tasks.toy import CONFIG
from tracin_ann import build
from tracin_ann.cli.build import main as build_command
from tracin_ann.cli.info import main as info_command
from tracin_ann.cli.verify import main as verify_command
from tracin_ann.errors import DamagedIndexError, IndexMismatchError
from tracin_ann.features.audit import Auditor, draw_places
from tracin_ann.features.pipeline import FEWEST_UNEVEN, MOST_UNEVEN, MostUnevenBatch
from tracin_ann.operations.verification import AuditSample, audit
from tracin_ann.store import FeatureStore
from tracin_ann.store.manifest import FEATURES
from tracin_ann.task.batches import CollatedBatch
from wrong_rows import alter_rows

SMALL = replace(CONFIG, partition_rows=80, yardstick=False)
NOTHING = np.zeros(0, np.int64)


@pytest.fixture
def index(tmp_path):
    zoo.save_checkpoints("mlp", 0, tmp_path)
    name = f"{Path(zoo.__file__).resolve()}:task"
    arguments = {"case": "mlp", "folder": str(tmp_path)}
    build(name, tmp_path / "i", replace(SMALL, partition_rows=6), arguments=arguments)
    return tmp_path / "i"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(verify_command, [str(argument) for argument in arguments])


def test_a_correct_index_passes(index):
    result = run(index, "--audit", 10)
    assert result.exit_code == 0, result.output
    assert re.search(r"audit\S* 10 rows; largest difference from autograd \de-0\d of a row", result.output)


def test_a_wrong_row_is_named_with_status_4(index):
    alter_rows(index, [11])
    assert run(index).exit_code == 0
    result = run(index, "--audit", 1000)
    assert result.exit_code == 4
    assert re.search(
        r"^row 11 at checkpoint 1 differs from plain autograd: got a relative difference of 0\.009\d, "
        r"but its batch agrees with autograd when it runs again, expected at most 0\.0005$",
        result.output,
        re.M,
    ), result.output
    assert "i: 1 of 28 rows differ from plain autograd; build a new index" in result.output


def test_damage_is_reported_before_the_audit(index):
    (index / FEATURES / "features-000000-0000.h5").unlink()
    result = run(index, "--audit", 10)
    assert result.exit_code == 4
    assert "largest difference" not in result.output
    assert "10 rows; largest difference" in run(index, "--audit", 10, "--repair").output


def test_the_sample_depends_on_the_index_and_the_seed(index, monkeypatch):
    calls: list[Any] = []
    true_audit = Auditor.audit
    monkeypatch.setattr(Auditor, "audit", lambda self, places: calls.append(places) or true_audit(self, places))
    for more in ((), (), ("--seed", 1), ("--seed", 1), ("--seed", 2)):
        assert run(index, "--audit", 5, *more).exit_code == 0
    assert calls[0] == calls[1] != calls[2] == calls[3] != calls[4]


def test_another_task_is_rejected_and_not_reported_as_a_wrong_row(index, tmp_path):
    task = zoo.task("mlp", str(tmp_path))
    other = replace(task, loss=lambda model, batch: 2 * task.loss(model, batch))
    with pytest.raises(IndexMismatchError, match="has changed since index"):
        audit(index, AuditSample(5), other)
    with pytest.raises(DamagedIndexError, match=r"manifest.json: got no file"):
        audit(tmp_path, AuditSample(5), task)


def test_build_and_info_report_what_was_audited(index, tmp_path):
    rows, message = r"16 rows", r"largest difference from autograd \de-0\d of a row's norm"
    options = ["--task", f"{zoo.__file__}:task", "--out", tmp_path / "new", "--dim", 32, "--no-yardstick"]
    options += ["--task-arg", "case=mlp", "--task-arg", f"folder={tmp_path}", "--device", "cpu"]
    built = CliRunner().invoke(build_command, [str(option) for option in options])
    assert re.search(rf"^audit\S* {rows} and \d+ rows of the most uneven batch; {message}$", built.output, re.M), (
        built.output
    )
    shown = CliRunner().invoke(info_command, [str(index)]).output
    assert re.search(rf"^audit\S* +{rows}; {message}$", shown, re.M), shown


def store(n_rows: int) -> FeatureStore:
    return FeatureStore(Path("unused"), replace(LAYOUT, n_rows=n_rows, partition_rows=10))


def test_pairs_are_distinct_and_uniformly_drawn():
    seen = Counter(place for seed in range(2000) for place in draw_places(4, store(6), NOTHING, seed))
    assert set(seen) == {(row, checkpoint) for row in range(6) for checkpoint in range(3)}
    # Binomial: each of 18 pairs with 4 / 18, over 2,000 draws; within 5 standard deviations.
    mean, deviation = 2000 * 4 / 18, (2000 * 4 / 18 * 14 / 18) ** 0.5
    assert all(abs(count - mean) < 5 * deviation for count in seen.values())
    assert all(len(set(draw_places(16, store(9), NOTHING, seed))) == 16 for seed in range(50))


def test_a_sample_depends_on_its_seed_only():
    np.random.seed(1)
    first = draw_places(16, store(10**6), NOTHING, 3)
    np.random.seed(2)
    assert first == draw_places(16, store(10**6), NOTHING, 3) != draw_places(16, store(10**6), NOTHING, 4)


def test_excluded_rows_are_not_drawn_and_a_small_index_is_audited_completely():
    without = np.array([0, 2], np.int64)
    assert sorted(draw_places(16, store(4), without, 0)) == [(r, c) for r in (1, 3) for c in range(3)]
    assert draw_places(16, store(2), np.arange(2), 0) == []


def record_draws(batches: list[list[int]]) -> Iterator[CollatedBatch]:
    first = 0
    for sizes in batches:
        yield CollatedBatch(tuple(range(first, first + len(sizes))), "inputs", sizes=tuple(sizes))
        first += len(sizes)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([[4, 4], [4, 4], [3, 5], [4, 4]], [4, 5]),
        (
            [[9, 9], [5, 5], [2, 2], [5, 5]],
            [4, 5],
        ),  # equal within batches: furthest from the first
        ([[4, 4], [4, 4], [4]], [2, 3]),  # equal: the last of the largest batches
        ([[1, 1, 1], [1, 7, 2]], [4, 3, 5]),  # the most uneven batch first
        ([], []),
    ],
)
def test_the_batch_with_the_most_uneven_sizes_is_found(batches, expected):
    most = MostUnevenBatch()
    assert [read.inputs for read in most.watch(record_draws(batches), 1)] == ["inputs"] * len(batches)
    assert [row for row, checkpoint in most.places if checkpoint == 1] == expected


@pytest.mark.parametrize(("batch", "expected"), [(500, MOST_UNEVEN), (120, 30), (20, FEWEST_UNEVEN), (5, 5)])
def test_the_number_of_audited_rows_is_limited(batch, expected):
    most = MostUnevenBatch()
    list(most.watch(record_draws([[*range(batch)]]), 0))
    assert len(most.places) == expected
    assert most.places[0] == (0, 0)
