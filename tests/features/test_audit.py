"""The audit of stored rows: it finds a single wrong batch, keeps the index intact, and reports no false difference."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.padded import LONG, Pooled, make_ragged_rows, pad, pooled_loss
from tasks.toy import CONFIG, RATES, make_rows, make_toy_task
from tracin_ann import InfluenceIndex, Task, build
from tracin_ann.cli.info import main as info_command
from tracin_ann.errors import GradientProofError, UsageError
from tracin_ann.features.audit import N_DRAWN, Auditor
from tracin_ann.operations.removal import remove
from tracin_ann.operations.verification import AuditSample, audit, repair, verify
from tracin_ann.store.manifest import FEATURES, FORMAT, MANIFEST, Manifest, content_digest
from wrong_rows import alter_rows, swap_gradients

BUILD = sys.modules["tracin_ann.build_job"]
N = 200
SMALL = replace(CONFIG, partition_rows=80, yardstick=False)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return make_toy_task(
        tmp_path,
        Pooled(),
        loss=pooled_loss,
        collate=pad,
        train_data=lambda: make_ragged_rows(N),
        query_data=lambda: make_ragged_rows(5),
    )


def list_feature_files(directory: Path) -> set[str]:
    return {path.name for path in (directory / FEATURES).glob("*.h5")}


def read_rows(directory: Path) -> np.ndarray:
    index = InfluenceIndex.open(directory)
    return index.view().take(range(len(index)))


def test_the_most_uneven_batch_is_always_audited(task, tmp_path, monkeypatch):
    with monkeypatch.context() as planted:
        swap_gradients(planted, lambda ids: LONG in ids, "second.weight")
        with pytest.raises(
            GradientProofError,
            match=r"^row 14\d at checkpoint 1 differs from plain autograd: got a relative difference of 0\.\d+, "
            r"mostly in second\.weight of layer second \(Linear\), expected at most 0\.0005 \(2 rows differ\); "
            r"nothing was published, and the files of this build were removed; ",
        ):
            build(task, tmp_path / "i", SMALL)
    assert not (tmp_path / "i" / MANIFEST).exists()
    assert list_feature_files(tmp_path / "i") == set()
    # Without the fault, the same command builds the same index as a new build.
    assert build(task, tmp_path / "i", SMALL).rows_extracted == N * len(RATES)
    build(task, tmp_path / "clean", SMALL)
    np.testing.assert_array_equal(read_rows(tmp_path / "i"), read_rows(tmp_path / "clean"))


def test_rows_are_drawn_from_all_partitions_and_checkpoints(tmp_path, monkeypatch):
    swap_gradients(monkeypatch, lambda ids: min(ids) >= N // 2, "first.bias")
    with pytest.raises(GradientProofError, match=r"mostly in first\.bias of layer first \(Linear\)"):
        build(make_toy_task(tmp_path, train_data=lambda: make_rows(N)), tmp_path / "i", SMALL)


def test_a_fault_that_does_not_recur_is_reported_without_a_parameter(task, tmp_path, monkeypatch):
    remaining = [*RATES]
    swap_gradients(monkeypatch, lambda ids: LONG in ids and bool(remaining) and remaining.pop() > 0, "second.weight")
    with pytest.raises(GradientProofError, match="but its batch agrees with autograd when it runs again"):
        build(task, tmp_path / "i", SMALL)


def test_a_layer_that_mixes_in_one_batch_only_is_found(tmp_path):
    """A real case: questions with four options each, except that one batch has one with three and one with five."""
    counts = [4] * 400
    counts[258], counts[300] = 3, 5
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(n, 5, generator=generator), i % 3) for i, n in enumerate(counts)]

    def collate(examples: list[Any]) -> Any:
        sizes = tuple(len(x) for x, _ in examples)
        return torch.cat([x for x, _ in examples]), sizes, torch.tensor([y for _, y in examples])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = torch.split(model(batch[0])[:, 0], batch[1])
        return torch.stack([F.cross_entropy(one, y) for one, y in zip(logits, batch[2], strict=True)])

    task = make_toy_task(tmp_path, loss=loss, collate=collate, train_data=lambda: data, query_data=lambda: data[:5])
    try:
        build(task, tmp_path / "i", replace(SMALL, batch_size=64))
    except GradientProofError as error:
        assert re.match(r"row (25[6-9]|2[6-9]\d|3[01]\d) at checkpoint 1 differs .* of layer ", str(error)), error
    else:
        assert not audit(tmp_path / "i", AuditSample(2 * len(data)), task).differences


def test_a_failed_append_leaves_the_index_unchanged(task, tmp_path, monkeypatch):
    short = replace(task, train_data=lambda: make_ragged_rows(N)[:130])
    build(short, tmp_path / "i", SMALL)
    before, files = read_rows(tmp_path / "i"), list_feature_files(tmp_path / "i")
    with monkeypatch.context() as planted:
        swap_gradients(planted, lambda ids: LONG in ids, "second.weight")
        with pytest.raises(GradientProofError, match="row 14"):
            build(task, tmp_path / "i", replace(SMALL, append=True))
    assert list_feature_files(tmp_path / "i") == files
    np.testing.assert_array_equal(read_rows(tmp_path / "i"), before)
    assert verify(tmp_path / "i").damage == ()
    result = build(task, tmp_path / "i", replace(SMALL, append=True))
    assert (result.manifest.build.spec.train_rows, result.manifest.audit.rows, result.uneven.rows) == (N, N_DRAWN, 4)


def test_old_rows_are_audited_beside_new_ones(task, tmp_path, monkeypatch):
    short = replace(task, train_data=lambda: make_ragged_rows(N)[:130])
    build(short, tmp_path / "i", SMALL)
    calls: list[Any] = []
    true_audit = Auditor.audit
    monkeypatch.setattr(Auditor, "audit", lambda self, places: calls.extend(places) or true_audit(self, places))
    build(task, tmp_path / "i", replace(SMALL, append=True))
    assert {row < 80 for row, _ in calls} == {True, False}
    assert {checkpoint for _, checkpoint in calls} == {0, 1}


def test_a_wrong_row_of_the_existing_index_is_reported_and_its_file_stays(task, tmp_path):
    short = replace(task, train_data=lambda: make_ragged_rows(N)[:130])
    build(short, tmp_path / "i", SMALL)
    alter_rows(tmp_path / "i", range(80))
    files = list_feature_files(tmp_path / "i")
    with pytest.raises(GradientProofError, match="the row belongs to the existing index: build a new index$"):
        build(task, tmp_path / "i", replace(SMALL, append=True))
    assert list_feature_files(tmp_path / "i") == files


def test_a_failed_repair_leaves_no_wrong_file(task, tmp_path, monkeypatch):
    build(task, tmp_path / "i", SMALL)
    (tmp_path / "i" / FEATURES / "features-000001-0001.h5").unlink()
    with monkeypatch.context() as planted:
        swap_gradients(planted, lambda ids: LONG in ids, "second.weight")
        with pytest.raises(GradientProofError, match="row 14"):
            repair(tmp_path / "i", task)
    assert "features-000001-0001.h5" not in list_feature_files(tmp_path / "i")
    repair(tmp_path / "i", task)
    assert verify(tmp_path / "i").damage == ()


def test_files_of_a_killed_run_are_audited_by_the_next(task, tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(BUILD, "audit_build", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(task, tmp_path / "i", SMALL)
    assert len(list_feature_files(tmp_path / "i")) == 6
    result = build(task, tmp_path / "i", SMALL)
    assert result.rows_extracted == 0
    # The batches of the interrupted run are unknown to this one.
    assert (result.manifest.audit.rows, result.uneven) == (N_DRAWN, None)


def test_an_unchanged_finished_index_is_not_audited(task, tmp_path, monkeypatch):
    before = build(task, tmp_path / "i", SMALL).manifest
    monkeypatch.setattr(Auditor, "audit", interrupt)
    result = build(task, tmp_path / "i", replace(SMALL, rebuild_index=True)).manifest
    assert (result.generation, result.audit) == (2, before.audit)


def test_skipped_and_removed_rows_are_left_out(task, tmp_path, monkeypatch):
    data = make_ragged_rows(40, long=17)
    data[9][0][0, 0] = torch.nan
    task = replace(task, train_data=lambda: data)
    config = replace(SMALL, on_nonfinite="skip")
    build(task, tmp_path / "i", config)
    remove(tmp_path / "i", [5, 17])
    calls: list[Any] = []
    true_audit = Auditor.audit
    monkeypatch.setattr(Auditor, "audit", lambda self, places: calls.extend(places) or true_audit(self, places))
    assert audit(tmp_path / "i", AuditSample(1000), task).rows == 37 * 2
    assert {row for row, _ in calls} == {*range(40)} - {5, 9, 17}
    calls.clear()
    grown = replace(task, train_data=lambda: [*data, *make_ragged_rows(10, long=-1)])
    result = build(grown, tmp_path / "i", replace(config, append=True))
    assert result.manifest.audit.rows == N_DRAWN
    assert not {5, 9, 17} & {row for row, _ in calls}


def test_random_rows_cannot_be_audited(tmp_path):
    task = make_toy_task(tmp_path)
    result = build(task, tmp_path / "i", replace(SMALL, allow_random_data=True)).manifest
    assert (result.audit, result.audit_summary()) == (None, "no rows, because the training data is random")
    with pytest.raises(UsageError, match=r"cannot be audited: got an index built with --allow-random-data"):
        audit(tmp_path / "i", AuditSample(3), task)


def test_a_manifest_of_a_version_without_audits_is_read(tmp_path):
    build(make_toy_task(tmp_path), tmp_path / "i", SMALL)
    for path in (tmp_path / "i").rglob(MANIFEST):
        content = json.loads(path.read_text())
        for name in ("format", "digest", "audit"):
            del content[name]
        path.write_text(json.dumps({"format": FORMAT, "digest": content_digest(content), **content}))
    found = Manifest.read(tmp_path / "i")
    assert (found.audit, found.audit_summary()) == (None, "no rows, because an earlier version built the index")
    result = CliRunner().invoke(info_command, [str(tmp_path / "i")])
    assert "audit:      no rows, because an earlier version built the index\n" in result.output


def interrupt(*given: Any) -> None:
    raise KeyboardInterrupt
