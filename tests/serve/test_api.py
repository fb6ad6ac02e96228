"""The API's records are those of the commands; its errors have four parts and fitting statuses."""

from __future__ import annotations

import io
import json
import time

import pytest

from explorer import N_QUERIES, N_TRAIN, serve
from tracin_ann import QueryOptions
from tracin_ann.analysis import explain, find_duplicates, find_hubs, find_mislabelled
from tracin_ann.distributed import NoReplyError
from tracin_ann.errors import DamagedIndexError, UsageError, WorkerError
from tracin_ann.serve import Settings
from tracin_ann.serve.problems import find_status
from tracin_ann.store import RowFilter

API = "/api/v1"


def get(client, address, **parameters):
    response = client.get(API + address, params=parameters)
    assert response.status_code == 200, response.text
    return response.json()


def finish(client, **work):
    """Return the state and the records of a job that has ended."""
    started = client.post(f"{API}/jobs", json=work)
    assert started.status_code == 202, started.text
    place = started.headers["Location"]
    while (state := client.get(place).json())["state"] in ("queued", "running"):
        time.sleep(0.005)
    records, offset = [], 0
    while offset is not None and state["state"] == "done":
        page = client.get(f"{place}/records", params={"offset": offset, "limit": 7}).json()
        records += page["records"]
        offset = page["next"]
    return state, records


def as_json(records):
    return json.loads(json.dumps(records))


@pytest.mark.parametrize(
    ("parameters", "options"),
    [
        ({}, QueryOptions()),
        ({"k": 3, "score": "cosine"}, QueryOptions(k=3, score="cosine")),
        ({"checkpoints": [1], "rerank": "none"}, QueryOptions(checkpoints=(1,), rerank="none")),
        ({"where": ["label=1", "name!=train 4"]}, QueryOptions(rows=RowFilter(where=("label=1", "name!=train 4")))),
        ({"only": [1, 2, 3], "without": [2]}, QueryOptions(rows=RowFilter((1, 2, 3), (2,)))),
        ({"score": "fisher", "damping": 0.5}, QueryOptions(score="fisher", damping=0.5)),
    ],
)
def test_answers_are_the_lines_of_the_library(client, index, parameters, options):
    found = get(client, "/answers", rows=[3, 0], **parameters)
    expected = index.query([3, 0], (), options)
    assert found["answers"] == as_json(expected.lines())
    assert found["how"] == [answer.how for answer in expected]
    assert (found["schema"], found["generation"]) == (1, 1)


def test_training_rows_groups_and_contrasts_are_queries(client, index):
    assert get(client, "/answers", side="train", rows=[5])["answers"] == as_json(index.query((), [5]).lines())
    together = get(client, "/answers", rows=[1, 2], together=True)
    assert together["answers"] == as_json(index.query([1, 2], together=True).lines())
    contrast = get(client, "/answers", rows=[1, 2], against=[3])
    assert contrast["answers"] == as_json(index.contrast([1, 2], [3]).lines())


def test_queries_are_named_by_the_ids_of_the_task(client):
    by_id = get(client, "/answers", ids=["query/4"])
    assert by_id["answers"] == get(client, "/answers", rows=[4])["answers"]
    assert client.get(f"{API}/answers", params={"ids": "query/none"}).status_code == 404


def test_examples_that_are_not_in_the_index(client, index):
    response = client.post(f"{API}/answers", json={"records": [{"text": "abc"}, {"text": "z"}], "k": 2})
    examples = [index.task.read_query({"text": text}) for text in ("abc", "z")]
    assert response.json()["answers"] == as_json(index.query_examples(examples, QueryOptions(k=2)).lines())


def test_a_picture_is_decoded_and_written_again(client, index):
    image = pytest.importorskip("PIL.Image")
    data = io.BytesIO()
    image.new("RGB", (9, 2), "red").save(data, "JPEG", comment=b"a comment")
    response = client.post(f"{API}/answers/picture", files={"picture": ("../x.php", data.getvalue())}, params={"k": 1})
    (answer,) = response.json()["answers"]
    assert answer["query"] == "picture/9" and len(answer["proponents"]) == 1


def test_explanations(client, index):
    found = get(client, "/explanations", row=3, query=2)
    expected = explain(index, 3, 2)
    assert found["records"] == as_json(expected.lines())
    assert (found["score"], found["stored_score"]) == (expected.score, expected.stored_score)


