"""Views of answers for the templates: formatted scores, bars, hits with their examples, losses.

Shapes: Q queries, M members of a query, C checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from tracin_ann.choices import SideName
from tracin_ann.features import TaskRunner
from tracin_ann.index import InfluenceIndex
from tracin_ann.report.examples import Examples, ExampleView
from tracin_ann.results import Answer, Hit
from tracin_ann.types import Float64

MOST_MEMBERS = 12
"""Rows of a group that are displayed; the others are counted."""
_BARS_WIDTH, _BARS_HEIGHT = 60, 16
_WIDEST_BAR = 8
SIDES: dict[SideName, str] = {"train": "training row", "query": "query", "input": "input"}
_EXACT = "; scores are exact: over all parameters, without projection"


@dataclass(frozen=True)
class ScoredCheckpoints:
    """The checkpoints of scores: their positions (None: not known) and names."""

    positions: tuple[int, ...] | None
    names: tuple[str, ...]

    @classmethod
    def infer(cls, index: InfluenceIndex, n_parts: int, checkpoints: Sequence[int] | None) -> ScoredCheckpoints:
        """Return the checkpoints of scores with `n_parts` parts (0: no parts).

        They are the given ones, or all of the index; if their number is not `n_parts`, they are not known.
        """
        specs = index.manifest.build.spec.checkpoints
        chosen = range(len(specs)) if checkpoints is None else checkpoints
        if n_parts and n_parts != len(chosen):
            return cls(None, tuple(f"part {part}" for part in range(1, n_parts + 1)))
        stems = [PurePath(specs[c].name).stem or specs[c].name for c in chosen]
        if len(set(stems)) < len(stems):
            stems = [f"checkpoint {c}" for c in chosen]
        return cls(tuple(chosen), tuple(stems))


@dataclass(frozen=True)
class Bars:
    """A small bar chart of signed values: SVG paths of positive and negative values, and the values as text."""

    width: int
    positive: str
    negative: str
    text: str


@dataclass(frozen=True)
class HitView:
    """A hit; `share` and `error_share` are fractions of the query's largest absolute score."""

    id: str
    row: int
    score: str
    error: str
    detail: str
    share: float
    error_share: float
    has_same_label: bool | None
    example: ExampleView
    bars: Bars | None


@dataclass(frozen=True)
class LossView:
    """A loss: its value at the last checkpoint, and bars of its values at all checkpoints."""

    last: str
    bars: Bars


@dataclass(frozen=True)
class HitList:
    """The proponents (`pro`) or opponents (`opp`) of a query, with a heading and a caption."""

    kind: str
    heading: str
    caption: str
    hits: tuple[HitView, ...]


@dataclass(frozen=True)
class QueryView:
    """A query with its hits.

    `page` is the address of the page of the query, and `link` that of the page of the query and a hit, without the
    position of the hit at its end; "" if there is none. `is_partial`: shards of the index did not answer.
    """

    anchor: str
    name: str
    label: str
    members: tuple[ExampleView, ...]
    n_members: int
    against: tuple[ExampleView, ...]
    n_against: int
    loss: LossView | None
    hit_lists: tuple[HitList, ...]
    how: str
    is_unlike: bool
    is_partial: bool = False
    page: str = ""
    link: str = ""


