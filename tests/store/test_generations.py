"""Indexes that grow and shrink: appended rows equal rebuilt ones, and readers keep their generation."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import zoo
from paths import ROOT, SUPPORT
from tasks.toy import CONFIG, make_rows, make_toy_task, save_checkpoints
from tasks.toy import Toy as Model
from tracin_ann import InfluenceIndex, QueryOptions, build
from tracin_ann.cli.remove import main as remove_command
from tracin_ann.errors import BusyIndexError, DamagedIndexError, IndexMismatchError, UsageError
from tracin_ann.operations.removal import remove
from tracin_ann.operations.verification import verify
from tracin_ann.store import FeatureStore
from tracin_ann.store.generations import generation_folder, take_lease
from tracin_ann.store.locks import WRITER, hold_writer_lock
from tracin_ann.store.manifest import BUILD_RECORD, MANIFEST, Manifest

BUILD = importlib.import_module("tracin_ann.build")
SMALL = replace(CONFIG, partition_rows=4)
GROWING = replace(SMALL, append=True)
EVERY = QueryOptions(k=300, search="scan")


@pytest.fixture
def model(tmp_path):
    return Model(), save_checkpoints(Model(), tmp_path)


def task(model, n_rows, n_checkpoints=2, **changes):
    """Return the task with the first rows and checkpoints."""
    module, checkpoints = model
    return make_toy_task(
        Path(),
        module,
        train_data=lambda: make_rows(n_rows),
        checkpoints=[*checkpoints, *changes.pop("more", [])][:n_checkpoints],
        **changes,
    )


def read_answers(index, options=EVERY):
    return [
        [(hit.id, hit.score) for hit in (*answer.proponents, *answer.opponents)]
        for answer in index.query(range(5), options=options)
    ]


def list_own_files(directory):
    """Return the names of the feature files and generations in a directory."""
    features = sorted(path.name for path in (directory / "features").iterdir())
    return features, sorted(path.name for path in directory.glob("generation-*"))


def read_files(directory):
    """Return the content of every file, without the lock and the numbers of generations."""
    return {path.relative_to(directory): path.read_bytes() for path in (directory / "features").rglob("*.h5")}


def is_clean(directory):
    """Return whether the directory contains only the current generation."""
    manifest = Manifest.read(directory)
    expected = (
        sorted(record.name for record in manifest.features),
        [generation_folder(directory, manifest.generation).name],
    )
    others = {path.name for path in directory.iterdir()} - {expected[1][0]}
    return list_own_files(directory) == expected and others == {MANIFEST, BUILD_RECORD, "features"}


@pytest.mark.parametrize("last", [8, 10])
def test_an_appended_index_equals_a_rebuilt_one_bit_for_bit(model, tmp_path, last):
    grown, fresh = tmp_path / "grown", tmp_path / "fresh"
    for n_rows in (last, 11, 17):
        report = build(task(model, n_rows), grown, GROWING)
    assert report.rows_extracted == 2 * (17 - 8)  # the partition that was not full, and the new ones
    build(task(model, 17), fresh, SMALL)
    assert read_files(grown) == read_files(fresh)
    assert read_answers(InfluenceIndex.open(grown, task(model, 17))) == read_answers(
        InfluenceIndex.open(fresh, task(model, 17))
    )
    assert is_clean(grown) and Manifest.read(grown).generation == 3


def test_adding_a_checkpoint_does_not_change_the_files_of_others(model, tmp_path):
    grown, fresh = tmp_path / "grown", tmp_path / "fresh"
    build(task(model, 10, 1), grown, SMALL)
    before = {path: path.stat().st_ino for path in (grown / "features").iterdir()}
    report = build(task(model, 10), grown, replace(SMALL, add_checkpoint=True))
    assert report.rows_extracted == 10
    assert all(path.stat().st_ino == inode for path, inode in before.items())
    build(task(model, 10), fresh, SMALL)
    assert read_files(grown) == read_files(fresh) and is_clean(grown)
    build(task(model, 13), grown, replace(GROWING, add_checkpoint=True))
    assert len(InfluenceIndex.open(grown)) == 13


def test_an_append_requires_its_option_and_the_existing_rows(model, tmp_path):
    out = tmp_path / "out"
    build(task(model, 10, 1), out, SMALL)
    before = read_files(out)
    with pytest.raises(IndexMismatchError, match="10 training rows, this task has 11; build with --append, or"):
        build(task(model, 11, 1), out, SMALL)
    with pytest.raises(IndexMismatchError, match="nothing as checkpoint 1.*; build with --add-checkpoint, or"):
        build(task(model, 11, 2), out, GROWING)
    with pytest.raises(IndexMismatchError, match="10 training rows, this task has 9; restore train_data"):
        build(task(model, 9, 1), out, GROWING)
    other = replace(task(model, 11, 1), train_data=lambda: make_rows(11, seed=5))
    with pytest.raises(IndexMismatchError, match="training data of digest"):
        build(other, out, GROWING)
    with pytest.raises(IndexMismatchError, match="this task has 11; build with --append"):
        InfluenceIndex.open(out, task(model, 11, 1)).query([0])
    assert read_files(out) == before and is_clean(out)


def test_a_reader_keeps_its_generation_and_the_last_reader_removes_it(model, tmp_path):
    out = tmp_path / "out"
    build(task(model, 10), out, SMALL)
    reader, expected = InfluenceIndex.open(out, task(model, 10)), None
    build(task(model, 17), out, GROWING)
    expected = read_answers(reader)
    assert {int(row) for row, _ in expected[0]} <= set(range(10))
    assert list_own_files(out)[1] == ["generation-000001", "generation-000002"]
    removed = remove(out, [0, 16])
    assert list_own_files(out)[1] == ["generation-000001", "generation-000003"] and removed.generation == 3
    assert read_answers(reader) == expected
    assert read_answers(InfluenceIndex.open(out, task(model, 17)))[0] != expected[0]
    del reader
    build(task(model, 18), out, GROWING)
    assert is_clean(out)


@pytest.mark.parametrize("kind", ["flat", "ivf", "codes", "bounds", "graph"])
def test_a_removed_row_is_in_no_answer(model, tmp_path, kind):
    out, n_rows = tmp_path / "out", 200
    build(task(model, n_rows), out, replace(CONFIG, index=kind))
    index = InfluenceIndex.open(out, task(model, n_rows))
    best = [int(row) for row, _ in read_answers(index, QueryOptions(k=3))[0]]
    removed = sorted({*best, 7, 8, 199})
    result = CliRunner().invoke(remove_command, [str(out), "--ids", ",".join(map(str, removed))])
    assert result.exit_code == 0 and f"{len(removed)} of 200 rows removed; generation 2" in result.output
    after = InfluenceIndex.open(out, task(model, n_rows))
    for options in (EVERY, QueryOptions(k=200), QueryOptions(k=200, exact=True), QueryOptions(k=200, cosine=True)):
        for found, before in zip(read_answers(after, options), read_answers(index, options), strict=True):
            remaining = [hit for hit in before if int(hit[0]) not in removed]
            assert [row for row, _ in found] == [row for row, _ in remaining]
            # Batches of other rows: exact scores differ by rounding.
            np.testing.assert_allclose([s for _, s in found], [s for _, s in remaining], rtol=1e-5, atol=1e-6)
    rest = [row for row in index.self_influence() if int(row.id) not in removed]
    assert [(row.id, row.score) for row in after.self_influence()] == [(row.id, row.score) for row in rest]
    remove(out, [7, 9])
    assert InfluenceIndex.open(out, task(model, n_rows)).removed.tolist() == sorted({*removed, 9})
    del index, after
    build(task(model, n_rows + 1), out, replace(GROWING, partition_rows=CONFIG.partition_rows, index=kind))
    grown = InfluenceIndex.open(out, task(model, n_rows + 1))
    assert grown.removed.tolist() == sorted({*removed, 9}) and is_clean(out)
    assert {int(row) for row, _ in read_answers(grown)[0]} == set(range(n_rows + 1)) - {*removed, 9}


def test_invalid_removals_are_rejected_and_change_nothing(model, tmp_path):
    out = tmp_path / "out"
    build(task(model, 10), out, SMALL)
    for ids, message in (([10], "bad --ids: got 10, expected 0 to 9"), ([], "no ids"), (range(10), "no row would be")):
        with pytest.raises(UsageError, match=message):
            remove(out, list(ids))
    with pytest.raises(DamagedIndexError, match="manifest.json: got no file"):
        remove(tmp_path / "none", [1])
    assert is_clean(out) and Manifest.read(out).generation == 1


def test_a_killed_append_leaves_the_old_index_and_can_be_resumed(model, tmp_path, monkeypatch):
    out, fresh, written = tmp_path / "out", tmp_path / "fresh", []
    write = FeatureStore.write

    def killed(self, partition, checkpoint, block):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append((partition, checkpoint))
        return write(self, partition, checkpoint, block)

    build(task(model, 10), out, SMALL)
    before = read_answers(InfluenceIndex.open(out, task(model, 10)))
    with monkeypatch.context() as patched:
        patched.setattr(FeatureStore, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            build(task(model, 17), out, GROWING)
    assert read_answers(InfluenceIndex.open(out, task(model, 10))) == before
    remove(out, [3])  # while the abandoned files exist
    with pytest.raises(IndexMismatchError, match="17 training rows, this task has 10; restore"):
        build(task(model, 10), out, SMALL)
    report = build(task(model, 17), out, SMALL)
    assert report.rows_extracted == 2 * (17 - 8) - sum(min(4 * p + 4, 17) - 4 * p for p, _ in written)
    build(task(model, 17), fresh, SMALL)
    assert read_files(out) == read_files(fresh) and is_clean(out)
    assert InfluenceIndex.open(out).removed.tolist() == [3]


def test_files_of_an_abandoned_append_are_removed(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    build(task(model, 10), out, SMALL)
    with monkeypatch.context() as patched:
        patched.setattr("tracin_ann.store.next_generation.publish", lambda *given: pytest.fail("not yet"))
        with pytest.raises(pytest.fail.Exception):
            build(task(model, 17), out, GROWING)
    (out / BUILD_RECORD).unlink()
    remove(out, [3])
    assert build(task(model, 10), out, SMALL).rows_extracted == 0
    assert list_own_files(out)[0] == sorted(record.name for record in Manifest.read(out).features)


def test_a_reader_whose_generation_is_removed_opens_the_newer_one_or_raises(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    build(task(model, 10), out, SMALL)
    old = Manifest.read(out)
    remove(out, [1])
    read, seen = Manifest.read, []

    def slow(directory):
        seen.append(directory)
        return old if len(seen) == 1 else read(directory)

    monkeypatch.setattr(Manifest, "read", slow)
    assert take_lease(out)[0].generation == 2
    monkeypatch.undo()
    (generation_folder(out, 2) / MANIFEST).unlink()
    with pytest.raises(DamagedIndexError, match="generation-000002/manifest.json: got no file"):
        InfluenceIndex.open(out)


HOLD = """
import sys, time
from pathlib import Path
from tracin_ann.store.locks import hold_writer_lock
with hold_writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_rejected_and_the_lock_of_a_dead_writer_is_ignored(model, tmp_path):
    out = tmp_path / "out"
    build(task(model, 10), out, SMALL)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == "held\n"
        for write in (lambda: remove(out, [1]), lambda: build(task(model, 10), out, SMALL)):
            with pytest.raises(BusyIndexError, match=f"is being written: got process {holder.pid} on .*since 2"):
                write()
        assert len(read_answers(InfluenceIndex.open(out, task(model, 10)))) == 5
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert (out / WRITER).exists()
    remove(out, [1])
    assert is_clean(out)
    with hold_writer_lock(out), pytest.raises(BusyIndexError, match=f"process {os.getpid()}"), hold_writer_lock(out):
        pass


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_stopped_build_prints_how_to_resume_and_resumes(tmp_path, number, status):
    zoo.save_checkpoints("mlp", 0, tmp_path)
    out = tmp_path / "index"
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time, zoo\nfrom dataclasses import replace\n\n"
        "class Slow(list):\n    def __getitem__(self, i):\n        time.sleep(0.05)\n"
        "        return super().__getitem__(i)\n\n"
        "def task(folder):\n    made = zoo.task('mlp', folder)\n    rows = Slow(list(made.train_data()) * 40)\n"
        "    return replace(made, train_data=lambda: rows)\n"
    )
    words = [sys.executable, str(ROOT / "build_index.py"), "--task", f"{slow}:task", "--task-arg", f"folder={tmp_path}"]
    words += ["--out", str(out), "--dim", "8", "--batch-size", "4", "--no-yardstick"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])}
    # If the tests run in the background of a shell, they and their child processes ignore SIGINT.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        signal.signal(number, before)
    until = time.monotonic() + 120
    while not (out / "features").is_dir() and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(number)
    message = running.communicate(timeout=60)[1]
    assert running.returncode == status, message
    assert f"stopped: no incomplete file is left; to run it again: {ROOT / 'build_index.py'} --task" in message
    left = {path.name for path in out.iterdir()} - {"generation-000001"}
    assert left == {BUILD_RECORD, "features"} and list((out / "features").iterdir()) == []
    assert json.loads((out / BUILD_RECORD).read_text())["batch_size"] == 4


