"""The page for checking training rows one by one: self-influence, suspects, or any list of rows.

Each row comes with the training rows that have the most similar and the most opposed gradients, by cosine. Rows with
similar inputs and another label are opposed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tracin_ann.index import InfluenceIndex
from tracin_ann.report.examples import LABEL, Examples, Shown, plain
from tracin_ann.report.views import LossView, Side, Views
from tracin_ann.scoring import Answer, QueryOptions, RankedRows, Record, RowList

NEIGHBOURS = 8
_LOT = 256
_TOLD_APART = ("rank", "id", "row", "text", LABEL)
_NAMES = {"loss": "mean loss"}
_HEADINGS = {
    "pro": ("Most similar rows", "the training rows with the most similar gradients, by cosine"),
    "opp": ("Most opposed rows", "the training rows with the most opposed gradients, by cosine"),
}


@dataclass(frozen=True)
class SuspectView:
    """A training row to be looked at."""

    anchor: str
    rank: int
    id: str
    shown: Shown
    fields: tuple[tuple[str, str], ...]
    share: float
    loss: LossView | None
    sides: tuple[Side, ...]
    verdicts: tuple[str, ...]


def has_rows(records: Sequence[Record]) -> bool:
    """Return whether every record is of one training row."""
    return all(isinstance(record.get("row"), int) for record in records)


def neighbours(
    index: InfluenceIndex, records: Sequence[Record], checkpoints: Sequence[int] | None
) -> dict[int, Answer]:
    """Return, by position, the rows most alike to each and most against it, itself left out."""
    options = QueryOptions(
        k=NEIGHBOURS + 1, cosine=True, checkpoints=None if checkpoints is None else tuple(checkpoints)
    )
    rows, found = list(dict.fromkeys(int(record["row"]) for record in records)), {}
    for start in range(0, len(rows), _LOT):
        for answer in index.query((), rows[start : start + _LOT], options):
            row = answer.members[0]
            proponents, opponents = (
                tuple(hit for hit in hits if hit.row != row)[:NEIGHBOURS]
                for hits in (answer.proponents, answer.opponents)
            )
            found[row] = Answer(
                answer.query, "train", answer.members, proponents, opponents, answer.rows_scored, answer.how
            )
    return found


def suspect_views(
    results: RowList[Any], records: Sequence[Record], examples: Examples, views: Views, around: dict[int, Answer]
) -> list[SuspectView]:
    """Return the views of rows, in order."""
    rows = [int(record["row"]) for record in records]
    losses = views.losses({"train": rows})
    most = max((abs(float(record.get("score") or 0)) for record in records), default=0.0) or 1.0
    made = []
    for number, (record, row) in enumerate(zip(records, rows, strict=True)):
        shown = examples.shown("train", row)
        label = plain(record[LABEL]) if record.get(LABEL) is not None else shown.label
        shown = Shown(**{**vars(shown), "label": label})
        sides = views.sides(around[row], label) if row in around else ()
        made.append(
            SuspectView(
                anchor=f"s{number}",
                rank=int(record.get("rank") or number + 1),
                id=str(record.get("id", row)),
                shown=shown,
                fields=_fields(results, record),
                share=round(abs(float(record.get("score") or 0)) / most, 3),
                loss=views.loss(losses["train", row]) if ("train", row) in losses else None,
                sides=tuple(Side(s.kind, *_HEADINGS[s.kind], s.hits) for s in sides),
                verdicts=tuple(_verdict(side) for side in sides),
            )
        )
    return made


def kept_rows(records: Sequence[Record], made: Sequence[SuspectView]) -> list[Record]:
    """Return what is saved of a row when it is chosen; a number that JSON does not know is left out."""
    kept = []
    for record, view in zip(records, made, strict=True):
        row = {"rank": view.rank, "id": record.get("id"), "row": record["row"], LABEL: view.shown.label or None}
        row |= {name: value for name, value in record.items() if name not in row}
        kept.append({n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()})
    return kept


def _fields(results: RowList[Any], record: Record) -> tuple[tuple[str, str], ...]:
    named = {**_NAMES, "score": "self-influence"} if isinstance(results, RankedRows) else _NAMES
    return tuple(
        (named.get(name, name.replace("_", " ")), plain(value))
        for name, value in record.items()
        if name not in (*_TOLD_APART, *results.DATA_ONLY) and value is not None
    )


def _verdict(side: Side) -> str:
    labels = Counter(hit.shown.label for hit in side.hits if hit.shown.label)
    said = ", ".join(f"{label} ({count} of {len(side.hits)})" for label, count in labels.most_common(3))
    return f"their labels: {said}" if said else ""
