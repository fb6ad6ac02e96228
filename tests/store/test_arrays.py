"""Arrays and strings in one file: memory and disk use are proportional to content, and damage is rejected."""

from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paths import ROOT, SUPPORT
from tasks.toy import CONFIG, make_rows, make_toy_task
from tracin_ann import InfluenceIndex, build
from tracin_ann.errors import DamagedIndexError
from tracin_ann.store.arrays import make_text_array, read_arrays, write_arrays
from tracin_ann.store.columns import RowFilter, RowTable, read_columns, write_columns

AWKWARD = [
    "",
    "a",
    "a\0",
    "\0",
    "naïve ✓",
    "\ud800 alone",
    "\ud83d\ude00 as two",
    "😀 as one",
    "two\nlines",
    "\x1b[31m",
]
LONG, N = 10_000_000, 300


def uneven_strings() -> list[str]:
    """Return 300 short strings and one with ten million characters."""
    return ["x" * LONG if i == 7 else f"row {i}" for i in range(N)]


def test_text_is_read_back_unchanged(tmp_path: Path) -> None:
    held = {
        "text": make_text_array(AWKWARD),
        "none": make_text_array([]),
        "empty": make_text_array([""]),
        "number": np.arange(3.0),
    }
    write_arrays(tmp_path / "a.npz", held)
    found = read_arrays(tmp_path / "a.npz")
    assert set(found) == set(held)
    for name, array in held.items():
        assert found[name].dtype == array.dtype
        assert found[name].tolist() == array.tolist()


def test_one_long_string_among_short_ones_takes_only_its_own_size(tmp_path: Path) -> None:
    table = RowTable({"text": make_text_array(uneven_strings())}, make_text_array(uneven_strings()))
    path = tmp_path / "columns.npz"
    tracemalloc.start()
    write_columns(path, table)
    read = read_columns(path, N)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size < 2 * LONG + 100_000
    assert peak < 8 * LONG
    assert read.columns["text"].tolist() == uneven_strings()
    assert RowFilter(where=("text=row 5,row 9",)).allowed(N, read.columns, np.zeros(0, np.int64)).tolist() == [5, 9]


LIMITED = """
import resource, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_arrays import build_uneven_index
import torch, h5py, faiss
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), now + (1 << 30)))
build_uneven_index(Path(sys.argv[1]))
"""


def build_uneven_index(folder: Path) -> None:
    """Build and query an index with a column and ids of very different lengths."""
    texts = uneven_strings()
    data: list[Any] = [(x, y, text) for (x, y), text in zip(make_rows(N), texts, strict=True)]
    sides = {"train_data": lambda: data, "query_data": lambda: data[:2]}
    task = make_toy_task(folder, **sides, columns=lambda row: {"text": row[2]}, ids=lambda row: f"id {row[2]}")
    build(task, folder / "index", CONFIG)
    index = InfluenceIndex.open(folder / "index", task)
    assert {row.id for row in index.self_influence(rows=RowFilter(where=("text=row 3",)))} == {"id row 3"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space, as Linux counts it")
@pytest.mark.slow
def test_an_index_of_strings_of_very_different_lengths_is_built_and_queried_in_a_gigabyte(tmp_path: Path) -> None:
    code = LIMITED.format(paths=[str(SUPPORT), str(Path(__file__).parent), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_filters_compare_text(tmp_path: Path) -> None:
    columns = {"text": make_text_array(["b", "a", "c", "a\0"])}
    none = np.zeros(0, np.int64)
    for condition, expected in {
        "text=a": [1],
        "text!=a": [0, 2, 3],
        "text<b": [1, 3],
        "text>=b": [0, 2],
        "text=c,b": [0, 2],
        "text=d": [],
    }.items():
        assert RowFilter(where=(condition,)).allowed(4, columns, none).tolist() == expected


def read_members(**arrays: Any) -> bytes:
    content = io.BytesIO()
    np.savez(content, allow_pickle=True, **{name.replace("_", " "): array for name, array in arrays.items()})
    return content.getvalue()


def compress() -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **{"column a": np.zeros(10_000_000)})
    return content.getvalue()


def make_false_claim(shape: tuple[int, ...], descr: str = "<i8") -> bytes:
    """Return a file whose header states more data than it contains."""
    header, content = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": descr})
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("column a.npy", header.getvalue())
    return content.getvalue()


BYTES = np.frombuffer(b"abcd", np.uint8)
HOSTILE: dict[str, Callable[[], bytes]] = {
    "offsets that fall": lambda: read_members(utf8_a=BYTES, offsets_a=np.array([0, 3, 1, 4])),
    "offsets past the end": lambda: read_members(utf8_a=BYTES, offsets_a=np.array([0, 2, 9])),
    "offsets before the start": lambda: read_members(utf8_a=BYTES, offsets_a=np.array([-2, 2, 4])),
    "offsets that begin late": lambda: read_members(utf8_a=BYTES, offsets_a=np.array([1, 4])),
    "offsets that overflow": lambda: read_members(utf8_a=BYTES, offsets_a=np.array([0, 2**63 - 1, -(2**63), 4])),
    "offsets with fractions": lambda: read_members(utf8_a=BYTES, offsets_a=np.array([0.0, 4.0])),
    "no offset": lambda: read_members(utf8_a=BYTES, offsets_a=np.zeros(0, np.int64)),
    "pairs of offsets": lambda: read_members(utf8_a=BYTES, offsets_a=np.array([[0, 4]])),
    "offsets missing": lambda: read_members(utf8_a=BYTES),
    "a character cut in two": lambda: read_members(
        utf8_a=np.frombuffer("é".encode(), np.uint8), offsets_a=np.array([0, 1, 2])
    ),
    "no UTF-8": lambda: read_members(utf8_a=np.frombuffer(b"\xff", np.uint8), offsets_a=np.array([0, 1])),
    "wide bytes": lambda: read_members(utf8_a=np.arange(4), offsets_a=np.array([0, 4])),
    "objects": lambda: read_members(column_a=np.array([{}], dtype=object)),
    "compressed": compress,
    "a terabyte claimed": lambda: make_false_claim((2**37,)),
    "a trillion texts of no width": lambda: make_false_claim((10**12,), "<U0"),
    "negative shapes": lambda: make_false_claim((-1, -1)),
    "characters that there are not": lambda: read_members(column_a=np.array([0x7FFFFFFF], "<u4").view("<U1")),
    "no zip": lambda: b"PK",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_text_is_rejected_in_one_line_before_memory_is_allocated(tmp_path: Path, case: str) -> None:
    path = tmp_path / "columns.npz"
    path.write_bytes(HOSTILE[case]())
    tracemalloc.start()
    with pytest.raises(DamagedIndexError, match=r"cannot read .*columns\.npz") as refused:
        read_columns(path, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in str(refused.value)
    assert peak < 8_000_000


def test_text_of_fixed_width_from_earlier_versions_is_read(tmp_path: Path) -> None:
    path = tmp_path / "columns.npz"
    np.savez(path, **{"column label": np.array(["a", "bcd"]), "ids": np.array(["x", "y"])})
    table = read_columns(path, 2)
    assert (table.columns["label"].tolist(), table.id_at(1)) == (["a", "bcd"], "y")
