"""The routes of the pages: requests become what a page asks for, and replies become responses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response

from tracin_ann.errors import UnknownRowError, problem
from tracin_ann.report import Figure
from tracin_ann.serve.decisions import Decisions, default_path
from tracin_ann.serve.dependencies import CheckedForm, ReaderOfRequest
from tracin_ann.serve.pages.addresses import Parameters
from tracin_ann.serve.pages.comparison import show_comparison
from tracin_ann.serve.pages.context import Asked, Context, cancel_job
from tracin_ann.serve.pages.lists import list_hub_figures, show_duplicates, show_hubs
from tracin_ann.serve.pages.overview import list_overview_figures, show_overview
from tracin_ann.serve.pages.pairs import list_pair_figures, show_pair
from tracin_ann.serve.pages.queries import export_answers, keep_picture, list_query_figures, show_query
from tracin_ann.serve.pages.rows import find_row, show_row
from tracin_ann.serve.pages.site import Reply
from tracin_ann.serve.pages.suspects import decide, export_decisions, show_suspects
from tracin_ann.serve.security import CSRF_FIELD, make_csrf
from tracin_ann.serve.service import Reader, Service

Show = Callable[[Context, Asked, Reader], Awaitable[Reply]]
PAGES: dict[str, Show] = {
    "/": show_overview,
    "/query": show_query,
    "/query/answers.{form}": export_answers,
    "/rows": find_row,
    "/rows/{row}": show_row,
    "/pair": show_pair,
    "/suspects": show_suspects,
    "/compare": show_comparison,
    "/hubs": show_hubs,
    "/duplicates": show_duplicates,
    "/decisions.{form}": export_decisions,
}
FORMS: dict[str, Show] = {"/decisions": decide, "/query/picture": keep_picture, "/jobs/cancel": cancel_job}
FIGURES = {
    "overview": list_overview_figures,
    "query": list_query_figures,
    "pair": list_pair_figures,
    "hubs": list_hub_figures,
}
"""The figures of pages, at addresses with the query string of the page."""


def add_pages(app: FastAPI, against: Service | None = None) -> None:
    """Add the pages to an application whose service is open.

    Args:
        app: the application; `app.state.service` is its service.
        against: another index that answers can be compared with.
    """
    service: Service = app.state.service
    decisions = Decisions(service.settings.decisions or default_path(service.directory))
    context = Context(service, decisions, against)
    router = APIRouter(include_in_schema=False)
    for path, show in PAGES.items():
        router.add_api_route(path, _make_endpoint(context, show), methods=["GET"])
    for path, show in FORMS.items():
        endpoint = _make_form_endpoint(context, show)
        router.add_api_route(path, endpoint, methods=["POST"], dependencies=[CheckedForm])
    for page, list_figures in FIGURES.items():
        path = f"/figures/{page}/{{number:int}}.{{form}}"
        router.add_api_route(path, _make_endpoint(context, partial(_show_figure, list_figures)), methods=["GET"])

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        return _respond(context.site.static_file(name) or Reply("", status=404))

    @router.get("/images/{name}.png")
    async def image(name: str) -> Response:
        return _respond(context.site.image(name) or Reply("", status=404))

    def show_error(request: Request, status: int, record: Mapping[str, Any]) -> Response:
        return _respond(context.show_error(record["error"], request.url.path, status))

    app.include_router(router)
    app.state.show_error = show_error


async def _show_figure(
    list_figures: Callable[[Context, Asked, Reader], Awaitable[tuple[Figure, ...]]],
    context: Context,
    asked: Asked,
    reader: Reader,
) -> Reply:
    """Return a figure of a page, by its number from 1, as a file."""
    figures, number, form = await list_figures(context, asked, reader), asked.places["number"], asked.places["form"]
    if not 1 <= number <= len(figures) or form not in ("svg", "png"):
        got, expected = f"{number}.{form}", f"1 to {len(figures)}, .svg or .png"
        remedy = "follow the link of the page"
        raise UnknownRowError(problem("no such figure", got=repr(got), expected=expected, remedy=remedy))
    return await context.draw(figures[number - 1], form)


def _make_endpoint(context: Context, show: Show) -> Callable[..., Awaitable[Response]]:
    async def endpoint(request: Request, reader: ReaderOfRequest) -> Response:
        return _respond(await show(context, _read_request(request, request.query_params), reader))

    return endpoint


def _make_form_endpoint(context: Context, show: Show) -> Callable[..., Awaitable[Response]]:
    async def endpoint(request: Request, reader: ReaderOfRequest) -> Response:
        form = await request.form()
        picture = form.get("picture")
        file = b"" if picture is None or isinstance(picture, str) else await picture.read()
        return _respond(await show(context, _read_request(request, form, file), reader))

    return endpoint


def _read_request(request: Request, given: Parameters, file: bytes = b"") -> Asked:
    guard = ((CSRF_FIELD, make_csrf(request.state.session)),)
    return Asked(given, request.path_params, guard, "HX-Request" in request.headers, file)


def _respond(reply: Reply) -> Response:
    return Response(reply.body, reply.status, dict(reply.headers), reply.media_type)
