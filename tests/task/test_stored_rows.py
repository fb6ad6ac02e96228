"""Rows of a stream in a folder: equal to those of the stream, complete or absent, read without pickle."""

from __future__ import annotations

import collections
import fcntl
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tasks.toy import CONFIG, make_rows, make_toy_task
from tracin_ann import InfluenceIndex, build, materialise
from tracin_ann.errors import TaskError
from tracin_ann.task import encode_content
from tracin_ann.task.datasets.stored_rows import decode_row, encode_row

TENSORS = [
    torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    torch.zeros(0, 3),
    torch.tensor(7),
    torch.tensor([True, False]),
    torch.arange(6, dtype=torch.int16).reshape(2, 3).T,
    torch.randn(3, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    torch.tensor([1 + 2j]).conj(),
    torch.tensor([0.0, float("nan"), float("-inf")], dtype=torch.float64),
]
ARRAYS = [
    np.arange(6, dtype=">i2").reshape(2, 3)[:, ::-1],
    np.zeros((0, 2)),
    np.float32(0.1),
    np.array(3),
    np.array([1j]),
]
VALUES = [None, True, 2**70, -0.0, 1e-310, float("nan"), float("inf"), "é\ud800\n", b"\x00\xff", b"", [], (), {}]
ROWS = [
    *TENSORS,
    *ARRAYS,
    *VALUES,
    (torch.ones(2), 3),
    {"x": [1, (2.5, {"y": np.ones(3, np.uint8)})], 5: b"abc", "list": ["list", "tensor"]},
    {"text": "a", "ids": list(range(100))},
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: repr(row)[:40])
def test_a_row_is_read_back_to_the_bit(row):
    again = decode_row(encode_row(row))
    assert type(again) is type(row)
    assert encode_content(again) == encode_content(row)
    assert repr(again) == repr(row)


def test_an_image_is_read_back_to_the_bit():
    image_type = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4), np.uint8)
    for mode in ("1", "L", "LA", "RGB", "RGBA"):
        image = image_type.fromarray(pixels).convert(mode)
        again = decode_row(encode_row((image, 1)))[0]
        assert (again.mode, again.size, again.tobytes()) == (mode, (4, 5), image.tobytes())


def test_a_folder_gives_the_rows_of_the_stream(tmp_path):
    rows = materialise(iter(ROWS), tmp_path / "deep" / "rows")
    assert len(rows) == len(ROWS)
    assert [encode_content(row) for row in rows] == [encode_content(row) for row in ROWS]
    assert encode_content(rows[-1]) == encode_content(ROWS[-1])
    with ThreadPoolExecutor(4) as threads:
        places = list(range(len(ROWS))) * 10
        found = list(threads.map(lambda i: encode_content(rows[i]), places))
    assert found == [encode_content(ROWS[i]) for i in places]
    assert encode_content(list(pickle.loads(pickle.dumps(rows)))) == encode_content(list(rows))
    assert sorted(os.listdir(tmp_path / "deep")) == ["rows"]


def test_a_folder_is_written_once(tmp_path):
    materialise(iter([1, 2]), tmp_path / "rows")

    def fail():
        raise AssertionError("read again")
        yield

    assert list(materialise(fail(), tmp_path / "rows")) == [1, 2]


def test_a_reused_object_is_stored_as_it_was(tmp_path):
    def stream():
        row = {"x": torch.zeros(1)}
        for i in range(3):
            row["x"][0] = i
            yield row

    assert [row["x"].item() for row in materialise(stream(), tmp_path / "rows")] == [0, 1, 2]


def test_an_interrupted_stream_leaves_nothing(tmp_path):
    def stream():
        yield 1
        raise ValueError("the connection\nended")

    with pytest.raises(TaskError, match=r"row 1 of the stream cannot be read: got ValueError: the connection ended"):
        materialise(stream(), tmp_path / "rows")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_writer_leaves_no_folder_and_is_cleaned_up(tmp_path):
    def stream():
        yield from range(1000)
        os._exit(3)

    child = os.fork()
    if child == 0:
        materialise(stream(), tmp_path / "rows")
    os.waitpid(child, 0)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".rows.partial-")
    assert list(materialise(range(5), tmp_path / "rows")) == list(range(5))
    assert os.listdir(tmp_path) == ["rows"]


