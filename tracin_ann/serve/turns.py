"""Turns: one thread at a time uses the index and the model, and requests come before jobs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """The right to use the index and the model.

    A job lets waiting requests go first at the steps where it calls `give_way`. There it must not be inside a block of
    `TaskRunner.model`, or must have released it (`InfluenceIndex.release_model`): a request that needs the model would
    wait for the job, which waits for the request.

    Args:
        patience: seconds that a job waits while requests go first; then it does its next step.
    """

    def __init__(self, patience: float = 1.0) -> None:
        self._patience = patience
        self._change = threading.Condition()
        self._is_taken = False
        self._requests = 0
        self._overdue_jobs = 0

    @contextmanager
    def take_for_request(self) -> Iterator[None]:
        """Hold the turn in the block, before the jobs that wait for it."""
        with self._change:
            self._requests += 1
            try:
                self._change.wait_for(lambda: not self._is_taken and not self._overdue_jobs)
            finally:
                self._requests -= 1
            self._is_taken = True
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
            if not self._change.wait_for(lambda: not self._is_taken and not self._requests, self._patience):
                self._overdue_jobs += 1
                try:
                    self._change.wait_for(lambda: not self._is_taken)
                finally:
                    self._overdue_jobs -= 1
            self._is_taken = True

    def _release(self) -> None:
        with self._change:
            self._is_taken = False
            self._change.notify_all()
