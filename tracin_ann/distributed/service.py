"""A worker: a process that holds a service, such as an open shard, and runs requests one after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, runtime_checkable

from tracin_ann.distributed.launcher import WorkerTraceback
from tracin_ann.errors import TracinAnnError, UsageError, WorkerError, first_line, problem


class Service(Protocol):
    """What a worker holds."""

    def run(self, request: Any) -> Any:
        """Return the reply to a request."""


MakeService = Callable[[str | None], Service]
"""Makes the service on a device (None: its own choice) in the worker; it can be pickled, as requests and replies."""


class WorkerDied(Exception):
    """The worker ended before it replied; the message says how."""


class ServiceWorker(ABC):
    """A process with a service. One thread opens it and runs requests; another may call `stop` at any time."""

    @abstractmethod
    def open(self) -> None:
        """Wait until the service is open; called once, before the first request.

        Raises:
            WorkerDied: the worker ended, or was stopped.
            Exception: what made the service fail to open.
        """

    @abstractmethod
    def run(self, request: Any) -> Any:
        """Return the service's reply to a request, or raise its error.

        Raises:
            WorkerDied: the worker ended, or was stopped.
            WorkerError: the request cannot be pickled.
        """

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """Return its process, if it runs on this machine."""

    @abstractmethod
    def stop(self) -> None:
        """End the worker at once, even if it does not react; a second call does nothing."""


@runtime_checkable
class ServiceLauncher(Protocol):
    """Starts workers somewhere."""

    @property
    def is_local(self) -> bool:
        """Return whether the workers run on this machine, and share its threads and memory."""

    def count_services(self) -> int:
        """Return the number of workers for work that can be divided among any number."""

    def start_service(self, make_service: MakeService, number: int) -> ServiceWorker:
        """Start a worker, and return it without waiting for its service, which `make_service` makes in the worker.

        Args:
            make_service: makes the service.
            number: of the worker among those of the same owner.
        """


class ServiceProcess(ServiceWorker):
    """A spawned process of this machine, connected by a pipe; it ends with this process."""

    def __init__(self, process: SpawnProcess, connection: Connection) -> None:
        """Store the process and this end of its pipe; use `start` to create a worker."""
        self._process, self._connection = process, connection

    @classmethod
    def start(cls, make_service: Callable[[], Service]) -> ServiceProcess:
        """Start a process, in which `make_service` is called."""
        context = multiprocessing.get_context("spawn")
        connection, other = context.Pipe()
        process = context.Process(target=_serve, args=(other, make_service), daemon=True)
        # The start of the tracker, which the start of a process may need, would unblock the signal.
        resource_tracker.ensure_running()
        # Ctrl-C reaches all processes of a terminal, also one that is importing the library.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        # Only the worker holds this end then, and the pipe closes when it ends.
        other.close()
        return cls(process, connection)

    def open(self) -> None:
        """Wait until the service is open, see `ServiceWorker`."""
        self._receive()

    @property
    def pid(self) -> int | None:
        """Return the id of the process."""
        return self._process.pid

    def run(self, request: Any) -> Any:
        """Return the service's reply, see `ServiceWorker`."""
        content = pack_request(request)
        try:
            self._connection.send_bytes(content)
        except OSError as error:
            raise self._describe_end() from error
        return self._receive()

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        # It ends at once, unless the kernel reads from a disk for it.
        self._process.join(1)

    def _receive(self) -> Any:
        try:
            content = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._describe_end() from error
        return unpack_result(content)

    def _describe_end(self) -> WorkerDied:
        self._process.join()
        return WorkerDied(f"process {self._process.pid} ended with status {self._process.exitcode}")


class ServiceHost:
    """A service in its worker; replies are pickled, with the errors that the worker's owner raises."""

    def __init__(self, make_service: Callable[[], Service]) -> None:
        """Store the function; `open` calls it."""
        self._make_service = make_service

    def open(self) -> bytes:
        """Make the service, and return the reply None."""
        return _pack_result(self._open)

    def run(self, request: bytes) -> bytes:
        """Return the reply to a pickled request."""
        return _pack_result(lambda: self._service.run(pickle.loads(request)))

    def _open(self) -> None:
        self._service = self._make_service()


def pack_request(request: Any) -> bytes:
    """Return a pickled request.

    Raises:
        UsageError: it cannot be pickled, because of the examples of a query.
    """
    try:
        return pickle.dumps(request)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        what, remedy = "a query cannot be sent to workers", "use examples that can be pickled, or no workers"
        raise UsageError(problem(what, got=first_line(error), expected="picklable examples", remedy=remedy)) from error


def _pack_result(call: Callable[[], Any]) -> bytes:
    """Return the pickled result of a call, or its error with the traceback as text."""
    try:
        return pickle.dumps((call(), None))
    except Exception as error:
        # Exceptions of other packages may not be picklable.
        what, remedy = "a worker failed", "run the same command without workers"
        other = WorkerError(problem(what, got=first_line(error), expected="a reply", remedy=remedy))
        sent = error if isinstance(error, TracinAnnError) else other
        return pickle.dumps((None, (sent, traceback.format_exc())))


def unpack_result(content: bytes) -> Any:
    """Return the result in a reply of `ServiceHost`, or raise its error."""
    result, failure = pickle.loads(content)
    if failure is not None:
        error, text = failure
        raise error from WorkerTraceback(text)
    return result


def _serve(connection: Connection, make_service: Callable[[], Service]) -> None:
    """Run requests until the other end of the pipe closes: the main function of a process."""
    # Ctrl-C reaches all processes of a terminal; the pipe then closes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    host = ServiceHost(make_service)
    with contextlib.suppress(EOFError, OSError), connection:
        connection.send_bytes(host.open())
        while True:
            connection.send_bytes(host.run(connection.recv_bytes()))
