"""The page of a training row and a query: the parts of their score by checkpoint and layer, and by token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from tracin_ann.analysis import Explanation, Pair, TokenExplanation
from tracin_ann.choices import SideName
from tracin_ann.index import InfluenceIndex
from tracin_ann.report import SIDES, Examples, ExampleView, Figure, ScoredCheckpoints, format_score
from tracin_ann.results import parts_figure
from tracin_ann.serve.pages.addresses import QueryForm, make_address, name_query, read_choice, read_number
from tracin_ann.serve.pages.context import Asked, Context, Progress, Wanted, link_figures
from tracin_ann.serve.pages.site import Reply
from tracin_ann.serve.service import Reader
from tracin_ann.serve.work import ExplainScore, Result, Steps

_BY: tuple[Literal["layer", "token"], ...] = ("layer", "token")
_LEAD = "The exact score of a training row for a query, over all parameters, split into its parts."
_MOST_ROWS = 60
_OTHERS = "(others)"


@dataclass(frozen=True)
class Cell:
    """A value of a heat map; `weight` is its size divided by the largest one, 0 to 1."""

    text: str
    weight: float
    is_negative: bool


@dataclass(frozen=True)
class HeatMap:
    """Values by row and column; the last cell of a row, and the last row, are sums, which have no colour.

    Attributes:
        corner: what the rows are.
        columns: names of the columns, without that of the sums.
        rows: name, cells and sum of each row.
        sums: of the columns, and of all.
    """

    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...], str], ...]
    sums: tuple[str, ...]


@dataclass(frozen=True)
class SplitScore:
    """An explained score, without a reference to the index.

    Attributes:
        pair: the training row and the query.
        score: the exact score.
        stored_score: the score from the stored features.
        heat: the parts by layer and checkpoint, or by token and checkpoint.
        by_layer: the parts of the layers; empty if the score is split by token.
        by_checkpoint: the parts of the checkpoints.
        by_position: the parts of the target positions of the `row` and of the `query`, if the score is split by token.
    """

    pair: Pair
    score: float
    stored_score: float
    heat: HeatMap
    by_layer: Mapping[str, float]
    by_checkpoint: Mapping[int, float]
    by_position: Mapping[str, Sequence[float]]

    @classmethod
    def read(cls, index: InfluenceIndex, explanation: Explanation | TokenExplanation) -> SplitScore:
        """Return the content of an explanation."""
        by_layer: Mapping[str, float] = {}
        by_position: dict[str, Sequence[float]] = {}
        if isinstance(explanation, TokenExplanation):
            by_checkpoint = explanation.by_checkpoint()
            by_position = {example: explanation.by_position(example) for example in explanation.examples}
        else:
            by_layer, by_checkpoint = explanation.by_layer, explanation.by_checkpoint
        names = ScoredCheckpoints.infer(index, 0, list(by_checkpoint)).names
        heat = _draw_heat_map(explanation, list(by_checkpoint), names)
        pair, score, stored = explanation.pair, explanation.score, explanation.stored_score
        return cls(pair, score, stored, heat, by_layer, by_checkpoint, by_position)


@dataclass(frozen=True)
class ExplainPair(ExplainScore):
    """The parts of a score; the only row of the result is a `SplitScore`."""

    kind = "page"

    def run(self, index: InfluenceIndex, steps: Steps) -> Result:
        """Return the parts."""
        found = self.explain(index, steps)
        return Result((SplitScore.read(index, found),), tuple(found.lines()), {})


@dataclass(frozen=True)
class SplitExample:
    """An example of a pair; its tokens are shaded by their parts if the score is split by token."""

    name: str
    address: str
    view: ExampleView


@dataclass(frozen=True)
class PairPage:
    """What `pair.html` shows: the training row and the query, names and values of the score, and its parts."""

    examples: tuple[SplitExample, ...]
    facts: tuple[tuple[str, str], ...]
    heat: HeatMap


def describe_pair(examples: Examples, split: SplitScore, query_page: str) -> PairPage:
    """Return the page of a score; `query_page` is the address of the page of the query."""
    pair, shown = split.pair, []
    sides: tuple[tuple[str, str, str, SideName, int], ...] = (
        ("row", f"training row {pair.id}", f"/rows/{pair.row}", "train", pair.row),
        ("query", f"{SIDES[pair.side]} {pair.query}", query_page, pair.side, pair.query_row),
    )
    for example, name, address, side, row in sides:
        part_T = split.by_position.get(example)
        view = examples.view(side, row) if part_T is None else examples.shade(side, row, part_T)
        shown.append(SplitExample(name, address, view))
    difference = split.stored_score - split.score
    return PairPage(
        examples=tuple(shown),
        facts=(
            ("exact score", format_score(split.score)),
            ("stored score", f"{format_score(split.stored_score)}, difference {difference:+.2g}"),
        ),
        heat=split.heat,
    )


def _draw_heat_map(
    explanation: Explanation | TokenExplanation, checkpoints: list[int], names: tuple[str, ...]
) -> HeatMap:
    values: dict[str, dict[int, float]] = defaultdict(lambda: dict.fromkeys(checkpoints, 0.0))
    for name, checkpoint, value in _list_values(explanation):
        values[name][checkpoint] += value
    by_size = sorted(values, key=lambda name: -sum(map(abs, values[name].values())))
    for name in by_size[_MOST_ROWS:]:
        for checkpoint, value in values.pop(name).items():
            values[_OTHERS][checkpoint] += value
    largest = max((abs(value) for row in values.values() for value in row.values()), default=0.0) or 1.0
    return HeatMap(
        corner="token" if isinstance(explanation, TokenExplanation) else "layer",
        columns=names,
        rows=tuple(
            (
                name,
                tuple(Cell(_format_part(row[c]), abs(row[c]) / largest, row[c] < 0) for c in checkpoints),
                format_score(sum(row.values())),
            )
            for name, row in values.items()
        ),
        sums=(
            *(_format_part(sum(row[c] for row in values.values())) for c in checkpoints),
            format_score(explanation.score),
        ),
    )


def _format_part(value: float) -> str:
    return f"{value:+.2g}".replace("-", "\N{MINUS SIGN}")


def _list_values(explanation: Explanation | TokenExplanation) -> Iterator[tuple[str, int, float]]:
    """Yield (layer or token of the training row, checkpoint, part)."""
    if isinstance(explanation, TokenExplanation):
        for part in explanation:
            if part.example == "row":
                yield f"{part.position}: {part.token or ''}", part.checkpoint, part.contribution
    else:
        for layer_part in explanation:
            yield layer_part.layer, layer_part.checkpoint, layer_part.contribution


@dataclass(frozen=True)
class _AskedPair:
    """The pair that a page is asked for: the values of its address, by name, and the job that splits its score."""

    form: QueryForm
    values: Mapping[str, object]
    job: Wanted


async def show_pair(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Return the page of a training row and a query."""
    # Before the job, for whose next step it would wait.
    possible = None if asked.is_partial else await reader.run(_list_splits)
    pair, split, progress = await _split(context, asked, reader)
    if progress is not None and asked.is_partial:
        return context.show_progress(reader, progress)
    if possible is None:
        possible = await reader.run(_list_splits)
    form, values = pair.form, pair.values
    page = None
    if split is not None:
        row = split.pair.query_row
        query_page = (
            f"/rows/{row}" if form.side == "train" else form.address(rows=() if form.side == "input" else (row,))
        )

        def build(index: InfluenceIndex) -> PairPage:
            with context.inputs.lend(form, index):
                return describe_pair(context.make_examples(index), split, query_page)

        page = await reader.run(build)
    return context.page(
        "pair.html",
        reader,
        title=_name_pair(form, values, split),
        lead=_LEAD,
        permalink=pair.job.address,
        progress=progress,
        splits=[(make_address("/pair", {**values, "by": by}), f"by {by}", by == values["by"]) for by in possible],
        view=page,
        figures=() if split is None else link_figures(_list_figures(split), "pair", pair.job.address),
    )


