"""Feature files: reading back, rejected input, and detection of damage.

Shapes: N rows, C checkpoints, D sketch dimension per checkpoint, F = C·D.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from blocks import CODES, DIM, DTYPES, make_block, make_header
from paths import ROOT, SUPPORT
from tracin_ann.errors import DamagedIndexError, NonFiniteError
from tracin_ann.files import file_digest
from tracin_ann.store import Dtype, FeatureBlock, FeatureFile, FileRecord
from tracin_ann.store.codec import decode_rows, encode_rows
from tracin_ann.store.feature_file import write_feature_file
from tracin_ann.store.stored_rows import FileHeader
from tracin_ann.store.taking import take_grouped_rows
from tracin_ann.store.taking import take_rows as take_rows_of_files


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 4, 11])
def test_a_file_is_read_back_unchanged(tmp_path: Path, dtype: Dtype, n_rows: int) -> None:
    block = make_block(100, 100 + n_rows)
    header = make_header(block, dtype=dtype)
    write_feature_file(tmp_path / "a.h5", block, header=header)
    file = FeatureFile.open(tmp_path / "a.h5", header)
    file.verify()
    assert file.header == header
    tolerance = {"float16": 2.0**-11, "float32": 0.0}.get(dtype, 0.0) * np.abs(block.feature_ND).max(axis=1)
    feature_ND, expected_ND = file.read(0, n_rows), block.feature_ND
    if dtype in CODES:
        expected_ND = np.empty_like(feature_ND)
        decode_rows(*encode_rows(block.feature_ND, dtype), expected_ND, dtype)
    assert (np.abs(feature_ND - expected_ND) <= tolerance[:, None]).all()
    assert np.array_equal(file.read(n_rows // 2, n_rows), feature_ND[n_rows // 2 :])
    assert file.read(1, 1).shape == (0, DIM)
    positions = np.array([n_rows - 1, 0, n_rows - 1])
    assert np.array_equal(take_rows(file, positions), feature_ND[positions])
    for name in ("sqnorm_N", "loss_N"):
        assert np.array_equal(getattr(file, name), getattr(block, name))
    for outside in (np.array([n_rows]), np.array([-1])):
        with pytest.raises(IndexError):
            take_rows(file, outside)
    with pytest.raises(IndexError):
        file.read(0, n_rows + 1)


@pytest.mark.parametrize("lead", ["link", "storage", "virtual"])
def test_row_numbers_outside_of_the_file_are_rejected(tmp_path: Path, lead: str) -> None:
    block = make_block(0, 9)
    for name in ("a.h5", "b.h5"):
        write_feature_file(tmp_path / name, block, header=make_header(block))
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        held = file["loss"][...]
        del file["loss"]
        if lead == "link":
            file["loss"] = h5py.ExternalLink(str(tmp_path / "b.h5"), "/loss")
        elif lead == "storage":
            (tmp_path / "raw").write_bytes(held.tobytes())
            file.create_dataset("loss", held.shape, "<f4", external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)])
        else:
            layout = h5py.VirtualLayout(held.shape, "<f4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "b.h5"), "loss", held.shape)
            file.create_virtual_dataset("loss", layout)
    with pytest.raises(DamagedIndexError, match="loss is not a dataset of this file"):
        FeatureFile.open(tmp_path / "a.h5")


def test_a_file_can_be_read_by_h5py(tmp_path: Path) -> None:
    block = make_block(0, 9)
    write_feature_file(tmp_path / "a.h5", block, header=make_header(block))
    with h5py.File(tmp_path / "a.h5") as file:
        assert {name: (data.chunks, data.compression) for name, data in file.items()} == dict.fromkeys(
            [
                *("feature", "exponent", "id", "sqnorm", "loss"),
                *("block_checksum", "row_checksum", "column_checksum"),
            ],
            (None, None),
        )
        feature_ND = np.ldexp(file["feature"][...].astype(np.float32), file["exponent"][...][:, None].astype(int))
        assert np.array_equal(feature_ND, FeatureFile.open(tmp_path / "a.h5").read(0, 9))
        assert file.attrs["spec_digest"] == b"spec"
        assert file.attrs["format"] == b"tracin_ann.features"
        assert file.attrs["version"] == 3


def test_equal_arguments_give_equal_bytes_in_any_process(tmp_path: Path) -> None:
    block = make_block(0, 9)
    record = write_feature_file(tmp_path / "a.h5", block, header=make_header(block))
    again = write_feature_file(tmp_path / "b.h5", block, header=make_header(block))
    assert (record.size, record.digest) == (again.size, again.digest)
    assert record == FileRecord("a.h5", (tmp_path / "a.h5").stat().st_size, file_digest(tmp_path / "a.h5"))
    code = (
        f"import sys\nsys.path[:0] = {[str(SUPPORT), str(ROOT)]!r}\nfrom pathlib import Path\nfrom blocks import *\n"
        "from tracin_ann.store.feature_file import write_feature_file\nblock = make_block(0, 9)\n"
        f"print(write_feature_file(Path({str(tmp_path / 'c.h5')!r}), block, header=make_header(block)).digest)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == record.digest


@pytest.mark.parametrize(
    "other", [{"spec_digest": "b"}, {"checkpoint": 1}, {"dim": 6}, {"dtype": "float32"}, {"start": 1}]
)
def test_another_header_is_rejected_by_name(tmp_path: Path, other: dict[str, object]) -> None:
    block = make_block(0, 9)
    header = make_header(block)
    write_feature_file(tmp_path / "a.h5", block, header=header)
    expected = FileHeader(**{**vars(header), **other})
    ((name, value),) = other.items()
    got = getattr(header, name)
    with pytest.raises(DamagedIndexError, match=rf"a\.h5.*got {name}={got}, expected {name}={value}; "):
        FeatureFile.open(tmp_path / "a.h5", expected)


@pytest.mark.parametrize("version", [1, 2, 4])
def test_another_version_is_rejected(tmp_path: Path, version: int) -> None:
    block = make_block(0, 9)
    write_feature_file(tmp_path / "a.h5", block, header=make_header(block))
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.attrs["version"] = np.int64(version)
    with pytest.raises(DamagedIndexError, match=rf"version .*{version}\), this program reads .*; run the build again"):
        FeatureFile.open(tmp_path / "a.h5")


def test_a_file_that_cannot_be_mapped_is_not_reported_as_damaged(
    tmp_path: Path,
) -> None:
    block = make_block(0, 9)
    path, header = tmp_path / "a.h5", make_header(block)
    write_feature_file(path, block, header=header)

    def refuse(*given: object) -> NoReturn:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)) as found:
        FeatureFile.open(path, header, refuse)
    assert (found.value.errno, found.value.filename) == (errno.ENOMEM, str(path))


@pytest.mark.parametrize("length", [0, 7, 600, 4096, -2000, -1])
def test_a_truncated_feature_file_is_rejected(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.h5"
    block = make_block(0, 600)
    write_feature_file(path, block, header=make_header(block))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedIndexError, match=r"a\.h5.*expected an intact feature file; run"):
        FeatureFile.open(path)


def test_a_file_that_is_not_a_feature_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "junk.h5").write_bytes(b"junk" * 1000)
    with h5py.File(tmp_path / "foreign.h5", "w") as foreign:
        foreign["feature"] = np.zeros(3)
    (tmp_path / "directory.h5").mkdir()
    for name in ("junk.h5", "foreign.h5", "directory.h5"):
        with pytest.raises(DamagedIndexError, match=name):
            FeatureFile.open(tmp_path / name)
    with pytest.raises(DamagedIndexError, match=r"none\.h5: got no file"):
        FeatureFile.open(tmp_path / "none.h5")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_byte_of_data_is_detected_and_its_rows_are_named(tmp_path: Path, dtype: Dtype) -> None:
    path = tmp_path / "a.h5"
    block = make_block(50, 61)
    header = make_header(block, dtype=dtype)
    write_feature_file(path, block, header=header)
    content, sound_ND = path.read_bytes(), FeatureFile.open(path).read(0, 11)
    with h5py.File(path) as file:
        spans = {
            name: (data.id.get_offset(), data.dtype.itemsize * data.size, data.dtype.itemsize * data.size // len(data))
            for name, data in file.items()
        }
    offset, size, row_bytes = spans.pop("feature")
    for at, length, _ in spans.values():
        for position in range(0, length, 5):
            _flip(path, content, at + position)
            with pytest.raises(DamagedIndexError, match=r"a\.h5: got header or columns are altered"):
                FeatureFile.open(path, header)
    reads: list[Callable[[FeatureFile, int], object]] = [
        lambda file, row: file.verify(),
        lambda file, row: take_rows(file, np.array([0, 10, *range(11)])),
        lambda file, row: take_rows(file, np.array([row]), unit=True),
        lambda file, row: file.read(0, 11),
        # The rest of the block is damaged as well.
        lambda file, row: file.read(row // 4 * 4, row // 4 * 4 + 1),
    ]
    for position in range(0, size, 3):
        _flip(path, content, offset + position)
        row, file = position // row_bytes, FeatureFile.open(path, header)
        with pytest.raises(DamagedIndexError, match=rf"a\.h5: row {50 + row} is altered.*run tracin-verify --repair"):
            reads[position % len(reads)](file, row)
        others = np.delete(np.arange(11), row)
        assert np.array_equal(take_rows(file, others), sound_ND[others])


def take_rows(file: FeatureFile, positions: npt.NDArray[np.int64], **options: bool) -> npt.NDArray[np.float32]:
    """Return the rows by both functions, which must agree."""
    row_KD = np.empty((len(positions), file.header.dim), dtype=np.float32)
    take_grouped_rows([(file, positions[:1]), (file, positions[1:])], row_KD, **options)
    assert np.array_equal(row_KD, take_rows_of_files([[file]] * len(positions), positions.tolist(), **options))
    return row_KD


def _flip(path: Path, content: bytes, position: int) -> None:
    damaged = bytearray(content)
    damaged[position] ^= 1 << position % 8
    path.write_bytes(damaged)


@pytest.mark.parametrize("altered", [[0, 1], [3, 4], [0, 5, 10]])
def test_altered_rows_are_counted_and_distinguished_from_the_others(tmp_path: Path, altered: list[int]) -> None:
    block = make_block(50, 61)
    path, header = tmp_path / "a.h5", make_header(block)
    write_feature_file(path, block, header=header)
    with h5py.File(path, "r+") as file:
        for row in altered:
            file["feature"][row, 0] = 1
    named = rf"{len(altered)} of rows {50 + altered[0]}\.\.{50 + altered[-1]} are altered"
    with pytest.raises(DamagedIndexError, match=named):
        FeatureFile.open(path, header).verify()
    with pytest.raises(DamagedIndexError, match=named):
        take_rows(FeatureFile.open(path, header), np.arange(11))


def test_blocks_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block(0, 11)
    write_feature_file(tmp_path / "a.h5", block, header=make_header(block))
    file = FeatureFile.open(tmp_path / "a.h5")
    file.read(5, 6)
    assert np.flatnonzero(file.verified_blocks).tolist() == [1]
    file.read(0, 11)
    monkeypatch.setattr("xxhash.xxh3_64_intdigest", lambda data: pytest.fail("checked twice"))
    file.read(0, 11)


def test_any_flipped_byte_is_detected_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    block = make_block(0, 9)
    header = make_header(block)
    write_feature_file(path, block, header=header)
    content = path.read_bytes()
    feature_ND = FeatureFile.open(path).read(0, 9)
    for position in range(0, len(content), 29):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            file = FeatureFile.open(path)
            file.verify()
        except DamagedIndexError:
            continue
        assert file.header == header
        assert np.array_equal(file.read(0, 9), feature_ND)
        assert np.array_equal(file.loss_N, block.loss_N)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", ["feature_ND", "sqnorm_N", "loss_N"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nonfinite_value_is_rejected_with_its_row_and_checkpoint(
    tmp_path: Path, dtype: Dtype, column: str, value: float
) -> None:
    block = make_block(40, 49)
    getattr(block, column)[3] = value
    with pytest.raises(NonFiniteError, match=r"of row 43 at checkpoint 2 .*got -?(nan|inf) at a loss of"):
        write_feature_file(tmp_path / "a.h5", block, header=make_header(block, dtype=dtype))
    assert list(tmp_path.iterdir()) == []


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.h5"
    record = write_feature_file(path, make_block(0, 9), header=make_header(make_block(0, 9)))

    def fail(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    block = make_block(0, 9, seed=1)
    with pytest.raises(OSError, match="power cut"):
        write_feature_file(path, block, header=make_header(block))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.h5"]
    assert file_digest(path) == record.digest


def test_a_block_of_the_wrong_shape_is_rejected(tmp_path: Path) -> None:
    block = make_block(0, 9)
    good = vars(block)
    for wrong in (
        {"ids_N": np.arange(9, dtype=np.int32)},
        {"ids_N": np.arange(9, dtype=np.int64) * 2},
        {"loss_N": good["loss_N"][:8]},
        {"feature_ND": good["feature_ND"].astype(np.float64)},
        {"feature_ND": good["feature_ND"][:, 0]},
        {"feature_ND": good["feature_ND"][:, :0]},
    ):
        with pytest.raises(ValueError, match="expected|consecutive"):
            FeatureBlock(**{**good, **wrong})
    with pytest.raises(ValueError, match="expected"):
        make_block(4, 4)
    with pytest.raises(ValueError, match="does not match"):
        write_feature_file(tmp_path / "a.h5", block, header=make_header(make_block(1, 10)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_a_skipped_row_is_read_as_zeros_with_a_nonfinite_loss(tmp_path: Path, dtype: Dtype, loss: float) -> None:
    block, finite = make_block(40, 49), make_block(40, 49)
    for row in (0, 3, 8):
        block.feature_ND[row] = block.sqnorm_N[row] = 0
        block.loss_N[row] = loss
    header = make_header(block, dtype=dtype)
    for name, each in (("a.h5", block), ("b.h5", finite)):
        write_feature_file(tmp_path / name, each, header=header)
    file, other = (FeatureFile.open(tmp_path / name, header) for name in ("a.h5", "b.h5"))
    file.verify()
    assert file.skipped_K.tolist() == [0, 3, 8] and other.skipped_K.tolist() == []
    assert not file.read(0, 9)[[0, 3, 8]].any() and not file.read(0, 9, unit=True)[[0, 3, 8]].any()
    remaining = [1, 2, 4, 5, 6, 7]
    assert np.array_equal(take_rows(file, np.array(remaining)), take_rows(other, np.array(remaining)))
    np.testing.assert_array_equal(file.loss_N[[0, 3, 8]], np.float32(loss))


@pytest.mark.parametrize("spoilt", ["feature", "exponent", "sqnorm", "loss", "a norm alone"])
def test_a_nonfinite_row_that_is_not_skipped_is_rejected(tmp_path: Path, spoilt: str) -> None:
    block = make_block(0, 9)
    block.feature_ND[3] = block.sqnorm_N[3] = 0
    block.loss_N[3] = np.nan
    write_feature_file(tmp_path / "a.h5", block, header=make_header(block))
    FeatureFile.open(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        if spoilt == "loss":
            file["loss"][5] = np.inf
        elif spoilt == "a norm alone":
            file["sqnorm"][5] = np.inf
        else:
            file[spoilt][3] = 1
    with pytest.raises(DamagedIndexError, match="rows that are neither finite nor skipped"):
        FeatureFile.open(tmp_path / "a.h5")
