"""Forged files with matching digests: verification and queries accept and reject the same files."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from forgery import forge, update_digest
from tasks.toy import CONFIG, Toy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import InfluenceIndex, QueryOptions, Task, build
from tracin_ann.errors import DamagedIndexError, IndexMismatchError
from tracin_ann.operations.removal import remove
from tracin_ann.operations.verification import verify
from tracin_ann.store.manifest import MANIFEST, Manifest

N = 70
FEATURE_SETS = ("feature", "exponent", "id", "sqnorm", "loss", "block_checksum", "row_checksum", "column_checksum")
CANARY_SETS = ("train/id", "train/feature", "query/id", "query/feature")
OWN = "generation-000002"
UNLIKE = "not of this task:"


@pytest.fixture(scope="module", params=["flat", pytest.param("ivf", marks=pytest.mark.slow)])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Task]:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = Toy()
    fields: dict[str, Any] = {"train_data": lambda: make_rows(N), "query_data": lambda: make_rows(9, seed=2)}
    task = make_toy_task(
        folder, model, checkpoints=save_checkpoints(model, folder), columns=lambda row: {"label": row[1]}, **fields
    )
    build(task, folder / "index", replace(CONFIG, index=request.param, partition_rows=32, dim=8))
    remove(folder / "index", [3, 50])
    return folder / "index", task


@pytest.fixture
def index(original: tuple[Path, Task], tmp_path: Path) -> Path:
    shutil.copytree(original[0], tmp_path / "index")
    return tmp_path / "index"


def damage_by_verify(index: Path) -> str:
    """Return the damage that verification reports, "" for none."""
    try:
        return "".join(damage.message for damage in verify(index).damage)
    except DamagedIndexError as error:
        return str(error)


def damage_by_query(index: Path, task: Task) -> str:
    """Return the damage that a query reports, "" for none."""
    try:
        opened = InfluenceIndex.open(index, task)
        for search in ("scan", "lists") if opened.manifest.index.kind == "ivf" else ("scan",):
            opened.query([0], options=QueryOptions(search=search))  # type: ignore[arg-type]
        opened.self_influence(3)
    except IndexMismatchError as error:
        # The spec of the task is compared before a feature file is opened.
        return f"{UNLIKE} {error}"
    except DamagedIndexError as error:
        return str(error)
    return ""


def test_both_accept_an_intact_index(index: Path, original: tuple[Path, Task]) -> None:
    assert (damage_by_verify(index), damage_by_query(index, original[1])) == ("", "")


def assert_both_reject(index: Path, task: Task, path: Path) -> None:
    """Expect that both reject the file and name it."""
    update_digest(index, path)
    for message in (damage_by_verify(index), damage_by_query(index, task)):
        assert path.name in message and message.count("\n") == 0


ALTERED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "a scalar": lambda held: held.reshape(-1)[0],
    "shorter": lambda held: held[:-1],
    "longer": lambda held: np.concatenate([held, held[-1:]]),
    "narrower": lambda held: held[..., :-1],
    "deeper": lambda held: held[..., None],
    "flat": lambda held: held.reshape(-1) if held.ndim > 1 else held[None],
    "wider numbers": lambda held: held.astype(np.complex128),
    "other numbers": lambda held: held.astype(np.float64 if held.dtype.kind != "f" else np.int32),
    "big-endian": lambda held: held.astype(held.dtype.newbyteorder(">")),
    "texts": lambda held: np.full(held.shape, b"x"),
}


def replace_data_set(path: Path, name: str, kind: str) -> None:
    """Replace a data set by another object."""
    with h5py.File(path, "r+") as file:
        held = file[name][...]
        del file[name]
        if kind in ALTERED:
            file.create_dataset(name, data=ALTERED[kind](held))
        elif kind == "compressed":
            file.create_dataset(name, data=held, compression="gzip", chunks=held.shape)
        elif kind == "never written":
            file.create_dataset(name, held.shape, held.dtype)
        elif kind == "huge":
            file.create_dataset(name, (2**40, *held.shape[1:]), held.dtype)
        elif kind == "a link":
            file["away"] = held
            file[name] = h5py.SoftLink("/away")
        elif kind == "a group":
            file.create_group(name)
        elif kind == "compact":
            write_low_level(file, name, held, h5py.h5t.py_create(held.dtype), h5py.h5d.COMPACT)
        elif kind == "numbers of fewer bits":
            stored = h5py.h5t.py_create(held.dtype).copy()
            if held.dtype.kind == "f":
                stored.set_ebias(stored.get_ebias() - 1)
            else:
                stored.set_precision(stored.get_precision() - 1)
            write_low_level(file, name, held, stored, h5py.h5d.CONTIGUOUS)


def write_low_level(file: h5py.File, name: str, held: np.ndarray, stored: h5py.h5t.TypeID, layout: int) -> None:
    """Write a data set with a storage layout or a type that h5py's high-level functions do not offer."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(layout)
    data = h5py.h5d.create(file.id, name.encode(), stored, h5py.h5s.create_simple(held.shape), properties)
    data.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(held), mtype=stored)


