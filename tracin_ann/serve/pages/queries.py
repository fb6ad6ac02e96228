"""The page of queries: a form to choose them, and their answers, the stored ones first, then the exact ones."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from tracin_ann.choices import SCORES, ScoreName, SideName
from tracin_ann.errors import UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.report import (
    Figure,
    QueryView,
    ScoredCheckpoints,
    ViewBuilder,
    answer_figures,
    explain_score,
    has_wide_hits,
)
from tracin_ann.results import Answer, Answers, open_writer
from tracin_ann.serve.attribution_lines import format_lines
from tracin_ann.serve.pages.addresses import RERANKS, QueryForm, format_ranges, make_address, name_query
from tracin_ann.serve.pages.context import LABEL, Asked, Context, Wanted, download, link_figures, redirect
from tracin_ann.serve.pages.listing import RowList, list_rows
from tracin_ann.serve.pages.site import Reply
from tracin_ann.serve.service import Reader

_SAVED = (("csv", "CSV"), ("jsonl", "JSON lines"), ("viewer.jsonl", "JSON lines of the PAIR viewer"))
_UNSPLIT: tuple[ScoreName, ...] = ("cosine", "trackstar")
"""Scores that are no sum over parameters, so that pairs have no parts."""


@dataclass(frozen=True)
class QueryPage:
    """The values of `query.html` that come from the index.

    Attributes:
        queries: the answers.
        figures: of the answers.
        is_wide: whether each hit has its own line.
        has_wide_rows: whether the rows to choose from need more space than an image.
        rows: the rows to choose from.
        default_score: of the index.
        n_checkpoints: of the index.
        columns: names of the columns of the training rows.
        reads_inputs: whether the task reads texts and pictures.
    """

    queries: tuple[QueryView, ...]
    figures: tuple[Figure, ...]
    is_wide: bool
    has_wide_rows: bool
    rows: RowList
    default_score: ScoreName
    n_checkpoints: int
    columns: tuple[str, ...]
    reads_inputs: bool


async def show_query(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Return the form, and the answers to the queries that it names."""
    form, progress, page = QueryForm.parse(asked.given), None, None
    answers: tuple[Answer, ...] = ()
    wanted: Wanted | None = None
    if form.has_queries and not form.browse:
        answers, wanted = await context.answer(asked, reader, form)
    if wanted is not None:
        if not asked.is_partial:
            page = await reader.run(partial(_build_page, context, form, answers))
        result, progress = await context.compute(asked, reader, wanted)
        if progress is not None and asked.is_partial:
            return context.show_progress(reader, progress)
        if result is not None:
            answers, page = result.rows, None
    if page is None:
        page = await reader.run(partial(_build_page, context, form, answers))
    return context.page(
        "query.html",
        reader,
        title="Query",
        here="/query",
        layout="rows" if page.is_wide else "cards",
        permalink=form.address() if form.has_queries else "",
        progress=progress,
        form=form,
        page=page,
        answers=[
            context.site.render("answer.html", reader.generation, query=query, is_wide=page.is_wide)
            for query in page.queries
        ],
        has_labels=LABEL in page.columns,
        checkpoints=format_ranges(form.checkpoints),
        scores=SCORES,
        reranks=RERANKS,
        limits=context.limits,
        guard=asked.guard,
        carried=[(name, value) for name, value in (("k", form.k), ("score", form.score)) if value],
        heading=f"{len(answers):,} {'answer' if len(answers) == 1 else 'answers'}",
        explanation=explain_score(answers),
        exports=[(form.address(f"/query/answers.{name}"), caption) for name, caption in _SAVED],
        figures=link_figures(page.figures, "query", form.address()),
    )


async def keep_picture(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Keep an uploaded picture, and send the browser to its answer."""
    form = QueryForm.parse(asked.given)
    name = context.inputs.keep_picture(asked.file)
    return redirect(replace(form, side="input", upload=name, text="", rows=()).address())


async def list_query_figures(context: Context, asked: Asked, reader: Reader) -> tuple[Figure, ...]:
    """Return the figures of the page."""
    form = QueryForm.parse(asked.given)
    answers, _ = await context.answer(asked, reader, form)
    return await reader.run(lambda index: answer_figures(index, answers, _infer_checkpoints(index, form, answers)))


async def export_answers(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Return the answers as a file.

    Raises:
        UsageError: there is no such format, or the exact scores are not computed yet.
    """
    form, name = QueryForm.parse(asked.given), str(asked.places["form"])
    if name not in dict(_SAVED):
        expected = ", ".join(dict(_SAVED))
        raise UsageError(problem("no such format", got=repr(name), expected=expected, remedy="change the address"))
    answers, wanted = await context.answer(asked, reader, form)
    result, progress = (None, None) if wanted is None else await context.compute(asked, reader, wanted)
    if progress is not None:
        remedy = "save them when the page shows them"
        raise UsageError(
            problem("the exact scores are not computed yet", got=progress.state, expected="exact scores", remedy=remedy)
        )
    found = answers if result is None else result.rows
    return download(await reader.run(partial(_write_answers, context, form, found, name)), f"answers.{name}")


def _write_answers(
    context: Context, form: QueryForm, answers: Sequence[Answer], name: str, index: InfluenceIndex
) -> str:
    with context.inputs.lend(form, index):
        if name == "viewer.jsonl":
            examples = context.make_examples(index)
            return "".join(format_lines(answers, index.directory.resolve().name, examples.text, examples.label))
        found, file = Answers(answers, index.describe), io.StringIO()
        with open_writer("csv" if name == "csv" else "jsonl", file, found.fields) as write:
            write(found.records() if name == "csv" else found.lines())
        return file.getvalue()


def _build_page(context: Context, form: QueryForm, answers: Sequence[Answer], index: InfluenceIndex) -> QueryPage:
    examples = context.make_examples(index)
    rows = list_rows(index, examples, form)
    checkpoints = _infer_checkpoints(index, form, answers)
    builder = ViewBuilder(index, examples, checkpoints)
    with context.inputs.lend(form, index):
        members: dict[SideName, list[int]] = {"query": [], "train": [], "input": []}
        for answer in answers:
            members[answer.side] += answer.members
        losses = builder.collect_losses(members)
        is_wide = has_wide_hits(examples, answers)
        queries = tuple(
            replace(
                builder.build_query(number, answer, losses),
                page=f"/rows/{answer.row}" if answer.side == "train" and answer.row is not None else "",
                link=_link_pairs(form, answer),
            )
            for number, answer in enumerate(answers)
        )
    return QueryPage(
        queries=queries,
        figures=answer_figures(index, answers, checkpoints),
        is_wide=is_wide,
        has_wide_rows=any(card.view.is_wide or not card.view.image for card in rows.cards),
        rows=rows,
        default_score=index.default_score,
        n_checkpoints=len(index.manifest.build.spec.checkpoints),
        columns=tuple(index.columns),
        reads_inputs=examples.runner is not None and index.task.read_query is not None,
    )


def _infer_checkpoints(index: InfluenceIndex, form: QueryForm, answers: Sequence[Answer]) -> ScoredCheckpoints:
    n_parts = max((len(hit.by_checkpoint) for answer in answers for hit in answer.hits), default=0)
    return ScoredCheckpoints.infer(index, n_parts, form.checkpoints or None)


def _link_pairs(form: QueryForm, answer: Answer) -> str:
    """Return the address of the page of a query and a hit, without the hit's position; "" if it has no such page."""
    if answer.row is None or answer.score in _UNSPLIT:
        return ""
    address = make_address("/pair", name_query(form, answer.row))
    return f"{address}{'&' if '?' in address else '?'}row="
