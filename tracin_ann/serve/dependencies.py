"""What routes and pages get for a request: the service, a reader of one generation, and the context of templates.

    @router.get("/rows/{row}")
    async def show_row(row: int, reader: ReaderOfRequest, context: TemplateContext) -> HTMLResponse: ...

A request may name the generation that it continues, as the query parameter `generation`: if another one is current, the
status is 409. Links and forms of a page that add to what it shows carry `generation`; permalinks do not.

A form with `method="post"` has a field `csrf` with the value `csrf` of the context, or the request has the header
`X-CSRF-Token`; the route depends on `CheckedForm`. Requests from other sites never reach a route (`security`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, Query, Request

from tracin_ann.errors import problem
from tracin_ann.serve.problems import ForbiddenError
from tracin_ann.serve.security import CSRF_FIELD, CSRF_HEADER, is_valid_csrf, make_csrf
from tracin_ann.serve.service import Reader, Service


def get_service(request: Request) -> Service:
    """Return the service of the application."""
    service: Service = request.app.state.service
    return service


ServiceOfRequest = Annotated[Service, Depends(get_service)]


async def open_reader(
    service: ServiceOfRequest,
    generation: Annotated[
        int | None, Query(ge=0, description="The generation of the index that the request continues.")
    ] = None,
) -> AsyncIterator[Reader]:
    """Yield the reader of a request.

    Raises:
        IndexChangedError: the request continues another generation.
    """
    async with service.read() as reader:
        reader.expect(generation)
        yield reader


ReaderOfRequest = Annotated[Reader, Depends(open_reader)]


def make_template_context(request: Request) -> dict[str, Any]:
    """Return the values that all templates get.

    `csrf`: the token of forms. `nonce`: of the `<style>` elements of this response, the only inline content that the
    content security policy allows. `generation`: the current one.
    """
    return {
        "csrf": make_csrf(request.state.session),
        "nonce": request.state.nonce,
        "generation": get_service(request).generation,
    }


TemplateContext = Annotated[dict[str, Any], Depends(make_template_context)]


async def check_form(request: Request) -> AsyncIterator[None]:
    """Check the CSRF token of a form; files that came with it are closed when the request ends.

    Raises:
        ForbiddenError: it is missing or wrong.
    """
    try:
        given = request.headers.get(CSRF_HEADER) or (await request.form()).get(CSRF_FIELD)
        if not isinstance(given, str) or not is_valid_csrf(request.state.session, given):
            what, expected = "the form is not from a page of this server", "its token"
            remedy = "load the page again"
            raise ForbiddenError(problem(what, got="no valid token", expected=expected, remedy=remedy))
        yield
    finally:
        await request.close()


CheckedForm = Depends(check_form)
"""For `dependencies=[CheckedForm]` of a route."""