KINDS = [
    *ALTERED,
    *("gone", "compressed", "never written", "huge", "a link", "a group", "compact", "numbers of fewer bits"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FEATURE_SETS)
def test_a_feature_file_of_another_structure(index: Path, original: tuple[Path, Task], name: str, kind: str) -> None:
    path = sorted((index / "features").iterdir())[1]
    replace_data_set(path, name, kind)
    assert_both_reject(index, original[1], path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CANARY_SETS)
def test_canaries_of_another_structure(index: Path, original: tuple[Path, Task], name: str, kind: str) -> None:
    replace_data_set(index / OWN / "canaries.h5", name, kind)
    assert_both_reject(index, original[1], index / OWN / "canaries.h5")


CANARY_VALUES = {
    "a row that there is not": ("train/id", -1, N),
    "a negative row": ("train/id", 0, -1),
    "rows that fall": ("query/id", 0, 2**40),
    "NaN": ("train/feature", (0, 0, 0), np.nan),
}


@pytest.mark.parametrize("case", CANARY_VALUES)
def test_canaries_of_invalid_rows(index: Path, original: tuple[Path, Task], case: str) -> None:
    name, place, value = CANARY_VALUES[case]
    with h5py.File(index / OWN / "canaries.h5", "r+") as file:
        file[name][place] = value
    assert_both_reject(index, original[1], index / OWN / "canaries.h5")


@pytest.mark.parametrize(
    "change", [{"stop": 33}, {"start": 1}, {"checkpoint": 7}, {"dim": 9}, {"block_rows": 0}, {"dtype": b"f8"}]
)
def test_a_feature_file_with_another_header(index: Path, original: tuple[Path, Task], change: dict[str, Any]) -> None:
    path = sorted((index / "features").iterdir())[0]
    with h5py.File(path, "r+") as file:
        for name, value in change.items():
            file.attrs[name] = value
    assert_both_reject(index, original[1], path)


@pytest.mark.parametrize(
    "value", [np.zeros((3, 3)), np.bytes_(b"x" * 5000), "text", np.float64(np.nan), h5py.Empty("f")]
)
@pytest.mark.parametrize("name", ["format", "version", "stop"])
def test_a_feature_file_with_another_attribute(index: Path, original: tuple[Path, Task], name: str, value: Any) -> None:
    path = sorted((index / "features").iterdir())[0]
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value
    assert_both_reject(index, original[1], path)


@pytest.mark.parametrize("kind", [*(kind for kind in ALTERED if kind not in ("shorter", "narrower")), "gone", "huge"])
def test_removed_rows_of_another_structure(index: Path, original: tuple[Path, Task], kind: str) -> None:
    path = index / OWN / "removed.npy"
    array = np.load(path)
    path.write_bytes(b"" if kind == "gone" else make_npy(array, kind))
    assert_both_reject(index, original[1], path)


def make_npy(array: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "huge":
        header = {"shape": (2**40, *array.shape[1:]), "fortran_order": False, "descr": array.dtype.str}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.tobytes())
    else:
        np.save(file, ALTERED[kind](array))
    return file.getvalue()


ARRAYS = ("basis_FR", "outliers", "group_GR", "parent_L", "group_radius_G", "radius_L", "size_L")


@pytest.mark.parametrize("kind", [*ALTERED, "gone"])
@pytest.mark.parametrize("name", [*ARRAYS, "centroids"])
def test_lists_of_another_structure(index: Path, original: tuple[Path, Task], name: str, kind: str) -> None:
    if Manifest.read(index).index.kind == "flat":
        pytest.skip("a flat index has no lists")
    path = index / OWN / ("ivf-centroids.npy" if name == "centroids" else "ivf.npz")
    if name == "centroids":
        array = np.load(path)
        path.write_bytes(b"" if kind == "gone" else make_npy(array, kind))
    else:
        arrays = dict(np.load(path))
        array = arrays.pop(name)
        if not array.size:
            pytest.skip("empty here")
        np.savez(path, **(arrays if kind == "gone" else arrays | {name: ALTERED[kind](array)}))
    update_digest(index, path)
    assert "ivf" in damage_by_verify(index) and "ivf" in damage_by_query(index, original[1])


def find_leaves(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value; of lists, to the first and last items only."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    last = len(value) - 1 if isinstance(value, list) else 0
    for key, item in inner:
        if isinstance(value, dict) or key in (0, last):
            yield (*here, key)
            yield from find_leaves(item, (*here, key))


VALUES = (None, True, -1, 0, 1.5, 2**70, "x", [], {})


@pytest.mark.slow
def test_a_manifest_with_any_other_value(index: Path, original: tuple[Path, Task]) -> None:
    """Every field, except the digests of feature files, which a query does not read."""
    intact = json.loads((index / MANIFEST).read_text())
    content = {name: value for name, value in intact.items() if name not in ("digest", "format")}
    ways = [way for way in find_leaves(content) if way[-1] != "digest" or way[0] != "features"]
    random = np.random.default_rng(0)
    for way in ways:
        for value in [VALUES[i] for i in random.choice(len(VALUES), 3, replace=False)]:
            changed = copy.deepcopy(content)
            node = changed
            for key in way[:-1]:
                node = node[key]
            node[way[-1]] = value
            forge(index, lambda held, changed=changed: held.update(changed))
            message = damage_by_verify(index), damage_by_query(index, original[1])
            assert bool(message[0]) == bool(message[1]) or message[1].startswith(UNLIKE), (way, value, message)
            for place in (index, index / OWN):
                (place / MANIFEST).write_text(json.dumps(intact))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "hnsw"},
        {"kind": "ivf", "files": []},
        {"kind": "flat", "codes": "sq8"},
        {"codes": "pq"},
        {"files": [{"name": MANIFEST, "size": 1, "digest": ""}]},
    ],
)
def test_an_invalid_index_record(index: Path, original: tuple[Path, Task], change: dict[str, Any]) -> None:
    forge(index, lambda content: content["index"].update(change))
    for message in (damage_by_verify(index), damage_by_query(index, original[1])):
        assert "manifest.json cannot be understood" in message


def test_a_manifest_that_differs_from_its_copy(index: Path, original: tuple[Path, Task]) -> None:
    shutil.copy(index / MANIFEST, index / "kept")
    forge(index, lambda content: content["index"].update(reason="another"))
    shutil.move(index / "kept", index / MANIFEST)
    for message in (damage_by_verify(index), damage_by_query(index, original[1])):
        assert f"{OWN}/{MANIFEST}" in message


def test_a_manifest_that_is_too_large(index: Path, original: tuple[Path, Task]) -> None:
    with (index / MANIFEST).open("r+b") as file:
        file.truncate(2**40)
    for message in (damage_by_verify(index), damage_by_query(index, original[1])):
        assert "more than 67,108,864 bytes" in message
