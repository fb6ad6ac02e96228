"""Views of examples on a page, from `Task.describe` or else from the types of their data."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tracin_ann.choices import SideName
from tracin_ann.errors import UsageError
from tracin_ann.features import TaskRunner
from tracin_ann.index import InfluenceIndex
from tracin_ann.report.images import Images
from tracin_ann.results import match_tokens
from tracin_ann.task import Description

LABEL = "label"
"""The column with the label of a row."""
MOST_CHARACTERS = 600
"""Characters of text, or tokens, on a page."""
MOST_ENTRIES = 40
"""Entries of a table on a page."""
_FIRST_ENTRIES = 6
_LONG_TEXT = 60
_MOST_NUMBERS = 6
_IMAGE_DIMS, _CHANNELS = 3, (1, 3)
_LARGE_WEIGHT = 0.2


@dataclass(frozen=True)
class Token:
    """A token: `weight` is its score divided by the largest absolute score, -1 to 1; `score` is the score as text."""

    text: str
    weight: float = 0.0
    score: str = ""

    @property
    def is_large(self) -> bool:
        """Return whether screen readers read its score."""
        return abs(self.weight) >= _LARGE_WEIGHT


@dataclass(frozen=True)
class ExampleView:
    """An example as a page displays it.

    Attributes:
        text: its text, cut at `MOST_CHARACTERS`; "" if there is none.
        n_cut: number of characters or tokens that were cut off.
        image: the CSS class of its image; "" if there is none.
        tokens: its tokens, displayed instead of the text.
        positions: its positions with scores, displayed after the text, if it has no tokens.
        table: names and values.
        label: its label, "" if it is not known.
        note: what cannot be displayed, and why.
    """

    text: str = ""
    n_cut: int = 0
    image: str = ""
    tokens: tuple[Token, ...] = ()
    positions: tuple[Token, ...] = ()
    table: tuple[tuple[str, str], ...] = ()
    label: str = ""
    note: str = ""

    @property
    def first_entries(self) -> tuple[tuple[str, str], ...]:
        """Return the first entries of the table."""
        return self.table[:_FIRST_ENTRIES]

    @property
    def is_wide(self) -> bool:
        """Return whether it needs the full width of a line."""
        return (
            bool(self.tokens or self.positions or self.table)
            or len(self.text) > _LONG_TEXT
            or not (self.image or self.text)
        )

    @property
    def alt(self) -> str:
        """Return the text alternative of its image."""
        label = f"label {self.label}" if self.label else ""
        text = ", ".join(part for part in (label, "" if self.text == self.label else self.text) if part)
        return f"image: {text}" if text else "image"


class Examples:
    """The examples of an index's task, each read once; their views are empty if the task cannot be found."""

    def __init__(self, index: InfluenceIndex, images: Images) -> None:
        self._index, self._images = index, images
        self._views: dict[tuple[SideName, int], ExampleView] = {}
        self._labels = index.columns.get(LABEL)
        self.runner = _find_runner(index)

    def view(self, side: SideName, row: int) -> ExampleView:
        """Return the view of a row."""
        key = side, row
        if key not in self._views:
            self._views[key] = self._read(side, row)
        return self._views[key]

    def label(self, side: SideName, row: int) -> str:
        """Return the label of a row, "" if it is not known."""
        if self._labels is None:
            return ""
        if side == "train":
            return format_value(self._labels[row])
        return "" if self.runner is None else self._read_query_label(self.runner, self.runner.data(side)[row])

    def text(self, side: SideName, row: int) -> str:
        """Return the complete text of a row, or its tokens or table as text; "" if it has none of these."""
        if self.runner is None:
            return ""
        example = self.runner.data(side)[row]
        description = self.runner.task.describe_example(example) or infer_description(example)
        entries = (f"{name}: {format_value(value)}" for name, value in (description.table or {}).items())
        return (description.text or "").strip() or " ".join(map(str, description.tokens or ())) or ", ".join(entries)

    def shade(self, side: SideName, row: int, scores: Sequence[float]) -> ExampleView:
        """Return the view of a row with scores of its tokens, or of its positions if it has no tokens."""
        view = self.view(side, row)
        matched = list(match_tokens([token.text for token in view.tokens], scores))
        tokens = _shade_tokens([text for text, _ in matched], [score for _, score in matched])[:MOST_CHARACTERS]
        if view.tokens:
            return replace(view, tokens=tokens, n_cut=max(view.n_cut, len(matched) - MOST_CHARACTERS))
        return replace(view, positions=tokens)

    def _read(self, side: SideName, row: int) -> ExampleView:
        label = self.label(side, row)
        if self.runner is None:
            return ExampleView(label=label)
        example = self.runner.data(side)[row]
        return self._make_view(self.runner.task.describe_example(example) or infer_description(example), label)

    def _read_query_label(self, runner: TaskRunner, example: Any) -> str:
        columns = runner.task.columns
        try:
            return "" if columns is None else format_value(columns(example)[LABEL])
        except Exception:
            # Task.columns has to support training rows only: a query of another type has no label.
            return ""

    def _make_view(self, description: Description, label: str) -> ExampleView:
        image = note = ""
        if description.image is not None:
            try:
                image = self._images.add(description.image)
            except ValueError as error:
                note = f"not shown: {error}"
        text = (description.text or "").strip()
        tokens = _make_tokens(description)
        table = tuple((str(name), format_value(value)) for name, value in (description.table or {}).items())
        rest = () if len(table) <= MOST_ENTRIES else (("…", f"{len(table) - MOST_ENTRIES} more"),)
        return ExampleView(
            text=text[:MOST_CHARACTERS],
            n_cut=max(0, (len(description.tokens or ()) if tokens else len(text)) - MOST_CHARACTERS),
            image=image,
            tokens=tokens[:MOST_CHARACTERS],
            table=table[:MOST_ENTRIES] + rest,
            label=label,
            note=note,
        )


