"""The rows of all files of a checkpoint in one array: equal to those of the files, verified, and safe to replace."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from blocks import DTYPES, make_block
from tracin_ann.errors import DamagedIndexError
from tracin_ann.files import AddressRange
from tracin_ann.store import Dtype, FeatureStore, StoreLayout
from tracin_ann.store import feature_store as feature_store_module
from tracin_ann.store import taking as taking_module
from tracin_ann.store.taking import gather_stored
from tracin_ann.types import Float32

N, PARTITION_ROWS, DIM = 2600, 1024, 32
"""A partition ends with a page in every format; the last has fewer rows."""


def make_layout(dtype: Dtype = "float16", partition_rows: int = PARTITION_ROWS, n_rows: int = N) -> StoreLayout:
    return StoreLayout(n_rows, partition_rows, DIM, dtype, ("one", "two"))


def write_files(directory: Path, layout: StoreLayout) -> Float32:
    """Write all files, and return the rows [N, F] as an unjoined store reads them."""
    store = FeatureStore(directory, layout)
    for partition, (start, stop) in enumerate(store.partitions()):
        for checkpoint in range(2):
            store.write(partition, checkpoint, make_block(start, stop, dim=DIM, seed=checkpoint))
    return np.concatenate([rows for _, rows in FeatureStore(directory, layout).view().blocks(300)])


def open_all(directory: Path, layout: StoreLayout) -> FeatureStore:
    store = FeatureStore(directory, layout)
    store.files(layout.files)
    return store


def alter_row(path: Path, position: int) -> None:
    """Change a byte of a row in place: maps of the file change, too."""
    with h5py.File(path) as file:
        offset = file["feature"].id.get_offset() + position * file["feature"][0].nbytes
    with path.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_files(tmp_path: Path, dtype: Dtype) -> None:
    layout = make_layout(dtype)
    expected = write_files(tmp_path, layout)
    store = FeatureStore(tmp_path, layout)
    random = np.random.default_rng(0)
    for n_ids in (1, 40, 2000):
        ids = random.integers(0, N, n_ids)
        assert np.array_equal(store.view().take(ids), expected[ids])
    assert store.join_rows(0) is not None
    for n_ids in (1, 40, 2000):
        ids = random.integers(0, N, n_ids)
        assert np.array_equal(store.view().take(ids), expected[ids])
        assert np.array_equal(store.view([1]).take(ids), expected[ids, DIM:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_rows_are_those_of_the_files_in_any_order(tmp_path: Path, dtype: Dtype) -> None:
    layout = make_layout(dtype)
    write_files(tmp_path, layout)
    joined, apart = open_all(tmp_path, layout), FeatureStore(tmp_path, layout)
    ids = np.random.default_rng(1).permutation(N)[:900]
    for checkpoint in range(2):
        assert apart.join_rows(checkpoint) is None
        groups = joined.view([checkpoint])._split(ids, checkpoint)
        stored, exponents = gather_stored(groups)
        # The next call of the thread overwrites the rows.
        stored = stored.copy()
        same_stored, same_exponents = gather_stored([(joined.join_rows(checkpoint), ids)])
        assert np.array_equal(stored, same_stored) and np.array_equal(exponents, same_exponents)
    assert np.array_equal(apart.view().take(ids), joined.view().take(ids))


@pytest.mark.parametrize("kept_rows", [0, 100])
def test_more_rows_than_the_kept_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_rows: int) -> None:
    layout = make_layout()
    expected = write_files(tmp_path, layout)
    monkeypatch.setattr(taking_module, "_KEPT_BYTES", kept_rows * 2 * DIM)
    monkeypatch.setattr(taking_module, "_memory", taking_module._Memory())
    store = open_all(tmp_path, layout)
    for n_ids in (100, 101, 700):
        ids = np.random.default_rng(n_ids).integers(0, N, n_ids)
        assert np.array_equal(store.view().take(ids), expected[ids])


def test_rows_are_joined_when_all_files_are_open_and_mapped_once(tmp_path: Path) -> None:
    layout = make_layout()
    write_files(tmp_path, layout)
    store = FeatureStore(tmp_path, layout)
    for number, key in enumerate(layout.files):
        assert store.join_rows(key[1]) is None, number
        file = store.file(*key)
    joined = store.join_rows(1)
    assert joined is not None
    assert np.shares_memory(joined.stored_ND, file.stored_ND)
    assert np.shares_memory(joined.row_info_N, file.row_info_N)
    assert Path("/proc/self/maps").read_text().count(f"{tmp_path}/") == len(layout.files)


def test_what_a_file_verified_is_verified_for_all(tmp_path: Path) -> None:
    layout = make_layout()
    write_files(tmp_path, layout)
    store = open_all(tmp_path, layout)
    joined, file = store.join_rows(0), store.file(1, 0)
    assert joined is not None
    file.read(0, 256)
    positions = np.array([0, PARTITION_ROWS, PARTITION_ROWS + 255, PARTITION_ROWS + 256])
    assert joined.find_unverified(positions).tolist() == [True, False, False, True]
    assert not joined.find_unverified(np.arange(2 * PARTITION_ROWS, 2 * PARTITION_ROWS + 256, 2)).any()
    assert store.file(2, 0).verified_blocks.tolist() == [True, False, False]


def test_a_row_is_verified_once(tmp_path: Path) -> None:
    layout = make_layout()
    expected = write_files(tmp_path, layout)
    store = open_all(tmp_path, layout)
    joined, few = store.join_rows(0), np.array([3, PARTITION_ROWS + 7, N - 1])
    assert joined is not None
    assert joined.find_unverified(few).all()
    assert np.array_equal(store.view().take(few), expected[few])
    assert not joined.find_unverified(few).any()
    assert joined.find_unverified(few - 1).all()
    assert not store.file(1, 0).find_unverified(np.array([7])).any()
    assert not joined.verified_blocks.any()


def test_a_row_that_is_altered_remains_unverified(tmp_path: Path) -> None:
    layout = make_layout()
    expected = write_files(tmp_path, layout)
    store = open_all(tmp_path, layout)
    alter_row(store.path(1, 0), 7)
    ids = np.array([3, PARTITION_ROWS + 7])
    for _ in range(2):
        with pytest.raises(DamagedIndexError, match="row 1031 is altered"):
            store.view().take(ids)
    assert np.array_equal(store.view().take(ids[:1]), expected[ids[:1]])


@pytest.mark.parametrize("n_ids", [3, 600])
def test_an_altered_row_is_named_with_its_file(tmp_path: Path, n_ids: int) -> None:
    layout = make_layout()
    expected = write_files(tmp_path, layout)
    store = open_all(tmp_path, layout)
    assert store.join_rows(1) is not None
    alter_row(store.path(1, 1), 5)
    alter_row(store.path(2, 1), 7)
    damaged = [PARTITION_ROWS + 5, 2 * PARTITION_ROWS + 7]
    ids = np.concatenate([damaged, np.arange(n_ids)])
    with pytest.raises(DamagedIndexError, match=r"000001-0001.h5: row 1029 is altered"):
        store.view().take(ids)
    with pytest.raises(DamagedIndexError, match=r"000002-0001-552.h5: row 2055 is altered"):
        store.view().take([damaged[1], 3])
    others = np.setdiff1d(np.arange(N), damaged)
    assert np.array_equal(store.view().take(others), expected[others])


def test_a_file_that_is_written_again_does_not_change_open_ones(tmp_path: Path) -> None:
    layout = make_layout()
    expected = write_files(tmp_path, layout)
    store = open_all(tmp_path, layout)
    before = store.file(1, 0)
    other = make_block(PARTITION_ROWS, 2 * PARTITION_ROWS, dim=DIM, seed=9)
    store.write(1, 0, other)
    assert store.join_rows(0) is None
    assert store.join_rows(1) is not None
    assert np.array_equal(before.read(0, 10), expected[PARTITION_ROWS : PARTITION_ROWS + 10, :DIM])
    np.testing.assert_allclose(store.view([0]).take([PARTITION_ROWS + 4])[0], other.feature_ND[4], atol=4e-3)
    assert np.array_equal(store.view().take([3, N - 1]), expected[[3, N - 1]])


def test_a_file_in_the_place_of_another_is_not_mapped_over_rows(tmp_path: Path) -> None:
    """The file of a complete partition under the name of the last, which has fewer rows."""
    layout = make_layout()
    expected = write_files(tmp_path, layout)
    store = FeatureStore(tmp_path, layout)
    store.path(2, 0).write_bytes(store.path(1, 0).read_bytes())
    with pytest.raises(DamagedIndexError, match="another header"):
        store.files(layout.files)
    assert np.array_equal(store.view().take([0, 1500]), expected[[0, 1500]])
    assert store.join_rows(0) is None


@pytest.mark.parametrize(
    ("partition_rows", "n_rows"),
    [(1000, N), (PARTITION_ROWS, PARTITION_ROWS), (64, N), (384, N)],
    ids=["page", "one", "part of a page", "part of a block"],
)
def test_files_that_cannot_be_side_by_side_are_read_one_by_one(
    tmp_path: Path, partition_rows: int, n_rows: int
) -> None:
    layout = make_layout(partition_rows=partition_rows, n_rows=n_rows)
    expected = write_files(tmp_path, layout)
    store = open_all(tmp_path, layout)
    assert store.join_rows(0) is None
    ids = np.random.default_rng(0).integers(0, n_rows, 700)
    assert np.array_equal(store.view().take(ids), expected[ids])
    assert np.array_equal(store.view().take(ids[:9]), expected[ids[:9]])


def test_without_addresses_or_open_files_rows_are_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_layout()
    expected = write_files(tmp_path, layout)

    def fail(_: AddressRange, size: int) -> None:
        raise OSError(12, f"no {size} bytes")

    with monkeypatch.context() as patched:
        patched.setattr(AddressRange, "__init__", fail)
        store = open_all(tmp_path, layout)
        assert store.join_rows(0) is None
        assert np.array_equal(store.view().take(np.arange(N)), expected)
    monkeypatch.setattr(feature_store_module, "_MOST_OPEN_FILES", 5)
    store = open_all(tmp_path, layout)
    assert store.join_rows(0) is None
    assert np.array_equal(store.view().take(np.arange(N)), expected)


def test_files_are_mapped_to_whole_pages_inside_the_range(tmp_path: Path) -> None:
    page = AddressRange.page_bytes
    (tmp_path / "file").write_bytes(bytes(range(256)) * (3 * page // 256))
    addresses = AddressRange(2 * page)
    with (tmp_path / "file").open("rb") as file:
        for offset, place, size in [(1, 0, 10), (0, 1, 10), (0, page, page + 1), (0, -page, 10)]:
            with pytest.raises(ValueError, match="bytes from"):
                addresses.map_file(file, offset, place, size)
        addresses.map_file(file, page, 0, page)
        addresses.map_file(file, 0, page, page)
    view = addresses.view((2 * page,), np.dtype("u1"))
    assert not view.flags.writeable
    assert np.array_equal(view, np.resize(np.arange(256, dtype=np.uint8), 2 * page))
