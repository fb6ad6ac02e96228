"""A group of workers that are asked together; a worker that ends is started again, and asked again."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from tracin_ann.distributed.service import ServiceWorker, WorkerDied
from tracin_ann.errors import UsageError, WorkerError, problem

Launch = Callable[[], ServiceWorker]
"""Starts a worker, which the group opens."""

logger = logging.getLogger(__name__)


class NoReplyError(WorkerError):
    """A worker ended at every attempt, or did not reply in time."""


class ServiceGroup:
    """Workers with one thread each, which sends requests and restarts the worker; several threads may ask."""

    def __init__(self, launches: Sequence[Launch], restarts: int) -> None:
        """Store the arguments.

        Args:
            launches: starts one worker each.
            restarts: how often a worker is started again for one request.
        """
        self._slots = [_Slot(f"worker {number}", launch, restarts) for number, launch in enumerate(launches)]
        self._lock = threading.Lock()
        self._is_closed = False
        # At the end of Python, before the modules that it needs are gone; `__del__` would be called after that.
        self._end = weakref.finalize(self, _close_slots, self._slots)

    def start(self) -> None:
        """Start all workers, at the same time.

        Raises:
            NoReplyError: a worker ends while it starts.
            Exception: what the start of a worker raises.
        """
        try:
            for future in [slot.start() for slot in self._slots]:
                future.result()
        except BaseException:
            self.close()
            raise

    def ask(self, requests: Sequence[Any | None], deadline_s: float | None = None) -> list[Any | NoReplyError | None]:
        """Return the reply of each worker to its request; None for a worker without one.

        A worker that does not reply in time is replaced, unless it is only starting. In place of its reply, and of that
        of a worker that ends at every attempt, there is an error.

        Args:
            requests: one for each worker; None: the worker is not asked.
            deadline_s: seconds to wait; None: any.

        Raises:
            UsageError: the group is closed.
            Exception: what the service of a worker raises.
        """
        if self._is_closed:
            remedy = "open the index again"
            raise UsageError(problem("the index is closed", got="a query", expected="an open index", remedy=remedy))
        with self._lock:
            asked = {
                number: slot.submit(request)
                for number, (slot, request) in enumerate(zip(self._slots, requests, strict=True))
                if request is not None
            }
            try:
                wait(asked.values(), deadline_s)
            finally:
                late = [number for number, future in asked.items() if not future.done()]
                for number in late:
                    self._slots[number].replace()
            replies: list[Any | NoReplyError | None] = [None] * len(requests)
            for number, future in asked.items():
                replies[number] = self._slots[number].report_late(deadline_s) if number in late else _get_reply(future)
            return replies

    @property
    def pids(self) -> list[int | None]:
        """Return the process of each worker on this machine; None: it has not been started yet."""
        return [slot.pid for slot in self._slots]

    def close(self) -> None:
        """End all workers."""
        self._is_closed = True
        self._end()


class _Slot:
    """The place of one worker, and the thread that asks it."""

    def __init__(self, name: str, launch: Launch, restarts: int) -> None:
        self._name, self._launch, self._restarts = name, launch, restarts
        self._worker: ServiceWorker | None = None
        self._turn = 0
        self._is_starting = self._is_closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def start(self) -> Future[Any]:
        """Start the worker unless it runs."""
        return self._thread.submit(self._try, lambda worker: None, self._turn)

    @property
    def pid(self) -> int | None:
        """Return the process of the worker, if it runs on this machine."""
        return None if self._worker is None else self._worker.pid

    def submit(self, request: Any) -> Future[Any]:
        """Ask the worker."""
        return self._thread.submit(self._try, lambda worker: worker.run(request), self._turn)

    def replace(self) -> None:
        """End the request and its worker, and start another one.

        A worker that is starting has no request yet, and is not ended: with a deadline that is shorter than its start,
        it would never be ready.
        """
        self._turn += 1
        if not self._is_starting:
            self._stop_worker()
            self.start()

    def close(self) -> None:
        """End the worker and the thread."""
        self._turn += 1
        self._is_closed = True
        self._stop_worker()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def report_late(self, deadline_s: float | None) -> NoReplyError:
        """Return the error of a worker that did not reply in time."""
        remedy = "raise the deadline, or allow partial answers"
        return NoReplyError(
            problem(f"{self._name} is late", got=f"no reply in {deadline_s} s", expected="a reply", remedy=remedy)
        )

    def _stop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()

    def _try(self, run: Callable[[ServiceWorker], Any], turn: int) -> Any:
        """Return the result of a call with the worker, which is started if needed, and again if it ends.

        Raises:
            NoReplyError: it ends at every attempt, or `replace` or `close` was called meanwhile.
        """
        cause: WorkerDied | None = None
        for _ in range(self._restarts + 1):
            if turn != self._turn:
                break
            try:
                worker = self._worker or self._open_worker()
                if turn != self._turn:
                    break
                return run(worker)
            except WorkerDied as error:
                if turn == self._turn:
                    logger.warning("%s: %s", self._name, error)
                self._worker, cause = None, error
        what, remedy = f"{self._name} ends before it replies", "see its messages, such as for missing memory"
        raise NoReplyError(problem(what, got=cause or "its end", expected="a reply", remedy=remedy)) from cause

    def _open_worker(self) -> ServiceWorker:
        """Start the worker, and wait until it is open; `close` ends it meanwhile.

        Raises:
            WorkerDied: it ended, or `close` was called.
            Exception: what made it fail to open.
        """
        self._is_starting = True
        try:
            worker = self._worker = self._launch()
            try:
                if self._is_closed:
                    raise WorkerDied("it was started too late")
                worker.open()
            except BaseException:
                self._worker = None
                worker.stop()
                raise
        finally:
            # Before the turn is read: a request that is late from now on ends the worker, or finds another turn.
            self._is_starting = False
        return worker


def _close_slots(slots: Sequence[_Slot]) -> None:
    for slot in slots:
        slot.close()


def _get_reply(future: Future[Any]) -> Any | NoReplyError:
    try:
        return future.result()
    except NoReplyError as error:
        return error
