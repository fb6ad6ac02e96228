"""The application: middleware, the API's and the pages' routes, and the service's life."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from tracin_ann import __version__
from tracin_ann.serve.service import IndexLocation, Service
from tracin_ann.serve.settings import Settings


def create_app(location: IndexLocation, settings: Settings | None = None) -> FastAPI:
    """Open an index and return the application that serves it.

    Args:
        location: the index.
        settings: limits and access.

    Raises:
        DamagedIndexError: as `InfluenceIndex.open`.
    """
    settings = settings or Settings()
    service = Service(location, settings)

    @asynccontextmanager
    async def close_at_end(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="tracin_ann",
        version=__version__,
        lifespan=close_at_end,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/v1/openapi.json",
    )
    app.state.service = service
    # app.include_router(api.router, prefix="/api/v1")
    # pages.add_pages(app): mounts /static and includes the pages' router
    return app
