"""What the templates are given of answers: numbers as people read them, bars as shares, examples as they are shown.

Shapes: Q queries, C checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from tracin_ann.choices import SideName
from tracin_ann.features import Passes
from tracin_ann.index import InfluenceIndex
from tracin_ann.report.examples import Examples, Shown
from tracin_ann.scoring import Answer, Hit
from tracin_ann.store import FEATURES, FeatureStore
from tracin_ann.types import Float64

MEMBERS = 12
"""Rows of a group that are shown; the others are counted."""
_BARS_WIDTH, _BARS_HEIGHT = 60, 16
_WIDEST_BAR = 8
_EXACT = "; scores are exact, over all parameters and without projection"


@dataclass(frozen=True)
class Asked:
    """The checkpoints that scores were summed over: positions, None where they are not known, and names."""

    checkpoints: tuple[int, ...] | None
    names: tuple[str, ...]

    @classmethod
    def of(cls, index: InfluenceIndex, n_parts: int, checkpoints: Sequence[int] | None) -> Asked:
        """Return what was asked: what is said, all where scores have as many parts (or none), else unknown."""
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
    """Signed values as little bars: an SVG path of those above the line, one of those below, and all in words."""

    width: int
    up: str
    down: str
    said: str


@dataclass(frozen=True)
class HitView:
    """A hit; `share` and `error_share` are of the query's largest score, which is 1."""

    id: str
    row: int
    score: str
    error: str
    detail: str
    share: float
    error_share: float
    agrees: bool | None
    shown: Shown
    bars: Bars | None


@dataclass(frozen=True)
class LossView:
    """A loss at the last checkpoint asked, its course over all, and that in words."""

    last: str
    bars: Bars


@dataclass(frozen=True)
class Side:
    """One of the two lists of a query, with its heading and what it means."""

    kind: str
    heading: str
    meaning: str
    hits: tuple[HitView, ...]


@dataclass(frozen=True)
class QueryView:
    """A query with its hits."""

    anchor: str
    name: str
    label: str
    members: tuple[Shown, ...]
    n_members: int
    against: tuple[Shown, ...]
    n_against: int
    loss: LossView | None
    sides: tuple[Side, ...]
    how: str
    strange: bool


class Views:
    """Makes the views of answers, for an index and the checkpoints that were asked."""

    def __init__(self, index: InfluenceIndex, examples: Examples, asked: Asked) -> None:
        self._index, self._examples, self._asked = index, examples, asked

    def query(self, number: int, answer: Answer, losses: Mapping[tuple[SideName, int], Float64]) -> QueryView:
        """Return the view of an answer."""
        members = tuple(self._examples.shown(answer.side, row) for row in answer.members[:MEMBERS])
        against = tuple(self._examples.shown(answer.side, row) for row in answer.against[:MEMBERS])
        label = members[0].label if answer.row is not None else ""
        losses_MC = [losses[answer.side, row] for row in answer.members if (answer.side, row) in losses]
        return QueryView(
            anchor=f"q{number}",
            name=f"{'training row' if answer.side == 'train' else 'query'} {answer.query}",
            label=label,
            members=members,
            n_members=len(answer.members),
            against=against,
            n_against=len(answer.against),
            loss=self.loss(np.mean(losses_MC, axis=0)) if losses_MC else None,
            sides=self.sides(answer, label),
            how=answer.how + (_EXACT if answer.hits and all(hit.is_exact for hit in answer.hits) else ""),
            strange=answer.strange,
        )

    def sides(self, answer: Answer, label: str) -> tuple[Side, ...]:
        """Return the two lists of an answer."""
        if answer.against:
            names = (
                ("Help the first set", "their mean score for the first set is above that for the second"),
                ("Help the second set", "their mean score for the second set is above that for the first"),
            )
        else:
            names = (
                ("Proponents", "training on them lowered the loss here"),
                ("Opponents", "training on them raised the loss here"),
            )
        most = max((abs(hit.score) for hit in answer.hits), default=0.0) or 1.0
        parts = [abs(part) for hit in answer.hits for part in hit.by_checkpoint]
        scale = most, max(parts, default=0.0) or 1.0
        lists = (("pro", names[0], answer.proponents), ("opp", names[1], answer.opponents))
        return tuple(
            Side(kind, heading, meaning, tuple(self._hit(hit, scale, label) for hit in hits))
            for kind, (heading, meaning), hits in lists
        )

    def _hit(self, hit: Hit, scale: tuple[float, float], label: str) -> HitView:
        shown = self._examples.shown("train", hit.row)
        error = 0.0 if hit.is_exact or hit.error is None else hit.error
        return HitView(
            id=str(hit.id),
            row=hit.row,
            score=signed(hit.score),
            error=f"\N{PLUS-MINUS SIGN} {error:.2g}" if error else "",
            detail=_detail(hit),
            share=round(abs(hit.score) / scale[0], 3),
            error_share=round(min(1.0, error / scale[0]), 3),
            agrees=shown.label == label if shown.label and label else None,
            shown=shown,
            bars=bars(hit.by_checkpoint, self._asked.names, scale[1]) if hit.by_checkpoint else None,
        )

    def loss(self, loss_C: Float64) -> LossView:
        """Return the view of losses over the checkpoints."""
        values = loss_C.tolist()
        most = max((abs(v) for v in values if math.isfinite(v)), default=0.0) or 1.0
        return LossView(f"{values[-1]:.3g}", bars(values, self._asked.names, most))

    def losses(self, rows: Mapping[SideName, Sequence[int]]) -> dict[tuple[SideName, int], Float64]:
        """Return the losses [C] of rows by side and position; none where the task or the checkpoints are not known.

        Those of training rows are stored; those of queries are computed now, one forward a checkpoint.
        """
        found: dict[tuple[SideName, int], Float64] = {}
        checkpoints = self._asked.checkpoints
        if checkpoints is not None and rows.get("train"):
            store = FeatureStore(self._index.directory / FEATURES, self._index.manifest.build.layout)
            loss_NC = store.losses(checkpoints).astype(np.float64)
            found |= {("train", row): loss_NC[row] for row in rows["train"]}
        if checkpoints is not None and rows.get("query") and self._examples.passes is not None:
            loss_QC = query_losses(self._examples.passes, rows["query"], checkpoints)
            found |= {("query", row): loss_C for row, loss_C in zip(rows["query"], loss_QC, strict=True)}
        return found


