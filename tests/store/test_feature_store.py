"""The store of many feature files: missing files, reads, and rejected input.

Shapes: N rows, C checkpoints, D sketch dimension per checkpoint, F = C·D.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks import CODES, DIM, LAYOUT, NUMBERS, make_block
from descriptors import limit_descriptors
from tracin_ann.errors import DamagedIndexError, NonFiniteError, UsageError
from tracin_ann.store import (
    Dtype,
    FeatureFile,
    FeatureStore,
    FileRecord,
    StoreLayout,
    WriteBehind,
    choose_partition_rows,
    feature_file,
)
from tracin_ann.store import feature_store as feature_store_module
from tracin_ann.types import Float32, Float64, PendingReads, RowSource


def fill(store: FeatureStore) -> tuple[list[FileRecord], Float32]:
    """Write every file; return the records and the expected rows [N, F]."""
    records = []
    row_NF = np.empty((store.layout.n_rows, store.layout.n_checkpoints * store.layout.dim), dtype=np.float32)
    for checkpoint in range(store.layout.n_checkpoints):
        for partition, (start, stop) in enumerate(store.partitions()):
            block = make_block(start, stop, dim=store.layout.dim, seed=checkpoint)
            columns = slice(checkpoint * store.layout.dim, (checkpoint + 1) * store.layout.dim)
            row_NF[start:stop, columns] = block.feature_ND
            records.append(store.write(partition, checkpoint, block))
    return records, row_NF


@pytest.fixture
def filled(tmp_path: Path) -> tuple[FeatureStore, list[FileRecord], Float32]:
    store = FeatureStore(tmp_path / "store", LAYOUT)
    return store, *fill(store)


def test_partitions_cover_the_rows() -> None:
    assert FeatureStore(Path("nowhere"), LAYOUT).partitions() == [(0, 8), (8, 16), (16, 23)]


def test_missing_returns_the_absent_damaged_and_incompatible_files(
    filled: tuple[FeatureStore, list[FileRecord], Float32],
) -> None:
    store, _, _ = filled
    assert store.missing() == []
    store.path(0, 1).unlink()
    damaged = bytearray(store.path(2, 0).read_bytes())
    with h5py.File(store.path(2, 0)) as file:
        damaged[file["feature"].id.get_offset() + 3] ^= 1
    store.path(2, 0).write_bytes(damaged)
    store.path(1, 2).write_bytes(store.path(1, 2).read_bytes()[:-1])
    store.path(0, 0).write_bytes(store.path(1, 0).read_bytes())
    wrong = [(0, 0), (0, 1), (1, 2), (2, 0)]
    assert store.missing() == wrong
    for partition, checkpoint in wrong:
        start, stop = store.partitions()[partition]
        store.write(partition, checkpoint, make_block(start, stop, seed=checkpoint))
    assert store.missing() == []
    everything = [(partition, checkpoint) for partition in range(3) for checkpoint in range(3)]
    other = StoreLayout(**{**vars(LAYOUT), "digests": ("other",) * 3})
    assert FeatureStore(store.directory, other).missing() == everything
    assert FeatureStore(store.directory / "none", LAYOUT).missing() == everything


def test_the_check_compares_sizes(filled: tuple[FeatureStore, list[FileRecord], Float32]) -> None:
    store, records, _ = filled
    path = store.path(1, 1)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    store.check(records)
    path.write_bytes(damaged[:-1])
    with pytest.raises(DamagedIndexError, match=rf"{path.name}: got \d+ bytes, expected"):
        store.check(records)
    path.unlink()
    with pytest.raises(DamagedIndexError, match=rf"{path.name}: got no file"):
        store.check(records)
    with pytest.raises(ValueError, match="not inside the index"):
        FileRecord("../a.h5", 1, "")


def test_a_rewritten_file_is_reopened(filled: tuple[FeatureStore, list[FileRecord], Float32]) -> None:
    store, _, _ = filled
    view = store.view([1])
    view.take([8])
    block = make_block(8, 16, seed=99)
    store.write(1, 1, block)
    assert np.array_equal(view.take([8]), block.feature_ND[:1])


@pytest.mark.parametrize("checkpoints", [None, [0], [2, 0]])
@pytest.mark.parametrize("block_rows", [1, 2, 3, 7, 8, 9, 23, 1000])
def test_blocks_cover_all_rows_once(
    filled: tuple[FeatureStore, list[FileRecord], Float32], checkpoints: list[int] | None, block_rows: int
) -> None:
    store, _, row_NF = filled
    view: RowSource = store.view(checkpoints)
    chosen = [0, 1, 2] if checkpoints is None else checkpoints
    expected_NF = np.concatenate([row_NF[:, c * DIM : (c + 1) * DIM] for c in chosen], axis=1)
    blocks = list(view.blocks(block_rows))
    assert (len(view), view.dim) == expected_NF.shape
    assert max(len(ids) for ids, _ in blocks) <= block_rows
    assert np.array_equal(np.concatenate([ids for ids, _ in blocks]), np.arange(23))
    assert np.array_equal(np.concatenate([rows for _, rows in blocks]), expected_NF)


@settings(deadline=None, max_examples=25)
@given(
    ids=st.lists(st.integers(0, 22), max_size=40), at_once=st.sampled_from([1, 3, 1024]), few=st.sampled_from([0, 512])
)
def test_take_preserves_order_and_duplicates(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], at_once: int, few: int
) -> None:
    store = FeatureStore(tmp_path_factory.getbasetemp() / "take", LAYOUT)
    if store.missing():
        fill(store)
    row_NF = np.concatenate([rows for _, rows in store.view().blocks(100)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tracin_ann.store.feature_store._ROWS_AT_ONCE", at_once)
        patched.setattr("tracin_ann.store.feature_store._FEW_ROWS", few)
        taken = store.view([1, 2]).take(ids)
        assert taken.dtype == np.float32
        assert np.array_equal(taken, row_NF[ids, DIM:] if ids else np.empty((0, 2 * DIM)))
        assert np.array_equal(store.view([1, 2]).take(np.array(ids, dtype=np.int64)), taken)


@pytest.mark.parametrize("unknown", [-1, 23])
def test_take_of_an_unknown_id_is_a_key_error(
    filled: tuple[FeatureStore, list[FileRecord], Float32], unknown: int
) -> None:
    with pytest.raises(KeyError, match=str(unknown)):
        filled[0].view().take([1, unknown])


def write_unequal_rows(folder: Path, dtype: Dtype) -> tuple[FeatureStore, Float64]:
    """Return a store of 6 rows, one of them zero and two of extreme norms at checkpoint 1, and the rows [6, 2, D]."""
    layout = StoreLayout(n_rows=6, partition_rows=4, dim=DIM, dtype=dtype, digests=("spec",) * 2)
    store = FeatureStore(folder, layout)
    row_NF = fill(store)[1]
    block = make_block(0, 4, seed=1)
    block.feature_ND[1] = 0
    block.feature_ND[2] *= np.float32(1e30)
    block.feature_ND[3] *= np.float32(1e-30)
    store.write(0, 1, block)
    row_NF[:4, DIM:] = block.feature_ND
    return store, row_NF.astype(np.float64).reshape(6, 2, DIM)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_cosine_divides_each_checkpoint_by_its_norm(tmp_path: Path, dtype: Dtype) -> None:
    store, wide_NCD = write_unequal_rows(tmp_path, dtype)
    norm_NC1 = np.linalg.norm(wide_NCD, axis=2, keepdims=True)
    expected_NF = (wide_NCD / np.where(norm_NC1 == 0, 1, norm_NC1)).reshape(6, 2 * DIM)
    view = store.view(cosine=True)
    tolerance = {"float16": 1e-3, "float32": 1e-6}[dtype]
    ((_, first), (_, second)) = view.blocks(5)
    assert np.abs(np.concatenate([first, second]) - expected_NF).max() <= tolerance
    assert np.array_equal(view.take([5, 1]), np.stack([second[1], first[1]]))
    assert not first[1, DIM:].any()
    assert np.linalg.norm(first[1, :DIM]) == pytest.approx(1)


@pytest.mark.parametrize("dtype", CODES)
def test_codes_divided_by_the_norm_of_the_original_row_have_unbiased_products(tmp_path: Path, dtype: Dtype) -> None:
    store, wide_NCD = write_unequal_rows(tmp_path, dtype)
    norm_NC = np.linalg.norm(wide_NCD, axis=2)
    view = store.view(cosine=True)
    unit_NF = np.concatenate([rows for _, rows in view.blocks(5)])
    product_NC = np.einsum("ncd,ncd->nc", unit_NF.reshape(6, 2, DIM).astype(np.float64), wide_NCD)
    np.testing.assert_allclose(product_NC, norm_NC, rtol=1e-5)
    assert not unit_NF[1, DIM:].any()
    assert np.array_equal(view.take([5, 1]), unit_NF[[5, 1]])
    # Both ways to read many and few rows, and the rows of one checkpoint.
    plain = store.view()
    (first, second) = (rows for _, rows in plain.blocks(5))
    assert np.array_equal(plain.take(np.arange(6).repeat(100)), np.concatenate([first, second]).repeat(100, axis=0))
    assert np.array_equal(store.view([1]).take([4, 2]), np.concatenate([first, second])[[4, 2], DIM:])


def test_columns_match_their_checkpoints(filled: tuple[FeatureStore, list[FileRecord], Float32]) -> None:
    store, _, _ = filled
    for name, read in (("sqnorm_N", store.sqnorms), ("loss_N", store.losses)):
        expected_NC = np.stack(
            [
                np.concatenate([getattr(make_block(*rows, seed=checkpoint), name) for rows in store.partitions()])
                for checkpoint in range(3)
            ],
            axis=1,
        )
        assert np.array_equal(read(), expected_NC)
        assert np.array_equal(read([2, 0]), expected_NC[:, [2, 0]])


@pytest.mark.parametrize("checkpoints", [[], [3], [-1]])
def test_unknown_checkpoints_are_rejected(tmp_path: Path, checkpoints: list[int]) -> None:
    store = FeatureStore(tmp_path, LAYOUT)
    with pytest.raises(UsageError, match=r"expected some of 0\.\.2"):
        store.view(checkpoints)
    with pytest.raises(UsageError):
        store.losses(checkpoints)


def test_the_number_of_open_files_is_bounded(
    filled: tuple[FeatureStore, list[FileRecord], Float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    row_NF = filled[2]
    monkeypatch.setattr(feature_store_module, "_MOST_OPEN_ROWS", 2 * LAYOUT.partition_rows + 1)
    store = FeatureStore(filled[0].directory, LAYOUT)
    before = count_maps(store)
    assert np.array_equal(np.concatenate([rows for _, rows in store.view().blocks(4)]), row_NF)
    assert count_maps(store) == before + 2
    assert store.file(0, 0) is store.file(0, 0)
    assert store.file(2, 2) is not store.file(2, 2)


@pytest.mark.parametrize(("n_rows", "n_checkpoints", "n_files"), [(10**6, 3, 93), (10**7, 10, 1530)])
def test_all_files_of_a_large_index_remain_open(n_rows: int, n_checkpoints: int, n_files: int) -> None:
    layout = StoreLayout(n_rows, choose_partition_rows(n_rows), DIM, "float16", ("spec",) * n_checkpoints)
    assert layout.n_partitions * n_checkpoints == n_files
    assert FeatureStore(Path("nowhere"), layout)._most_open >= n_files


def count_maps(store: FeatureStore) -> int:
    """Return how many feature files are mapped."""
    return Path("/proc/self/maps").read_text().count(f"{store.directory}/")


@pytest.mark.parametrize("most", [9, 8, 4, 1, 0])
def test_files_within_the_limit_are_opened_and_verified_once(
    filled: tuple[FeatureStore, list[FileRecord], Float32], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Every scan of n files opens only those above the limit, once for all blocks of a partition."""
    monkeypatch.setattr(feature_store_module, "_MOST_OPEN_FILES", most)
    store, opened, verified = FeatureStore(filled[0].directory, LAYOUT), [], []
    original, check = FeatureFile.open, feature_file.checksum
    monkeypatch.setattr(FeatureFile, "open", lambda *given: opened.append(given) or original(*given))
    monkeypatch.setattr(feature_file, "checksum", lambda rows: verified.append(len(rows)) or check(rows))
    view = store.view()
    reads: list[Callable[[], object]] = [
        lambda: list(view.blocks(3)),
        lambda: list(view.stored_blocks(3)),
        lambda: view.take(np.arange(23)),
        store.losses,
    ]
    for expected, read in zip((9, *[9 - most] * 3), reads, strict=True):
        opened.clear()
        read()
        assert len(opened) == expected
    # Three checkpoints of 23 rows, in two blocks of four rows or three rows a partition.
    assert sum(verified) == 3 * 23 + sum(_count_rows(store, key) for key in range(most, 9))


