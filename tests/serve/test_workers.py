"""The explorer and its API over an index that workers search: equal answers, lost workers, partial answers."""

from __future__ import annotations

import gc
import os
import signal
from dataclasses import replace

import pytest

from explorer import LOCAL, serve
from inline_workers import Inline
from invocation import run
from shard_folder import make_config, make_shard_folder
from tracin_ann import InfluenceIndex, ProcessLauncher, build
from tracin_ann.cli.serve import main
from tracin_ann.distributed import ShardOptions
from tracin_ann.serve import IndexLocation, Service, Settings

PARTIAL = "partial: shards of the index did not answer"
ANSWERS = "/api/v1/answers?k=5&" + "&".join(f"rows={row}" for row in range(10))
MARKS = {"shards", "missing_shards"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shard_folder(tmp_path_factory.mktemp("workers"), "served_task")


def locate(folder, name, launcher=None, options=None):
    task = f"{folder}/served_task.py:task"
    return IndexLocation(folder / name, task, device="cpu", launcher=launcher, shard_options=options)


def read_answers(client):
    response = client.get(ANSWERS)
    assert response.status_code == 200, response.text
    return response.json()["answers"]


@pytest.fixture(scope="module")
def expected(folder):
    """Return the answers of one process."""
    with serve(locate(folder, "flat")) as client:
        return read_answers(client)


def test_workers_give_the_answers_of_one_process(folder, expected):
    launcher = Inline()
    with serve(locate(folder, "flat", launcher)) as client:
        found = read_answers(client)
        assert PARTIAL not in client.get("/query?rows=0").text
    assert found == [line | {"shards": [0, 1]} for line in expected]
    assert launcher.stopped == {0, 1}


@pytest.mark.slow
def test_killed_workers_lose_no_request(folder, expected):
    with serve(locate(folder, "flat", ProcessLauncher(["cpu", "cpu"]))) as client:
        search = client.app.state.service._index._workers
        for number in (0, 1, 1):
            before = search.pids
            os.kill(before[number], signal.SIGKILL)
            assert read_answers(client) == [line | {"shards": [0, 1]} for line in expected]
            assert search.pids[number] != before[number]


def test_partial_answers_are_marked(folder, expected):
    launcher = Inline()
    launcher.dead.add(1)
    with serve(locate(folder, "flat", launcher, ShardOptions(allow_partial=True, restarts=0))) as client:
        found = read_answers(client)
        assert {(tuple(line["shards"]), tuple(line["missing_shards"])) for line in found} == {((0,), (1,))}
        own = [{hit["row"] for hit in line["proponents"]} for line in found]
        assert max(max(rows) for rows in own) < 256 and own != [
            {hit["row"] for hit in line["proponents"]} for line in expected
        ]
        assert PARTIAL in client.get("/query?rows=0").text
        assert PARTIAL in client.get("/compare?rows=0&other=cosine").text
        assert "partial lists of similar rows" in client.get("/rows/3").text
        while "<progress" in (page := client.get("/suspects?by=loss").text):
            pass
        assert PARTIAL in page
        job = client.post("/api/v1/jobs", json={"kind": "hubs", "side": "query"}, headers={"Origin": LOCAL}).json()
        while (state := client.get(f"/api/v1/jobs/{job['name']}").json()["state"]) not in ("done", "failed"):
            pass
        assert state == "done"
        assert "partial results" in client.get(f"/api/v1/jobs/{job['name']}/records").json()["summary"]["how"]


def test_without_partial_answers_a_lost_worker_is_an_error_for_a_while(folder, expected):
    launcher = Inline()
    launcher.dead.add(1)
    with serve(locate(folder, "flat", launcher, ShardOptions(restarts=0))) as client:
        response = client.get(ANSWERS)
        assert (response.status_code, response.json()["error"]["type"]) == (503, "NoReplyError")
        assert "retry-after" in response.headers
        launcher.dead.clear()
        assert read_answers(client) == [line | {"shards": [0, 1]} for line in expected]


def test_the_workers_of_an_earlier_generation_end(folder, tmp_path):
    build(f"{folder}/served_task.py:task", tmp_path / "index", make_config("flat"))
    launcher = Inline()
    location = replace(locate(folder, "flat", launcher), directory=tmp_path / "index")
    service = Service(location, Settings())
    arguments = {"rows": "700"}
    build(f"{folder}/served_task.py:task", tmp_path / "index", make_config("flat", append=True), arguments=arguments)
    assert launcher.stopped == set()
    service._open_current()
    gc.collect()
    assert launcher.stopped == {0, 1} and service.generation == 2
    launcher.stopped.clear()
    service.close()
    assert launcher.stopped == {0, 1}


@pytest.mark.parametrize("option", [["--allow-partial"], ["--deadline", "3"], ["--ray-address", "auto"]])
def test_options_of_workers_need_workers(folder, option):
    result = run(main, folder / "flat", *option)
    assert result.exit_code == 2
    assert f"{option[0]} is for workers" in result.stderr


def test_the_command_starts_workers_and_ends_them(folder, monkeypatch):
    locations = []
    monkeypatch.setattr("tracin_ann.serve.create_app", lambda location, settings, other: locations.append(location))
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    options = ["--shard-workers", "--deadline", "3", "--allow-partial", "--device", "cpu", "--port", "0"]
    result = run(main, folder / "flat", *options)
    assert result.exit_code == 0, result.stderr
    (location,) = locations
    assert isinstance(location.launcher, ProcessLauncher) and set(location.launcher.devices) == {"cpu"}
    assert location.shard_options == ShardOptions(3.0, True)


def test_an_index_is_closed_at_the_end_of_a_block(folder):
    launcher, task = Inline(), f"{folder}/served_task.py:task"
    with InfluenceIndex.open(folder / "flat", task, device="cpu", launcher=launcher) as index:
        assert len(index) == 600 and launcher.stopped == set()
    assert launcher.stopped == {0, 1}
