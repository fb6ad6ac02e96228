"""Rows that are NaN or infinite: skipped without effect on other rows, recorded on disk, and absent from answers."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tasks import flawed as tasks
from tasks.flawed import FINE, LATE, NAN_GRADIENT, NAN_LOSS, make_rows, make_task, read_scores
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, build, plan
from tracin_ann.cli.build import main as build_command
from tracin_ann.cli.info import main as info_command
from tracin_ann.cli.query import main as query_command
from tracin_ann.errors import DamagedIndexError, IndexMismatchError, NonFiniteError, UsageError
from tracin_ann.features import IndexTask, RunOptions
from tracin_ann.features.canaries import read_generation_canaries
from tracin_ann.operations.removal import remove
from tracin_ann.scoring.exact import ExactScorer
from tracin_ann.store import FeatureStore, FeatureView
from tracin_ann.store.columns import RowFilter
from tracin_ann.store.generations import generation_folder
from tracin_ann.store.manifest import Manifest

BUILD = importlib.import_module("tracin_ann.build_job")
N = 61
# In the first batch; first and last of later batches; a complete batch of four; the last row of the data set.
MARKS = {
    **{1: NAN_LOSS, 2: tasks.LATE_NAN_GRADIENT, 7: NAN_GRADIENT, 8: tasks.LATE_INFINITE_LOSS, 60: NAN_LOSS},
    **dict.fromkeys(range(20, 24), NAN_LOSS),
}
SKIP = BuildConfig(
    dim=32, batch_size=4, device="cpu", dtype="float32", index="flat", partition_rows=16, on_nonfinite="skip"
)
PLAIN = replace(SKIP, on_nonfinite=None)


def read_features(out: Path) -> list[np.ndarray]:
    """Return the stored rows of each checkpoint."""
    layout = Manifest.read(out).build.layout
    store = FeatureStore(out / "features", layout)
    return [store.view([c]).take(range(layout.n_rows)) for c in range(layout.n_checkpoints)]


def read_files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "features").iterdir())}


STEPS = {
    "layer rules": [],
    "vmap": [("find_covered_layers", lambda model, names: {})],
    "loop": [
        ("find_covered_layers", lambda model, names: {}),
        ("batched_tensors", lambda value, batch: "refused here"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("held", [False, True], ids=["by checkpoint", "by partition"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("norms", ["sketch", "exact"])
def test_other_rows_of_the_batch_are_bit_identical_to_a_build_without_bad_rows(
    tmp_path, monkeypatch, step, norms, held
):
    for name, other in STEPS[step]:
        monkeypatch.setattr(f"tracin_ann.gradients.engine.{name}", other)
    monkeypatch.setattr(BUILD, "reading_costs_more", lambda *given: held)
    config = replace(SKIP, norms=norms)
    report = build(make_task(tmp_path, make_rows(N, marks=MARKS)), tmp_path / "bad", config)
    build(make_task(tmp_path, make_rows(N)), tmp_path / "good", replace(config, on_nonfinite="error"))
    assert report.skipped.row_S.tolist() == sorted(MARKS)
    assert report.skipped.checkpoint_S.tolist() == [int(MARKS[row] in LATE) for row in sorted(MARKS)]
    store, other = (
        FeatureStore(tmp_path / name / "features", Manifest.read(tmp_path / name).build.layout)
        for name in ("bad", "good")
    )
    pairs = zip(read_features(tmp_path / "bad"), read_features(tmp_path / "good"), strict=True)
    for checkpoint, (found, expected) in enumerate(pairs):
        bad = [row for row, mark in MARKS.items() if checkpoint == 1 or mark not in LATE]
        remaining = np.setdiff1d(np.arange(N), bad)
        assert np.array_equal(found[remaining].view(np.uint32), expected[remaining].view(np.uint32))
        for column in ("losses", "sqnorms"):
            values = getattr(store, column)([checkpoint])[:, 0]
            assert np.array_equal(values[remaining], getattr(other, column)([checkpoint])[remaining, 0])
        assert not found[bad].any() and not store.sqnorms([checkpoint])[bad].any()
        assert not np.isfinite(store.losses([checkpoint])[bad]).any()


@pytest.mark.parametrize("sketch", ["kronecker", "dense", "dense-gaussian"])
def test_a_bad_row_does_not_affect_others_in_any_sketch(tmp_path, sketch):
    config = replace(SKIP, sketch=sketch, dim=36, yardstick=False)
    build(make_task(tmp_path, make_rows(N, marks=MARKS)), tmp_path / "bad", config)
    build(make_task(tmp_path, make_rows(N)), tmp_path / "good", config)
    remaining = np.setdiff1d(np.arange(N), list(MARKS))
    for found, expected in zip(read_features(tmp_path / "bad"), read_features(tmp_path / "good"), strict=True):
        assert np.array_equal(found[remaining], expected[remaining])


_SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("bounds", "graph")]


@pytest.fixture(scope="module", params=["flat", "ivf", "codes", *_SLOW_KINDS])
def built(request, tmp_path_factory):
    """Return an index with skipped rows, an index of the same rows without bad values, and the skipped ids."""
    folder = tmp_path_factory.mktemp(request.param)
    n, marks = 400, MARKS | {0: NAN_LOSS, 399: tasks.LATE_NAN_GRADIENT, 133: NAN_LOSS, 266: NAN_GRADIENT}
    config = replace(SKIP, index=request.param, partition_rows=128)
    indexes = []
    for name, given in (("bad", marks), ("good", {})):
        task = make_task(folder, make_rows(n, marks=given))
        build(task, folder / name, config)
        indexes.append(InfluenceIndex.open(folder / name, task, device="cpu", batch_size=4))
    return indexes[0], indexes[1], sorted(marks)


WAYS = {
    "as stored": QueryOptions(k=400),
    "few": QueryOptions(k=5),
    "scan": QueryOptions(k=400, search="scan"),
    "index": QueryOptions(k=400, rerank="none"),
    "re-scored": QueryOptions(k=5, rerank="exact"),
    "exact": QueryOptions(k=400, exact=True),
    "cosine": QueryOptions(k=400, cosine=True),
    "first checkpoint": QueryOptions(k=400, checkpoints=(0,)),
    "second checkpoint, exact": QueryOptions(k=400, checkpoints=(1,), exact=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_skipped_rows_are_in_no_answer_and_the_other_hits_are_unchanged(built, way):
    index, complete, skipped = built
    found, expected = (read_scores(each, WAYS[way]) for each in (index, complete))
    without = replace(WAYS[way], rows=RowFilter(without=tuple(skipped)))
    for mine, other, all_rows in zip(found, read_scores(complete, without), expected, strict=True):
        assert mine.keys() == other.keys() and not mine.keys() & set(skipped)
        np.testing.assert_allclose(list(mine.values()), list(other.values()), rtol=1e-5, atol=1e-7)
        assert way in ("few", "re-scored") or mine.keys() == all_rows.keys() - set(skipped)
    assert all(a.how.endswith(f"; {len(skipped)} rows skipped by the build: not finite") for a in index.query([0]))
    assert "skipped" not in complete.query([0])[0].how


@pytest.mark.parametrize("exact", [False, True])
def test_skipped_rows_have_no_self_influence(built, exact):
    index, complete, skipped = built
    found = {int(row.id): row.score for row in index.self_influence(exact=exact)}
    expected = {int(row.id): row.score for row in complete.self_influence(exact=exact) if int(row.id) not in skipped}
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    assert [row.rank for row in index.self_influence(exact=exact)] == list(range(1, len(expected) + 1))


def test_canaries_calibration_and_fidelity_exclude_skipped_rows(built, monkeypatch, tmp_path):
    index, _, skipped = built
    train, query = read_generation_canaries(generation_folder(index.directory, 1), index.manifest)
    assert not set(train.ids_N.tolist()) & set(skipped) and len(train.ids_N) and query.ids_N.tolist() == [0, 2, 4, 6]
    scored, asked = [], []

    exactly, take = ExactScorer.scores, FeatureView.take

    def seen(scorer, rows, *rest):
        scored.extend(rows)
        return exactly(scorer, rows, *rest)

    def taken(self, ids):
        asked.append(np.asarray(ids).tolist())
        return take(self, ids)

    monkeypatch.setattr(ExactScorer, "scores", seen)
    monkeypatch.setattr("tracin_ann.store.FeatureView.take", taken)
    manifest = build(index.task, tmp_path / "again", replace(SKIP, index=index.manifest.index.kind)).manifest
    assert len(scored) > 200 and not set(scored) & set(skipped)
    if manifest.index.calibration is not None:
        assert manifest.index.calibration.train_queries == 93
        queries = next(ids for ids in asked if len(ids) == 93)
        assert not set(queries) & set(skipped)
    assert manifest.fidelity is not None and 0.5 < manifest.fidelity.correlation <= 1


def test_bad_rows_of_query_data_are_excluded_from_canaries_and_quality_measurements(tmp_path):
    query = make_rows(
        130, 2, marks=dict.fromkeys([*range(0, 130, 2), 129, 43], NAN_GRADIENT) | {1: tasks.LATE_INFINITE_LOSS}
    )
    task = make_task(tmp_path, make_rows(N), query)
    with pytest.raises(NonFiniteError, match="^the gradient of row 0 at checkpoint 0 is not finite"):
        build(task, tmp_path / "error", replace(PLAIN, index="ivf"))
    manifest = build(task, tmp_path / "out", replace(SKIP, index="ivf")).manifest
    assert manifest.skipped is None
    _, canaries = read_generation_canaries(generation_folder(tmp_path / "out", 1), manifest)
    assert all(query[row][2] == FINE for row in canaries.ids_N)
    fine = sum(row[2] == FINE for row in query)
    assert manifest.index.calibration.queries == 100 and manifest.index.calibration.train_queries == 100 - fine
    assert 1 <= manifest.fidelity.queries <= 16
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu")
    assert index.query([3])[0].proponents
    for row, checkpoint, what in ((4, 0, "gradient"), (1, 1, "loss")):
        with pytest.raises(
            NonFiniteError,
            match=f"^cannot query with this row of query_data: the {what} of row {row} at checkpoint "
            f"{checkpoint} is not finite: got ",
        ):
            index.query([3, row])


def test_a_skipped_training_row_cannot_be_a_query(built):
    index, _, skipped = built
    for row in (skipped[0], 399):
        with pytest.raises(
            NonFiniteError, match=rf"^cannot query with this row of train_data: .*of row {row} at checkpoint [01] "
        ):
            index.query(train_ids=[5, row])


def test_the_commands_report_which_rows_were_skipped(tmp_path):
    torch.save({"rows": make_rows(N, marks=MARKS)}, tmp_path / "rows.pt")
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nimport torch\nfrom tasks.flawed import make_task\n\n"
        "def task():\n    here = Path(__file__).parent\n"
        "    return make_task(here, torch.load(here / 'rows.pt', weights_only=False)['rows'])\n"
    )
    words = ["--task", f"{tmp_path / 'mine.py'}:task", "--out", str(tmp_path / "out"), "--dim", "16"]
    words += ["--batch-size", "4"]
    refused = CliRunner().invoke(build_command, words)
    assert refused.exit_code == 1 and "the loss of row 1 at checkpoint 0 is not finite: got nan" in refused.stderr
    made = CliRunner().invoke(build_command, [*words, "--on-nonfinite", "skip"])
    named = "skipped: 9 rows, not finite (row 1 at checkpoint 0, row 2 at checkpoint 1, row 7 at "
    assert made.exit_code == 0 and named in made.stdout and "row 23 at checkpoint 0, ...)" in made.stdout
    output = CliRunner().invoke(info_command, [str(tmp_path / "out")])
    assert named.replace("skipped: ", "skipped:    ") in output.stdout
    query = [str(tmp_path / "out"), *words[:2]]
    result = CliRunner().invoke(query_command, [*query, "--ids", "0-1", "-k", "2", "--format", "jsonl"])
    assert "search:  exact scan of the stored rows; expected true recall@10: " in result.stderr
    assert " for opponents; 9 rows skipped by the build: not finite" in result.stderr
    assert len([json.loads(line) for line in result.stdout.splitlines()]) == 2
    own = CliRunner().invoke(query_command, [*query, "--self-influence", "-k", "2"])
    assert own.exit_code == 0 and "skipped: 9 rows, not finite" in own.stderr
    bad = CliRunner().invoke(query_command, [*query, "--train-ids", "3,60"])
    assert bad.exit_code == 1 and bad.stdout == "" and len(bad.stderr.splitlines()) == 1
    assert "row of train_data" in bad.stderr and "the loss of row 60 at checkpoint 0" in bad.stderr


def stop_after(n_files: int, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    write, written = FeatureStore.write, []

    def stopping(self, partition, checkpoint, block):
        if len(written) == n_files:
            raise KeyboardInterrupt
        written.append(partition)
        return write(self, partition, checkpoint, block)

    monkeypatch.setattr(FeatureStore, "write", stopping)
    return monkeypatch


@pytest.mark.parametrize("again", [None, "skip"])
def test_an_interrupted_build_resumes_with_its_skipped_rows(tmp_path, monkeypatch, again):
    task = make_task(tmp_path, make_rows(N, marks=MARKS))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after(5, patched)
        build(task, tmp_path / "out", SKIP)
    with pytest.raises(IndexMismatchError, match="built with --on-nonfinite skip, this command asks for error; leave"):
        build(task, tmp_path / "out", replace(SKIP, on_nonfinite="error"))
    report = build(task, tmp_path / "out", replace(SKIP, on_nonfinite=again))
    build(task, tmp_path / "fresh", SKIP)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "fresh")
    assert report.skipped.row_S.tolist() == sorted(MARKS) and report.rows_extracted < 2 * N


def test_a_failed_build_resumes_with_on_nonfinite_skip(tmp_path, monkeypatch):
    monkeypatch.setattr(BUILD, "reading_costs_more", lambda *given: False)
    task = make_task(tmp_path, make_rows(N, marks={41: NAN_LOSS}))
    with pytest.raises(NonFiniteError, match="row 41"):
        build(task, tmp_path / "out", PLAIN)
    remaining = read_files(tmp_path / "out")
    assert len(remaining) == 2
    with pytest.raises(NonFiniteError, match="row 41"):
        build(task, tmp_path / "out", PLAIN)
    report = build(task, tmp_path / "out", SKIP)
    assert remaining.items() <= read_files(tmp_path / "out").items() and report.skipped.row_S.tolist() == [41]
    assert report.manifest.build.on_nonfinite == "skip"


def test_appended_rows_are_skipped_by_the_same_rule(tmp_path):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    growing = replace(PLAIN, append=True)
    build(make_task(tmp_path, make_rows(N)[:30], checkpoints=tasks.save_checkpoints(tmp_path, 1)), out, SKIP)
    assert Manifest.read(out).skipped is None
    for n_rows in (41, N):
        given = [
            *make_rows(N)[:30],
            *make_rows(N, marks={row: MARKS.get(row - 30, 0) for row in range(30, N)})[30:n_rows],
        ]
        report = build(make_task(tmp_path, given, checkpoints=tasks.save_checkpoints(tmp_path, 1)), out, growing)
        expected = [row for row in range(30, n_rows) if MARKS.get(row - 30, 0) not in (FINE, *LATE)]
        assert report.skipped.row_S.tolist() == expected
    remove(out, [5])
    report = build(make_task(tmp_path, given), out, replace(PLAIN, add_checkpoint=True))
    everything = [row for row in range(30, N) if row - 30 in MARKS]
    assert report.skipped.row_S.tolist() == everything
    assert report.skipped.checkpoint_S.tolist() == [int(MARKS[row - 30] in LATE) for row in everything]
    build(make_task(tmp_path, given), fresh, SKIP)
    assert read_files(out) == read_files(fresh)
    index = InfluenceIndex.open(out, make_task(tmp_path, given))
    assert {*range(N)} - {*everything, 5} == {int(row.id) for row in index.self_influence()}
    with pytest.raises(UsageError, match="no row would be left"):
        remove(out, [row for row in range(N) if row not in everything])


def test_a_build_without_finite_rows_is_rejected(tmp_path):
    everywhere = make_rows(N, marks=dict.fromkeys(range(N), NAN_LOSS))
    with pytest.raises(NonFiniteError, match="^no row of train_data is finite at checkpoint 1: got NaN or infinity"):
        build(make_task(tmp_path, everywhere), tmp_path / "out", SKIP)
    diverged = tasks.save_checkpoints(tmp_path)
    state = torch.load(diverged[1].path)
    state["second.bias"][:] = torch.nan
    torch.save(state, diverged[1].path)
    with pytest.raises(NonFiniteError, match="^no row of train_data is finite at checkpoint 1: .*leave out this check"):
        build(make_task(tmp_path, make_rows(N)), tmp_path / "out", SKIP)
    with pytest.raises(NonFiniteError, match="^no row of query_data is finite at checkpoint 0"):
        plan(
            make_task(
                tmp_path,
                make_rows(N),
                make_rows(7, marks=dict.fromkeys(range(7), NAN_GRADIENT)),
                checkpoints=diverged[:1],
            ),
            tmp_path / "out",
            SKIP,
        )
    assert not (tmp_path / "out").exists()
    late = make_rows(N, marks=dict.fromkeys(range(N), tasks.LATE_NAN_GRADIENT))
    (tmp_path / "others").mkdir()
    with pytest.raises(NonFiniteError, match="^no train.* row is left.*: got NaN or infinity first at checkpoint 1"):
        build(make_task(tmp_path / "others", late), tmp_path / "out", SKIP)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_other_rows_replace_a_first_batch_without_finite_rows(tmp_path):
    marks = dict.fromkeys(range(20), NAN_LOSS) | dict.fromkeys(range(20, 37), NAN_GRADIENT)
    query = make_rows(50, 2, marks=dict.fromkeys(range(49), tasks.LATE_NAN_GRADIENT))
    report = build(make_task(tmp_path, make_rows(N, marks=marks), query), tmp_path / "out", SKIP)
    assert report.skipped.row_S.tolist() == list(range(37))
    build(make_task(tmp_path, make_rows(N), query), tmp_path / "good", SKIP)
    for found, expected in zip(read_features(tmp_path / "out"), read_features(tmp_path / "good"), strict=True):
        assert np.array_equal(found[37:], expected[37:])


def test_a_batch_that_changes_the_gradient_methods_is_verified_on_its_finite_rows(tmp_path):
    """No row of the first batch reaches a parameter; the first that does is in a batch with a bad row."""

    def reaching(model, batch):
        values = tasks.loss(model, batch)
        return values if bool((batch[3] == 1).all()) else values + (batch[3] != 1) * model.extra.sum()

    class Extra(tasks.Staged):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Parameter(torch.ones(2))

    made = Extra()
    torch.save(made.state_dict(), tmp_path / "0.pt")
    fields = {"model": Extra, "loss": reaching, "checkpoints": tasks.save_checkpoints(tmp_path, 1)}
    scales = {row: 2.0 for row in (9, 10, 11)}
    given = [make_rows(N, marks=marks, scales=scales) for marks in ({9: NAN_GRADIENT}, {})]
    for name, train in zip(("bad", "good"), given, strict=True):
        build(make_task(tmp_path, train, **fields), tmp_path / name, replace(SKIP, yardstick=False))
    (found,), (expected,) = read_features(tmp_path / "bad"), read_features(tmp_path / "good")
    remaining = [row for row in range(N) if row != 9]
    assert np.array_equal(found[remaining], expected[remaining]) and not found[9].any()


@pytest.mark.usefixtures("emulated_bf16")
def test_overflow_in_half_precision_is_handled_the_same_way(tmp_path):
    given = make_rows(N)
    for row in (2, 40):  # finite in float32, unlike their squares
        given[row] = (given[row][0], given[row][1], FINE, 3e38)
    task = make_task(tmp_path, given)
    with pytest.raises(NonFiniteError, match="of row 2 at checkpoint 0 is not finite: got .*"):
        build(task, tmp_path / "error", replace(PLAIN, precision="bf16"))
    report = build(task, tmp_path / "out", replace(SKIP, precision="bf16"))
    assert report.skipped.row_S.tolist() == [2, 40]
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu")
    assert not {2, 40} & read_scores(index, QueryOptions(k=N))[0].keys()


@pytest.mark.parametrize("content", [b"junk", [[1, 0], [1, 0]], [[0, 2]], [[-1, 0]], [[N, 0]], [3], [[0.5, 0]]])
def test_a_damaged_list_of_skipped_rows_is_rejected_and_a_missing_one_rebuilt(tmp_path, content):
    task, out = make_task(tmp_path, make_rows(N, marks=MARKS)), tmp_path / "out"
    manifest = build(task, out, SKIP).manifest
    path = generation_folder(out, 1) / manifest.skipped.name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, np.array(content))
    with pytest.raises(DamagedIndexError, match="skipped.npy"):
        InfluenceIndex.open(out, task)
    index = InfluenceIndex(out, manifest, IndexTask(out, manifest, lambda: task, RunOptions(torch.device("cpu"))))
    with pytest.raises(DamagedIndexError, match="cannot read .*skipped.npy"):
        len(index.skipped)
    path.unlink()
    assert build(task, out, SKIP).skipped.row_S.tolist() == sorted(MARKS)


def test_the_policy_for_bad_rows_is_checked():
    with pytest.raises(UsageError, match="bad --on-nonfinite: got 'ignore', expected error or skip"):
        BuildConfig(on_nonfinite="ignore")  # type: ignore[arg-type]
