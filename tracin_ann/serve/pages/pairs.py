"""The page of a training row and a query: the parts of their score by checkpoint and layer, and by token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from tracin_ann.analysis import Explanation, TokenExplanation
from tracin_ann.choices import SideName
from tracin_ann.index import InfluenceIndex
from tracin_ann.report import Examples, ExampleView, ScoredCheckpoints, format_score

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
class SplitExample:
    """An example of a pair; with parts by token, `shaded` has them and `largest` lists the largest ones."""

    name: str
    address: str
    view: ExampleView
    shaded: ExampleView | None = None


@dataclass(frozen=True)
class PairPage:
    """The values of `pair.html`.

    Attributes:
        examples: the training row and the query.
        facts: names and values of the score.
        heat: the parts by layer and checkpoint, or by token and checkpoint.
    """

    examples: tuple[SplitExample, ...]
    facts: tuple[tuple[str, str], ...]
    heat: HeatMap


def describe_pair(
    index: InfluenceIndex, examples: Examples, explanation: Explanation | TokenExplanation, query_page: str
) -> PairPage:
    """Return the page of an explanation; `query_page` is the address of the page of the query."""
    pair = explanation.pair
    names = {"train": "training row", "query": "query", "input": "input"}
    sides: tuple[tuple[str, str, str, SideName, int], ...] = (
        ("row", f"training row {pair.id}", f"/rows/{pair.row}", "train", pair.row),
        ("query", f"{names[pair.side]} {pair.query}", query_page, pair.side, pair.query_row),
    )
    split = []
    for example, name, address, side, row in sides:
        shaded = None
        if isinstance(explanation, TokenExplanation) and example in explanation.examples:
            shaded = examples.shade(side, row, explanation.by_position(example))  # type: ignore[arg-type]
        split.append(SplitExample(name, address, examples.view(side, row), shaded))
    checkpoints = list(explanation.by_checkpoint() if isinstance(explanation, TokenExplanation) else explanation.by_checkpoint)
    return PairPage(
        examples=tuple(split),
        facts=(
            ("exact score", format_score(explanation.score)),
            ("stored score", f"{format_score(explanation.stored_score)}, difference {explanation.difference:+.2g}"),
        ),
        heat=_draw_heat_map(explanation, checkpoints, ScoredCheckpoints.infer(index, 0, checkpoints).names),
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
                tuple(Cell(format_score(row[c]), abs(row[c]) / largest, row[c] < 0) for c in checkpoints),
                format_score(sum(row.values())),
            )
            for name, row in values.items()
        ),
        sums=(
            *(format_score(sum(row[c] for row in values.values())) for c in checkpoints),
            format_score(explanation.score),
        ),
    )


def _list_values(explanation: Explanation | TokenExplanation) -> Iterator[tuple[str, int, float]]:
    """Yield (layer or token of the training row, checkpoint, part)."""
    if isinstance(explanation, TokenExplanation):
        for part in explanation:
            if part.example == "row":
                yield f"{part.position}: {part.token or ''}", part.checkpoint, part.contribution
    else:
        for layer_part in explanation:
            yield layer_part.layer, layer_part.checkpoint, layer_part.contribution