async def list_pair_figures(context: Context, asked: Asked, reader: Reader) -> tuple[Figure, ...]:
    """Return the figures of the page."""
    _, split, _ = await _split(context, asked, reader)
    return () if split is None else _list_figures(split)


async def _split(
    context: Context, asked: Asked, reader: Reader
) -> tuple[_AskedPair, SplitScore | None, Progress | None]:
    form = QueryForm.parse(asked.given)
    by: Literal["layer", "token"] = read_choice(asked.given, "by", _BY, "layer")  # type: ignore[assignment]
    row, query = read_number(asked.given, "row", 0), read_number(asked.given, "query", 0)
    values = {**name_query(form, query), "row": row, "by": by}
    work = ExplainPair(row, query, form.side, by, form.options, await context.inputs.open(form, reader))
    job = Wanted(work, "Computing the gradients of both", make_address("/pair", values), f"/rows/{row}")
    result, progress = await context.compute(asked, reader, job)
    return _AskedPair(form, values, job), None if result is None else result.rows[0], progress


def _list_splits(index: InfluenceIndex) -> tuple[str, ...]:
    return _BY if index.task.find_token_losses("train") is not None else _BY[:1]


def _name_pair(form: QueryForm, values: Mapping[str, object], split: SplitScore | None) -> str:
    """Return the title of the page: with ids, or while they are not known, with positions."""
    row, query = (values["row"], values["query"] or 0) if split is None else (split.pair.id, split.pair.query)
    return f"Training row {row} and {SIDES[form.side]} {query}"


def _list_figures(split: SplitScore) -> tuple[Figure, ...]:
    if not split.by_layer:
        return ()
    name = max(split.by_layer, key=lambda layer: abs(split.by_layer[layer]))
    return (
        Figure(
            partial(parts_figure, split.by_layer, split.by_checkpoint),
            "f1-",
            "Parts of the score",
            "By layer, and by checkpoint.",
            f"Parts of the score: the largest part of a layer is that of {name}, {split.by_layer[name]:+.3g}",
        ),
    )
