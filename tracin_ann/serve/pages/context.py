"""What all pages share: requests, replies, answers, jobs with their progress, and figures with addresses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from tracin_ann.index import InfluenceIndex
from tracin_ann.report import Examples, ExampleView, Figure
from tracin_ann.results import Answer
from tracin_ann.serve.decisions import Decisions
from tracin_ann.serve.jobs import ENDED, Job
from tracin_ann.serve.pages.addresses import Parameters, QueryForm, read_text
from tracin_ann.serve.pages.inputs import Inputs
from tracin_ann.serve.pages.site import Reply, Site
from tracin_ann.serve.security import own_address
from tracin_ann.serve.service import Reader, Service
from tracin_ann.serve.work import ComputeExactAnswers, Result, Work

LABEL = "label"
"""The column with the label of a row."""
_FIRST_WAIT, _WAIT_STEP = 0.4, 0.02
"""Seconds that a page waits for a job before it shows progress, and between two looks at it."""
_MOST_TEXT = 20_000
"""Characters of a text that is a query."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        given: values of its query string or of its form.
        places: values in its path, by name.
        guard: names and values of the hidden fields of forms that change something.
        is_partial: whether the script of a page asks for a part of it.
        file: the content of an uploaded file.
    """

    given: Parameters
    places: Mapping[str, Any]
    guard: tuple[tuple[str, str], ...]
    is_partial: bool
    file: bytes = b""


@dataclass(frozen=True)
class Progress:
    """The progress of a job on a page: what it is for, what it does, and the form that cancels it."""

    caption: str
    state: str
    done: int
    total: int
    address: str
    fields: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class LinkedFigure:
    """A figure of a page with the addresses of its files."""

    address: str
    png: str
    title: str
    caption: str
    alt: str


@dataclass(frozen=True)
class RowCard:
    """A row in a list."""

    row: int
    id: int | str
    view: ExampleView
    detail: str = ""


@dataclass(frozen=True)
class Wanted:
    """A result that a page wants from a job.

    Attributes:
        work: what the job does.
        caption: what it is for.
        address: of the page.
        back: address of the page without the result, for visitors who cancel the job.
    """

    work: Work
    caption: str
    address: str
    back: str = "/"


class Context:
    """The service and the site of the pages.

    Attributes:
        service: the index.
        against: another index that answers can be compared with, or None.
        decisions: the reviewers' decisions.
        site: renders pages.
        inputs: texts and pictures of visitors.
    """

    def __init__(self, service: Service, decisions: Decisions, against: Service | None = None) -> None:
        self.service, self.decisions, self.against = service, decisions, against
        self.site, self.inputs = Site("/".join(service.directory.resolve().parts[-2:])), Inputs(service.settings)
        # matplotlib has global state.
        self._drawing = threading.Lock()

    @property
    def limits(self) -> dict[str, int]:
        """Return the largest values of the fields of forms."""
        settings = self.service.settings
        return {"k": settings.most_hits, "candidates": settings.most_candidates, "text": _MOST_TEXT}

    def page(self, template: str, reader: Reader, **values: Any) -> Reply:
        """Return a page."""
        return Reply(self.site.render(template, reader.generation, **values))

    def show_progress(self, reader: Reader, progress: Progress) -> Reply:
        """Return the progress alone, for the script of a page that shows it."""
        headers = {"HX-Retarget": "#progress", "HX-Reselect": "#progress", "HX-Reswap": "outerHTML"}
        return Reply(self.site.render("progress.html", reader.generation, progress=progress), headers=headers)

    def make_examples(self, index: InfluenceIndex) -> Examples:
        """Return the examples of an index, with images that have addresses."""
        return Examples(index, self.site.images)

    def make_cards(self, rows: Sequence[int], index: InfluenceIndex) -> list[RowCard]:
        """Return cards of training rows."""
        examples = self.make_examples(index)
        return [RowCard(row, index.rows.id_at(row), examples.view("train", row)) for row in rows]

    async def compute(self, asked: Asked, reader: Reader, wanted: Wanted) -> tuple[Result | None, Progress | None]:
        """Return the result of a job, or else its progress; a job for the same work is not started again.

        Raises:
            TracinAnnError: the job failed.
            TooManyJobsError: it cannot be started now.
        """
        job = self._find_job(reader.generation, wanted.work, asked.is_partial) or reader.start_job(wanted.work)
        for _ in range(round(_FIRST_WAIT / _WAIT_STEP)):
            if job.state in ENDED:
                break
            await asyncio.sleep(_WAIT_STEP)
        job.raise_error()
        if job.result is not None:
            return job.result, None
        steps = f", {job.done:,} of {job.total:,}" if job.total > 1 else ""
        fields = (*asked.guard, ("job", job.name), ("back", wanted.back))
        state = f"{job.stage or job.state}{steps}"
        return None, Progress(wanted.caption, state, job.done, job.total, wanted.address, fields)

    def _find_job(self, generation: int, work: Work, with_failed: bool) -> Job | None:
        """Return the latest job for some work; a page that is loaded again starts a failed job again."""
        unfit = {"cancelled"} if with_failed else {"cancelled", "failed"}
        return next(
            (
                job
                for job in self.service.jobs.list()
                if job.generation == generation and job.work == work and job.state not in unfit
            ),
            None,
        )

    async def answer(self, asked: Asked, reader: Reader, form: QueryForm) -> tuple[tuple[Answer, ...], Wanted | None]:
        """Return the answers to a form, and the job that it still needs.

        While exact scores are not computed, the answers are the stored ones; the script of a page, which shows them
        already, gets none. The caller starts the job by `compute` after all else that needs the index, which would wait
        for the next step of the job.

        Raises:
            TracinAnnError: as `Reader.answer`.
        """
        options, wanted = form.options, None
        examples = await self.inputs.open(form, reader)
        if options.rerank == "exact":
            self.service.check_limits(len(form.rows), options)
            rows = form.rows if examples is None else (0,)
            work = ComputeExactAnswers(form.side, rows, options, examples, form.together)
            job = self._find_job(reader.generation, work, asked.is_partial)
            if job is not None and job.result is not None:
                return job.result.rows, None
            wanted = Wanted(work, "Computing exact scores", form.address(), form.address(rerank="stored"))
            if asked.is_partial:
                return (), wanted
            options = replace(options, rerank="stored")
        if examples is not None:
            return (await reader.answer_examples(examples, options)).answers, wanted
        return (await reader.answer(form.side, form.rows, options, together=form.together)).answers, wanted

    async def draw(self, figure: Figure, form: Literal["svg", "png"]) -> Reply:
        """Return a figure as a file."""
        return await asyncio.to_thread(self._draw, figure, form)

    def _draw(self, figure: Figure, form: Literal["svg", "png"]) -> Reply:
        with self._drawing:
            body = figure.encode(form)
        if form == "png":
            return Reply(body, "image/png")
        # The style of an SVG file is its own; as a document of its own it may run nothing.
        policy = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
        return Reply(body, "image/svg+xml", headers={"Content-Security-Policy": policy})

    def show_error(self, parts: Mapping[str, str], path: str, status: int) -> Reply:
        """Return the page of an error.

        Args:
            parts: `what`, `got`, `expected` and `remedy`.
            path: of the page that failed.
            status: of the response.
        """
        what = parts["what"]
        page = self.site.render(
            "error.html",
            self.service.generation,
            title=what[:1].upper() + what[1:],
            parts=[(name, parts[name]) for name in ("got", "expected", "remedy") if parts[name]],
            back=own_address(path),
        )
        return Reply(page, status=status)


async def cancel_job(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Cancel a job, and send the browser to the page without its result."""
    context.service.jobs.cancel(read_text(asked.given, "job"))
    return redirect(own_address(read_text(asked.given, "back")))


def link_figures(figures: Sequence[Figure], page: str, address: str) -> tuple[LinkedFigure, ...]:
    """Return figures with the addresses of their files; `address` is that of the page, for its query string."""
    query = f"?{urlsplit(address).query}" if urlsplit(address).query else ""
    return tuple(
        LinkedFigure(
            f"/figures/{page}/{number}.svg{query}",
            f"/figures/{page}/{number}.png{query}",
            figure.title,
            figure.caption,
            figure.alt,
        )
        for number, figure in enumerate(figures, start=1)
    )


def redirect(address: str) -> Reply:
    """Return the reply that sends a browser to another page."""
    return Reply("", status=303, headers={"Location": address})


def download(text: str, name: str) -> Reply:
    """Return a text as a file that a browser saves."""
    types = {"csv": "text/csv", "json": "application/json", "jsonl": "application/jsonl"}
    media_type = f"{types[name.rpartition('.')[2]]}; charset=utf-8"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Reply(text.encode("utf-8", "backslashreplace"), media_type, headers=headers)
