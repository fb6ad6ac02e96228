"""Records of JSON Lines, CSV and Parquet files, DataFrames and Arrow data sets: rows, pickling, errors by line."""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tasks.toy import CONFIG, make_toy_task
from tracin_ann import InfluenceIndex, build, read_records
from tracin_ann.errors import MissingPackageError, TaskError
from tracin_ann.task import open_data
from tracin_ann.task.datasets.records import as_map_style

ROWS = [{"text": f"row {i}", "label": i % 3, "weight": i / 4} for i in range(10)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows=ROWS):
    path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n")
    return path


def write_parquet(path, rows=ROWS, **options):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


WRITERS = {"a.jsonl": write_jsonl, "a.csv": write_csv, "a.parquet": write_parquet}
every_format = pytest.mark.parametrize("name", WRITERS)


@every_format
def test_rows_are_dicts_by_position(tmp_path, name):
    records = read_records(WRITERS[name](tmp_path / name))
    assert len(records) == 10
    assert list(records) == ROWS
    assert records[-1] == ROWS[-1]
    assert records[2:8:2] == ROWS[2:8:2]
    assert [type(value) for value in records[3].values()] == [str, int, float]
    with pytest.raises(IndexError):
        records[10]


@every_format
def test_pickled_records_read_the_same_file(tmp_path, name):
    records = read_records(WRITERS[name](tmp_path / name), transform=lambda_free)
    records[0]
    again = pickle.loads(pickle.dumps(records))
    assert list(again) == [lambda_free(row) for row in ROWS]


def lambda_free(row):
    return row["text"], row["label"]


@every_format
def test_threads_read_the_same_rows(tmp_path, name):
    records = read_records(WRITERS[name](tmp_path / name))
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(records.__getitem__, list(range(10)) * 20)) == ROWS * 20


@every_format
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_reads_the_same_rows(tmp_path, name):
    records = read_records(WRITERS[name](tmp_path / name))
    records[0]
    child = os.fork()
    if child == 0:
        os._exit(0 if list(records) == ROWS else 1)
    assert os.waitpid(child, 0)[1] == 0


@every_format
def test_a_file_that_changed_is_not_unpickled(tmp_path, name):
    path = WRITERS[name](tmp_path / name)
    pickled = pickle.dumps(read_records(path))
    WRITERS[name](path, ROWS[:5])
    with pytest.raises(TaskError, match=f"{name} has changed since its records were counted"):
        pickle.loads(pickled)


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xe2\x80\xa8"}\n\n{"a": 3}')
    assert list(read_records(path)) == [{"a": 1}, {"a": "\u2028"}, {"a": 3}]


def test_cells_have_the_type_of_their_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "\ufeff"
        "whole,real,code,mixed,gaps,text\n"
        '1,1,007,1,,"two\nlines, ""quoted"""\n'
        "\n"
        "-20,2.5e3,1,x,4,\u2028\n"
        "3,nan,2,3,,\n"
    )
    first, second, third = read_records(path)
    text = 'two\nlines, "quoted"'
    assert first == {"whole": 1, "real": 1.0, "code": "007", "mixed": "1", "gaps": None, "text": text}
    assert second == {"whole": -20, "real": 2500.0, "code": "1", "mixed": "x", "gaps": 4, "text": "\u2028"}
    assert math.isnan(third["real"]) and third["text"] == ""
    assert [type(first[name]) for name in ("whole", "real")] == [int, float]


