"""Workers that are asked together: restarts, deadlines, errors; with workers that are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from tracin_ann.distributed import service_group
from tracin_ann.distributed.ray_cluster import _ServiceActor
from tracin_ann.distributed.service import ServiceWorker, WorkerDied
from tracin_ann.distributed.service_group import NoReplyError, ServiceGroup
from tracin_ann.errors import DamagedIndexError, UsageError

LONG_S = 60


@dataclass
class Scripted(ServiceWorker):
    """A worker whose request is a list of what happens at each attempt; it replies with its number and attempt."""

    number: int
    attempts: list[str]
    stopped: threading.Event = field(default_factory=threading.Event)
    opens: bool = True
    is_opening: threading.Event = field(default_factory=threading.Event)
    ready: threading.Event | None = None

    def open(self) -> None:
        self.is_opening.set()
        assert self.ready is None or self.ready.wait(LONG_S)
        if not self.opens:
            assert self.stopped.wait(LONG_S)
            raise WorkerDied("stopped")

    @property
    def pid(self) -> int | None:
        return None

    def run(self, request: list[str]) -> tuple[int, int]:
        attempt = len(self.attempts)
        self.attempts.append(request[attempt])
        if request[attempt] == "dies":
            raise WorkerDied("scripted")
        if request[attempt] == "hangs":
            assert self.stopped.wait(LONG_S)
            raise WorkerDied("stopped")
        if request[attempt] == "fails":
            raise DamagedIndexError("scripted damage")
        return self.number, attempt

    def stop(self) -> None:
        self.stopped.set()


@dataclass
class Cluster:
    """A group of two workers, and what happened to each."""

    started: list[int] = field(default_factory=list)
    attempts: dict[int, list[str]] = field(default_factory=lambda: {0: [], 1: []})

    def launch(self, number: int) -> ServiceWorker:
        self.started.append(number)
        return Scripted(number, self.attempts[number])


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def group(cluster: Cluster) -> Iterator[ServiceGroup]:
    made = ServiceGroup([partial(cluster.launch, number) for number in range(2)], restarts=2)
    made.start()
    yield made
    made.close()


def test_each_worker_replies_to_its_request(group: ServiceGroup, cluster: Cluster) -> None:
    assert group.ask([["replies"], ["replies"]]) == [(0, 0), (1, 0)]
    assert sorted(cluster.started) == [0, 1]


def test_a_worker_without_request_is_not_asked(group: ServiceGroup, cluster: Cluster) -> None:
    assert group.ask([None, ["replies"]]) == [None, (1, 0)]
    assert cluster.attempts == {0: [], 1: ["replies"]}


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_ends_is_started_and_asked_again(group: ServiceGroup, cluster: Cluster, deaths: int) -> None:
    assert group.ask([["replies"], ["dies"] * deaths + ["replies"]]) == [(0, 0), (1, deaths)]
    assert sorted(cluster.started) == [0] + [1] * (deaths + 1)


def test_a_worker_that_ends_at_every_attempt_is_an_error(group: ServiceGroup, cluster: Cluster) -> None:
    first, second = group.ask([["replies"], ["dies"] * 3 + ["replies"]])
    assert first == (0, 0)
    assert isinstance(second, NoReplyError) and "worker 1 ends before it replies: got scripted" in str(second)
    assert cluster.attempts[1] == ["dies"] * 3
    # It is started again for the next request.
    assert group.ask([None, ["dies"] * 3 + ["replies"]]) == [None, (1, 3)]


def test_a_late_worker_is_replaced(group: ServiceGroup, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait_for_one(asked: Any, deadline_s: float | None) -> None:
        wait(asked, LONG_S, FIRST_COMPLETED)
        while not cluster.attempts[1]:
            threading.Event().wait(0.001)

    # The deadline ends when one worker has replied, and the other one has begun.
    monkeypatch.setattr(service_group, "wait", wait_for_one)
    first, second = group.ask([["replies"], ["hangs"]], deadline_s=0.05)
    assert first == (0, 0)
    assert isinstance(second, NoReplyError) and "worker 1 is late: got no reply in 0.05 s" in str(second)
    assert group.ask([None, ["hangs", "replies"]]) == [None, (1, 1)]
    assert sorted(cluster.started) == [0, 1, 1]
    assert cluster.attempts[1] == ["hangs", "replies"]


def test_a_worker_whose_start_takes_longer_than_the_deadline_becomes_ready() -> None:
    started: list[Scripted] = []
    attempts: list[str] = []
    ready = threading.Event()

    def launch() -> ServiceWorker:
        started.append(Scripted(0, attempts, ready=ready if started else None))
        return started[-1]

    group = ServiceGroup([launch], restarts=2)
    group.start()
    try:
        for _ in range(3):
            (late,) = group.ask([["dies", "replies"]], deadline_s=0.05)
            assert isinstance(late, NoReplyError)
        ready.set()
        assert group.ask([["dies", "replies"]]) == [(0, 1)]
        assert len(started) == 2 and not started[1].stopped.is_set()
    finally:
        ready.set()
        group.close()


def test_an_error_of_a_service_is_raised(group: ServiceGroup, cluster: Cluster) -> None:
    with pytest.raises(DamagedIndexError, match="scripted damage"):
        group.ask([["replies"], ["fails"]])
    assert sorted(cluster.started) == [0, 1]
    assert group.ask([["", "replies"], ["", "replies"]]) == [(0, 1), (1, 1)]


@pytest.mark.parametrize("error", [DamagedIndexError, WorkerDied])
def test_a_worker_that_does_not_start_is_an_error(cluster: Cluster, error: type[Exception]) -> None:
    def fail() -> ServiceWorker:
        raise error("no start")

    launches: list[Callable[[], ServiceWorker]] = [partial(cluster.launch, 0), fail]
    with pytest.raises(NoReplyError if error is WorkerDied else error, match="no start"):
        ServiceGroup(launches, restarts=1).start()


def test_a_worker_that_does_not_open_ends_with_the_group() -> None:
    worker = Scripted(0, [], opens=False)
    group = ServiceGroup([lambda: worker], restarts=2)
    with ThreadPoolExecutor(1) as executor:
        starting = executor.submit(group.start)
        assert worker.is_opening.wait(LONG_S) and not starting.done()
        group.close()
        with pytest.raises(NoReplyError, match="worker 0 ends before it replies: got stopped"):
            starting.result(LONG_S)


def test_several_threads_ask(group: ServiceGroup) -> None:
    replies: list[Any] = []

    def ask() -> None:
        replies.append(group.ask([["replies"] * 50] * 2))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(first for (_, first), _ in replies) == sorted(second for _, (_, second) in replies) == list(range(8))


@pytest.mark.parametrize("is_connected", [True, False])
def test_an_actor_is_killed_by_a_process_that_is_connected_to_its_cluster(is_connected: bool) -> None:
    killed: list[str] = []
    exceptions = SimpleNamespace(RayError=RuntimeError)
    ray = SimpleNamespace(is_initialized=lambda: is_connected, kill=killed.append, exceptions=exceptions)
    _ServiceActor(ray, "actor").stop()
    assert killed == ["actor"] * is_connected


def test_requests_of_a_closed_group_are_rejected(group: ServiceGroup) -> None:
    group.close()
    with pytest.raises(UsageError, match="the index is closed: got a query"):
        group.ask([["replies"], ["replies"]])
