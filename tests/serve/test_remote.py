"""`tracin-query URL`: the answers of `InfluenceIndex`, and one line for each fault of the server or the options."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from explorer import N_TRAIN, Place, build_place, listen, read_query
from invocation import run
from paths import ROOT
from tracin_ann import InfluenceIndex, QueryOptions
from tracin_ann.cli.query import main
from tracin_ann.cli.remote import _Questions
from tracin_ann.cli.table import print_results
from tracin_ann.results import Answer, Answers, open_writer
from tracin_ann.serve import Settings, create_app
from tracin_ann.store import RowFilter

TOKEN = "0123456789abcdef"
NEW = [{"text": "one"}, {"text": "three"}, {"text": "fourteen"}]


@pytest.fixture(scope="module")
def address(place: Place) -> Iterator[str]:
    with listen(create_app(place.location)) as address:
        yield address


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("new") / "new.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in NEW))
    return path


def ask(*words: object) -> list[dict[str, Any]]:
    """Return the lines that a command prints."""
    result = run(main, *words, "--format", "jsonl", "--quiet")
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def lines_of(answers: Answers) -> list[dict[str, Any]]:
    return json.loads(json.dumps(answers.lines()))


def fail(status: int, *words: object, printed: int = 0) -> str:
    """Return the only line on stderr of a command that fails, after it has printed the answers to some queries."""
    result = run(main, *words, "--format", "jsonl")
    assert (result.exit_code, len(result.stdout.splitlines())) == (status, printed)
    (line,) = result.stderr.splitlines()
    return line


def assert_close(lines: list[dict[str, Any]], answers: list[Answer]) -> None:
    """Compare answers up to rounding, which other queries in a batch change."""
    for line, answer in zip(lines, answers, strict=True):
        assert (line["query"], line["side"]) == (answer.query, answer.side)
        scores = {hit["row"]: hit["score"] for hit in [*line["proponents"], *line["opponents"]]}
        assert scores == pytest.approx({hit.row: hit.score for hit in answer.hits}, rel=1e-5)


def test_rows_of_both_sides(address: str, index: InfluenceIndex) -> None:
    found = ask(address, "--ids", "0-4,7", "--train-ids", "3", "-k", 4)
    options = QueryOptions(k=4)
    assert found[:6] == lines_of(index.query([0, 1, 2, 3, 4, 7], (), options))
    assert found[6:] == lines_of(index.query((), [3], options))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["-k", 3, "--score", "cosine"], QueryOptions(k=3, cosine=True)),
        (["--cosine"], QueryOptions(cosine=True)),
        (["--rerank", "none", "--search", "scan"], QueryOptions(rerank="none", search="scan")),
        (["--score", "fisher", "--damping", 0.5], QueryOptions(score="fisher", damping=0.5)),
        (["--checkpoints", "1"], QueryOptions(checkpoints=(1,))),
        (["--recall", 0.9], QueryOptions(recall=0.9)),
        (
            ["--where", "label=1,2", "--only", "0-29", "--without", "4,5"],
            QueryOptions(rows=RowFilter(tuple(range(30)), (4, 5), ("label=1,2",))),
        ),
    ],
    ids=str,
)
def test_options(address: str, index: InfluenceIndex, words: list[object], options: QueryOptions) -> None:
    assert ask(address, "--ids", "0-2", *words) == lines_of(index.query([0, 1, 2], (), options))
    texts = ["--text", "one", "--text", "three", "--text", "fourteen"]
    expected = lines_of(index.query_examples([read_query(record) for record in NEW], options))
    assert ask(address, *texts, *words) == expected


def test_examples_of_files_and_texts(address: str, index: InfluenceIndex, new: Path) -> None:
    found = ask(address, "--input", new, "--text", "twenty")
    assert [line["row"] for line in found] == [0, 1, 2, 3]
    assert_close(found, index.query_examples([read_query(record) for record in [*NEW, {"text": "twenty"}]]))


def test_a_request_has_as_many_queries_as_the_server_allows(place: Place, index: InfluenceIndex, new: Path) -> None:
    with listen(create_app(place.location, Settings(most_rows=2))) as address:
        found = ask(address, "--ids", "0-4,7", "--input", new, "--text", "twenty", "--train-ids", "5")
        assert "got 3, expected at most 2" in fail(2, address, "--ids", "0-2", "--together")
    examples = [read_query(record) for record in [*NEW, {"text": "twenty"}]]
    assert [line["row"] for line in found] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 7, 5]
    assert_close(found, [*index.query_examples(examples), *index.query([0, 1, 2, 3, 4, 7], [5])])


def test_pictures(address: str, index: InfluenceIndex, tmp_path: Path) -> None:
    for width in (3, 4):
        Image.new("RGB", (width, 2)).save(tmp_path / f"{width}.png")
    found = ask(address, "--input", tmp_path / "3.png", "--input", tmp_path / "4.png", "--text", "one", "-k", 2)
    examples = [*(read_query({"image": Image.new("RGB", (width, 2))}) for width in (3, 4)), read_query(NEW[0])]
    assert [line["row"] for line in found] == [0, 1, 2]
    for line, example in zip(found, examples, strict=True):
        assert [line | {"row": 0}] == lines_of(index.query_examples([example], QueryOptions(k=2)))


def test_together_and_against(address: str, index: InfluenceIndex, new: Path) -> None:
    assert ask(address, "--ids", "0,1,2", "--together") == lines_of(index.query([0, 1, 2], together=True))
    examples = [read_query(record) for record in NEW[:2]]
    together = lines_of(index.query_examples(examples, together=True))
    assert ask(address, "--text", "one", "--text", "three", "--together") == together
    assert ask(address, "--ids", "0", "--against", "1") == lines_of(index.contrast([0], [1]))


def test_own_ids(address: str, index: InfluenceIndex) -> None:
    found = ask(address, "--own-ids", "--ids", "query/3,query/1,query/2", "--train-ids", "train/7")
    assert [line["query"] for line in found] == ["query/3", "query/1", "query/2", "train/7"]
    assert found[:3] == lines_of(index.query([3, 1, 2]))


def test_tables_and_files(address: str, index: InfluenceIndex, tmp_path: Path, capsys: Any) -> None:
    answers = index.query([0, 1, 2])
    print_results(answers)
    result = run(main, address, "--ids", "0-2")
    assert result.stdout == capsys.readouterr().out
    assert result.stderr.startswith("queries: 3; ") and f"of {len(index)} rows scored" in result.stderr
    run(main, address, "--ids", "0-2", "--output", tmp_path / "hits.csv")
    stream = io.StringIO()
    with open_writer("csv", stream, answers.fields) as write:
        write(answers.records())
    assert (tmp_path / "hits.csv").read_text() == stream.getvalue()


def test_fields_of_a_score_with_a_curvature_matrix(address: str, index: InfluenceIndex, tmp_path: Path) -> None:
    run(main, address, "--ids", "0", "--score", "fisher", "--output", tmp_path / "hits.csv")
    head = (tmp_path / "hits.csv").read_text().splitlines()[0]
    assert head.split(",") == index.query([0], (), QueryOptions(score="fisher")).fields.names


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--rerank", "exact"], "--rerank exact"),
        (["--exact"], "--exact"),
        (["--device", "cpu"], "--device"),
        (["--task", "x.py:task"], "--task"),
        (["--task-arg", "a=b"], "--task-arg"),
        (["--memory", "1GB"], "--memory"),
        (["--html", "report.html"], "--html"),
        (["--own-ids", "--only", "train/3"], "--own-ids with --only"),
    ],
    ids=str,
)
def test_options_of_an_open_index_are_rejected(address: str, words: list[str], flag: str) -> None:
    line = fail(2, address, "--ids", "0", *words)
    assert line == (
        f"error: {flag} needs an index in a directory: got {address}, expected DIR; name its directory, or leave out "
        f"{flag}"
    )


def test_what_the_server_rejects_is_reported_as_by_an_open_index(address: str, place: Place) -> None:
    assert fail(2, address, "--ids", "999") == (
        "error: no such row in query_data: got 999, expected 0 to 11; change the ids"
    )
    assert "k is above the limit: got 5000" in fail(2, address, "--ids", "0", "-k", 5000)
    assert "no query: got no rows" in fail(2, address)
    assert "refused" in fail(1, address, "--text", "refused text")
    assert "nothing" in fail(2, address, "--ids", "0", "--where", "nothing=1")


def test_a_record_that_json_cannot_represent(address: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["one"], "when": pa.array([1], pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "new.parquet")
    for more in ([], ["--together"]):
        line = fail(2, address, "--input", tmp_path / "new.parquet", *more)
        assert line.startswith("error: record 0 of ") and " has no JSON: got Object of type datetime is not" in line


def test_an_example_that_the_task_refuses_is_named(place: Place, new: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["one", "two", "three", "refused"]))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with listen(create_app(place.location, Settings(most_rows=2))) as address:
        line = fail(1, address, "--input", new, "--input", path, printed=5)
        assert line.startswith(f"error: {path}: Task.read_query fails on record 3: got KeyError")
        assert "--text: Task.read_query fails on record 1" in fail(1, address, "--text", "one", "--text", "refused")
        line = fail(1, address, "--input", tmp_path / "bad.png")
        assert line.startswith(
            f"error: {tmp_path}/bad.png: the picture cannot be read: got UnidentifiedImageError, exp"
        )


def test_requests_stay_below_the_largest_size(place: Place, index: InfluenceIndex, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    texts = ["x" * length for length in (1500, 1600, 10, 1700)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "large.png").write_bytes(b"x" * 5000)
    with listen(create_app(place.location, Settings(upload_bytes=4000))) as address:
        assert [line["row"] for line in ask(address, "--input", path)] == [0, 1, 2, 3]
        line = fail(2, address, "--input", path, "--together")
        assert line.startswith("error: all records: too large for a request: got 4,")
        line = fail(2, address, "--text", "one", "--text", "y" * 3500)
        assert line.startswith("error: record 1 of --text: too large for a request: got 3,5")
        line = fail(2, address, "--input", tmp_path / "large.png")
        assert line.startswith(
            f"error: {tmp_path}/large.png: too large for a request: got 5,000 bytes, expected at most"
        )
        line = fail(2, address, "--ids", "0", "--where", "name=" + "x" * 60_000)
        assert line.startswith("error: the options are too long for a request: got 60,")


def test_together_takes_rows_of_one_kind(address: str, tmp_path: Path) -> None:
    assert "the mean of rows of one data set" in fail(2, address, "--ids", "0", "--train-ids", "1", "--together")
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    assert "the mean of rows of one data set" in fail(2, address, "--input", tmp_path / "a.png", "--together")


def test_a_token(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with listen(create_app(place.location, Settings(token=TOKEN))) as address:
        assert "token" in fail(1, address, "--ids", "0")
        assert "token" in fail(1, address, "--ids", "0", "--token", TOKEN[1:])
        assert len(ask(address, "--ids", "0", "--token", TOKEN)) == 1
        monkeypatch.setenv("TRACIN_SERVE_TOKEN", TOKEN)
        assert len(ask(address, "--ids", "0")) == 1
    monkeypatch.delenv("TRACIN_SERVE_TOKEN")
    assert "--token is for a server: got runs" in fail(2, "runs", "--ids", "0", "--token", TOKEN)


@pytest.mark.parametrize("token", ["secret\n", "secret\r\nX: y", "secret word", "secr\xe9t", "\N{SNOWMAN}secret"])
def test_a_token_that_no_header_can_have_is_not_shown(token: str) -> None:
    line = fail(2, "http://127.0.0.1:1", "--ids", "0", "--token", token)
    assert line.startswith("error: bad --token: got a character that a header cannot have") and "secr" not in line


@pytest.mark.parametrize(
    "address", ["http://", "http://:80", "http://h:port", "http://h:70000", "http://h:0", "http://h?x=1", "http://h#x"]
)
def test_a_malformed_address(address: str) -> None:
    line = fail(2, address, "--ids", "0", "--token", TOKEN)
    assert line == (f"error: bad address of a server: got {address}, expected http://HOST:PORT; correct the address")


def test_an_address_with_a_password_is_not_shown() -> None:
    line = fail(2, "http://user:secret@127.0.0.1:1", "--ids", "0")
    assert "bad address of a server: got a user name in it" in line and "secret" not in line


def test_an_address_without_a_scheme_and_in_capitals(address: str) -> None:
    short = address.removeprefix("http://")
    assert fail(2, short, "--ids", "0").endswith(f"; write http://{short}")
    assert len(ask(address.replace("http", "HTTP"), "--ids", "0")) == 1


def test_options_that_are_not_utf8(address: str) -> None:
    line = fail(2, address, "--ids", "0", "--where", "name=\udcff")
    assert line == r"error: an option is not UTF-8 text: got '\udcff', expected UTF-8; correct it"


def test_two_scores(address: str) -> None:
    assert "two scores: got --cosine and --score fisher" in fail(
        2, address, "--ids", "0", "--score", "fisher", "--cosine"
    )


def test_a_proxy_is_not_used_for_this_machine(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert len(ask(address, "--ids", "0")) == 1


def test_requests_of_one_command_read_one_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = build_place(tmp_path)
    read = _Questions._read_answers

    def append(self: Any, *arguments: Any) -> Any:
        if len(place.open()) == N_TRAIN:
            place.append(2)
        return read(self, *arguments)

    monkeypatch.setattr(_Questions, "_read_answers", append)
    with listen(create_app(place.location, Settings(most_rows=2))) as address:
        assert "the index has changed: got generation 1, expected generation 2" in fail(
            1, address, "--ids", "0-3", printed=2
        )
        assert len(ask(address, "--ids", "0-3")) == 4


def test_torch_is_not_imported(address: str) -> None:
    words = [address, "--ids", "0", "--text", "one"]
    code = f"import sys; from tracin_ann.cli.query import main; main({words}, standalone_mode=False); "
    code += "print(sorted({'torch', 'faiss', 'tracin_ann.scoring'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "input one/3" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_server(address: str) -> None:
    line = fail(1, "http://127.0.0.1:1", "--ids", "0")
    assert line.startswith("error: cannot reach http://127.0.0.1:1: got ConnectionRefusedError: [Errno 111] Connect")
    assert fail(1, f"{address}/other", "--ids", "0").startswith(f"error: {address}/other does not reply as expected")


@contextmanager
def reply(status: int, content: bytes, **headers: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield the address of a server with one reply to everything, and the headers of the requests."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            """Log nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


