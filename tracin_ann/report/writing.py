"""Write a report: which page suits which results, and one file from its parts, whole or not at all."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from tracin_ann.choices import SideName
from tracin_ann.errors import MissingPackageError, UsageError, problem
from tracin_ann.files import open_output
from tracin_ann.index import InfluenceIndex
from tracin_ann.report.examples import Examples
from tracin_ann.report.figures import Figure, answer_figures, row_figures
from tracin_ann.report.pictures import Pictures
from tracin_ann.report.suspects import has_rows, kept_rows, neighbours, suspect_views
from tracin_ann.report.views import Asked, Views
from tracin_ann.scoring import Answer, Answers, RankedRows, RowList, format_cells, score_ranks_figure
from tracin_ann.task import preserve_globals
from tracin_ann.text import escape_control, escape_json

_LOT = 256
"""Queries that are rendered together."""


@dataclass(frozen=True)
class Page:
    """What `page.html` is given, besides what all pages share; `body` and `data` are HTML and JSON already."""

    title: str
    lead: str
    things: str
    heading: str
    layout: str
    body: Sequence[str]
    facts: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    believed: str = ""
    data: str = "{}"
    interactive: bool = True
    choosing: bool = False
    any_strange: bool = False
    pictures: str = ""
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
    """Write results as one HTML file that opens from disk and asks the network for nothing, and return its path.

    Answers become a page of queries beside their proponents and opponents; lists of training rows (self-influence,
    suspects) a page to go through them, choose some and save those; any other list a table.

    Args:
        results: of `index`.
        path: the file; it is there whole or not at all. A device or a FIFO is written to as it is.
        index: what answered.
        title: of the page.
        checkpoints: those that were asked, where not all were; they name the parts of scores.

    Raises:
        MissingPackageError: jinja2, matplotlib or, for pictures, Pillow is not installed.
        IndexMismatchError: the task does not fit the index.
    """
    out = Path(path)
    # Once, not once a row: the task's code reads and describes thousands.
    with preserve_globals():
        maker = _Maker(index, _templates(), checkpoints)
        page = maker.answers(results, title) if isinstance(results, Answers) else maker.listed(results, title)
    with open_output(out) as file:
        for piece in page:
            file.write(piece.encode("utf-8", "backslashreplace"))
    return out


def refuse_unwritable(path: str | os.PathLike[str]) -> None:
    """Refuse a report that `write_report` could not write, before its results are computed.

    Raises:
        MissingPackageError: jinja2 or matplotlib is not installed.
        UsageError: there is no such folder.
    """
    _templates()
    score_ranks_figure([])
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(
            problem(
                "no place for the report",
                got=os.fspath(path),
                expected="a file in a folder that is there",
                remedy="make the folder",
            )
        )


class _Maker:
    """Makes the pieces of pages for one index."""

    def __init__(self, index: InfluenceIndex, templates: Any, checkpoints: Sequence[int] | None) -> None:
        self.index, self._templates, self._checkpoints = index, templates, checkpoints
        self._pictures = Pictures()
        self._examples = Examples(index, self._pictures)

    def answers(self, answers: Answers, title: str | None) -> Iterator[str]:
        """Return the pieces of a page of queries."""
        n_parts = max((len(hit.by_checkpoint) for answer in answers for hit in answer.hits), default=0)
        asked = Asked.of(self.index, n_parts, self._checkpoints)
        views = Views(self.index, self._examples, asked)
        rows: dict[SideName, list[int]] = {"query": [], "train": []}
        for answer in answers:
            rows[answer.side] += answer.members
        losses = views.losses({side: list(dict.fromkeys(of_side)) for side, of_side in rows.items()})
        wide = _is_wide(self._examples, answers)
        template, body = self._templates.get_template("answer.html"), []
        labels: dict[str, None] = {}
        for number, answer in enumerate(answers):
            view = views.query(number, answer, losses)
            labels |= {view.label: None} if view.label else {}
            body.append(template.render(q=view, wide=wide))
        n_queries = f"{len(answers):,} {'query' if len(answers) == 1 else 'queries'}"
        return self._page(
            title=title or f"Influence in {self.index.directory.resolve().name}",
            lead="Which training rows made these predictions what they are. A score is by how much training on the "
            "row lowered the query's loss, to first order (TracInCP): proponents lowered it, opponents raised it.",
            things="queries",
            heading=n_queries.capitalize(),
            wide=wide,
            body=body,
            figures=answer_figures(self.index, answers, asked),
            labels=tuple(sorted(labels)),
            any_strange=any(answer.strange for answer in answers),
            believed=self.index.manifest.quality_summary,
        )

    def listed(self, results: RowList[Any], title: str | None) -> Iterator[str]:
        """Return the pieces of a page of training rows, or of a table where records are of something else."""
        records = results.records()
        if not has_rows(records):
            template = self._templates.get_template("table.html")
            cells = [format_cells(record) for record in records]
            heading, body = f"{len(records):,} results", [template.render(names=results.FIELDS.names, rows=cells)]
            name = title or f"{type(results).__name__} in {self.index.directory.resolve().name}"
            return self._page(name, "", "results", heading, body, wide=True, interactive=False)
        around: dict[int, Answer] = {}
        notes: tuple[str, ...] = ()
        if self._examples.passes is None:
            notes = ("The task cannot be found: rows are shown without their pictures, texts and neighbours.",)
        else:
            around = neighbours(self.index, records, self._checkpoints)
        views = Views(self.index, self._examples, Asked.of(self.index, 0, self._checkpoints))
        made = suspect_views(results, records, self._examples, views, around)
        wide = any(view.shown.wide for view in made)
        template = self._templates.get_template("suspect.html")
        body = [template.render(s=view, wide=wide) for view in made]
        kept = kept_rows(records, made)
        digest = hashlib.blake2b(json.dumps(kept, default=str).encode(), digest_size=8).hexdigest()
        data = {"key": f"tracin_ann {digest}", "fields": list(kept[0]) if kept else [], "rows": kept}
        return self._page(
            title=title or f"Suspects in {self.index.directory.resolve().name}",
            lead=_RANKED_LEAD if isinstance(results, RankedRows) else _LISTED_LEAD,
            things="rows",
            heading=f"{len(records):,} training {'row' if len(records) == 1 else 'rows'}",
            wide=wide,
            body=body,
            figures=row_figures(self.index, [int(record["row"]) for record in records], self._checkpoints),
            labels=tuple(sorted({view.shown.label for view in made if view.shown.label})),
            notes=notes,
            data=_safe_json(data),
            choosing=bool(made),
        )

    def _page(
        self, title: str, lead: str, things: str, heading: str, body: Sequence[str], *, wide: bool, **more: Any
    ) -> Iterator[str]:
        script = _resource("page.js")
        pictures = self._pictures.css()
        notes = (*more.pop("notes", ()), *([self._pictures.note] if self._pictures.note else []))
        data = more.pop("data", _safe_json({}))
        page = Page(
            title=title,
            lead=lead,
            things=things,
            heading=heading,
            layout="rows" if wide else "cards",
            body=body,
            facts=_facts(self.index),
            figures=more.pop("figures", ()),
            notes=notes,
            data=data,
            pictures=pictures,
            style=_resource("style.css"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=metadata.version("tracin-ann"),
            date=datetime.date.today().isoformat(),
            **more,
        )
        made: Iterator[str] = self._templates.get_template("page.html").generate(page=page)
        return made


_RANKED_LEAD = (
    "Training rows by self-influence: by how much training on a row lowers the loss of that row itself. Memorised, "
    "rare and mislabelled rows have a high one. Go through them, choose those that are wrong, and save the choice."
)
_LISTED_LEAD = (
    "Training rows to look at, the most suspicious first. Go through them, choose those that are wrong, and save the "
    "choice."
)


def _is_wide(examples: Examples, answers: Answers) -> bool:
    """Return whether hits need a line each: where one of the first does."""
    rows = [hit.row for answer in answers[:_LOT] for hit in answer.hits]
    return any(examples.shown("train", row).wide for row in rows[:_LOT])


def _facts(index: InfluenceIndex) -> tuple[tuple[str, str], ...]:
    manifest = index.manifest
    spec = manifest.build.spec
    facts = [
        ("index", f"{index.directory.resolve().name}, generation {manifest.generation}, {manifest.index.kind}"),
        ("training rows", f"{len(index):,}"),
        ("checkpoints", f"{len(spec.checkpoints)}"),
        ("sketch", f"{spec.sketch.name}, {spec.sketch.dim} a checkpoint, seed {spec.sketch.seed}"),
    ]
    gone = (("removed", len(index.removed)), ("skipped, not finite", len(index.skipped)))
    return (*facts, *((name, f"{count:,} rows") for name, count in gone if count))


def _safe_json(value: Any) -> str:
    """Return JSON that ends no script element, whatever the texts in it."""
    coded = escape_json(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str))
    for character in "<>&":
        coded = coded.replace(character, f"\\u{ord(character):04x}")
    return coded


@cache
def _resource(name: str) -> str:
    return resources.files("tracin_ann.report").joinpath("templates", name).read_text(encoding="utf-8").strip()


def _templates() -> Any:
    try:
        import jinja2  # noqa: PLC0415 - optional package, imported only here
    except ImportError as error:
        raise MissingPackageError(
            problem(
                "jinja2 is not installed",
                got="no module jinja2",
                expected="it, for reports",
                remedy="pip install 'tracin-ann[report]'",
            )
        ) from error
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        # HTML has no control characters; what is HTML already is a Markup.
        finalize=lambda value: escape_control(value, "\n\t") if type(value) is str else value,
    )