class ViewBuilder:
    """Builds the views of answers of an index over given checkpoints."""

    def __init__(self, index: InfluenceIndex, examples: Examples, checkpoints: ScoredCheckpoints) -> None:
        self._index, self._examples, self._checkpoints = index, examples, checkpoints

    def build_query(self, number: int, answer: Answer, losses: Mapping[tuple[SideName, int], Float64]) -> QueryView:
        """Return the view of an answer; `losses` are those of `collect_losses`."""
        members = tuple(self._examples.view(answer.side, row) for row in answer.members[:MOST_MEMBERS])
        against = tuple(self._examples.view(answer.side, row) for row in answer.against[:MOST_MEMBERS])
        label = members[0].label if answer.row is not None else ""
        losses_MC = [losses[answer.side, row] for row in answer.members if (answer.side, row) in losses]
        return QueryView(
            anchor=f"q{number}",
            name=f"{SIDES[answer.side]} {answer.query}",
            label=label,
            members=members,
            n_members=len(answer.members),
            against=against,
            n_against=len(answer.against),
            loss=self.build_loss(np.mean(losses_MC, axis=0)) if losses_MC else None,
            hit_lists=self.build_hit_lists(answer, label),
            how=answer.how + (_EXACT if answer.hits and all(hit.is_exact for hit in answer.hits) else ""),
            is_unlike=answer.strange,
            is_partial=bool(answer.missing_shards),
        )

    def build_hit_lists(self, answer: Answer, label: str) -> tuple[HitList, ...]:
        """Return the proponents and the opponents of an answer; `label` is that of the query."""
        if answer.against:
            names = (
                ("Favour the first set", "rows with a higher mean score for the first set than for the second"),
                ("Favour the second set", "rows with a higher mean score for the second set than for the first"),
            )
        else:
            names = (
                ("Proponents", "training on these rows reduced the loss of the query"),
                ("Opponents", "training on these rows increased the loss of the query"),
            )
        largest = max((abs(hit.score) for hit in answer.hits), default=0.0) or 1.0
        parts = [abs(part) for hit in answer.hits for part in hit.by_checkpoint]
        scale = largest, max(parts, default=0.0) or 1.0
        lists = (("pro", names[0], answer.proponents), ("opp", names[1], answer.opponents))
        return tuple(
            HitList(kind, heading, caption, tuple(self._build_hit(hit, scale, label) for hit in hits))
            for kind, (heading, caption), hits in lists
        )

    def _build_hit(self, hit: Hit, scale: tuple[float, float], label: str) -> HitView:
        if hit.tokens is None:
            example = self._examples.view("train", hit.row)
        else:
            example = self._examples.shade("train", hit.row, hit.tokens)
        error = 0.0 if hit.is_exact or hit.error is None else hit.error
        return HitView(
            id=str(hit.id),
            row=hit.row,
            score=format_score(hit.score),
            error=f"\N{PLUS-MINUS SIGN} {error:.2g}" if error else "",
            detail=_format_detail(hit),
            share=round(abs(hit.score) / scale[0], 3),
            error_share=round(min(1.0, error / scale[0]), 3),
            has_same_label=example.label == label if example.label and label else None,
            example=example,
            bars=draw_bars(hit.by_checkpoint, self._checkpoints.names, scale[1]) if hit.by_checkpoint else None,
        )

    def build_loss(self, loss_C: Float64) -> LossView:
        """Return the view of losses over the checkpoints."""
        values = loss_C.tolist()
        largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0) or 1.0
        return LossView(f"{values[-1]:.3g}", draw_bars(values, self._checkpoints.names, largest))

    def collect_losses(self, rows: Mapping[SideName, Sequence[int]]) -> dict[tuple[SideName, int], Float64]:
        """Return the losses [C] of rows by side and position.

        Losses of training rows are read from the store. Losses of queries are computed, with one forward per
        checkpoint. Without the task or known checkpoints, they are missing.
        """
        losses: dict[tuple[SideName, int], Float64] = {}
        positions = self._checkpoints.positions
        if positions is not None and rows.get("train"):
            loss_NC = self._index.view().store.losses(positions).astype(np.float64)
            losses |= {("train", row): loss_NC[row] for row in rows["train"]}
        sides: tuple[SideName, ...] = ("query", "input")
        for side in sides:
            if positions is not None and rows.get(side) and self._examples.runner is not None:
                loss_QC = compute_query_losses(self._examples.runner, side, rows[side], positions)
                losses |= {(side, row): loss_C for row, loss_C in zip(rows[side], loss_QC, strict=True)}
        return losses


def compute_query_losses(
    runner: TaskRunner, side: SideName, rows: Sequence[int], checkpoints: Sequence[int]
) -> Float64:
    """Return the losses [Q, C] of rows of query_data, or of given examples, at checkpoints."""
    loss_QC = np.empty((len(rows), len(checkpoints)))
    with runner.model() as model:
        for place, checkpoint in enumerate(checkpoints):
            model.load(checkpoint)
            engine, done = model.engine(side), 0
            for batch in model.batches(side, rows):
                loss_QC[done : done + len(batch), place] = engine.losses(batch).detach().double().cpu().numpy()
                done += len(batch)
    return loss_QC


def draw_bars(values: Sequence[float], names: Sequence[str], largest: float) -> Bars:
    """Return a bar chart of values, scaled to `largest`; values that are not finite are only in its text."""
    step = min(_WIDEST_BAR, _BARS_WIDTH / max(1, len(values)))
    width = max(1.0, step - 2) if step > 2 else step  # noqa: PLR2004
    has_negative = any(value < 0 for value in values)
    line = _BARS_HEIGHT / 2 if has_negative else _BARS_HEIGHT
    paths = {True: "", False: ""}
    for place, value in enumerate(values):
        if math.isfinite(value) and value:
            height = max(0.5, abs(value) / largest * line)
            start = line - height if value > 0 else line
            x, y, w, h = map(_format_coordinate, (place * step, start, width, height))
            paths[value > 0] += f"M{x} {y}h{w}v{h}h-{w}z"
    text = ", ".join(f"{name} {value:+.3g}" for name, value in _name_values(values, names))
    return Bars(math.ceil(step * len(values)), paths[True], paths[False], text)


def format_score(value: float) -> str:
    """Return a score with its sign and four significant digits."""
    return f"{value:+.4g}".replace("-", "\N{MINUS SIGN}")


def _name_values(values: Sequence[float], names: Sequence[str]) -> Iterator[tuple[str, float]]:
    for place, value in enumerate(values):
        yield names[place] if place < len(names) else str(place), value


def _format_detail(hit: Hit) -> str:
    parts = []
    if hit.of_means:
        parts.append(f"first set {format_score(hit.of_means[0])}, second set {format_score(hit.of_means[1])}")
    if hit.amount is not None:
        parts.append(f"without it, loss {format_score(hit.amount)}")
    if hit.stored_score is not None:
        parts.append(f"stored {format_score(hit.stored_score)}")
    return "; ".join(parts)


def _format_coordinate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