LIMITS = {"rows": 100, "bytes": 10_000}
ABOUT = {"rows": 40, "query_rows": 12, "limits": LIMITS, "default_score": "tracin", "generation": 1}
HIT = {"id": 3, "row": 3, "score": 1.5}
LINE = {"query": 0, "side": "query", "row": 0, "proponents": [HIT], "opponents": []}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"\xff",
        b"[]",
        b"{}",
        json.dumps(ABOUT).encode(),
        b"[" * 100_000,
        *(
            json.dumps(ABOUT | {"answers": [LINE], "how": ["scan"], "rows_scored": [1]} | change).encode()
            for change in (
                {"rows": "many"},
                {"rows": float("inf")},
                {"limits": LIMITS | {"rows": 0}},
                {"limits": {}},
                {"answers": [], "how": [], "rows_scored": []},
                {"answers": [LINE] * 2, "how": ["scan"] * 2, "rows_scored": [1] * 2},
                {"how": []},
                {"rows_scored": [float("inf")]},
            )
        ),
        *(
            json.dumps(ABOUT | {"answers": [LINE | change], "how": ["scan"], "rows_scored": [1]}).encode()
            for change in (
                {"side": "elsewhere"},
                {"row": None},
                {"query": [1]},
                {"score": "unknown"},
                {"proponents": [HIT | {"score": "high"}]},
                {"proponents": [{"id": 1}]},
                {"proponents": [HIT | {"score": 10**400}]},
                {"proponents": [HIT | {"row": 10**30}]},
                {"proponents": 3},
                {"rows": [], "text": "a"},
            )
        ),
    ],
    ids=lambda content: content[:5] + content[-40:],
)
def test_another_reply_than_that_of_a_server(content: bytes) -> None:
    with reply(200, content) as (address, _):
        line = fail(1, address, "--ids", "0")
    assert line.startswith(f"error: {address} does not reply as expected: got ")
    assert line.endswith("or install the same version of tracin_ann here and there")


