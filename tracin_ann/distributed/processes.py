"""Launcher of processes on this machine, one for each device."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from tracin_ann.device import resolve_device
from tracin_ann.distributed.launcher import Launcher, OpenWorker, WorkerTraceback, describe_unpicklable
from tracin_ann.distributed.service import MakeService, ServiceProcess, ServiceWorker
from tracin_ann.distributed.units import UnitQueue
from tracin_ann.errors import TracinAnnError, UsageError, first_line, problem

U = TypeVar("U")
R = TypeVar("R")


class ProcessLauncher(Launcher):
    """Runs units, or the workers of an open index, in processes of this machine; several may share a device.

    Processes are spawned: a script that uses it needs `if __name__ == "__main__":`. Together they use as many CPU
    threads as this process.

    Args:
        devices: the device of each process, such as ("cpu", "cpu"), see `resolve_device`.

    Raises:
        UsageError: there are none.
    """

    is_local = True

    def __init__(self, devices: Sequence[str]) -> None:
        if not devices or isinstance(devices, str):
            expected = 'a list with one name for each process, such as ["cpu", "cpu"]'
            raise UsageError(problem("no devices", got=repr(devices), expected=expected, remedy="name some"))
        self.devices = tuple(devices)

    def count_services(self) -> int:
        """Return the number of devices."""
        return len(self.devices)

    def start_service(self, make_service: MakeService, number: int) -> ServiceWorker:
        """Start a process that holds a service, on the next device in turn; see `ServiceLauncher`.

        Raises:
            UsageError: the device does not exist.
        """
        device = self.devices[number % len(self.devices)]
        resolve_device(device)
        return ServiceProcess.start(partial(make_service, device))

    def run(self, open_worker: OpenWorker[U, R], units: Sequence[U]) -> Iterator[R]:
        """Yield the results of the processes; see `Launcher`."""
        for device in self.devices:
            resolve_device(device)
        pickled, n_threads = _pickle(open_worker), max(1, torch.get_num_threads() // len(self.devices))
        queue, running = UnitQueue(units, len(self.devices)), dict[Connection, _Process]()

        def start(device: str) -> None:
            if queue:
                process = _Process.start(device, pickled, n_threads)
                process.send(queue.take())
                running[process.pipe] = process

        try:
            for device in self.devices:
                start(device)
            while running:
                for pipe in connection.wait(list(running)):
                    process = running[pipe]  # type: ignore[index]
                    try:
                        kind, value = process.pipe.recv()
                    except (EOFError, OSError):
                        del running[process.pipe]
                        queue.put_back(process.units, process.describe_end())
                        start(process.device)
                        continue
                    if kind == "result":
                        yield value
                    elif kind == "error":
                        error, text = value
                        raise error from WorkerTraceback(text)
                    else:
                        process.send(queue.take())
                        if not process.units:
                            del running[process.pipe]
                            process.process.join()
        finally:
            for process in running.values():
                process.process.kill()
                process.process.join()


@dataclass
class _Process:
    """A running process.

    Attributes:
        device: its device.
        process: the process.
        pipe: this end of the connection to it.
        units: what it computes.
    """

    device: str
    process: BaseProcess
    pipe: Connection
    units: list[Any] = field(default_factory=list)

    @classmethod
    def start(cls, device: str, pickled: bytes, n_threads: int) -> _Process:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, pickled, device, n_threads), daemon=False)
        process.start()
        # The end of the process then closes the connection.
        theirs.close()
        return cls(device, process, ours)

    def send(self, units: list[Any]) -> None:
        """Send the next units; an empty list ends the process."""
        self.units = units
        try:
            self.pipe.send(units)
        except OSError:
            # It has died, which the next `recv` reports.
            return

    def describe_end(self) -> str:
        """Return how the process ended."""
        self.process.join()
        code = self.process.exitcode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _pickle(open_worker: Any) -> bytes:
    try:
        return pickle.dumps(open_worker)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(describe_unpicklable(error)) from error


def _serve(pipe: Connection, pickled: bytes, device: str, n_threads: int) -> None:
    """Compute the units that come through the pipe until an empty list comes: the main function of a process."""
    # Ctrl-C reaches all processes of a terminal; the parent process ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(n_threads)
    try:
        with pickle.loads(pickled)(device) as worker:
            while units := pipe.recv():
                for result in worker(units):
                    pipe.send(("result", result))
                pipe.send(("done", None))
    except Exception as error:
        pipe.send(("error", (_make_sendable(error), traceback.format_exc())))


def _make_sendable(error: Exception) -> Exception:
    """Return an error of the library or of the system, or another error as text, which can always be pickled."""
    is_known = isinstance(error, TracinAnnError) or (
        isinstance(error, OSError) and type(error).__module__ == "builtins"
    )
    return error if is_known else RuntimeError(first_line(error))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
