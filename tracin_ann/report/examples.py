"""What a page shows of an example: what the task describes, else what its data look like; each example read once."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracin_ann.choices import SideName
from tracin_ann.errors import UsageError
from tracin_ann.features import Passes
from tracin_ann.index import InfluenceIndex
from tracin_ann.report.pictures import Pictures
from tracin_ann.task import Description

LABEL = "label"
"""The column that holds a row's label."""
LONGEST = 600
"""Characters of a text, or tokens, that a page shows."""
ENTRIES = 40
_SMALL_TABLE = 6
_LONG_TEXT = 60
_NUMBERS = 6
_IMAGE_DIMS, _CHANNELS = 3, (1, 3)
_STRONG = 0.2


@dataclass(frozen=True)
class Token:
    """A piece of a text; `weight` from -1 to 1 is its score's share of the largest, `shown` its score."""

    text: str
    weight: float = 0.0
    shown: str = ""

    @property
    def strong(self) -> bool:
        """Return whether its score is to be read out."""
        return abs(self.weight) >= _STRONG


@dataclass(frozen=True)
class Shown:
    """An example as a page shows it.

    Attributes:
        text: its text, cut at `LONGEST`; "" where there is none.
        cut: characters or tokens that were cut off.
        picture: the CSS class of its picture; "" where there is none.
        tokens: its tokens, instead of the text.
        table: names and values.
        label: its label, "" where it is not known.
        note: what cannot be shown, and why.
    """

    text: str = ""
    cut: int = 0
    picture: str = ""
    tokens: tuple[Token, ...] = ()
    table: tuple[tuple[str, str], ...] = ()
    label: str = ""
    note: str = ""

    @property
    def few(self) -> tuple[tuple[str, str], ...]:
        """Return the first entries of the table."""
        return self.table[:_SMALL_TABLE]

    @property
    def wide(self) -> bool:
        """Return whether it needs a line of its own."""
        return bool(self.tokens or self.table) or len(self.text) > _LONG_TEXT or not (self.picture or self.text)

    @property
    def alt(self) -> str:
        """Return what stands for its picture."""
        label = f"label {self.label}" if self.label else ""
        said = ", ".join(part for part in (label, "" if self.text == self.label else self.text) if part)
        return f"picture: {said}" if said else "picture"


class Examples:
    """The examples of an index's task, as a page shows them; nothing where the task cannot be found."""

    def __init__(self, index: InfluenceIndex, pictures: Pictures) -> None:
        self._index, self._pictures = index, pictures
        self._shown: dict[tuple[SideName, int], Shown] = {}
        self._labels = index.columns.get(LABEL)
        self.passes = _passes(index)

    def shown(self, side: SideName, row: int) -> Shown:
        """Return what is shown of a row."""
        key = side, row
        if key not in self._shown:
            self._shown[key] = self._read(side, row)
        return self._shown[key]

    def _read(self, side: SideName, row: int) -> Shown:
        label = "" if side == "query" or self._labels is None else plain(self._labels[row])
        if self.passes is None:
            return Shown(label=label)
        example = self.passes.data(side)[row]
        described = self.passes.task.described(example)
        if side == "query" and self._labels is not None:
            label = self._query_label(self.passes, example)
        return self._made(described or described_by_look(example), label)

    def _query_label(self, passes: Passes, example: Any) -> str:
        columns = passes.task.columns
        try:
            return "" if columns is None else plain(columns(example)[LABEL])
        except Exception:
            # Task.columns is promised for training rows alone: a query of another kind has no label.
            return ""

    def _made(self, described: Description, label: str) -> Shown:
        picture = note = ""
        if described.image is not None:
            try:
                picture = self._pictures.add(described.image)
            except ValueError as error:
                note = f"not shown: {error}"
        text = (described.text or "").strip()
        tokens = _tokens(described)
        table = tuple((str(name), plain(value)) for name, value in (described.table or {}).items())
        more = () if len(table) <= ENTRIES else (("…", f"{len(table) - ENTRIES} more"),)
        return Shown(
            text=text[:LONGEST],
            cut=max(0, (len(described.tokens or ()) if tokens else len(text)) - LONGEST),
            picture=picture,
            tokens=tokens[:LONGEST],
            table=table[:ENTRIES] + more,
            label=label,
            note=note,
        )


def described_by_look(example: Any) -> Description:
    """Return what is shown of an example that its task does not describe.

    The first tensor or array of 1 or 3 × H × W is its picture, the first text its text, and a mapping of numbers and
    texts its table; where there is none of these, its text is a short `repr`.
    """
    table = {name: value for name, value in _items(example) if _is_plain(value)}
    parts = list(_parts(example))
    image = next((part for part in parts if _is_image(part)), None)
    text = next((part for part in parts if isinstance(part, str)), None)
    if image is None and text is None and not table:
        return Description(text=", ".join(_short(part) for part in parts) or _short(example))
    return Description(text=None if table else text, image=image, table=table or None)


def plain(value: Any) -> str:
    """Return a number as people read it, or anything else as a short text."""
    if _is_number(value):
        value = value.item()
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, str | int) else _short(value)


def _passes(index: InfluenceIndex) -> Passes | None:
    try:
        return index.passes
    except UsageError:
        # As in InfluenceIndex.described: results can be looked at without the task.
        return None


def _tokens(described: Description) -> tuple[Token, ...]:
    tokens = [str(token) for token in described.tokens or ()]
    if described.token_scores is None:
        return tuple(Token(token) for token in tokens)
    scores = [float(score) for score in described.token_scores]
    most = max(map(abs, scores), default=0.0) or 1.0
    return tuple(Token(t, round(s / most, 3), f"{s:+.3g}") for t, s in zip(tokens, scores, strict=True))


def _items(example: Any) -> Iterator[tuple[str, Any]]:
    for part in example if isinstance(example, tuple | list) else (example,):
        if isinstance(part, Mapping):
            yield from ((str(name), value) for name, value in part.items())


def _parts(example: Any) -> Iterator[Any]:
    if isinstance(example, Mapping):
        example = tuple(example.values())
    for part in example if isinstance(example, tuple | list) else (example,):
        yield from part.values() if isinstance(part, Mapping) else (part,)


def _is_image(value: Any) -> bool:
    shape: tuple[int, ...] = tuple(getattr(value, "shape", ()))
    return len(shape) == _IMAGE_DIMS and shape[0] in _CHANNELS and min(shape[1:]) > 1


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) or _is_number(value)


def _is_number(value: Any) -> bool:
    return hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is None or not len(shape):
        return reprlib.repr(value.item() if hasattr(value, "item") else value)
    flat: Sequence[Any] = value.reshape(-1)[:_NUMBERS].tolist()
    numbers = ", ".join(f"{number:.3g}" if isinstance(number, float) else str(number) for number in flat)
    more = ", …" if math.prod(shape) > _NUMBERS else ""
    return f"[{numbers}{more}] ({' x '.join(map(str, shape))})"
