"""The page of a training row: content, columns, self-influence, similar rows, and the queries that it helps and hurts.

Shapes: N training rows, Q queries, C checkpoints, F = C·D feature dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from tracin_ann.errors import NonFiniteError
from tracin_ann.index import InfluenceIndex
from tracin_ann.report import (
    Examples,
    ExampleView,
    HitList,
    LossView,
    ScoredCheckpoints,
    ViewBuilder,
    find_neighbours,
    format_score,
    format_value,
    read_parts,
)
from tracin_ann.results import Id
from tracin_ann.scoring import QueryOptions
from tracin_ann.serve.pages.addresses import make_address, read_text
from tracin_ann.serve.pages.context import Asked, Context, RowCard, Wanted, redirect
from tracin_ann.serve.pages.site import Reply
from tracin_ann.serve.pages.suspects import find_training_row, render_decision
from tracin_ann.serve.service import Reader
from tracin_ann.serve.work import Result, Steps, Work
from tracin_ann.types import Float32, ProgressCallback

MOST_QUERIES = 10
"""Queries that a row helps most, and that it hurts most."""
_FEATURE_BYTES = 64 << 20
_LOT = 256
"""Queries whose features are computed at once."""
_HEADINGS = {
    "pro": ("Most similar rows", "training rows with the most similar gradients, by cosine: near 1 for duplicates"),
    "opp": ("Most opposed rows", "training rows with the most opposed gradients, by cosine"),
}


@dataclass(frozen=True)
class RowPage:
    """The values of `row.html` for a training row.

    Attributes:
        row: its position.
        id: its id.
        example: its content.
        columns: names and values of its columns.
        figures: names and values: self-influence, its rank, its share of the total.
        loss: its losses over the checkpoints.
        hit_lists: similar and opposed rows; empty if the task cannot be found.
        link: address of the page of this row as a query and another row, without the position of that row at its end.
        notes: why answers do not contain the row, or its lists are partial, if so.
    """

    row: int
    id: Id
    example: ExampleView
    columns: tuple[tuple[str, str], ...]
    figures: tuple[tuple[str, str], ...]
    loss: LossView | None
    hit_lists: tuple[HitList, ...]
    link: str
    notes: tuple[str, ...]


def describe_row(index: InfluenceIndex, examples: Examples, row: int) -> RowPage:
    """Return the page of a training row, which exists."""
    builder = ViewBuilder(index, examples, ScoredCheckpoints.infer(index, 0, None))
    example = examples.view("train", row)
    hit_lists: tuple[HitList, ...] = ()
    notes = [
        text
        for rows, text in (
            (index.removed, "was removed"),
            (index.skipped.row_S, "was skipped by the build, because it is not finite"),
        )
        if row in rows
    ]
    if examples.runner is not None and row not in index.skipped.row_S:
        try:
            neighbours = find_neighbours(index, [{"row": row}], None)[row]
            found = builder.build_hit_lists(neighbours, example.label)
            hit_lists = tuple(HitList(hits.kind, *_HEADINGS[hits.kind], hits.hits) for hits in found)
            if neighbours.missing_shards:
                notes.append("has partial lists of similar rows: shards of the index did not answer")
        except NonFiniteError as error:
            notes.append(f"has no similar rows: {error}")
    return RowPage(
        row=row,
        id=index.rows.id_at(row),
        example=example,
        columns=tuple((name, format_value(values[row])) for name, values in index.columns.items()),
        figures=_measure(index, row),
        loss=builder.build_loss(builder.collect_losses({"train": [row]})["train", row]),
        hit_lists=hit_lists,
        link=make_address("/pair", {"side": "train", "query": row}) + "&row=",
        notes=tuple(f"This row {text}." for text in notes),
    )


def _measure(index: InfluenceIndex, row: int) -> tuple[tuple[str, str], ...]:
    """Return the self-influence of a row, and its rank among the rows that answers may contain."""
    own_N = read_parts(index, None).sum(axis=1)
    own, present_N = own_N[row], own_N[index.present()]
    if not np.isfinite(own):
        return (("self-influence", "not finite"),)
    rank = int((present_N > own).sum()) + 1
    share = rank / max(1, len(present_N))
    return (
        ("self-influence", format_score(float(own))),
        ("rank", f"{rank:,} of {len(present_N):,}"),
        ("", f"among the largest {max(share, 1e-4):.2%}" if share <= 0.5 else "below the median"),  # noqa: PLR2004
    )


@dataclass(frozen=True, eq=False)
class QueryFeatures:
    """The features [Q, F] of the first queries, as a score multiplies them with training rows.

    Attributes:
        vector_QF: of the queries.
        n_queries: number of all queries.
        options: of the score.
    """

    vector_QF: Float32
    n_queries: int
    options: QueryOptions

    @classmethod
    def compute(cls, index: InfluenceIndex, options: QueryOptions, progress: ProgressCallback) -> QueryFeatures:
        """Compute the features of all queries, or of the first ones that memory allows.

        Raises:
            IndexMismatchError: the task does not fit the index.
            NonFiniteError: a query's loss or gradient is NaN or infinite.
        """
        chosen, n_queries = index.view(options.checkpoints).checkpoints, index.runner.n_rows("query")
        dim = index.manifest.build.layout.dim * len(chosen)
        most = min(n_queries, max(1, _FEATURE_BYTES // (4 * dim)))
        score, parts = index.make_score(options), []
        for start in range(0, most, _LOT):
            ids = range(start, min(most, start + _LOT))
            parts.append(score.weigh(index.features("query", ids, chosen), chosen).vector_QF)
            progress("features of queries", ids.stop, most)
        return cls(np.concatenate(parts), n_queries, options)

    def list_queries(self, index: InfluenceIndex, examples: Examples, row: int) -> tuple[tuple[RowCard, ...], ...]:
        """Return the queries that a training row helps most, and those that it hurts most."""
        chosen = index.view(self.options.checkpoints).checkpoints
        score_Q = self.vector_QF @ index.make_score(self.options).rows(chosen).take([row])[0]
        order_Q = np.argsort(-score_Q, kind="stable")
        helped = [int(q) for q in order_Q[:MOST_QUERIES] if score_Q[q] > 0]
        hurt = [int(q) for q in order_Q[::-1][:MOST_QUERIES] if score_Q[q] < 0]

        def make_cards(queries: Sequence[int]) -> tuple[RowCard, ...]:
            cards = (RowCard(q, index.id_of("query", q), examples.view("query", q)) for q in queries)
            return tuple(replace(card, detail=format_score(float(score_Q[card.row]))) for card in cards)

        return make_cards(helped), make_cards(hurt)


@dataclass(frozen=True)
class ComputeQueryFeatures(Work):
    """The features of the queries; the only row of the result is a `QueryFeatures`."""

    options: QueryOptions = field(default_factory=QueryOptions)

    def run(self, index: InfluenceIndex, steps: Steps) -> Result:
        """Return the features."""
        return Result((QueryFeatures.compute(index, self.options, steps.progress),), (), {})


async def show_row(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Return the page of a training row, with the queries that it helps and hurts if these are asked for."""
    row = await reader.run(partial(find_training_row, name=str(asked.places["row"])))
    plain, progress = f"/rows/{row}", None
    with_queries = f"{plain}?queries=yes"
    address = with_queries if read_text(asked.given, "queries") else plain
    features: QueryFeatures | None = None
    if address == with_queries:
        wanted = Wanted(ComputeQueryFeatures(), "Computing the gradients of the queries", address, plain)
        result, progress = await context.compute(asked, reader, wanted)
        if progress is not None and asked.is_partial:
            return context.show_progress(reader, progress)
        features = None if result is None else result.rows[0]

    def build(index: InfluenceIndex) -> tuple[RowPage, tuple[tuple[RowCard, ...], ...], int, str]:
        examples = context.make_examples(index)
        helped = () if features is None else features.list_queries(index, examples, row)
        n_queries = 0 if examples.runner is None else index.runner.n_rows("query")
        decision = render_decision(context, asked, index, row, back=address)
        return describe_row(index, examples, row), helped, n_queries, decision

    view, helped, n_queries, decision = await reader.run(build)
    shown = [hit.example for hits in view.hit_lists for hit in hits.hits] + [
        card.view for side in helped for card in side
    ]
    sides = (("pro", "Helps these queries"), ("opp", "Hurts these queries"))
    return context.page(
        "row.html",
        reader,
        title=f"Training row {view.id}",
        layout="rows" if any(example.is_wide for example in shown) else "cards",
        notes=view.notes,
        permalink=address,
        progress=progress,
        view=view,
        as_query=make_address("/query", {"side": "train", "rows": row}),
        queries=[(*side, cards) for side, cards in zip(sides, helped, strict=False)],
        queries_page=with_queries,
        n_queries=n_queries,
        n_compared=0 if features is None else len(features.vector_QF),
        decision=decision,
    )


async def find_row(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Send the browser to the page of the training row with a position or an id."""
    row = await reader.run(partial(find_training_row, name=read_text(asked.given, "row")))
    return redirect(f"/rows/{row}")
