"""Jobs that compute with the model: requests that need it are answered between steps, and cancelling ends a job."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from tracin_ann import QueryOptions
from tracin_ann.choices import SideName
from tracin_ann.index import InfluenceIndex
from tracin_ann.scoring import exact_preconditioning
from tracin_ann.serve import Service, Settings
from tracin_ann.serve.pages.pairs import ExplainPair
from tracin_ann.serve.work import ComputeExactAnswers, RankSelfInfluence, Result, Steps, Work

WAIT = 60
FISHER = QueryOptions(k=5, exact=True, score="fisher")
CANDIDATES = QueryOptions(k=5, candidates=8, rerank="exact", score="fisher")
BATCH = 8


@dataclass(frozen=True)
class Pause(Work):
    """Work that waits at the second step of a stage until it may go on."""

    work: Work
    stage: str
    has_begun: threading.Event = field(default_factory=threading.Event)
    may_go_on: threading.Event = field(default_factory=threading.Event)

    def run(self, index: InfluenceIndex, steps: Steps) -> Result:
        seen = 0

        def report(stage: str, done: int, total: int) -> None:
            nonlocal seen
            seen += stage == self.stage
            if stage == self.stage and seen == 2:
                self.has_begun.set()
                assert self.may_go_on.wait(WAIT)
            steps.report(stage, done, total)

        return self.work.run(index, replace(steps, report=report))


@pytest.fixture(params=["gram", "EK-FAC"])
def method(request, monkeypatch) -> str:
    if request.param == "EK-FAC":
        monkeypatch.setattr(exact_preconditioning, "_MOST_PRODUCTS", 0)
    return request.param


@pytest.fixture
def service(place) -> Iterator[Service]:
    service = Service(replace(place.location, batch_size=BATCH), Settings())
    yield service
    service.close()


@contextmanager
def pause(service: Service, work: Work, stage: str) -> Iterator:
    """Yield a job that has stopped at the second step of a stage; it goes on when a request waits, or at the end."""

    async def start():
        async with service.read() as reader:
            return reader.start_job(paused)

    paused = Pause(work, stage)
    job = asyncio.run(start())
    assert paused.has_begun.wait(WAIT)
    waiting = threading.Thread(target=go_on_when_a_request_waits, args=(service, paused))
    try:
        yield job, waiting
    finally:
        paused.may_go_on.set()
        job.future.result(WAIT)
        if waiting.ident is not None:
            waiting.join(WAIT)


@contextmanager
def start_next(service: Service, work: Work) -> Iterator:
    """Yield a job that waits for the turn of another one, and wait for its end."""

    async def start():
        async with service.read() as reader:
            return reader.start_job(work)

    job = asyncio.run(start())
    yield job
    job.future.result(WAIT)


def go_on_when_a_request_waits(service: Service, paused: Pause) -> None:
    while not (service.turns.is_wanted or paused.may_go_on.wait(0.001)):
        pass
    paused.may_go_on.set()


def compute(place, work: Work) -> Result:
    """Return the result of work with nothing between its steps."""
    index = InfluenceIndex.open(place.directory, place.task, device="cpu", batch_size=BATCH)
    return work.run(index, Steps(lambda stage, done, total: None, lambda: None))


def ask(service: Service, job, side: SideName, row: int):
    """Return the answer of a request, and the stage of the job when it was answered."""

    async def answer():
        async with service.read() as reader:
            return await reader.run(lambda index: (query(index, side, row), job.state, job.stage, job.done, job.total))

    return asyncio.run(answer())


def query(index: InfluenceIndex, side: SideName, row: int):
    if side == "input":
        example = index.task.read_query({"text": "typed"})
        return index.query_examples([example]).lines()
    return index.query([row] if side == "query" else (), [row] if side == "train" else ()).lines()


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize(
    ("work", "stage", "side"),
    [
        (ComputeExactAnswers("query", (0,), FISHER), "curvature", "input"),
        (ComputeExactAnswers("query", (0,), FISHER), "curvature", "query"),
        (ComputeExactAnswers("query", (0,), FISHER), "exact scores", "train"),
        (ComputeExactAnswers("query", (0, 1), CANDIDATES), "exact scores", "input"),
        (ComputeExactAnswers("train", (0, 1), FISHER, together=True), "curvature", "train"),
        (RankSelfInfluence(5, exact=True), "exact scores", "query"),
    ],
)
def test_a_request_that_needs_the_model_is_answered_between_steps(place, index, service, work, stage, side):
    expected = compute(place, work)
    with pause(service, work, stage) as (job, waiting):
        waiting.start()
        found, *when = ask(service, job, side, 3)
    assert when[:2] == ["running", stage] and 0 < when[2] < when[3]
    assert [[hit["row"] for hit in line["proponents"]] for line in found] == [
        [hit["row"] for hit in line["proponents"]] for line in query(index, side, 3)
    ]
    assert job.state == "done"
    assert job.result == expected, "the same bits as without the request"


def test_a_request_is_answered_while_the_parts_of_a_score_are_computed(place, index, service, method):
    work = ExplainPair(3, 0, "query", "layer", FISHER)
    expected = compute(place, work)
    with pause(service, work, "curvature") as (job, waiting):
        waiting.start()
        _, *when = ask(service, job, "query", 3)
    assert when[:2] == ["running", "curvature"]
    assert job.result.records == expected.records


def test_a_job_with_lent_examples_keeps_them_while_a_request_lends_others(place, service, method):
    task = place.task
    work = ComputeExactAnswers("input", (0,), FISHER, examples=[task.read_query({"text": "a typed query"})])
    expected = compute(place, work)
    with pause(service, work, "curvature") as (job, waiting):
        waiting.start()
        ask(service, job, "input", 0)
    assert job.result.records == expected.records


@pytest.mark.parametrize("stage", ["curvature", "exact scores"])
def test_a_job_is_cancelled_between_steps_and_a_later_one_works(place, service, method, stage):
    work = ComputeExactAnswers("query", (0,), FISHER)
    expected = compute(place, work)
    with pause(service, work, stage) as (job, _):
        done = job.done
        service.jobs.cancel(job.name)
    assert (job.state, job.stage, job.done, job.result) == ("cancelled", stage, done, None)
    with pause(service, work, stage) as (job, _):
        pass
    assert (job.state, job.result) == ("done", expected)


def test_two_jobs_compute_a_curvature_together(place, service, method, monkeypatch):
    started: list[int] = []
    start = exact_preconditioning.FullCurvatures._start
    monkeypatch.setattr(
        exact_preconditioning.FullCurvatures,
        "_start",
        lambda self, name, model: started.append(model.checkpoint) or start(self, name, model),
    )
    works = [ComputeExactAnswers("query", (row,), FISHER) for row in (0, 1)]
    expected = [compute(place, work) for work in works]
    started.clear()
    with pause(service, works[0], "curvature") as (first, waiting), start_next(service, works[1]) as second:
        waiting.start()
        ask(service, first, "query", 3)
    assert [job.result for job in (first, second)] == expected
    assert started == [0, 1]
