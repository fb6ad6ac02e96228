"""The application: middleware, the routes of the API and of the pages, and the responses to errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tracin_ann import __version__
from tracin_ann.errors import TracinAnnError, UsageError, problem
from tracin_ann.serve import api
from tracin_ann.serve.pages import add_pages
from tracin_ann.serve.problems import make_response
from tracin_ann.serve.security import Gate
from tracin_ann.serve.service import IndexLocation, Service
from tracin_ann.serve.settings import Settings


def create_app(
    location: IndexLocation, settings: Settings | None = None, against: IndexLocation | None = None
) -> FastAPI:
    """Open an index and return the application that serves it.

    Args:
        location: the index.
        settings: limits and access.
        against: another index of the same training rows, whose answers pages compare with those of the first.

    Raises:
        DamagedIndexError: as `InfluenceIndex.open`.
    """
    settings = settings or Settings()
    service = Service(location, settings)
    other = None if against is None else Service(against, settings, service.turns)

    @asynccontextmanager
    async def close_at_end(app: FastAPI) -> AsyncIterator[None]:
        yield
        for each in (service, other):
            if each is not None:
                each.close()

    app = FastAPI(
        title="tracin_ann",
        version=__version__,
        lifespan=close_at_end,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/v1/openapi.json",
    )
    app.state.service = service
    app.add_middleware(Gate, settings=settings)
    add_error_responses(app)
    app.include_router(api.router, prefix="/api/v1")
    add_pages(app, other)
    return app


def add_error_responses(app: FastAPI) -> None:
    """Let an application respond to errors with their four parts."""
    app.add_exception_handler(TracinAnnError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http_error)


def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TracinAnnError)
    return make_response(request, error)


def _answer_invalid(request: Request, error: Exception) -> Response:
    """Return the response to a request whose parameters or body do not have the types of the route."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    got = repr(first.get("input"))
    message = problem(f"invalid {place}", got=got[:100], expected=first["msg"], remedy=f"change {place}")
    return make_response(request, UsageError(message))


def _answer_http_error(request: Request, error: Exception) -> Response:
    """Return the response to a request without a route, with another method, or with an unreadable body."""
    assert isinstance(error, HTTPException)
    got = f"{request.method} {request.url.path}"[:200]
    expected, remedy = "an address of a page", "follow the links of the pages"
    if request.url.path.startswith("/api/"):
        expected, remedy = "a request of the API", "see /api/v1/openapi.json"
    failure = TracinAnnError(problem(str(error.detail), got=got, expected=expected, remedy=remedy))
    return make_response(request, failure, error.headers, error.status_code)