def test_rows_are_listed_in_pages(client):
    rows, offset = [], 0
    while offset is not None:
        page = get(client, "/rows/train", offset=offset, limit=7, where="label=1")
        rows += [record["row"] for record in page["records"]]
        offset = page["next"]
    assert rows == list(range(1, N_TRAIN, 3)) and page["total"] == len(rows)
    assert get(client, "/rows/query", offset=N_QUERIES)["records"] == []


def test_a_row(client, index):
    record = get(client, "/rows/train/7")["record"]
    (own,) = [found.score for found in index.self_influence() if found.row == 7]
    assert record["self_influence"] == pytest.approx(own)
    assert record["columns"] == {"label": 1, "nan": None, "name": "train 7"}
    assert get(client, "/rows/query/7")["record"] == {"id": "query/7", "row": 7, "text": "query 7"}


def test_the_index(client, index):
    found = get(client, "/index")
    assert (found["rows"], found["query_rows"], found["generation"]) == (N_TRAIN, N_QUERIES, 1)
    assert [checkpoint["learning_rate"] for checkpoint in found["checkpoints"]] == [0.5, 0.125]
    assert found["quality"] == index.manifest.quality_summary


def test_jobs_return_the_records_of_the_library(client, index):
    assert finish(client, kind="mislabelled", k=9)[1] == as_json(find_mislabelled(index, k=9).lines())
    assert finish(client, kind="duplicates", threshold=0.6)[1] == as_json(find_duplicates(index, 0.6).lines())
    assert finish(client, kind="hubs", hits=3)[1] == as_json(find_hubs(index, k=3).lines())
    assert finish(client, kind="self-influence", k=9)[1] == as_json(index.self_influence(9).lines())
    explained = explain(index, 3, 2, score="fisher", damping=0.1)
    state, records = finish(client, kind="explanation", row=3, query=2, score="fisher", damping=0.1)
    assert records == as_json(explained.lines())
    summary = client.get(f"{API}/jobs/{state['name']}/records").json()["summary"]
    assert summary == {"score": explained.score, "stored_score": explained.stored_score}
    options = QueryOptions(k=4, candidates=9, rerank="exact")
    exact = [line for row in (2, 5) for line in index.query([row], (), options).lines()]
    assert finish(client, kind="exact", rows=[2, 5], k=4, candidates=9)[1] == as_json(exact)


def test_exact_scores_of_all_rows(client, index):
    state, records = finish(client, kind="exact", rows=[2], every_row=True, k=6, where=["label!=2"])
    options = QueryOptions(k=6, exact=True, rows=RowFilter(where=("label!=2",)))
    assert records == as_json(index.query([2], (), options).lines())
    assert state["state"] == "done"


@pytest.mark.parametrize(
    ("address", "parameters"),
    [
        ("/index", {}),
        ("/rows/train", {}),
        ("/rows/train/1", {}),
        ("/answers", {"rows": 1}),
        ("/explanations", {"row": 1, "query": 1}),
    ],
)
def test_a_request_can_continue_the_current_generation(client, address, parameters):
    found = client.get(API + address, params=parameters)
    again = client.get(API + address, params=parameters | {"generation": found.json()["generation"]})
    assert again.status_code == 200, again.text
    assert client.get(API + address, params=parameters | {"generation": 7}).status_code == 409


ERRORS = [
    ("/rows/train/40", {}, 404),
    ("/rows/query/-1", {}, 404),
    ("/rows/other/1", {}, 422),
    ("/answers", {"rows": 99}, 404),
    ("/answers", {"rows": "x"}, 422),
    ("/answers", {}, 422),
    ("/answers", {"rows": 1, "ids": "query/1"}, 422),
    ("/answers", {"rows": 1, "k": 0}, 422),
    ("/answers", {"rows": 1, "k": 101}, 422),
    ("/answers", {"rows": 1, "K": 10}, 422),
    ("/answers", {"rows": 1, "rerank": "exact"}, 422),
    ("/answers", {"rows": 1, "where": "label"}, 422),
    ("/answers", {"rows": 1, "damping": "nan", "score": "fisher"}, 422),
    ("/answers", {"rows": list(range(101))}, 422),
    ("/answers", {"rows": 1, "generation": 7}, 409),
    ("/rows/train", {"limit": 501}, 422),
    ("/rows/query", {"where": "label=1"}, 422),
    ("/explanations", {"row": 40, "query": 1}, 404),
    ("/explanations", {"row": 1, "query": 99}, 404),
    ("/explanations", {"row": 1, "query": 1, "score": "cosine"}, 422),
    ("/explanations", {"row": 1, "query": 1, "by_token": True}, 422),
    ("/jobs/none", {}, 404),
    ("/jobs/none/records", {}, 404),
    ("/none", {}, 404),
]


