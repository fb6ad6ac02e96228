"""`tracin-serve` as a process: address, refused options, a kill in the middle of a job, the client of the docs."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

import documents
from invocation import run
from paths import ROOT
from tasks import typed
from tracin_ann import BuildConfig, InfluenceIndex, build
from tracin_ann.cli.serve import listen, main

SERVE = "from tracin_ann.cli.serve import main; main()"
TASK = ROOT / "tests/support/tasks/typed.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    config = BuildConfig(dim=32, batch_size=4, device="cpu", index="flat")
    build(f"{TASK}:task", folder / "index", config, arguments={"folder": str(folder)})
    return folder


@contextmanager
def start(folder, *options):
    """Yield a server's process and its address."""
    named = ["--task", f"{TASK}:task", "--task-arg", f"folder={folder}", "--device", "cpu"]
    command = [sys.executable, "-c", SERVE, str(folder / "index"), "--port", "0", *named, *options]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder) as process:
        try:
            assert process.stderr is not None
            lines = [process.stderr.readline()]
            address = re.search(r"http://\S+:\d+", lines[0])
            assert address, lines[0] + process.stderr.read()
            yield process, address[0]
        finally:
            process.kill()


def call(address, path, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    request = Request(f"{address}/api/v1/{path}", data, {"Content-Type": "application/json", **headers})
    with urlopen(request, timeout=60) as response:
        return json.load(response)


def fail(address, path):
    """Return the status and the error of a request."""
    with pytest.raises(HTTPError) as failure:
        call(address, path)
    with failure.value as response:
        return response.code, json.load(response)["error"]


@pytest.mark.slow
def test_a_killed_server_forgets_its_jobs_and_harms_nothing(folder):
    files = {path: path.read_bytes() for path in (folder / "index").rglob("*") if path.is_file()}
    with start(folder) as (process, address):
        names = [call(address, "jobs", {"kind": "hubs"})["name"] for _ in range(5)]
        process.send_signal(signal.SIGKILL)
        process.wait()
    with start(folder) as (process, address):
        for name in names:
            status, error = fail(address, f"jobs/{name}")
            assert (status, error["what"], error["remedy"]) == (404, "no such job", "start the job again")
        (answer,) = call(address, "answers?rows=1")["answers"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert files == {path: path.read_bytes() for path in (folder / "index").rglob("*") if path.is_file()}
    index = InfluenceIndex.open(folder / "index", typed.task(str(folder)), device="cpu")
    assert [answer] == json.loads(json.dumps(index.query([1]).lines()))


@pytest.mark.slow
def test_a_token_is_needed_from_other_addresses(folder):
    token = "0123456789abcdef"
    with start(folder, "--host", "0.0.0.0", "--token", token) as (_, address):
        assert fail(address, "index")[0] == 401
        assert call(address, "index", Authorization=f"Bearer {token}")["rows"] == len(typed.TEXTS)


@pytest.mark.slow
def test_addresses_of_views_may_be_long_and_name_any_loopback_address(folder):
    with start(folder, "--host", "127.0.0.2") as (_, address):
        assert call(address, "index")["rows"] == len(typed.TEXTS)
        text = "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 20_000
        with urlopen(f"{address}/query?k=2&text={quote(text)}", timeout=60) as response:
            assert text in response.read().decode()


@pytest.mark.slow
def test_a_server_with_a_token_has_any_name(folder):
    token = "0123456789abcdef"
    with start(folder, "--token", token) as (_, address):
        assert call(address, "index", Authorization=f"Bearer {token}", Host="proxy.example")["query_rows"] > 0


@pytest.mark.slow
def test_the_client_of_the_documentation(folder):
    page = (ROOT / "docs/api-http.md").read_text(encoding="utf-8")
    client, job = (block.code for block in documents.read_blocks(page, "python"))
    names: dict = {}
    with start(folder) as (_, address):
        exec(client.replace("http://127.0.0.1:8321", address), names)
        exec(job.replace('"labels": "digit"', '"labels": None'), names)
    assert [record["rank"] for record in names["suspects"]["records"]] == list(range(1, 21))
    assert sum(bool(line.strip()) for line in client.splitlines()) <= 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "other machines could connect without a token: got 0.0.0.0, expected --token"),
        (["--host", "example.com"], "other machines could connect without a token"),
        (["--token", "short"], "bad --token: got 5 characters, expected 16 or more"),
        (["--token", "0123456789abcdé" * 2], "bad --token"),
    ],
)
def test_options_that_are_not_safe_are_refused(folder, options, message):
    result = run(main, folder / "index", *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")


def test_a_port_in_use_is_named(folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run(main, folder / "index", "--port", port)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: cannot listen on 127.0.0.1, port {port}: got Address already in use")


def test_bodies_do_not_wait_for_acknowledged_headers():
    with listen("127.0.0.1", 0) as listener:
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_directory_without_an_index_is_named(folder):
    result = run(main, folder, "--port", 0)
    assert result.exit_code == 4
    assert result.stderr.startswith("error: ")


def test_without_fastapi_the_extra_is_named(folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tracin_ann.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = run(main, folder / "index")
    assert result.exit_code == 1
    assert "pip install 'tracin-ann[serve]'" in result.stderr
