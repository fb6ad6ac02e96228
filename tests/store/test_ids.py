"""Ids of the task in the file of columns: they survive every change of an index; hostile arrays are rejected."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import disk
from tasks.toy import CONFIG, Toy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import InfluenceIndex, QueryOptions, Task, build
from tracin_ann.errors import DamagedIndexError, TaskError
from tracin_ann.operations.removal import remove
from tracin_ann.operations.verification import repair, verify
from tracin_ann.store.columns import read_columns
from tracin_ann.store.generations import generation_folder
from tracin_ann.store.manifest import Manifest, record_file

N = 12
SMALL = replace(CONFIG, dim=8, partition_rows=5, yardstick=False)
Example = tuple[torch.Tensor, int, str]


def make_named_rows(n_rows: int) -> list[Example]:
    """Return rows with names in another order than the rows."""
    return [(x, y, f"row {(7 * i) % 31:02}é") for i, (x, y) in enumerate(make_rows(n_rows))]


def get_id(row: Example) -> str:
    return row[2]


@pytest.fixture(scope="module")
def named_task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("ids")
    torch.manual_seed(0)
    model = Toy()
    fields: dict[str, Any] = {
        "checkpoints": save_checkpoints(model, folder),
        "columns": lambda row: {"label": row[1]},
        "ids": get_id,
    }
    fields["query_data"] = lambda: [(*row, f"query {i}") for i, row in enumerate(make_rows(3, seed=2))]
    return make_toy_task(folder, model, train_data=lambda: make_named_rows(N), **fields)


@pytest.fixture(scope="module")
def built(named_task: Task, tmp_path_factory: pytest.TempPathFactory) -> disk.Tree:
    root = tmp_path_factory.mktemp("built")
    build(named_task, root, SMALL)
    return disk.read_tree(root)


@pytest.fixture
def index(built: disk.Tree, tmp_path: Path) -> Path:
    disk.write_tree(built, tmp_path / "index")
    return tmp_path / "index"


def grown(task: Task, n_rows: int) -> Task:
    return replace(task, train_data=lambda: make_named_rows(n_rows))


def ids_by_row(out: Path, task: Task) -> dict[int, str]:
    """Return the ids of all rows in the answers."""
    answer = InfluenceIndex.open(out, task).query([0], options=QueryOptions(k=100))[0]
    return {hit.row: hit.id for hit in (*answer.proponents, *answer.opponents)}


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_ids_stay_with_their_rows_through_appends_removals_and_rebuilt_lists(
    named_task: Task, tmp_path: Path, kind: str
) -> None:
    out, config = tmp_path / "index", replace(SMALL, index=kind)
    removed: set[int] = set()

    def right(task: Task) -> None:
        n_rows = len(task.train_data())
        expected = {i: row[2] for i, row in enumerate(make_named_rows(n_rows)) if i not in removed}
        assert ids_by_row(out, task) == expected
        found = InfluenceIndex.open(out, task)
        assert found.positions("train", [expected[5], expected[0]]) == (5, 0)
        assert {hit.row: hit.id for hit in found.self_influence()} == expected
        assert verify(out).damage == ()

    build(named_task, out, config)
    right(named_task)
    removed |= {3, 11}
    remove(out, sorted(removed))
    right(named_task)
    more = grown(named_task, N + 6)
    build(more, out, replace(config, append=True))
    right(more)
    removed |= {N + 1}
    remove(out, [N + 1])
    build(more, out, replace(config, rebuild_index=True))
    right(more)
    (path,) = out.rglob("columns.npz")
    path.unlink()
    repair(out, more)
    right(more)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            lambda row: get_id(row) if row[1:] != make_named_rows(N + 2)[N + 1][1:] else get_id(make_named_rows(1)[0]),
            "the id of row 0",
        ),
        (lambda row: get_id(row) if row[1:] != make_named_rows(N + 2)[N + 1][1:] else 5, "the first row's is"),
    ],
)
def test_an_appended_row_with_an_existing_id_is_rejected_before_anything_is_written(
    named_task: Task, index: Path, ids: Callable[[Example], Any], message: str
) -> None:
    before = disk.read_tree(index)
    with pytest.raises(TaskError, match=rf"Task.ids returns an invalid id for row {N + 1}.*{message}"):
        build(replace(grown(named_task, N + 2), ids=ids), index, replace(SMALL, append=True))
    assert disk.read_tree(index) == before
    assert ids_by_row(index, named_task) == {i: row[2] for i, row in enumerate(make_named_rows(N))}


@pytest.mark.parametrize(("value", "message"), [(2**63, "9223372036854775808")])
def test_ids_that_an_array_would_alter_are_rejected(named_task: Task, tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(TaskError, match=rf"Task.ids returns an invalid id for row 0: got {message}, expected"):
        build(replace(named_task, ids=lambda row: value), tmp_path / "index", SMALL)
    with pytest.raises(TaskError, match=rf"Task.columns returns an invalid value for row 0: .*{message}"):
        build(replace(named_task, columns=lambda row: {"it": value}), tmp_path / "index", SMALL)
    assert not (tmp_path / "index").exists()


LABELS = np.arange(N) % 3
HOSTILE: dict[str, dict[str, Any]] = {
    "too few ids": {"column label": LABELS, "ids": np.arange(N - 1)},
    "too many ids": {"column label": LABELS, "ids": np.arange(N + 1)},
    "all too few": {"column label": LABELS[:-1], "ids": np.arange(N - 1)},
    "ids alone, too many": {"ids": np.arange(N + 1)},
    "no ids at all": {"column label": LABELS, "ids": np.zeros(0, np.int64)},
    "one id": {"column label": LABELS, "ids": np.array(7)},
    "pairs": {"column label": LABELS, "ids": np.arange(2 * N).reshape(N, 2)},
    "objects": {"column label": LABELS, "ids": np.array([object] * N, dtype=object)},
    "texts as objects": {"column label": LABELS, "ids": np.array(["a"] * N, dtype=object)},
    "fractions": {"column label": LABELS, "ids": np.arange(N) / 2},
    "NaN": {"column label": LABELS, "ids": np.full(N, np.nan)},
    "unsigned": {"column label": LABELS, "ids": np.arange(N, dtype=np.uint64)},
    "narrow": {"column label": LABELS, "ids": np.arange(N, dtype=np.int32)},
    "bytes": {"column label": LABELS, "ids": np.array([b"%d" % i for i in range(N)])},
    "bools": {"column label": LABELS, "ids": np.zeros(N, bool)},
    "times": {"column label": LABELS, "ids": np.arange(N).astype("M8[s]")},
    "records": {"column label": LABELS, "ids": np.zeros(N, dtype=[("a", "i8")])},
    "a column of objects": {"column label": np.array([{}] * N, dtype=object), "ids": np.arange(N)},
    "a column of pairs": {"column label": np.zeros((N, 2)), "ids": np.arange(N)},
}
TWINS = {"twins": np.array([*range(N - 1), 4]), "named twins": np.array(["a", *map(str, range(N - 2)), "a"])}


def replace_arrays(index: Path, arrays: dict[str, Any]) -> Path:
    """Replace arrays of the index and update its manifests, so that only a read detects the change."""
    manifest = Manifest.read(index)
    own_folder = generation_folder(index, manifest.generation)
    path = own_folder / "columns.npz"
    content = io.BytesIO()
    np.savez(content, allow_pickle=True, **arrays)
    path.unlink()
    path.write_bytes(content.getvalue())
    for place in (own_folder, index):
        replace(manifest, columns=record_file(path)).write(place)
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_ids_are_rejected_in_one_line_and_rebuilt(named_task: Task, index: Path, case: str) -> None:
    path = replace_arrays(index, HOSTILE[case])
    with pytest.raises(DamagedIndexError, match=r"cannot read .*columns.npz") as refused:
        read_columns(path, N)
    assert "\n" not in str(refused.value)
    (damage,) = verify(index).damage
    assert damage.path == path and damage.message == str(refused.value)


def test_a_query_rejects_hostile_ids_and_repair_recomputes_them_from_the_task(named_task: Task, index: Path) -> None:
    replace_arrays(index, HOSTILE["fractions"])
    with pytest.raises(DamagedIndexError, match=r"cannot read .*columns.npz.*ids are float64"):
        InfluenceIndex.open(index, named_task).query([0])
    repair(index, named_task)
    assert verify(index).damage == () and ids_by_row(index, named_task) == {
        i: row[2] for i, row in enumerate(make_named_rows(N))
    }


@pytest.mark.parametrize("case", TWINS)
def test_duplicate_ids_are_found(named_task: Task, index: Path, case: str) -> None:
    path = replace_arrays(index, {"column label": LABELS, "ids": TWINS[case]})
    (damage,) = verify(index).damage
    twin = {"twins": r"rows 4 and 11 both have id 4", "named twins": r"rows 0 and 11 both have id 'a'"}[case]
    assert damage.path == path and twin in damage.message