def _count_rows(store: FeatureStore, position: int) -> int:
    start, stop = store.layout.rows(position // store.layout.n_checkpoints)
    return stop - start


def test_a_store_may_have_more_files_than_the_process_has_descriptors(tmp_path: Path) -> None:
    layout = StoreLayout(n_rows=60, partition_rows=1, dim=DIM, dtype="float16", digests=("spec",) * 2)
    fill(FeatureStore(tmp_path, layout))
    store = FeatureStore(tmp_path, layout)
    with limit_descriptors(3):
        row_NF = np.concatenate([rows for _, rows in store.view().blocks(7)])
        assert np.array_equal(store.view().take(np.arange(60)), row_NF)


def test_pending_reads_are_the_files_to_open_and_the_bytes_to_verify(
    filled: tuple[FeatureStore, list[FileRecord], Float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, _ = filled
    view, row_bytes = store.view(), 4 * DIM
    assert view.pending_reads() == PendingReads(9, 3 * 23 * row_bytes, 3)
    assert store.view([1]).pending_reads() == PendingReads(3, 23 * row_bytes, 1)
    view.take([0])  # rows that are read by id are verified one by one, at every read
    assert view.pending_reads() == PendingReads(6, 3 * 23 * row_bytes, 3)
    store.file(2, 1).read_stored(0, 1)
    assert view.pending_reads() == PendingReads(5, (3 * 23 - 7) * row_bytes, 3)
    assert store.view([0, 2]).pending_reads() == PendingReads(4, 2 * 23 * row_bytes, 2)
    for _ in view.stored_blocks(8):
        pass
    assert view.pending_reads() == PendingReads(0, 0, 3)
    store.write(1, 2, make_block(8, 16, seed=2))
    assert view.pending_reads() == PendingReads(1, 8 * row_bytes, 3), "a new file is not verified"
    monkeypatch.setattr(feature_store_module, "_MOST_OPEN_FILES", 8)
    fresh = FeatureStore(store.directory, store.layout).view()
    assert fresh.pending_reads() == PendingReads(0, 0, 3), "every scan opens the files again"


def test_impossible_layouts_are_rejected() -> None:
    for wrong in (
        {"n_rows": 0},
        {"partition_rows": 0},
        {"dim": 0},
        {"dtype": "int3"},
        {"digests": ("",)},
        {"digests": ()},
    ):
        with pytest.raises(ValueError, match="impossible"):
            StoreLayout(**{**vars(LAYOUT), **wrong})
    store = FeatureStore(Path("nowhere"), LAYOUT)
    with pytest.raises(IndexError):
        store.write(3, 0, make_block(0, 8))
    with pytest.raises(IndexError):
        store.write(0, 3, make_block(0, 8))


def test_background_writes_give_the_same_files(tmp_path: Path) -> None:
    stores = [FeatureStore(tmp_path / name, LAYOUT) for name in ("now", "behind")]
    fill(stores[0])
    with WriteBehind(stores[1]) as behind:
        for checkpoint in range(LAYOUT.n_checkpoints):
            for partition, (start, stop) in enumerate(stores[1].partitions()):
                behind.write(partition, checkpoint, make_block(start, stop, dim=LAYOUT.dim, seed=checkpoint))
    contents = [{p.name: p.read_bytes() for p in sorted(store.directory.iterdir())} for store in stores]
    assert contents[0] == contents[1]


def test_a_failed_background_write_is_raised_and_stops_further_writes(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store", LAYOUT)
    bad = make_block(0, 8)
    bad.feature_ND[3, 1] = np.nan
    with pytest.raises(NonFiniteError, match="3"), WriteBehind(store) as behind:
        behind.write(0, 0, bad)
        behind.write(1, 0, make_block(8, 16))
    assert not list(store.directory.glob("*.h5"))
    with pytest.raises(NonFiniteError), WriteBehind(store) as behind:
        behind.write(0, 0, bad)
    with pytest.raises(KeyError), WriteBehind(store) as behind:
        behind.write(1, 0, make_block(8, 16))
        raise KeyError
    assert len(list(store.directory.glob("*.h5"))) == 1


def test_a_store_returns_the_rows_skipped_at_any_checkpoint_and_the_first_of_them(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, LAYOUT)
    skipped = {(0, 0), (7, 2), (8, 1), (8, 2), (22, 0), (22, 1), (22, 2)}
    for partition, (start, stop) in enumerate(store.partitions()):
        for checkpoint in range(3):
            block = make_block(start, stop, seed=checkpoint)
            for row in (row for row, at in skipped if at == checkpoint and start <= row < stop):
                block.feature_ND[row - start] = block.sqnorm_N[row - start] = 0
                block.loss_N[row - start] = np.nan
            store.write(partition, checkpoint, block)
    rows, first = store.skipped()
    assert (rows.tolist(), first.tolist()) == ([0, 7, 8, 22], [0, 2, 1, 0])
    assert {tuple(place) for place in np.argwhere(np.isnan(store.losses())).tolist()} == skipped
    assert rows.dtype == first.dtype == np.int64


def test_taken_rows_are_remembered_in_a_block(
    filled: tuple[FeatureStore, list[FileRecord], Float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, row_NF = filled
    view, ids = store.view(), np.array([0, 3, 7, 20], dtype=np.int64)
    reads: list[int] = []
    read = feature_store_module.take_rows
    monkeypatch.setattr(
        feature_store_module,
        "take_rows",
        lambda files, *rest, **options: reads.append(len(files)) or read(files, *rest, **options),
    )
    with store.remember_taken():
        assert np.array_equal(view.take(ids), row_NF[ids])
        assert np.array_equal(store.view().take(np.array([20, 0, 20])), row_NF[[20, 0, 20]])
        assert reads == [4]
        with store.remember_taken():
            assert np.array_equal(view.take(ids[1:]), row_NF[ids[1:]])
        assert np.array_equal(view.take(ids[2:]), row_NF[ids[2:]])
        assert reads == [4, 3]
        reads.pop()
        # Other rows, other checkpoints and cosine are read.
        assert np.array_equal(view.take(np.array([3, 4])), row_NF[[3, 4]])
        assert np.array_equal(store.view([1]).take(ids), row_NF[ids, DIM : 2 * DIM])
        store.view(cosine=True).take(ids)
        assert reads == [4, 2, 4, 4]
        with monkeypatch.context() as patched:
            patched.setattr(feature_store_module, "_TAKEN_BYTES", 0)
            view.take(np.array([5, 6]))
            view.take(np.array([5, 6]))
            assert reads[4:] == [2, 2]
    view.take(ids)
    assert reads[6:] == [4]
