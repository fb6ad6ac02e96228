"""Errors of requests: their status, and their four parts (what, got, expected, remedy) as JSON."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from tracin_ann.errors import (
    BusyIndexError,
    DamagedIndexError,
    IndexMismatchError,
    TracinAnnError,
    UnknownRowError,
    problem,
    split_problem,
)


class IndexChangedError(TracinAnnError):
    """The request names a generation that is not the current one."""


class UnknownResultError(TracinAnnError):
    """There is no such job, or its result is no longer kept."""


class TooManyJobsError(TracinAnnError):
    """As many jobs wait as may wait."""


class BusyError(TracinAnnError):
    """As many requests wait as may wait."""


class TooLargeError(TracinAnnError):
    """The body of the request is larger than the limit."""


class ForbiddenError(TracinAnnError):
    """The request comes from another site, or its form has no valid CSRF token."""


_STATUS: tuple[tuple[type[TracinAnnError], HTTPStatus], ...] = (
    (UnknownRowError, HTTPStatus.NOT_FOUND),
    (UnknownResultError, HTTPStatus.NOT_FOUND),
    (IndexChangedError, HTTPStatus.CONFLICT),
    (IndexMismatchError, HTTPStatus.CONFLICT),
    (TooLargeError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (TooManyJobsError, HTTPStatus.TOO_MANY_REQUESTS),
    (BusyError, HTTPStatus.SERVICE_UNAVAILABLE),
    (BusyIndexError, HTTPStatus.SERVICE_UNAVAILABLE),
    (ForbiddenError, HTTPStatus.FORBIDDEN),
    (DamagedIndexError, HTTPStatus.INTERNAL_SERVER_ERROR),
)
"""The status of each error; 422 for the others, which are about options and examples of the request."""


def find_status(error: TracinAnnError) -> int:
    """Return the status of the response to a request that raised the error."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return int(status)
    return int(HTTPStatus.UNPROCESSABLE_ENTITY)


def make_error_record(error: TracinAnnError) -> dict[str, Any]:
    """Return the JSON body of an error: `{"error": {"type", "what", "got", "expected", "remedy"}}`."""
    return {"error": {"type": type(error).__name__, **split_problem(str(error))}}


def make_changed_error(asked: int, current: int) -> IndexChangedError:
    """Return the error for a request that continues one about another generation of the index."""
    return IndexChangedError(
        problem(
            "the index has changed",
            got=f"generation {asked}",
            expected=f"generation {current}",
            remedy="load the page again, or leave out the generation",
        )
    )
