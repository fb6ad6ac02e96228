"""Workers in the process of a test, and their launcher."""

from __future__ import annotations

from typing import Any

from tracin_ann.distributed.service import ServiceWorker, WorkerDied


class Inline(ServiceWorker):
    """A worker, or the launcher of workers.

    Attributes:
        started: the open service of each worker, by its number.
        dead: numbers of workers that end at every request.
        stopped: numbers of workers that were stopped.
    """

    pid = None

    def __init__(self, n_workers: int = 2, *, is_local: bool = False) -> None:
        self.n_workers, self.is_local = n_workers, is_local
        self.started: dict[int, Any] = {}
        self.dead: set[int] = set()
        self.stopped: set[int] = set()
        self._number = -1

    @property
    def services(self) -> list[Any]:
        return [service for _, service in sorted(self.started.items())]

    def count_services(self) -> int:
        return self.n_workers

    def start_service(self, make_service: Any, number: int) -> ServiceWorker:
        self.started[number] = make_service(None)
        worker = Inline()
        worker.started, worker.dead, worker.stopped, worker._number = self.started, self.dead, self.stopped, number
        return worker

    def open(self) -> None: ...

    def stop(self) -> None:
        self.stopped.add(self._number)

    def run(self, request: Any) -> Any:
        if self._number in self.dead:
            raise WorkerDied("scripted")
        return self.started[self._number].run(request)
