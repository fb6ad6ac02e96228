"""Jobs run after waiting requests, report progress, can be cancelled, and are forgotten after an hour."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass, field

import pytest

from tracin_ann.errors import UsageError
from tracin_ann.serve import Settings
from tracin_ann.serve.jobs import Jobs
from tracin_ann.serve.problems import TooManyJobsError, UnknownJobError
from tracin_ann.serve.turns import Turns
from tracin_ann.serve.work import Result, Steps, Work

WAIT = 60
RESULT = Result((), ({"row": 1},), {})


@dataclass(frozen=True)
class Wait(Work):
    """Work that waits in the middle of ten steps, or fails there."""

    error: Exception | None = None
    stage: str = "steps"
    has_begun: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)

    def run(self, index, steps: Steps) -> Result:
        for step in range(10):
            steps.progress(self.stage, step, 10)
            if step == 5:
                self.has_begun.set()
                assert self.may_end.wait(WAIT)
                if self.error is not None:
                    raise self.error
        return RESULT


@pytest.fixture
def turns():
    return Turns()


@pytest.fixture
def jobs(turns, index):
    clock = [0.0]
    jobs = Jobs(turns, Settings(most_jobs=1, most_queued_jobs=2, keep_seconds=60), lambda: clock[0])
    jobs.clock = clock
    yield jobs
    jobs.close()


def run_job(jobs, index, work):
    job = jobs.start(work, index)
    work.may_end.set()
    job.future.result(WAIT)
    return job


def test_a_job_reports_its_progress(jobs, index):
    work = Wait()
    job = jobs.start(work, index)
    assert work.has_begun.wait(WAIT)
    assert (job.state, job.stage, job.done, job.total) == ("running", "steps", 5, 10)
    work.may_end.set()
    job.future.result(WAIT)
    assert (job.state, job.result) == ("done", RESULT)
    assert jobs.find(job.name) is job


def test_a_running_job_stops_at_its_next_step(jobs, index):
    work = Wait()
    job = jobs.start(work, index)
    assert work.has_begun.wait(WAIT)
    assert jobs.cancel(job.name).state == "running"
    work.may_end.set()
    job.future.result(WAIT)
    assert (job.state, job.done, job.result) == ("cancelled", 5, None)
    assert jobs.cancel(job.name).state == "cancelled", "a second time changes nothing"


def test_a_queued_job_is_cancelled_at_once(jobs, index):
    first, second = Wait(), Wait()
    running, queued = jobs.start(first, index), jobs.start(second, index)
    assert first.has_begun.wait(WAIT)
    assert jobs.cancel(queued.name).state == "cancelled"
    first.may_end.set()
    running.future.result(WAIT)
    assert not second.has_begun.is_set()
    assert jobs.cancel(running.name).state == "done", "a job that has ended stays as it is"


def test_too_many_jobs_are_rejected(jobs, index):
    work = [Wait() for _ in range(3)]
    started = [jobs.start(each, index) for each in work]
    with pytest.raises(TooManyJobsError, match=r"too many jobs: got 3 running or queued, expected fewer than 3"):
        jobs.start(Wait(), index)
    for each in work:
        each.may_end.set()
    started[-1].future.result(WAIT)
    assert run_job(jobs, index, Wait()).state == "done", "there is room again"
    assert [job.name for job in jobs.list()][1:] == [job.name for job in reversed(started)]


def test_results_are_forgotten(jobs, index):
    old = run_job(jobs, index, Wait())
    jobs.clock[0] = 30.0
    new = run_job(jobs, index, Wait())
    jobs.clock[0] = 61.0
    assert jobs.list() == [new]
    with pytest.raises(UnknownJobError, match="no such job: got .*; start the job again"):
        jobs.find(old.name)
    with pytest.raises(UnknownJobError):
        jobs.cancel(old.name)


def test_the_latest_results_are_kept(turns, index):
    jobs = Jobs(turns, Settings(most_jobs=1, most_kept_jobs=2), lambda: 0.0)
    started = [run_job(jobs, index, Wait()) for _ in range(4)]
    assert jobs.list() == started[:1:-1]
    jobs.close()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UsageError("a bad option"), "a bad option"),
        (ZeroDivisionError("secret"), "internal error in a job: got Zero"),
        # The code of a task may call sys.exit.
        (SystemExit(3), "internal error in a job: got SystemExit"),
    ],
)
def test_a_job_that_fails_has_its_error(jobs, index, error, message, caplog):
    job = run_job(jobs, index, Wait(error))
    assert job.state == "failed"
    assert str(job.error).startswith(message) and "secret" not in str(job.error)
    assert bool(caplog.records) == (not isinstance(error, UsageError))


def test_the_error_of_a_job_keeps_nothing_in_memory(jobs, index):
    class Large:
        pass

    @dataclass(frozen=True)
    class Fail(Wait):
        def run(self, index, steps):
            large = Large()
            kept.append(weakref.ref(large))
            raise UsageError("failed") from ValueError("cause")

    kept = []
    job = run_job(jobs, index, Fail())
    for _ in range(3):
        with pytest.raises(UsageError, match="failed"):
            job.raise_error()
    gc.collect()
    assert kept[0]() is None
    assert job.error.__traceback__ is None


def test_requests_go_first_where_a_job_lets_them(turns, jobs, index):
    work = Wait()
    job = jobs.start(work, index)
    assert work.has_begun.wait(WAIT)
    seen = []

    def request():
        with turns.take_for_request():
            seen.append(job.done)

    waiting = [threading.Thread(target=request) for _ in range(3)]
    for thread in waiting:
        thread.start()
    while turns._requests < len(waiting):
        threading.Event().wait(0.001)
    work.may_end.set()
    job.future.result(WAIT)
    for thread in waiting:
        thread.join(WAIT)
    assert seen == [6, 6, 6], "all at the next step, before the job goes on"
    assert job.state == "done"


def test_a_request_waits_for_one_step_of_each_job():
    turns, order = Turns(patience=0), []

    def work(name):
        with turns.take_for_job():
            take_steps(name)

    def take_steps(name):
        for _ in range(20):
            order.append(name)
            turns.give_way()

    def ask():
        with turns.take_for_request():
            order.append("request")

    other, request = threading.Thread(target=work, args=("other",)), threading.Thread(target=ask)
    with turns.take_for_job():
        other.start()
        while not turns._queue:
            threading.Event().wait(0.001)
        request.start()
        while not turns.is_wanted:
            threading.Event().wait(0.001)
        take_steps("job")
    other.join(WAIT)
    request.join(WAIT)
    assert order.index("request") == 2, "after the step of the other job, which has waited for longer"
    assert len(order) == 41


def test_requests_without_end_do_not_stop_a_job(index):
    turns = Turns(patience=0.01)
    has_ended = threading.Event()

    def ask():
        while not has_ended.is_set():
            with turns.take_for_request():
                threading.Event().wait(0.001)

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    jobs = Jobs(turns, Settings())
    try:
        assert run_job(jobs, index, Wait()).state == "done"
    finally:
        has_ended.set()
        for thread in asking:
            thread.join(WAIT)
        jobs.close()


def test_one_thread_at_a_time_has_the_turn(turns):
    inside, most = [0], [0]
    lock = threading.Lock()

    def enter(take, give_way):
        for _ in range(50):
            with take():
                with lock:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                with lock:
                    inside[0] -= 1
                if give_way:
                    turns.give_way()

    threads = [threading.Thread(target=enter, args=(turns.take_for_request, False)) for _ in range(4)]
    threads += [threading.Thread(target=enter, args=(turns.take_for_job, True)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert most[0] == 1 and not any(thread.is_alive() for thread in threads)