@pytest.mark.parametrize(("address", "parameters", "status"), ERRORS)
def test_errors_have_four_parts(client, address, parameters, status):
    response = client.get(API + address, params=parameters)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"type", "what", "got", "expected", "remedy"}
    assert all(error.values()), error


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"kind": "exact", "rows": [99]}, 202),
        ({"kind": "exact", "rows": [1], "candidates": 1001}, 422),
        ({"kind": "exact", "rows": [1], "score": "cosine"}, 422),
        ({"kind": "mislabelled", "k": 10_001}, 422),
        ({"kind": "explanation", "row": 3, "query": 99}, 202),
        ({"kind": "explanation", "row": 3, "query": 1, "score": "cosine"}, 422),
        ({"kind": "explanation", "row": 3, "query": 1, "damping": -1}, 422),
        ({"kind": "other"}, 422),
        ({"kind": "hubs", "hits": 101}, 422),
    ],
)
def test_jobs_with_bad_options(client, body, status):
    response = client.post(f"{API}/jobs", json=body)
    assert response.status_code == status, response.text
    if status == 202:
        state, _ = finish(client, **body)
        assert state["state"] == "failed" and state["error"]["what"] == "no such row in query_data"
        assert client.get(f"{API}/jobs/{state['name']}/records").status_code == 404


@pytest.mark.parametrize("text", ["refused", "refused\ud800", "refused" * 5000])
def test_examples_that_the_task_rejects(client, text):
    body = json.dumps({"records": [{"text": text}]})
    response = client.post(f"{API}/answers", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.json()["error"]["what"] == "Task.read_query fails on record 0"


def test_bodies_that_are_no_json(client):
    assert client.post(f"{API}/answers", content=b"{").status_code == 422
    assert client.post(f"{API}/jobs", content=b"\xff").status_code in (400, 422)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"not a picture" * 99])
def test_files_that_are_no_pictures(client, data):
    pytest.importorskip("PIL.Image")
    response = client.post(f"{API}/answers/picture", files={"picture": ("a.png", data)})
    assert response.status_code == 422
    assert response.json()["error"]["what"] == "the picture cannot be read"


def test_a_picture_with_too_many_pixels_is_not_decoded(client):
    image = pytest.importorskip("PIL.Image")
    data = io.BytesIO()
    image.new("1", (5000, 5000)).save(data, "PNG")
    response = client.post(f"{API}/answers/picture", files={"picture": ("a.png", data.getvalue())})
    assert response.status_code == 422
    assert response.json()["error"]["got"] == "5000 x 5000 pixels"


def test_a_busy_server_says_when_to_try_again(place):
    with serve(place.location, Settings(most_waiting=0)) as busy:
        response = busy.get(f"{API}/answers", params={"rows": 1})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    assert response.json()["error"]["what"] == "too many requests wait for the index"


def test_too_many_jobs_are_rejected(place):
    with serve(place.location, Settings(most_jobs=1, most_queued_jobs=1)) as client:
        with client.app.state.service.turns.take_for_request():
            statuses = [client.post(f"{API}/jobs", json={"kind": "self-influence"}).status_code for _ in range(3)]
            response = client.post(f"{API}/jobs", json={"kind": "self-influence"})
            (waiting, first) = client.get(f"{API}/jobs").json()["jobs"]
            cancelled = client.delete(f"{API}/jobs/{waiting['name']}").json()
            unfinished = client.get(f"{API}/jobs/{first['name']}/records")
    assert statuses == [202, 202, 429]
    assert (response.status_code, response.headers["Retry-After"]) == (429, "5")
    assert cancelled["state"] == "cancelled"
    assert unfinished.status_code == 409


def test_an_unexpected_error_says_no_more_than_its_type(client, monkeypatch, caplog):
    def fail(*arguments):
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr("tracin_ann.serve.api._describe_index", fail)
    response = client.get(f"{API}/index")
    assert response.status_code == 500
    assert response.json()["error"]["got"] == "ZeroDivisionError" and "secret" not in response.text
    assert "Content-Security-Policy" in response.headers
    assert "a secret" in caplog.text


def test_the_document_describes_the_errors(client):
    document = client.get(f"{API}/openapi.json").json()
    assert set(document["paths"]["/api/v1/answers"]["get"]["responses"]) >= {"200", "404", "409", "422", "503"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NoReplyError("no reply"), 503),
        (WorkerError("failed"), 500),
        (DamagedIndexError("x"), 500),
        (UsageError("x"), 422),
    ],
)
def test_the_status_says_who_can_help(error, status):
    assert find_status(error) == status