def test_the_reply_that_the_others_differ_from() -> None:
    content = json.dumps(ABOUT | {"answers": [LINE], "how": ["scan"], "rows_scored": [1]}).encode()
    with reply(200, content) as (address, _):
        (line,) = ask(address, "--ids", "0")
    assert line == {"schema": 1, **LINE}


@pytest.mark.parametrize("content", [b"", b"{}", b'{"error": 3}', b'{"error": {"type": "UsageError"}}'], ids=str)
def test_an_error_of_another_server(content: bytes) -> None:
    with reply(500, content) as (address, _):
        line = fail(1, address, "--ids", "0")
    assert line.startswith(f"error: {address} does not reply as expected: got ValueError: status 500, expected")


def test_text_of_a_server_cannot_control_the_terminal() -> None:
    error = {"type": "UsageError", "what": "\x1b[2Jwiped", "got": "a\nb", "expected": "c", "remedy": "d"}
    with reply(422, json.dumps({"error": error}).encode()) as (address, _):
        line = fail(2, address, "--ids", "0")
    assert "\x1b" not in line and "wiped: got a b, expected c; d" in line


def test_the_token_is_not_sent_to_another_server() -> None:
    with reply(200, b"{}") as (other, seen), reply(302, b"", Location=f"{other}/api/v1/index") as (address, first):
        line = fail(1, address, "--ids", "0", "--token", TOKEN)
    assert line.startswith(f"error: {address} does not reply as expected: got ValueError: status 302")
    assert len(first) == 1 and not seen
