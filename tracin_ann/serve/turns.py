"""Turns: one thread at a time uses the index and the model, and requests come before jobs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """The right to use the index and the model.

    A job lets waiting requests go first at the steps where it calls `give_way`. There it must not be inside a block of
    `TaskRunner.model`, or must have released it (`InfluenceIndex.release_model`): a request that needs the model would
    wait for the job, which waits for the request.

    Args:
        patience: seconds that a job waits while requests go first; then it waits in the queue of the requests.
    """

    def __init__(self, patience: float = 1.0) -> None:
        self._patience = patience
        self._change = threading.Condition()
        self._is_taken = False
        self._requests = 0
        self._queue: deque[object] = deque()

    @contextmanager
    def take_for_request(self) -> Iterator[None]:
        """Hold the turn in the block, before the jobs that have not waited for long."""
        with self._change:
            self._requests += 1
            try:
                self._take_in_order()
            finally:
                self._requests -= 1
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def take_for_job(self) -> Iterator[None]:
        """Hold the turn in the block, after the requests that wait for it."""
        self._take_after_requests()
        try:
            yield
        finally:
            self._release()

    @property
    def is_wanted(self) -> bool:
        """Return whether requests wait."""
        return self._requests > 0

    def give_way(self) -> None:
        """Let the waiting requests go first; the calling job holds the turn before and after."""
        if self.is_wanted:
            self._release()
            self._take_after_requests()

    def _take_after_requests(self) -> None:
        with self._change:
            if self._change.wait_for(lambda: not self._is_taken and not self._queue, self._patience):
                self._is_taken = True
            else:
                self._take_in_order()

    def _take_in_order(self) -> None:
        """Take the turn after those that are in the queue; the condition's lock is held."""
        place = object()
        self._queue.append(place)
        try:
            self._change.wait_for(lambda: not self._is_taken and self._queue[0] is place)
            self._is_taken = True
        finally:
            self._queue.remove(place)
            # If an interrupt has ended the wait, the next one may be first now.
            self._change.notify_all()

    def _release(self) -> None:
        with self._change:
            self._is_taken = False
            self._change.notify_all()
