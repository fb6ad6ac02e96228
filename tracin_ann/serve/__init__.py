"""The explorer: pages and a JSON API over one open index, for many people at once; it needs the extra `serve`.

This package, and only it, imports FastAPI. Its modules:

    settings     limits and access
    turns        who may use the index and the model: one thread at a time, requests before jobs
    service      the open index; queries that arrive together are answered in one pass; new generations
    jobs         slow work with progress, cancellation, and results that are kept for an hour
    problems     errors with a status and four parts
    security     hosts, token, cross-site requests, headers
    uploads      texts and pictures of requests
    api          the routes of /api/v1
    pages        the HTML pages
    app          the application
"""

from __future__ import annotations

from tracin_ann.serve.app import create_app
from tracin_ann.serve.service import Answered, IndexLocation, Reader, Service
from tracin_ann.serve.settings import Settings

__all__ = ["Answered", "IndexLocation", "Reader", "Service", "Settings", "create_app"]
