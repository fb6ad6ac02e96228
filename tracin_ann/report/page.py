"""The page of a report: its type by the type of the results, its parts, and the file that it is written to."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from tracin_ann.analysis import ExampleName, TokenExplanation
from tracin_ann.choices import DAMPED_SCORES, SideName
from tracin_ann.errors import MissingPackageError, UsageError, problem
from tracin_ann.files import open_output
from tracin_ann.index import InfluenceIndex
from tracin_ann.report.examples import Examples
from tracin_ann.report.figures import Figure, answer_figures, row_figures
from tracin_ann.report.images import PageImages
from tracin_ann.report.suspects import build_suspect_views, find_neighbours, has_rows, make_saved_records
from tracin_ann.report.views import SIDES, ScoredCheckpoints, ViewBuilder, format_score
from tracin_ann.results import Answer, Answers, RankedRows, RowList, format_cells, score_ranks_figure
from tracin_ann.task import preserve_globals
from tracin_ann.text import escape_control, escape_json

_LAYOUT_HITS = 256
"""Queries, and hits, that decide the layout of a page."""
_ANSWERS_LEAD = (
    "Training rows that influenced the predictions for these queries. A score estimates, to first order (TracInCP), by "
    "how much training on the row reduced the loss of the query. Proponents reduced it, opponents increased it."
)
_DAMPED_LEAD = (
    "Training rows that influenced the predictions for these queries, by the score {score}. It estimates how the loss "
    "of the query changes if the model is trained without the row: the loss rises without a proponent, and falls "
    "without an opponent."
)
_RANKED_LEAD = (
    "Training rows by self-influence, the score of a row for itself: by how much the loss of the row depends on "
    "training on this row. Memorised, rare and mislabelled rows have a large self-influence. Check the rows, choose "
    "those with errors, and save them."
)
_SUSPECTS_LEAD = (
    "Training rows to check, the most suspicious first. Check the rows, choose those with errors, and save them."
)

_TOKENS_LEAD = (
    "The score of a training row for a query, split over the target positions of both. The part of a token is that of "
    "the loss at its position. The parts of each example sum to the score; blue parts are positive, orange ones "
    "negative. The tables contain the largest parts."
)
_MOST_TOKENS = 20


@dataclass(frozen=True)
class Page:
    """The values of `page.html`; `body` is HTML, `data` is JSON.

    Attributes:
        title: of the page.
        lead: explains the results.
        items: the name of the items in `body`: queries, rows, results.
        heading: above the items, with their number.
        layout: the CSS class: `rows` (each hit on its own line) or `cards`.
        body: the items as HTML.
        facts: names and values of the index.
        figures: above the items.
        labels: of the items, to filter by.
        notes: for readers of the page.
        quality: the measured quality of the index; "" to leave it out.
        data: the records that the page can save.
        is_interactive: whether items can be filtered.
        has_choices: whether items can be chosen and saved.
        has_unlike: whether a query is unlike the calibration queries.
        images: CSS rules of the images.
        style: the style sheet.
        script: the script.
        script_hash: base64 of the script's SHA-256, for the content security policy.
        version: of tracin_ann.
        date: of today.
    """

    title: str
    lead: str
    items: str
    heading: str
    layout: str
    body: Sequence[str]
    facts: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    quality: str = ""
    data: str = "{}"
    is_interactive: bool = True
    has_choices: bool = False
    has_unlike: bool = False
    images: str = ""
    style: str = ""
    script: str = ""
    script_hash: str = ""
    version: str = ""
    date: str = ""


def write_report(
    results: Answers | RowList[Any],
    path: str | os.PathLike[str],
    index: InfluenceIndex,
    title: str | None = None,
    *,
    checkpoints: Sequence[int] | None = None,
) -> Path:
    """Write results as one self-contained HTML file, and return its path.

    Answers become a page of queries beside their proponents and opponents. Lists of training rows (self-influence,
    suspects) become a page to check the rows, choose some and save those. Any other list becomes a table.

    Args:
        results: of `index`.
        path: the file, which appears complete or not at all. A device or a FIFO is written to directly.
        index: the index that the results come from.
        title: of the page.
        checkpoints: positions of the checkpoints of the results; None: all. They name the parts of scores.

    Raises:
        MissingPackageError: jinja2, matplotlib or, for images, Pillow is not installed.
        IndexMismatchError: the task does not fit the index.
    """
    out = Path(path)
    # Global state is restored once, because code of the task runs for thousands of rows.
    with preserve_globals():
        renderer = _PageRenderer(index, load_templates(), checkpoints)
        inputs = results.examples if isinstance(results, Answers) else getattr(results, "inputs", None)
        with nullcontext() if inputs is None else index.lend(inputs):
            if isinstance(results, Answers):
                page = renderer.render_answers(results, title)
            else:
                page = renderer.render_list(results, title)
    with open_output(out) as file:
        for piece in page:
            file.write(piece.encode("utf-8", "backslashreplace"))
    return out


def require_writable(path: str | os.PathLike[str]) -> None:
    """Raise if `write_report` cannot write this file, before the results are computed.

    Raises:
        MissingPackageError: jinja2 or matplotlib is not installed.
        UsageError: the folder does not exist.
    """
    load_templates()
    score_ranks_figure([])
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(
            problem(
                "the folder of the report does not exist",
                got=os.fspath(path),
                expected="a file in an existing folder",
                remedy="create the folder",
            )
        )


class _PageRenderer:
    """Renders pages of one index, piece by piece."""

    def __init__(self, index: InfluenceIndex, templates: Any, checkpoints: Sequence[int] | None) -> None:
        self.index, self._templates, self._checkpoints = index, templates, checkpoints
        self._images = PageImages()
        self._examples = Examples(index, self._images)

    def render_answers(self, answers: Answers, title: str | None) -> Iterator[str]:
        """Return the pieces of a page of queries."""
        n_parts = max((len(hit.by_checkpoint) for answer in answers for hit in answer.hits), default=0)
        checkpoints = ScoredCheckpoints.infer(self.index, n_parts, self._checkpoints)
        builder = ViewBuilder(self.index, self._examples, checkpoints)
        rows: dict[SideName, list[int]] = {"query": [], "input": [], "train": []}
        for answer in answers:
            rows[answer.side] += answer.members
        losses = builder.collect_losses({side: list(dict.fromkeys(of_side)) for side, of_side in rows.items()})
        is_wide = has_wide_hits(self._examples, answers)
        template, body = self._templates.get_template("answer.html"), []
        labels: dict[str, None] = {}
        for number, answer in enumerate(answers):
            view = builder.build_query(number, answer, losses)
            labels |= {view.label: None} if view.label else {}
            body.append(template.render(query=view, is_wide=is_wide))
        n_queries = f"{len(answers):,} {'query' if len(answers) == 1 else 'queries'}"
        return self._render(
            title=title or f"Influence in {self.index.directory.resolve().name}",
            lead=explain_score(answers),
            items="queries",
            heading=n_queries.capitalize(),
            is_wide=is_wide,
            body=body,
            figures=answer_figures(self.index, answers, checkpoints),
            labels=tuple(sorted(labels)),
            has_unlike=any(answer.strange for answer in answers),
            quality=self.index.manifest.quality_summary,
        )

    def render_list(self, results: RowList[Any], title: str | None) -> Iterator[str]:
        """Return the pieces of a page of training rows, or of a table if the records are not training rows."""
        if isinstance(results, TokenExplanation):
            return self._render_tokens(results, title)
        records = results.records()
        if not has_rows(records):
            return self._render_table(results, title)
        neighbours: dict[int, Answer] = {}
        notes: tuple[str, ...] = ()
        if self._examples.runner is None:
            notes = ("The task cannot be found: rows are displayed without images, text and similar rows.",)
        else:
            neighbours = find_neighbours(self.index, records, self._checkpoints)
        checkpoints = ScoredCheckpoints.infer(self.index, 0, self._checkpoints)
        builder = ViewBuilder(self.index, self._examples, checkpoints)
        views = build_suspect_views(results, records, self._examples, builder, neighbours)
        is_wide = any(view.example.is_wide for view in views)
        template = self._templates.get_template("suspect.html")
        saved = make_saved_records(records, views)
        digest = hashlib.blake2b(json.dumps(saved, default=str).encode(), digest_size=8).hexdigest()
        data = {"key": f"tracin_ann {digest}", "fields": list(saved[0]) if saved else [], "rows": saved}
        return self._render(
            title=title or f"Suspects in {self.index.directory.resolve().name}",
            lead=_RANKED_LEAD if isinstance(results, RankedRows) else _SUSPECTS_LEAD,
            items="rows",
            heading=f"{len(records):,} training {'row' if len(records) == 1 else 'rows'}",
            is_wide=is_wide,
            body=[template.render(suspect=view, is_wide=is_wide) for view in views],
            figures=row_figures(self.index, [int(record["row"]) for record in records], self._checkpoints),
            labels=tuple(sorted({view.example.label for view in views if view.example.label})),
            notes=notes,
            data=_encode_script_json(data),
            has_choices=bool(views),
        )

    def _render_tokens(self, explanation: TokenExplanation, title: str | None) -> Iterator[str]:
        """Return the pieces of a page of the tokens of a training row and of a query."""
        pair, template, body = explanation.pair, self._templates.get_template("tokens.html"), []
        sides: dict[ExampleName, tuple[str, SideName, int]] = {
            "row": (f"training row {pair.id}", "train", pair.row),
            "query": (f"{SIDES[pair.side]} {pair.query}", pair.side, pair.query_row),
        }
        for example in explanation.examples:
            name, side, row = sides[example]
            tokens = list(enumerate(explanation.by_token(example)))
            total = sum(abs(part) for _, (_, part) in tokens) or 1.0
            largest = sorted(tokens, key=lambda token: -abs(token[1][1]))[:_MOST_TOKENS]
            rows = [(str(t), text, format_score(part), f"{part / total:+.1%}") for t, (text, part) in largest if part]
            view = self._examples.shade(side, row, explanation.by_position(example))
            names = ("position", "token", "part", "share")
            body.append(template.render(anchor=example, name=name, example=view, names=names, rows=rows))
        return self._render(
            title=title or f"Tokens of a score in {self.index.directory.resolve().name}",
            lead=_TOKENS_LEAD,
            items="examples",
            heading=f"Score {format_score(explanation.score)}",
            is_wide=True,
            body=body,
            is_interactive=False,
        )

    def _render_table(self, results: RowList[Any], title: str | None) -> Iterator[str]:
        cells = [format_cells(record) for record in results.records()]
        return self._render(
            title=title or f"{type(results).__name__} in {self.index.directory.resolve().name}",
            lead="",
            items="results",
            heading=f"{len(cells):,} results",
            is_wide=True,
            body=[self._templates.get_template("table.html").render(names=results.FIELDS.names, rows=cells)],
            is_interactive=False,
        )

    def _render(
        self,
        *,
        is_wide: bool,
        figures: tuple[Figure, ...] = (),
        notes: tuple[str, ...] = (),
        data: str = "{}",
        **values: Any,
    ) -> Iterator[str]:
        """Return the pieces of a page; `values` are other fields of Page."""
        script = _read_template("page.js")
        images = self._images.css()
        page = Page(
            layout="rows" if is_wide else "cards",
            facts=list_facts(self.index),
            figures=figures,
            notes=(*notes, *([self._images.note] if self._images.note else [])),
            data=data,
            images=images,
            style=read_style(),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=metadata.version("tracin-ann"),
            date=datetime.date.today().isoformat(),
            **values,
        )
        pieces: Iterator[str] = self._templates.get_template("page.html").generate(page=page)
        return pieces


def has_wide_hits(examples: Examples, answers: Sequence[Answer]) -> bool:
    """Return whether one of the first hits needs the full width of a line; then each hit has its own line."""
    rows = [hit.row for answer in answers[:_LAYOUT_HITS] for hit in answer.hits]
    return any(examples.view("train", row).is_wide for row in rows[:_LAYOUT_HITS])


def list_facts(index: InfluenceIndex) -> tuple[tuple[str, str], ...]:
    """Return names and values of an index."""
    manifest = index.manifest
    spec = manifest.build.spec
    facts = [
        ("index", f"{index.directory.resolve().name}, generation {manifest.generation}, {manifest.index.kind}"),
        ("training rows", f"{len(index):,}"),
        ("checkpoints", f"{len(spec.checkpoints)}"),
        ("sketch", f"{spec.sketch.name}, {spec.sketch.dim} per checkpoint, seed {spec.sketch.seed}"),
    ]
    if any(checkpoint.rates is not None for checkpoint in spec.checkpoints):
        facts.append(("learning rates", "differ between parameters"))
    if spec.preconditioner != "none":
        facts.append(("preconditioner", spec.preconditioner))
    absent = (("removed", len(index.removed)), ("skipped, not finite", len(index.skipped)))
    return (*facts, *((name, f"{count:,} rows") for name, count in absent if count))


def _encode_script_json(value: Any) -> str:
    """Return JSON that cannot end a script element."""
    text = escape_json(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _read_template(name: str) -> str:
    return resources.files("tracin_ann.report").joinpath("templates", name).read_text(encoding="utf-8").strip()


@cache
def read_style() -> str:
    """Return the style sheet of pages, with rules for shares: the class `s37` sets `--s` to .37, and `e37` `--e`.

    With classes instead of style attributes, pages can have a content security policy without inline style.
    """
    shares = (f".{name}{share}{{--{name}:{share / 100:g}}}" for name in "se" for share in range(101))
    return f"{_read_template('style.css')}\n{''.join(shares)}"


def load_templates(read_first: Callable[[str], str | None] = lambda name: None) -> Any:
    """Return the jinja2 environment of the templates.

    Args:
        read_first: returns the text of a template that replaces or adds to those of reports, or None.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: PLC0415 - optional package, imported only here
    except ImportError as error:
        raise MissingPackageError(
            problem(
                "jinja2 is not installed",
                got="no module jinja2",
                expected="jinja2, which reports need",
                remedy="pip install 'tracin-ann[report]'",
            )
        ) from error
    templates = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: read_first(name) or _read_template(name)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        # HTML cannot contain control characters; values that are HTML already are a Markup.
        finalize=lambda value: escape_control(value, "\n\t") if type(value) is str else value,
    )
    templates.filters["percent"] = lambda share: round(100 * share) if math.isfinite(share) else 0
    return templates


def explain_score(answers: Sequence[Answer]) -> str:
    """Return what the scores of answers estimate."""
    damped = [answer.score for answer in answers if answer.score in DAMPED_SCORES]
    return _DAMPED_LEAD.format(score=damped[0]) if damped else _ANSWERS_LEAD
