"""Examples of records of a run: typed texts and picture files have the columns that the task names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tracin_ann.errors import TaskError
from tracin_ann.task.integrations.examples import Columns, Encoder


def make_encoder(**changes: Any) -> Encoder:
    """Return an encoder whose tokens are the lengths of words, and whose pixels are the image itself."""
    fields: dict[str, Any] = {
        "kind": "sequence-classification",
        "config": SimpleNamespace(problem_type=None),
        "inputs": frozenset({"input_ids"}),
        "tokenizer": lambda text: {"input_ids": [len(word) for word in text.split()]},
        "processor": lambda image, return_tensors: {"pixel_values": [image]},
    }
    return Encoder(**(fields | changes))


@pytest.mark.parametrize("column", ["text", "sentence"])
def test_a_text_of_the_command_line_is_in_the_column_of_texts(column: str) -> None:
    encoder = make_encoder(columns=Columns(text=column))
    typed, read = encoder({"text": "a fine film"}), encoder({column: "a fine film", "label": 1})
    assert typed["input_ids"].tolist() == read["input_ids"].tolist() == [1, 4, 4]
    assert (typed["labels"].item(), read["labels"].item()) == (-100, 1)


@pytest.mark.parametrize("column", ["", "photo"])
def test_a_picture_is_in_the_column_of_images(column: str) -> None:
    encoder = make_encoder(kind="image-classification", columns=Columns(image=column))
    image = SimpleNamespace(mode="RGB")
    assert encoder({"image": image})["pixel_values"] is image


def test_a_row_without_the_column_is_rejected() -> None:
    with pytest.raises(TaskError, match="sentence"):
        make_encoder(columns=Columns(text="sentence"))({"text": "a fine film", "label": 1})
