"""Jobs: slow work with progress and cancellation; its result is kept for an hour, in memory.

Jobs end with the process: after a restart, their names are unknown. A page starts a job, and asks for its state until
`state` is one of `ENDED`:

    job = reader.start_job(FindMislabelled("label", k=200))
    job = service.jobs.find(name)                            # UnknownJobError: status 404
    job.state, job.stage, job.done, job.total, job.error, job.result
    service.jobs.cancel(name)
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from tracin_ann.errors import TracinAnnError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.serve.problems import TooManyJobsError, UnknownJobError
from tracin_ann.serve.settings import Settings
from tracin_ann.serve.turns import Turns
from tracin_ann.serve.work import Result, Steps, Work

State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: frozenset[State] = frozenset({"done", "failed", "cancelled"})
logger = logging.getLogger(__name__)


class _CancelledError(BaseException):
    """The job was cancelled; raised where it reports progress."""


@dataclass(eq=False)
class Job:
    """Slow work on one generation of the index.

    Attributes:
        name: its name, which cannot be guessed.
        work: what it does.
        generation: the generation of the index that it reads.
        state: `queued`, `running`, or one of `ENDED`.
        stage: what it is doing.
        done: steps of the stage that are done.
        total: all steps of the stage.
        result: of a job that is done.
        error: of a job that failed, without a traceback, whose frames would keep the index and gradients in memory.
        ended: when it ended, by `time.monotonic`.
    """

    name: str
    work: Work
    generation: int
    state: State = "queued"
    stage: str = ""
    done: int = 0
    total: int = 0
    result: Result | None = None
    error: TracinAnnError | None = None
    ended: float | None = None
    is_stopping: bool = False
    future: Future[None] = field(default_factory=Future, repr=False)

    def report(self, stage: str, done: int, total: int) -> None:
        """Set the progress.

        Raises:
            _CancelledError: the job was cancelled.
        """
        if self.is_stopping:
            raise _CancelledError
        self.stage, self.done, self.total = stage, done, total

    def raise_error(self) -> None:
        """Raise the error of a job that failed.

        Raises:
            TracinAnnError: a copy of the error.
        """
        if self.error is not None:
            raise copy(self.error)


class Jobs:
    """The jobs of a process.

    Args:
        turns: the right to use the index.
        settings: limits.
        now: returns seconds, as `time.monotonic`.
    """

    def __init__(self, turns: Turns, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        self._turns, self._settings, self._now = turns, settings, now
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(settings.most_jobs, thread_name_prefix="job")

    def start(self, work: Work, index: InfluenceIndex) -> Job:
        """Start a job on an open index, or queue it.

        Raises:
            TooManyJobsError: as many jobs are queued as may be.
        """
        with self._lock:
            self._forget_old()
            n_open = sum(job.state not in ENDED for job in self._jobs.values())
            most = self._settings.most_jobs + self._settings.most_queued_jobs
            if n_open >= most:
                raise TooManyJobsError(
                    problem(
                        "too many jobs",
                        got=f"{n_open} running or queued",
                        expected=f"fewer than {most}",
                        remedy="try again when a job has ended, or cancel one",
                    )
                )
            job = Job(secrets.token_urlsafe(12), work, index.manifest.generation)
            self._jobs[job.name] = job
            job.future = self._threads.submit(self._run, job, index)
        return job

    def find(self, name: str) -> Job:
        """Return a job.

        Raises:
            UnknownJobError: there is none, or it ended longer ago than results are kept.
        """
        with self._lock:
            self._forget_old()
            job = self._jobs.get(name)
        if job is None:
            raise UnknownJobError(
                problem(
                    "no such job",
                    got=repr(name[:40]),
                    expected=f"a job of this server, ended at most {self._settings.keep_seconds / 60:.0f} minutes ago",
                    remedy="start the job again",
                )
            )
        return job

    def list(self) -> list[Job]:
        """Return all jobs, the latest first."""
        with self._lock:
            self._forget_old()
            return list(reversed(self._jobs.values()))

    def cancel(self, name: str) -> Job:
        """Cancel a job that has not ended; a running job stops where it reports progress next.

        Raises:
            UnknownJobError: there is no such job.
        """
        job = self.find(name)
        job.is_stopping = True
        if job.future.cancel():
            self._end(job, "cancelled")
        return job

    def close(self) -> None:
        """Cancel all jobs and wait for their ends."""
        for job in self.list():
            self.cancel(job.name)
        self._threads.shutdown()

    def _run(self, job: Job, index: InfluenceIndex) -> None:
        try:
            with self._turns.take_for_job():
                job.state = "running"
                job.report("", 0, 0)
                job.result = job.work.run(index, Steps(job.report, partial(self._give_way, index)))
            self._end(job, "done")
        except _CancelledError:
            self._end(job, "cancelled")
        except TracinAnnError as error:
            job.error = copy(error)
            self._end(job, "failed")
        except BaseException as error:  # noqa: BLE001 - also SystemExit, which a task's code may raise
            logger.exception("job %s failed", type(job.work).__name__)
            job.error = TracinAnnError(
                problem(
                    "internal error in a job",
                    got=type(error).__name__,
                    expected="a result",
                    remedy="read the log of the server",
                )
            )
            self._end(job, "failed")

    def _give_way(self, index: InfluenceIndex) -> None:
        """Let the waiting requests go first, with the model."""
        if self._turns.is_wanted:
            with index.release_model():
                self._turns.give_way()

    def _end(self, job: Job, state: State) -> None:
        job.ended, job.state = self._now(), state

    def _forget_old(self) -> None:
        oldest = self._now() - self._settings.keep_seconds
        ends = sorted(
            (job.ended, place, job.name) for place, job in enumerate(self._jobs.values()) if job.ended is not None
        )
        n_surplus = len(ends) - self._settings.most_kept_jobs
        for order, (ended, _, name) in enumerate(ends):
            if ended < oldest or order < n_surplus:
                del self._jobs[name]
