"""A worker: a process that holds a service, such as an open shard, and runs requests one after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from tracin_ann.errors import TracinAnnError, WorkerError, first_line, problem


class Service(Protocol):
    """What a worker holds."""

    def run(self, request: Any) -> Any:
        """Return the reply to a request."""


MakeService = Callable[[], Service]
"""Makes the service in the worker; it is pickled, as requests and replies are."""


class WorkerDied(Exception):
    """The worker ended before it replied; the message says how."""


class Worker(ABC):
    """A process with a service. One thread runs requests; another may call `stop` at any time."""

    @abstractmethod
    def run(self, request: Any) -> Any:
        """Return the service's reply to a request, or raise its error.

        Raises:
            WorkerDied: the worker ended, or was stopped.
        """

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """Return its process, if it runs on this machine."""

    @abstractmethod
    def stop(self) -> None:
        """End the worker at once, even if it does not react; a second call does nothing."""


class LocalWorker(Worker):
    """A spawned process of this machine, connected by a pipe; it ends with this process."""

    def __init__(self, process: SpawnProcess, connection: Connection) -> None:
        """Store the process and this end of its pipe; use `start` to create a worker."""
        self._process, self._connection = process, connection

    @classmethod
    def start(cls, make_service: MakeService) -> LocalWorker:
        """Start a process and return it when its service is open.

        Raises:
            WorkerDied: it ended before.
            Exception: what `make_service` raises in the worker.
        """
        context = multiprocessing.get_context("spawn")
        connection, other = context.Pipe()
        process = context.Process(target=_serve, args=(other, make_service), daemon=True)
        process.start()
        # Only the worker holds this end then, and the pipe closes when it ends.
        other.close()
        worker = cls(process, connection)
        worker._receive()
        return worker

    @property
    def pid(self) -> int | None:
        """Return the id of the process."""
        return self._process.pid

    def run(self, request: Any) -> Any:
        """Return the service's reply, see `Worker`."""
        content = pickle.dumps(request)
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
        is_error, value = pickle.loads(content)  # noqa: S301 - written by the worker that this process started
        if is_error:
            raise value
        return value

    def _describe_end(self) -> WorkerDied:
        self._process.join()
        return WorkerDied(f"process {self._process.pid} ended with status {self._process.exitcode}")


def _serve(connection: Connection, make_service: MakeService) -> None:
    """Make the service and run requests until the other end of the pipe closes: the process of a `LocalWorker`."""
    # Ctrl-C interrupts the process that waits for the reply; the pipe then closes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError), connection:
        try:
            service = make_service()
        except Exception as error:  # noqa: BLE001 - raised by the process that started this one
            connection.send_bytes(pack_error(error))
            return
        connection.send_bytes(pickle.dumps((False, None)))
        while True:
            connection.send_bytes(_run_request(service, connection.recv_bytes()))


def _run_request(service: Service, content: bytes) -> bytes:
    """Return the pickled reply to a pickled request."""
    try:
        return pickle.dumps((False, service.run(pickle.loads(content))))  # noqa: S301 - written by the parent process
    except Exception as error:  # noqa: BLE001 - raised by the process that asked
        return pack_error(error)


def pack_error(error: Exception) -> bytes:
    """Return a pickled reply with an error of the library, or one that names another error."""
    if not isinstance(error, TracinAnnError):
        what, remedy = "a worker failed", "run the same command without workers"
        error = WorkerError(problem(what, got=first_line(error), expected="a reply", remedy=remedy))
    return pickle.dumps((True, error))
