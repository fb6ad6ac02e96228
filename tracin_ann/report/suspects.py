"""Views of training rows to check one by one: self-influence, suspects, or any other list of rows.

Each row comes with the training rows that have the most similar and the most opposed gradients, by cosine. Rows with
similar inputs and another label are opposed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tracin_ann.index import InfluenceIndex
from tracin_ann.report.examples import LABEL, Examples, ExampleView, format_value
from tracin_ann.report.views import HitList, LossView, ViewBuilder
from tracin_ann.results import Answer, RankedRows, Record, RowList
from tracin_ann.scoring import QueryOptions

NEIGHBOURS = 8
"""Most similar, and most opposed, rows of each row."""
_QUERIES_AT_ONCE = 256
_NOT_LISTED = ("rank", "id", "row", "text", LABEL)
"""Fields that the view displays elsewhere."""
_NAMES = {"loss": "mean loss"}
_HEADINGS = {
    "pro": ("Most similar rows", "the training rows with the most similar gradients, by cosine"),
    "opp": ("Most opposed rows", "the training rows with the most opposed gradients, by cosine"),
}


@dataclass(frozen=True)
class SuspectView:
    """A training row to check; `label_counts` has the labels of each of `hit_lists` as text."""

    anchor: str
    rank: int
    id: str
    example: ExampleView
    fields: tuple[tuple[str, str], ...]
    share: float
    loss: LossView | None
    hit_lists: tuple[HitList, ...]
    label_counts: tuple[str, ...]


def has_rows(records: Sequence[Record]) -> bool:
    """Return whether every record describes one training row."""
    return all(isinstance(record.get("row"), int) for record in records)


def find_neighbours(
    index: InfluenceIndex, records: Sequence[Record], checkpoints: Sequence[int] | None
) -> dict[int, Answer]:
    """Return the most similar and the most opposed other rows of each row, by its position."""
    options = QueryOptions(
        k=NEIGHBOURS + 1, cosine=True, checkpoints=None if checkpoints is None else tuple(checkpoints)
    )
    rows = list(dict.fromkeys(int(record["row"]) for record in records))
    neighbours: dict[int, Answer] = {}
    for start in range(0, len(rows), _QUERIES_AT_ONCE):
        for answer in index.query((), rows[start : start + _QUERIES_AT_ONCE], options):
            row = answer.members[0]
            proponents, opponents = (
                tuple(hit for hit in hits if hit.row != row)[:NEIGHBOURS]
                for hits in (answer.proponents, answer.opponents)
            )
            neighbours[row] = replace(answer, proponents=proponents, opponents=opponents)
    return neighbours


def build_suspect_views(
    results: RowList[Any],
    records: Sequence[Record],
    examples: Examples,
    builder: ViewBuilder,
    neighbours: dict[int, Answer],
) -> list[SuspectView]:
    """Return the views of rows, in order."""
    rows = [int(record["row"]) for record in records]
    losses = builder.collect_losses({"train": rows})
    largest = max((abs(float(record.get("score") or 0)) for record in records), default=0.0) or 1.0
    views = []
    for number, (record, row) in enumerate(zip(records, rows, strict=True)):
        example = examples.view("train", row)
        label = format_value(record[LABEL]) if record.get(LABEL) is not None else example.label
        hit_lists = builder.build_hit_lists(neighbours[row], label) if row in neighbours else ()
        views.append(
            SuspectView(
                anchor=f"s{number}",
                rank=int(record.get("rank") or number + 1),
                id=str(record.get("id", row)),
                example=replace(example, label=label),
                fields=_list_fields(results, record),
                share=round(abs(float(record.get("score") or 0)) / largest, 3),
                loss=builder.build_loss(losses["train", row]) if ("train", row) in losses else None,
                hit_lists=tuple(_replace_heading(hits, neighbours[row]) for hits in hit_lists),
                label_counts=tuple(_count_labels(hits) for hits in hit_lists),
            )
        )
    return views


def make_saved_records(records: Sequence[Record], views: Sequence[SuspectView]) -> list[Record]:
    """Return the records that the page saves for chosen rows; NaN and infinity, unknown to JSON, become None."""
    saved = []
    for record, view in zip(records, views, strict=True):
        row = {"rank": view.rank, "id": record.get("id"), "row": record["row"], LABEL: view.example.label or None}
        row |= {name: value for name, value in record.items() if name not in row}
        saved.append({n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()})
    return saved


def _replace_heading(hits: HitList, answer: Answer) -> HitList:
    heading, caption = _HEADINGS[hits.kind]
    note = "; partial: shards of the index did not answer" if answer.missing_shards else ""
    return HitList(hits.kind, heading, caption + note, hits.hits)


def _list_fields(results: RowList[Any], record: Record) -> tuple[tuple[str, str], ...]:
    names = {**_NAMES, "score": "self-influence"} if isinstance(results, RankedRows) else _NAMES
    return tuple(
        (names.get(name, name.replace("_", " ")), format_value(value))
        for name, value in record.items()
        if name not in (*_NOT_LISTED, *results.DATA_ONLY) and value is not None
    )


def _count_labels(hit_list: HitList) -> str:
    labels = Counter(hit.example.label for hit in hit_list.hits if hit.example.label)
    counts = ", ".join(f"{label} ({count} of {len(hit_list.hits)})" for label, count in labels.most_common(3))
    return f"their labels: {counts}" if counts else ""
