"""The routes of /api/v1: the records of the commands' JSON lines, as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, File, Path, Query, UploadFile

from tracin_ann.errors import TracinAnnError, UnknownRowError, UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.results import SCHEMA, Record
from tracin_ann.serve import schemas
from tracin_ann.serve.dependencies import ReaderOfRequest, ServiceOfRequest
from tracin_ann.serve.jobs import Job
from tracin_ann.serve.problems import ApiResponse, UnfinishedJobError, make_error_record
from tracin_ann.serve.schemas import StoredSide
from tracin_ann.serve.service import Answered
from tracin_ann.serve.settings import Settings
from tracin_ann.serve.uploads import read_picture_example, read_records
from tracin_ann.serve.work import Steps
from tracin_ann.store import RowFilter
from tracin_ann.types import ignore_progress

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorResponse, "description": description}
    for status, description in (
        (400, "The request cannot be read, or names another host."),
        (401, "There is no valid token."),
        (403, "The request comes from another site."),
        (404, "There is no such row or job."),
        (409, "The index has changed, does not match the task, or the job has no result."),
        (413, "The request is too large."),
        (422, "An option or an example is invalid."),
        (429, "Too many jobs."),
        (503, "Too many requests."),
    )
}
router = APIRouter(responses=_ERRORS, default_response_class=ApiResponse)
Offset = Annotated[int, Query(ge=0, description="The first record.")]
Limit = Annotated[int, Query(ge=1, description="The largest number of records.")]
_CONDITIONS = "Conditions on columns of training rows, such as `label=3`."
Position = Annotated[int, Path(description="The position of the row.")]


@router.get("/index", response_model=schemas.IndexInfo)
async def show_index(reader: ReaderOfRequest, service: ServiceOfRequest) -> Any:
    """Return what the index holds, its measured quality, and the limits of requests."""
    return ApiResponse(await reader.run(lambda index: _describe_index(index, service.settings)))


@router.get("/rows/{side}", response_model=schemas.RowsPage)
async def list_rows(
    side: StoredSide,
    reader: ReaderOfRequest,
    service: ServiceOfRequest,
    where: Annotated[list[str], Query(default_factory=list, description=_CONDITIONS)],
    offset: Offset = 0,
    limit: Limit = 50,
) -> Any:
    """Return rows of a data set, in order."""
    limit = _check_limit(limit, service.settings)
    return ApiResponse(await reader.run(lambda index: _list_rows(index, side, offset, limit, tuple(where))))


@router.get("/rows/{side}/{row}", response_model=schemas.SingleRow)
async def show_row(side: StoredSide, row: Position, reader: ReaderOfRequest) -> Any:
    """Return a row, with the columns and the self-influence of a training row."""
    return ApiResponse(await reader.run(lambda index: _show_row(index, side, row)))


@router.get("/answers", response_model=schemas.AnswersResponse)
async def answer(reader: ReaderOfRequest, asked: Annotated[schemas.AnswerParameters, Query()]) -> Any:
    """Return the proponents and opponents of rows, from the stored features."""
    rows: Sequence[int] = asked.rows
    if asked.ids:
        if rows:
            what, got = "rows are named twice", "rows and ids"
            raise UsageError(problem(what, got=got, expected="one of them", remedy="leave out one"))
        rows = await reader.run(lambda index: index.positions(asked.side, asked.ids))
    options = asked.make_options()
    return _respond(await reader.answer(asked.side, rows, options, together=asked.together, against=asked.against))


@router.post("/answers", response_model=schemas.AnswersResponse)
async def answer_records(reader: ReaderOfRequest, service: ServiceOfRequest, asked: schemas.ExampleQuery) -> Any:
    """Return the proponents and opponents of examples that are not in the index."""
    options = asked.make_options()
    service.check_limits(len(asked.records), options)
    examples = await reader.run(lambda index: read_records(index.task, asked.records, asked.first))
    return _respond(await reader.answer_examples(examples, options, together=asked.together))


@router.post("/answers/picture", response_model=schemas.AnswersResponse)
async def answer_picture(
    reader: ReaderOfRequest,
    service: ServiceOfRequest,
    asked: Annotated[schemas.PictureParameters, Query()],
    picture: Annotated[UploadFile, File(description="PNG, JPEG, GIF, WebP or BMP.")],
) -> Any:
    """Return the proponents and opponents of a picture."""
    options, data = asked.make_options(), await picture.read()
    most = service.settings.picture_pixels
    example = await reader.run(lambda index: read_picture_example(index.task, data, most))
    return _respond(await reader.answer_examples([example], options))


@router.get("/explanations", response_model=schemas.ExplanationResponse)
async def explain_score(reader: ReaderOfRequest, asked: Annotated[schemas.ExplanationParameters, Query()]) -> Any:
    """Return the parts of the exact score of a training row for a query, by parameter or token, and checkpoint."""
    return ApiResponse(await reader.run(lambda index: _explain(index, asked)))


@router.post("/jobs", response_model=schemas.JobState, status_code=202)
async def start_job(reader: ReaderOfRequest, asked: schemas.JobRequest) -> Any:
    """Start slow work; its address is in the header Location."""
    job = reader.start_job(asked.make_work())
    return ApiResponse(_describe_job(job), 202, {"Location": f"/api/v1/jobs/{job.name}"})


@router.get("/jobs", response_model=schemas.JobList)
async def list_jobs(service: ServiceOfRequest) -> Any:
    """Return the jobs whose results are kept, the latest first."""
    return ApiResponse({"schema": SCHEMA, "jobs": [_describe_job(job) for job in service.jobs.list()]})


@router.get("/jobs/{name}", response_model=schemas.JobState)
async def show_job(name: str, service: ServiceOfRequest) -> Any:
    """Return the progress of a job."""
    return ApiResponse(_describe_job(service.jobs.find(name)))


@router.delete("/jobs/{name}", response_model=schemas.JobState)
async def cancel_job(name: str, service: ServiceOfRequest) -> Any:
    """Cancel a job; one that runs stops at its next step, and one that has ended stays as it is."""
    return ApiResponse(_describe_job(service.jobs.cancel(name)))


@router.get("/jobs/{name}/records", response_model=schemas.RecordsPage)
async def show_records(name: str, service: ServiceOfRequest, offset: Offset = 0, limit: Limit = 50) -> Any:
    """Return records of the result of a job that is done."""
    job, limit = service.jobs.find(name), _check_limit(limit, service.settings)
    job.raise_error()
    if job.result is None:
        expected, remedy = "a job that is done", "wait until its state is done, or start it again"
        raise UnfinishedJobError(problem("the job has no result", got=job.state, expected=expected, remedy=remedy))
    records = job.result.records
    return ApiResponse(
        _make_content(job.generation, **_make_page(records, offset, limit, len(records)), summary=job.result.summary)
    )


def _respond(answered: Answered) -> ApiResponse:
    how, scored = zip(*((answer.how, answer.rows_scored) for answer in answered.answers), strict=True)
    return ApiResponse(_make_content(answered.generation, answers=answered.lines, how=how, rows_scored=scored))


def _make_content(generation: int, **fields: Any) -> Record:
    return {"schema": SCHEMA, "generation": generation, **fields}


def _make_page(records: Sequence[Any], offset: int, limit: int, total: int) -> Record:
    """Return a page of a list of records."""
    shown = records[offset : offset + limit]
    following = offset + len(shown)
    return {
        "offset": offset,
        "total": total,
        "next": following if shown and following < total else None,
        "records": shown,
    }


def _check_limit(limit: int, settings: Settings) -> int:
    """Return the limit of a page.

    Raises:
        UsageError: it is above the largest one.
    """
    if limit > settings.page_rows:
        expected = f"at most {settings.page_rows}"
        raise UsageError(problem("too large: limit", got=limit, expected=expected, remedy="lower limit"))
    return limit


def _describe_index(index: InfluenceIndex, settings: Settings) -> Record:
    manifest = index.manifest
    return _make_content(
        manifest.generation,
        rows=len(index),
        removed=len(index.removed),
        skipped=len(index.skipped),
        query_rows=_count_queries(index),
        checkpoints=[
            {"position": place, "name": checkpoint.name, "learning_rate": checkpoint.learning_rate}
            for place, checkpoint in enumerate(manifest.build.spec.checkpoints)
        ],
        columns={name: str(values.dtype) for name, values in index.columns.items()},
        default_score=index.default_score,
        index=f"{manifest.index.kind}, {manifest.index.reason}",
        quality=manifest.quality_summary,
        audit=manifest.audit_summary(),
        limits={
            "k": settings.most_hits,
            "candidates": settings.most_candidates,
            "rows": settings.most_rows,
            "limit": settings.page_rows,
            "bytes": settings.upload_bytes,
        },
    )


def _explain(index: InfluenceIndex, asked: schemas.ExplanationParameters) -> Record:
    _check_row(index, "train", asked.row)
    _check_row(index, asked.side, asked.query)
    found = asked.make_work().run(index, Steps(ignore_progress, lambda: None))
    return _make_content(index.manifest.generation, **found.summary, records=found.records)


def _count_queries(index: InfluenceIndex) -> int | None:
    """Return the number of rows of query_data; None if the task cannot be used."""
    try:
        return index.runner.n_rows("query")
    except TracinAnnError:
        return None


def _check_row(index: InfluenceIndex, side: StoredSide, row: int) -> None:
    """Check that the index has a row.

    Raises:
        UnknownRowError: it has no such row.
    """
    if side == "query":
        index.runner.check_ids(side, [row])
    elif not 0 <= row < len(index):
        expected = f"0 to {len(index) - 1}"
        raise UnknownRowError(problem("no such training row", got=row, expected=expected, remedy="choose another row"))


def _list_rows(index: InfluenceIndex, side: StoredSide, offset: int, limit: int, where: tuple[str, ...]) -> Record:
    if side == "query" and where:
        what, got = "conditions are about training rows", "where"
        raise UsageError(problem(what, got=got, expected="the side train", remedy="leave out where"))
    rows: Sequence[int] = range(index.runner.n_rows("query"))
    if side == "train":
        rows = index.present(RowFilter(where=where)).tolist()
    page = _make_page(rows, offset, limit, len(rows))
    return _make_content(
        index.manifest.generation, **page | {"records": [_describe_row(index, side, row) for row in page["records"]]}
    )


def _show_row(index: InfluenceIndex, side: StoredSide, row: int) -> Record:
    _check_row(index, side, row)
    record = _describe_row(index, side, row)
    if side == "train":
        rates = [checkpoint.learning_rate for checkpoint in index.manifest.build.spec.checkpoints]
        record["self_influence"] = _drop_nan(float(index.view().store.sqnorms()[row] @ rates))
    return _make_content(index.manifest.generation, record=record)


def _describe_row(index: InfluenceIndex, side: StoredSide, row: int) -> Record:
    described = index.describe(side, row)
    record: Record = {"id": index.id_of(side, row), "row": row}
    if described is not None:
        record["text"] = described.text
    if side == "train":
        record["columns"] = {
            name: _drop_nan(values[row : row + 1].tolist()[0]) for name, values in index.columns.items()
        }
    return record


def _drop_nan(value: Any) -> Any:
    """Return a value that JSON can represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe_job(job: Job) -> Record:
    record = {
        "schema": SCHEMA,
        "name": job.name,
        "kind": job.work.kind,
        "state": job.state,
        "generation": job.generation,
        "stage": job.stage,
        "done": job.done,
        "total": job.total,
    }
    if job.result is not None:
        record["records"] = len(job.result.records)
    if job.error is not None:
        record |= make_error_record(job.error)
    return record