def query_losses(passes: Passes, rows: Sequence[int], checkpoints: Sequence[int]) -> Float64:
    """Return the losses [Q, C] of rows of query_data at checkpoints."""
    loss_QC = np.empty((len(rows), len(checkpoints)))
    with passes.model() as model:
        for place, checkpoint in enumerate(checkpoints):
            model.load(checkpoint)
            engine, done = model.engine("query"), 0
            for batch in model.batches("query", rows):
                loss_QC[done : done + len(batch), place] = engine.losses(batch).detach().double().cpu().numpy()
                done += len(batch)
    return loss_QC


def bars(values: Sequence[float], names: Sequence[str], most: float) -> Bars:
    """Return little bars, the longest of height `most`; one that is not finite is left out and said."""
    step = min(_WIDEST_BAR, _BARS_WIDTH / max(1, len(values)))
    wide = max(1.0, step - 2) if step > 2 else step  # noqa: PLR2004
    both = any(value < 0 for value in values)
    line = _BARS_HEIGHT / 2 if both else _BARS_HEIGHT
    paths = {True: "", False: ""}
    for place, value in enumerate(values):
        if math.isfinite(value) and value:
            height = max(0.5, abs(value) / most * line)
            start = line - height if value > 0 else line
            paths[value > 0] += (
                f"M{_short(place * step)} {_short(start)}h{_short(wide)}v{_short(height)}h-{_short(wide)}z"
            )
    said = ", ".join(f"{name} {value:+.3g}" for name, value in _named(values, names))
    return Bars(math.ceil(step * len(values)), paths[True], paths[False], said)


def signed(value: float) -> str:
    """Return a score as people read it, with its sign."""
    return f"{value:+.4g}".replace("-", "\N{MINUS SIGN}")


def _named(values: Sequence[float], names: Sequence[str]) -> Iterator[tuple[str, float]]:
    for place, value in enumerate(values):
        yield names[place] if place < len(names) else str(place), value


def _detail(hit: Hit) -> str:
    parts = []
    if hit.of_means:
        parts.append(f"for {signed(hit.of_means[0])}, against {signed(hit.of_means[1])}")
    if hit.stored_score is not None:
        parts.append(f"stored {signed(hit.stored_score)}")
    return "; ".join(parts)


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
