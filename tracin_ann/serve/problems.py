"""Errors of requests: their status, and their four parts (what, got, expected, remedy) as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from tracin_ann.distributed import NoReplyError
from tracin_ann.errors import (
    BusyIndexError,
    DamagedIndexError,
    IndexMismatchError,
    TracinAnnError,
    UnknownRowError,
    WorkerError,
    problem,
    split_problem,
)

RETRY_SECONDS = 5
"""When to try again, of responses with status 429 and 503."""


class IndexChangedError(TracinAnnError):
    """The request names a generation that is not the current one."""


class UnknownJobError(TracinAnnError):
    """There is no such job, or its result is no longer kept."""


class UnfinishedJobError(TracinAnnError):
    """The job has no result: it has not ended, or it was cancelled."""


class TooManyJobsError(TracinAnnError):
    """As many jobs wait as may wait."""


class BusyError(TracinAnnError):
    """As many requests wait as may wait."""


class TooLargeError(TracinAnnError):
    """The body of the request is larger than the limit."""


class ForbiddenError(TracinAnnError):
    """The request comes from another site, or its form has no valid CSRF token."""


class LoginError(TracinAnnError):
    """The request has no valid token."""


class UnknownHostError(TracinAnnError):
    """The Host header is none of the server's names."""


_STATUS: dict[type[TracinAnnError], HTTPStatus] = {
    UnknownHostError: HTTPStatus.BAD_REQUEST,
    LoginError: HTTPStatus.UNAUTHORIZED,
    ForbiddenError: HTTPStatus.FORBIDDEN,
    UnknownRowError: HTTPStatus.NOT_FOUND,
    UnknownJobError: HTTPStatus.NOT_FOUND,
    UnfinishedJobError: HTTPStatus.CONFLICT,
    IndexChangedError: HTTPStatus.CONFLICT,
    IndexMismatchError: HTTPStatus.CONFLICT,
    TooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    TooManyJobsError: HTTPStatus.TOO_MANY_REQUESTS,
    BusyError: HTTPStatus.SERVICE_UNAVAILABLE,
    BusyIndexError: HTTPStatus.SERVICE_UNAVAILABLE,
    NoReplyError: HTTPStatus.SERVICE_UNAVAILABLE,
    WorkerError: HTTPStatus.INTERNAL_SERVER_ERROR,
    DamagedIndexError: HTTPStatus.INTERNAL_SERVER_ERROR,
}


def find_status(error: TracinAnnError) -> HTTPStatus:
    """Return the status of the response to a request that raised the error.

    It is 422 for errors that are not listed: they are about the options and examples of the request.
    """
    return next((_STATUS[kind] for kind in type(error).mro() if kind in _STATUS), HTTPStatus.UNPROCESSABLE_ENTITY)


def make_error_record(error: TracinAnnError) -> dict[str, Any]:
    """Return an error as JSON: `{"error": {"type", "what", "got", "expected", "remedy"}}`."""
    return {"error": {"type": type(error).__name__, **split_problem(str(error))}}


def make_response(
    request: Request, error: TracinAnnError, headers: Mapping[str, str] | None = None, status: int | None = None
) -> Response:
    """Return the response to a request that raised an error: JSON from the API, else a page.

    `app.state.show_error(request, status, record)` makes the pages, if it is set. They name the index: clients that may
    not read it get text.

    Args:
        request: the request.
        error: the error.
        headers: to be added.
        status: of the response; None: `find_status(error)`.
    """
    status, record = status or int(find_status(error)), make_error_record(error)
    added: dict[str, str] = (
        {"Retry-After": str(RETRY_SECONDS)} if isinstance(error, TooManyJobsError | BusyError | NoReplyError) else {}
    )
    added |= headers or {}
    if request.url.path.startswith("/api/"):
        return ApiResponse(record, status, added)
    is_stranger = isinstance(error, LoginError | UnknownHostError)
    show_error = None if is_stranger else getattr(request.app.state, "show_error", None)
    response: Response = PlainTextResponse(str(error)) if show_error is None else show_error(request, status, record)
    response.status_code = status
    response.headers.update(added)
    return response


class ApiResponse(JSONResponse):
    """JSON in ASCII: texts may have lone surrogates, which UTF-8 cannot represent."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


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
