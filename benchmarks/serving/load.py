"""Latency and throughput of tracin-serve with many clients, beside the same queries through InfluenceIndex one by one.

`--data` is a folder with mnist.npz; the first run trains the CNN of examples/mnist.py on all digits, and builds the
index in `--folder`. Each client sends its queries, all different, one after the other. Every answer is compared with
that of `InfluenceIndex.query` for the query alone. The server and the clients are processes of the same machine.

`served one by one` is a server whose passes answer one query each. `warm_bytes` is the resident memory of the server
after 500 answers, and `memory_growth` its change until the last one. Pages are loaded by one client, each page for
another row.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.paths import ROOT
from benchmarks.common.results import report_results
from examples import mnist
from tracin_ann import InfluenceIndex, build

RESULT = "serving"
ROWS, WARM, WARM_PAGES = 60_000, 500, 10
PAGES = {
    "page of the overview": "/?",
    "page of a query": "/query?rows=",
    "page of a training row": "/rows/",
    "page of two scores": "/compare?rows=",
}


def prepare(data: Path, folder: Path) -> Path:
    """Train and build unless it was done before; return the directory of the index."""
    index = folder / "index"
    if not (index / "manifest.json").exists():
        mnist.train(str(data), str(folder), ROWS, 0)
        named = {"data_path": str(data.resolve()), "runs": str(folder.resolve()), "rows": str(ROWS)}
        build("examples/mnist.py:task", index, arguments=named)
    return index


def measure_direct(index: Path, queries: Sequence[int], results: Connection) -> None:
    """Send the times and the answers of queries through an open index, one by one."""
    opened = InfluenceIndex.open(index)
    for query in queries[-10:]:
        opened.query([query]).lines()
    seconds, found = [], {}
    for query in queries:
        began = time.perf_counter()
        (found[query],) = opened.query([query]).lines()
        seconds.append(time.perf_counter() - began)
    results.send((seconds, found))


def serve(index: Path, pass_queries: int, ports: Connection) -> None:
    """Serve the index on a free port until the process is terminated."""
    import uvicorn  # noqa: PLC0415

    from tracin_ann.cli.serve import listen  # noqa: PLC0415
    from tracin_ann.serve import IndexLocation, Settings, create_app  # noqa: PLC0415

    listener = listen("127.0.0.1", 0)
    app = create_app(IndexLocation(index), Settings(pass_queries=pass_queries))
    ports.send(listener.getsockname()[1])
    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none")).run(sockets=[listener])


@contextmanager
def run_server(index: Path, pass_queries: int) -> Iterator[tuple[int, int]]:
    """Yield the port and the process id of a server.

    Raises:
        EOFError: it does not start. `recv` waits as long as any process can send, so this one closes its end.
    """
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(index, pass_queries, there))
    process.start()
    there.close()
    try:
        port = here.recv()
        assert process.pid is not None
        yield port, process.pid
    finally:
        process.terminate()
        process.join()


@dataclass
class Load:
    """Clients that send queries at the same time.

    Attributes:
        port: of the server.
        process: the id of the server's process.
        seconds: the time of each request.
        bodies: the responses, by query.
        warm_bytes: resident memory of the server after the first requests.
    """

    port: int
    process: int
    seconds: list[float] = field(default_factory=list)
    bodies: dict[int, bytes] = field(default_factory=dict)
    warm_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, queries: Sequence[int], clients: int) -> float:
        """Send the queries, an equal number by each client; return the seconds until all are answered."""
        start = threading.Barrier(clients + 1)
        threads = [
            threading.Thread(target=self._send, args=(queries[client::clients], start)) for client in range(clients)
        ]
        for thread in threads:
            thread.start()
        start.wait()
        began = time.perf_counter()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began

    def _send(self, queries: Sequence[int], start: threading.Barrier) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        start.wait()
        for query in queries:
            began = time.perf_counter()
            connection.request("GET", f"/api/v1/answers?rows={query}")
            response = connection.getresponse()
            body = response.read()
            seconds = time.perf_counter() - began
            assert response.status == http.HTTPStatus.OK, body
            with self._lock:
                self.seconds.append(seconds)
                self.bodies[query] = body
                if len(self.seconds) == WARM:
                    self.warm_bytes = measure_memory(self.process)
        connection.close()


def measure_memory(process: int) -> int:
    """Return the resident memory of a process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def is_same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Return whether two answers have the same hits, apart from rounding, which may exchange equal scores."""
    if {name: found[name] for name in ("query", "side", "row")} != {n: expected[n] for n in ("query", "side", "row")}:
        return False
    for side in ("proponents", "opponents"):
        scores, others = ([hit["score"] for hit in answer[side]] for answer in (found, expected))
        if len(scores) != len(others) or not np.allclose(scores, others, rtol=1e-4):
            return False
        own = {hit["row"]: hit["score"] for hit in expected[side]}
        last = others[-1] if others else 0.0
        for hit in found[side]:
            if not np.isclose(hit["score"], own.get(hit["row"], last), rtol=1e-4):
                return False
    return True


def summarise(name: str, seconds: Sequence[float], elapsed: float, **figures: Any) -> dict[str, Any]:
    """Return the figures of one way to answer."""
    p50, p95 = np.percentile(np.array(seconds) * 1e3, [50, 95])
    return {
        "way": name,
        "queries": len(seconds),
        "p50_ms": round(float(p50), 2),
        "p95_ms": round(float(p95), 2),
        "per_second": round(len(seconds) / elapsed, 1),
        **figures,
    }


def measure(index: Path, clients: int, each: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of each way to answer the same queries."""
    queries = np.random.default_rng(0).permutation(10_000)[: clients * each].tolist()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=measure_direct, args=(index, queries, there))
    process.start()
    there.close()
    seconds, expected = here.recv()
    process.join()
    yield summarise("InfluenceIndex one by one", seconds, sum(seconds))
    for name, pass_queries in (("served one by one", 1), ("served in passes", 16)):
        with run_server(index, pass_queries) as (port, server):
            Load(port, server).run(queries[-clients:], clients)
            load = Load(port, server)
            elapsed = load.run(queries, clients)
            end_bytes = measure_memory(server)
        found = {query: json.loads(body)["answers"][0] for query, body in load.bodies.items()}
        wrong = sum(not is_same(found[query], expected[query]) for query in queries)
        yield summarise(
            name,
            load.seconds,
            elapsed,
            clients=clients,
            wrong=wrong,
            warm_bytes=load.warm_bytes,
            memory_growth=round(end_bytes / load.warm_bytes - 1, 4),
        )
        gc.collect()


def measure_pages(index: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of pages of stored answers, with a warm index and one client."""
    with run_server(index, 16) as (port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for name, address in PAGES.items():
            seconds = []
            for row in range(count + WARM_PAGES):
                began = time.perf_counter()
                connection.request("GET", f"{address}{row}")
                response = connection.getresponse()
                body = response.read()
                seconds.append(time.perf_counter() - began)
                assert response.status == http.HTTPStatus.OK, body
            yield summarise(name, seconds[WARM_PAGES:], sum(seconds[WARM_PAGES:]), bytes=len(body))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder of mnist.npz")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "serving", help="folder of the index")
    parser.add_argument("--clients", type=int, default=32, help="clients at the same time")
    parser.add_argument("--each", type=int, default=50, help="queries of each client")
    parser.add_argument("--pages", type=int, default=100, help="loads of each page")
    options = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    os.chdir(ROOT)
    index = prepare(options.data, options.folder)
    settings = {"rows": ROWS, "clients": options.clients, "each": options.each, "pages": options.pages}
    answers = measure(index, options.clients, options.each)
    report_results(RESULT, settings, itertools.chain(answers, measure_pages(index, options.pages)))


if __name__ == "__main__":
    main()