def test_a_table_may_be_separated_by_tabs(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("a\tb\n1\tx,y\n")
    assert list(read_records(path)) == [{"a": 1, "b": "x,y"}]


def test_a_cell_may_be_long(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a\n" + "x" * 200_000 + "\n")
    assert len(read_records(path)[0]["a"]) == 200_000


def test_row_groups_are_read_one_at_a_time(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", row_group_size=3)
    monkeypatch.setattr("tracin_ann.task.datasets.records._CACHED_BYTES", 1)
    records = read_records(path)
    assert [records[i] for i in (9, 0, 5, 3)] == [ROWS[i] for i in (9, 0, 5, 3)]
    assert len(records._groups) == 1


MALFORMED = {
    "a.jsonl": {
        b'{"a": 1}\n\n{"a":\n': "line 3 of .*a.jsonl is malformed: got Expecting value at column 6",
        b"[1, 2]\n": "line 1 of .* is malformed: got an array, expected one JSON object per line",
        b"7\n": "line 1 of .* is malformed: got a int",
        b'{"a": "\xff"}\n': "line 1 of .* is malformed: got UnicodeDecodeError",
        b"\n \n": "a.jsonl has no records",
        b"": "a.jsonl has no records",
    },
    "a.csv": {
        b"a,b\n1,2\n3\n": "line 3 of .*a.csv is malformed: got 1 cell, expected 2, as in the header",
        b'a,b\n1,2\n3,"4\n': "line 3 of .* is malformed: got Error: unexpected end of data",
        b"a,a\n1,2\n": "line 1 of .* is malformed: got the column 'a' twice",
        b"a\n\xff\n": "line 2 of .* is malformed: got UnicodeDecodeError",
        b"a,b\n": "a.csv has no records",
    },
    "a.parquet": {b"text": "a.parquet cannot be read: got ArrowInvalid: .*expected a Parquet file"},
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, each in MALFORMED.items() for content in each])
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, content):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=MALFORMED[name][content]) as caught:
        list(read_records(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_the_line_of_a_record_counts_the_lines_of_records_before_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b\n"1\n2\n3",4\n5\n')
    with pytest.raises(TaskError, match="line 5 of"):
        read_records(path)


def test_other_files_are_rejected(tmp_path):
    with pytest.raises(TaskError, match=r"a.txt is in no format of records: got suffix '.txt'"):
        read_records(tmp_path / "a.txt")
    with pytest.raises(TaskError, match=r"a.csv cannot be read: got No such file or directory"):
        read_records(tmp_path / "a.csv")
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(TaskError, match=r"b.csv cannot be read: got Is a directory"):
        read_records(tmp_path / "b.csv")
    os.mkfifo(tmp_path / "c.jsonl")
    with pytest.raises(TaskError, match=r"c.jsonl cannot be read: got a FIFO"):
        read_records(tmp_path / "c.jsonl")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tracin-ann\[tables\]'"):
        read_records(path)


# Data sets of dicts, used by a task.

TRAIN = [{"x": [0.1 * i, -1.0, float(i % 4), 0.5, 1.0], "label": i % 3} for i in range(24)]


def collate_dicts(rows):
    return torch.tensor([row["x"] for row in rows]), torch.tensor([row["label"] for row in rows])


def make_frame(folder):
    return pytest.importorskip("pandas").DataFrame(TRAIN)


def make_arrow(folder):
    return pytest.importorskip("datasets").Dataset.from_list(TRAIN)


def make_arrow_on_disk(folder):
    datasets = pytest.importorskip("datasets")
    if not (folder / "arrow").exists():
        datasets.Dataset.from_list(TRAIN).save_to_disk(str(folder / "arrow"))
    return datasets.load_from_disk(str(folder / "arrow"))


def make_jsonl(folder):
    return read_records(write_jsonl(folder / "train.jsonl", TRAIN))


SOURCES = {
    "DataFrame": make_frame,
    "datasets in memory": make_arrow,
    "datasets on disk": make_arrow_on_disk,
    "JSON Lines": make_jsonl,
}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("source", SOURCES)
def test_a_task_gives_the_answers_of_a_list(tmp_path, source):
    data = SOURCES[source](tmp_path)
    task = make_toy_task(tmp_path, train_data=lambda: data, query_data=lambda: TRAIN[:2], collate=collate_dicts)
    build(task, tmp_path / "out", CONFIG)
    listed = make_toy_task(
        tmp_path,
        train_data=lambda: TRAIN,
        query_data=lambda: TRAIN[:2],
        collate=collate_dicts,
        checkpoints=task.checkpoints,
    )
    # The digest of the training rows is that of a list of dicts, or the list would not be the index's data.
    index = InfluenceIndex.open(tmp_path / "out", listed, device="cpu", batch_size=4)
    from_list = index.query([0, 1])
    from_data = index.query_examples(data, ids=[0, 1])
    assert [answer.hits for answer in from_list] == [answer.hits for answer in from_data]
    assert all(answer.hits for answer in from_list)


def test_a_data_set_on_disk_is_sent_to_workers_by_its_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"x": list(range(20_000))}).save_to_disk(str(tmp_path / "arrow"))
    data = open_data(
        make_toy_task(tmp_path, train_data=lambda: datasets.load_from_disk(str(tmp_path / "arrow"))), "train"
    )
    pickled = pickle.dumps(data)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled)[19_999] == {"x": 19_999}


def test_a_frame_keeps_the_types_of_its_columns():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5], "c": ["x", "y"], "d": [True, False]}, index=[7, 3])
    rows = as_map_style(frame)
    assert rows[1] == {"a": 2, "b": 1.5, "c": "y", "d": False}
    assert [type(value) for value in rows[0].values()] == [int, float, str, bool]
    assert rows[-1] == rows[1] and len(rows) == 2
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)
    with pytest.raises(TaskError, match="got the column 'a' twice"):
        as_map_style(pd.DataFrame([[1, 2]], columns=["a", "a"]))


def test_splits_are_not_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(train=make_arrow(tmp_path), test=make_arrow(tmp_path))
    task = make_toy_task(tmp_path, train_data=lambda: splits, collate=collate_dicts)
    with pytest.raises(TaskError, match="got a DatasetDict with the keys train, test, .* return one of its values"):
        build(task, tmp_path / "out", CONFIG)


def test_a_stream_of_datasets_is_named(tmp_path):
    stream = make_arrow(tmp_path).to_iterable_dataset()
    task = make_toy_task(tmp_path, train_data=lambda: stream, collate=collate_dicts)
    with pytest.raises(TaskError, match="got IterableDataset, an IterableDataset, .*materialise"):
        build(task, tmp_path / "out", CONFIG)


def test_a_line_that_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' + '{"a":' * 100_000 + "\n")
    with pytest.raises(TaskError, match="line 2 of .* is malformed: got RecursionError"):
        read_records(tmp_path / "rows.jsonl")[1]