def infer_description(example: Any) -> Description:
    """Return the description of an example without `Task.describe`, from the types of its data.

    The first tensor or array of 1 or 3 × H × W is its image, the first string its text, and a mapping of numbers and
    strings its table. If there is none of these, its text is a short `repr`.
    """
    table = {name: value for name, value in _list_items(example) if _is_scalar_or_text(value)}
    parts = list(_list_parts(example))
    image = next((part for part in parts if _is_image(part)), None)
    text = next((part for part in parts if isinstance(part, str)), None)
    if image is None and text is None and not table:
        return Description(text=", ".join(_format_short(part) for part in parts) or _format_short(example))
    return Description(text=None if table else text, image=image, table=table or None)


def format_value(value: Any) -> str:
    """Return a number with four significant digits, or anything else as short text."""
    if _is_number(value):
        value = value.item()
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, str | int) else _format_short(value)


def _find_runner(index: InfluenceIndex) -> TaskRunner | None:
    try:
        return index.runner
    except UsageError:
        # Results can be displayed without the task, as in InfluenceIndex.describe.
        return None


def _make_tokens(description: Description) -> tuple[Token, ...]:
    tokens = [str(token) for token in description.tokens or ()]
    if description.token_scores is None:
        return tuple(Token(token) for token in tokens)
    return _shade_tokens(tokens, [float(score) for score in description.token_scores])


def _shade_tokens(tokens: Sequence[str], scores: Sequence[float]) -> tuple[Token, ...]:
    largest = max(map(abs, scores), default=0.0) or 1.0
    return tuple(Token(t, round(s / largest, 3), f"{s:+.3g}") for t, s in zip(tokens, scores, strict=True))


def _list_items(example: Any) -> Iterator[tuple[str, Any]]:
    for part in example if isinstance(example, tuple | list) else (example,):
        if isinstance(part, Mapping):
            yield from ((str(name), value) for name, value in part.items())


def _list_parts(example: Any) -> Iterator[Any]:
    if isinstance(example, Mapping):
        example = tuple(example.values())
    for part in example if isinstance(example, tuple | list) else (example,):
        yield from part.values() if isinstance(part, Mapping) else (part,)


def _is_image(value: Any) -> bool:
    shape: tuple[int, ...] = tuple(getattr(value, "shape", ()))
    return len(shape) == _IMAGE_DIMS and shape[0] in _CHANNELS and min(shape[1:]) > 1


def _is_scalar_or_text(value: Any) -> bool:
    return isinstance(value, str | int | float) or _is_number(value)


def _is_number(value: Any) -> bool:
    return hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1


def _format_short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is None or not len(shape):
        return reprlib.repr(value.item() if hasattr(value, "item") else value)
    flat: Sequence[Any] = value.reshape(-1)[:_MOST_NUMBERS].tolist()
    numbers = ", ".join(f"{number:.3g}" if isinstance(number, float) else str(number) for number in flat)
    rest = ", …" if math.prod(shape) > _MOST_NUMBERS else ""
    return f"[{numbers}{rest}] ({' x '.join(map(str, shape))})"
