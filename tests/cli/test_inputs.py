"""Queries from files and from the command line: `--input` and `--text` of tracin-query and tracin-explain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from invocation import run
from tasks import typed
from tasks.toy import CONFIG
from tracin_ann import InfluenceIndex, QueryOptions, build, read_records
from tracin_ann.cli import query as query_module
from tracin_ann.cli.explain import main as explain
from tracin_ann.cli.query import main as query

TASK = f"{Path(typed.__file__).resolve()}:task"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("typed")
    build(TASK, out / "index", CONFIG, arguments={"folder": str(out)})
    return out


@pytest.fixture
def index(folder):
    return str(folder / "index")


def ask(index, *words):
    """Return the lines of the answers, and those of the same command with rows of query_data."""
    result = run(query, index, "--batch-size", 4, "--format", "jsonl", *words)
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def write_records(path):
    records = [{"text": text, "label": i % 3} for i, text in enumerate(typed.QUERIES)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"{record['text']},{record['label']}\n" for record in records))
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("more", [(), ("--exact",), ("--together",), ("--rerank", "exact", "--candidates", 12)])
def test_records_get_the_answers_of_rows(index, tmp_path, suffix, more):
    path = write_records(tmp_path / f"new{suffix}")
    found = ask(index, "--input", path, *more)
    expected = ask(index, "--ids", "0-3", *more)
    assert [line | {"side": "query"} for line in found] == expected
    assert {line["side"] for line in found} == {"input"}


def test_inputs_are_counted_over_all_files_and_texts(index, tmp_path, monkeypatch):
    """Also if they are answered in several lots."""
    monkeypatch.setattr(query_module, "_LOT", 4)
    path = write_records(tmp_path / "new.jsonl")
    found = ask(index, "--input", path, "--text", "grey grey", "--text", "green", "--input", path)
    assert [line["query"] for line in found] == list(range(10))
    assert [line["text"] for line in found] == [*typed.QUERIES, *typed.QUERIES, "grey grey", "green"]
    assert [line["proponents"] for line in found[:4]] == [line["proponents"] for line in ask(index, "--ids", "0-3")]
    assert [line["proponents"] for line in found[:4]] == [line["proponents"] for line in found[4:8]]


def test_a_text_is_a_query(index):
    (found,) = ask(index, "--text", "red red blue")
    (expected,) = ask(index, "--ids", 0)
    assert found | {"side": "query"} == expected
    assert found["text"] == "red red blue"


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_is_a_query(index, tmp_path, suffix):
    image_type = pytest.importorskip("PIL.Image")
    image_type.fromarray(np.full((6, 4), 128, np.uint8)).save(tmp_path / f"grey{suffix}", quality=100)
    (found,) = ask(index, "--input", tmp_path / f"grey{suffix}")
    assert found["text"] == "a picture of (4, 6)"
    example = typed.encode("") | {"x": typed.torch.full((5,), 0.5)}
    task = typed.task(str(Path(index).parent))
    (expected,) = InfluenceIndex.open(index, task, device="cpu").query_examples([example], QueryOptions())
    assert [hit["id"] for hit in found["proponents"]] == [hit.id for hit in expected.proponents] != []
    assert [hit["score"] for hit in found["proponents"]] == [hit.score for hit in expected.proponents]


def test_tables_and_files_show_inputs(index, tmp_path):
    words = (index, "--text", "red red blue", "-k", 2)
    result = run(query, *words)
    assert "input 0: red red blue" in result.stdout
    assert "1; 30 of 30 rows scored per direction" in result.stderr
    for name in ("hits.csv", "hits.parquet"):
        assert run(query, *words, "--output", tmp_path / name).exit_code == 0
        record = read_records(tmp_path / name)[0]
        assert (record["side"], record["query"], record["query_text"]) == ("input", 0, "red red blue")


def test_a_report_shows_inputs(index, tmp_path):
    pytest.importorskip("jinja2")
    path = write_records(tmp_path / "new.jsonl")
    result = run(query, index, "--input", path, "--ids", 1, "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "page.html").read_text()
    assert "input 3" in page and "query 1" in page and "blue white white" in page


def test_inputs_and_rows_are_queried_together(index):
    found = ask(index, "--text", "green", "--text", "red", "--ids", "0-1", "--train-ids", "3-4", "--together")
    assert [(line["side"], line["query"]) for line in found] == [
        ("input", "mean of 2"),
        ("query", "mean of 2"),
        ("train", "mean of 2"),
    ]


def test_a_text_is_explained(index):
    def parts(*words):
        result = run(explain, index, "--train-id", 5, "--format", "jsonl", *words)
        assert result.exit_code == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    found, expected = parts("--text", "red red blue"), parts("--id", 0)
    assert [part | {"side": "query"} for part in found] == expected
    assert found[0]["side"] == "input"


@pytest.mark.parametrize("command", [query, explain])
def test_a_task_without_read_query_names_the_remedy(index, folder, command):
    words = ("--train-id", 5) if command is explain else ()
    result = run(command, index, *words, "--text", "x", "--task", TASK, "--task-arg", f"folder={folder}", *TYPED_NO)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the task cannot read --text: got a task without read_query, expected ")
    assert "add it to the task, such as read_query=" in result.stderr


TYPED_NO = ("--task-arg", "typed=no")


def check_error(message, command, *words, status=1):
    result = run(command, *words)
    assert result.exit_code == status, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()[-1:]
    assert message in line


def test_errors_name_file_and_line(index, tmp_path):
    path = tmp_path / "new.jsonl"
    path.write_text('{"text": "red"}\n\n{"text": \n')
    check_error(f"line 3 of {path} is malformed", query, index, "--input", path)
    path.write_text('{"text": "red"}\n{"words": "red"}\n')
    message = (
        f"Task.read_query fails on record 1 of {path}: got KeyError: 'text', expected an example, made from a record"
    )
    check_error(f"{message} with the field 'words'", query, index, "--input", path)
    path.write_text("")
    check_error(f"{path} has no records", query, index, "--input", path)
    check_error("does not exist", query, index, "--input", tmp_path / "none.csv", status=2)
    (tmp_path / "a.txt").write_text("red")
    check_error("a.txt is in no format of records", query, index, "--input", tmp_path / "a.txt")
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    check_error("the picture", query, index, "--input", tmp_path / "a.png")
    check_error("this text is refused", query, index, "--text", "refused")


def test_options_that_exclude_each_other(index, tmp_path):
    message = "--self-influence ranks all training rows: got --text"
    check_error(message, query, index, "--self-influence", "--text", "x", status=2)
    message = "--against compares two sets of rows of query_data: got --input"
    path = write_records(tmp_path / "new.jsonl")
    check_error(message, query, index, "--ids", 0, "--against", 1, "--input", path, status=2)
    check_error("2 queries: got --id and --text", explain, index, "--train-id", 5, "--id", 0, "--text", "x", status=2)
    message = "--input takes one example: got 4 examples"
    check_error(message, explain, index, "--train-id", 5, "--input", path, status=2)
    check_error("no query: got no ids, expected --ids, --train-ids, --input or --text", query, index, status=2)