def test_the_folder_of_a_running_writer_is_kept(tmp_path):
    other = tmp_path / ".rows.partial-0"
    other.mkdir()
    with (other / "rows.bin").open("xb") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        materialise(range(5), tmp_path / "rows")
        assert other.is_dir()


def test_the_first_of_two_writers_wins(tmp_path):
    def stream():
        yield "first of the second writer"
        materialise(["of the first writer"], tmp_path / "rows")

    assert list(materialise(stream(), tmp_path / "rows")) == ["of the first writer"]
    assert os.listdir(tmp_path) == ["rows"]


def test_progress_counts_rows(tmp_path):
    calls = []
    materialise(range(600), tmp_path / "list", lambda *call: calls.append(call))
    assert calls == [("rows", 256, 600), ("rows", 512, 600), ("rows", 600, 600)]
    calls.clear()
    materialise(iter(range(300)), tmp_path / "stream", lambda *call: calls.append(call))
    assert calls == [("rows", 256, 256), ("rows", 300, 300)]


Named = collections.namedtuple("Named", "x")


@pytest.mark.parametrize(
    ("row", "got"),
    [
        (object(), "a object"),
        ({1.5: 2}, "a dict"),
        (np.array(["text"]), "a ndarray"),
        (Named(1), "a Named"),
        (torch.eye(2).to_sparse(), "a Tensor"),
        ({1, 2}, "a set"),
    ],
)
def test_rows_that_cannot_be_stored(tmp_path, row, got):
    with pytest.raises(TaskError, match=f"row 1 of the stream cannot be written: got {got}, expected tensors, arrays"):
        materialise([0, [row]], tmp_path / "rows")
    assert os.listdir(tmp_path) == []


def test_folders_with_other_content(tmp_path):
    with pytest.raises(TaskError, match="the stream has no rows"):
        materialise([], tmp_path / "rows")
    (tmp_path / "empty").mkdir()
    assert list(materialise([1], tmp_path / "empty")) == [1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(TaskError, match=r"mine is not a folder of rows: got a folder without index.json"):
        materialise([1], tmp_path / "mine")
    with pytest.raises(TaskError, match=r"notes.txt is not a folder of rows: got a file"):
        materialise([1], tmp_path / "mine" / "notes.txt")


def test_damage_is_reported_in_one_line(tmp_path):
    folder = tmp_path / "rows"
    materialise(ROWS, folder)
    whole = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    changes = {
        "rows.bin": [b"", whole["rows.bin"][:-1]],
        "ends.npy": [b"", whole["ends.npy"][:-1]],
        "index.json": [b"", b"[]", json.dumps({"format": "other"}).encode()],
    }
    for name, contents in changes.items():
        for content in contents:
            (folder / name).write_bytes(content)
            with pytest.raises(TaskError, match="the rows in .* cannot be read: got .*; delete the folder") as caught:
                materialise(ROWS, folder)
            assert "\n" not in str(caught.value)
        (folder / name).write_bytes(whole[name])
    (folder / "rows.bin").write_bytes(b"\0" * len(whole["rows.bin"]))
    with pytest.raises(TaskError, match="the rows in .* cannot be read"):
        materialise(ROWS, folder)[0]


def test_a_task_gives_the_answers_of_a_list(tmp_path):
    train = make_rows(20)
    task = make_toy_task(
        tmp_path,
        train_data=lambda: materialise(iter(train), tmp_path / "rows"),
    )
    build(task, tmp_path / "out", CONFIG)
    listed = make_toy_task(tmp_path, train_data=lambda: train, checkpoints=task.checkpoints)
    with_list, with_folder = (InfluenceIndex.open(tmp_path / "out", each, device="cpu") for each in (listed, task))
    assert list(with_list.query([0, 1])) == list(with_folder.query([0, 1]))
