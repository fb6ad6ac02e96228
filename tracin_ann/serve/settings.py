"""Settings of the explorer: limits on requests and jobs, and who may connect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Limits and access.

    Attributes:
        token: what a client has to present; None: anybody who reaches the address may connect.
        hosts: names that the Host header may have, without ports; None: any.
        decisions: the SQLite file with the reviewers' decisions; None: a file beside the index, named like it.
        most_hits: the largest `k`.
        most_candidates: the largest `candidates` for exact re-scoring.
        most_records: the largest number of records of the result of a job.
        most_rows: the largest number of queries of a request.
        pass_queries: the largest number of queries of different requests that are answered in one pass. It is below
            20, from where on the search tests whether the queries together are unlike the calibration queries.
        most_waiting: requests that may wait for the index; further ones get status 503.
        most_jobs: jobs that run at a time.
        most_queued_jobs: jobs that may wait to run; further ones get status 429.
        keep_seconds: how long the result of a job is kept.
        most_kept_jobs: ended jobs that are kept; the oldest are forgotten first.
        upload_bytes: the largest body of a request.
        picture_pixels: the largest number of pixels of an uploaded picture.
        page_rows: the largest number of records of a page of a list.
    """

    token: str | None = None
    hosts: frozenset[str] | None = frozenset({"127.0.0.1", "localhost", "::1"})
    decisions: Path | None = None
    most_hits: int = 100
    most_candidates: int = 1000
    most_records: int = 10_000
    most_rows: int = 100
    pass_queries: int = 16
    most_waiting: int = 256
    most_jobs: int = 2
    most_queued_jobs: int = 8
    keep_seconds: float = 3600.0
    most_kept_jobs: int = 100
    upload_bytes: int = 8 << 20
    picture_pixels: int = 1 << 24
    page_rows: int = 500