def test_rebuilt_lists_exclude_removed_rows(model, tmp_path):
    out, n_rows, removed = tmp_path / "out", 300, [*range(40, 90), 299]
    config = replace(CONFIG, index="ivf", partition_rows=128)
    build(task(model, n_rows), out, config)
    assert build(task(model, n_rows), out, config).manifest.generation == 1
    remove(out, removed)
    before = read_answers(InfluenceIndex.open(out, task(model, n_rows)))
    report = build(task(model, n_rows), out, replace(config, rebuild_index=True))
    assert (report.rows_extracted, report.manifest.generation) == (0, 3) and is_clean(out)
    index = InfluenceIndex.open(out, task(model, n_rows))
    assert len(index.search_index) == n_rows - len(removed) and index.removed.tolist() == removed
    assert read_answers(index) == before
    lists = read_answers(index, QueryOptions(k=10, search="lists"))
    assert not {row for found in lists for row, _ in found} & set(removed)
    assert verify(out).damage == ()
    remove(out, [0, 1])
    both = InfluenceIndex.open(out, task(model, n_rows))
    remaining = [[hit for hit in found if hit[0] not in (0, 1)] for found in before]
    for options in (EVERY, QueryOptions(k=300, search="lists")):
        for found, expected in zip(read_answers(both, options), remaining, strict=True):
            assert [row for row, _ in found] == [row for row, _ in expected]
            np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=1e-9)
    build(task(model, n_rows + 9), out, replace(config, append=True))
    grown = InfluenceIndex.open(out, task(model, n_rows + 9))
    assert len(grown.search_index) == n_rows + 9 - len(removed) - 2 and verify(out).damage == ()
