"""Queries that a visitor gives: texts from the address of a page, and uploaded pictures, which are kept for a while."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tracin_ann.errors import UnknownRowError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.serve.pages.addresses import QueryForm
from tracin_ann.serve.service import Reader
from tracin_ann.serve.settings import Settings
from tracin_ann.serve.uploads import read_picture_example, read_records

_MOST_PICTURES, _MOST_EXAMPLES = 64, 256
"""Uploaded pictures, and examples made from texts and pictures, that are kept."""


class _Example(Sequence[Any]):
    """A data set of one example, which is equal to itself only: examples may contain tensors."""

    def __init__(self, example: Any) -> None:
        self._example = example

    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: Any) -> Any:
        return (self._example,)[place]

    def __iter__(self) -> Iterator[Any]:
        return iter((self._example,))


class Inputs:
    """The texts and pictures of visitors as examples of the task; the latest ones are kept."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pictures: OrderedDict[str, bytes] = OrderedDict()
        self._examples: OrderedDict[tuple[int, str, str], _Example] = OrderedDict()
        self._lock = threading.Lock()

    def keep_picture(self, data: bytes) -> str:
        """Keep the bytes of a picture and return the name by which a form names it."""
        name = hashlib.blake2b(data, digest_size=16).hexdigest()
        with self._lock:
            self._pictures[name] = data
            self._pictures.move_to_end(name)
            while len(self._pictures) > _MOST_PICTURES:
                self._pictures.popitem(last=False)
        return name

    async def open(self, form: QueryForm, reader: Reader) -> Sequence[Any] | None:
        """Return the example of a form's text or picture as a data set of one; None if it has neither.

        Raises:
            UsageError: the task cannot read examples, or the picture cannot be read.
            UnknownRowError: the picture is no longer kept.
            TaskError: the task fails on the text or picture.
        """
        if form.side != "input":
            return None
        return self._find_known(form, reader.generation) or await reader.run(lambda index: self._find(form, index))

    def lend(self, form: QueryForm, index: InfluenceIndex) -> AbstractContextManager[None]:
        """Let the example of a form be the rows of the side `input` in the block."""
        return index.lend(self._find(form, index)) if form.side == "input" and form.has_queries else nullcontext()

    def _find_known(self, form: QueryForm, generation: int) -> _Example | None:
        with self._lock:
            return self._examples.get((generation, form.text, form.upload))

    def _find(self, form: QueryForm, index: InfluenceIndex) -> _Example:
        generation = index.manifest.generation
        known = self._find_known(form, generation)
        if known is not None:
            return known
        made = _Example(self._make(form, index))
        with self._lock:
            self._examples[generation, form.text, form.upload] = made
            while len(self._examples) > _MOST_EXAMPLES:
                self._examples.popitem(last=False)
        return made

    def _make(self, form: QueryForm, index: InfluenceIndex) -> Any:
        if form.text:
            return read_records(index.task, [{"text": form.text}])[0]
        with self._lock:
            data = self._pictures.get(form.upload)
        if data is None:
            raise UnknownRowError(
                problem(
                    "the picture is no longer kept",
                    got=repr(form.upload[:40]),
                    expected=f"one of the last {_MOST_PICTURES} pictures",
                    remedy="upload it again",
                )
            )
        return read_picture_example(index.task, data, self._settings.picture_pixels)
