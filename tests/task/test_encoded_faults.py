"""Records that a run cannot use: an error of one line instead of scores of another label, text or picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tracin_ann.errors import TaskError
from tracin_ann.task.integrations.examples import Columns, EncodedRows, Encoder, Padding

pillow = pytest.importorskip("PIL.Image")


class Words:
    """A tokenizer whose tokens are the lengths of words, one for each word."""

    def __call__(self, text: Any, **options: Any) -> Any:
        words = text.split() if isinstance(text, str) else text
        return _Encoding({"input_ids": [len(word) for word in words]})


class _Encoding(dict[str, Any]):
    def word_ids(self) -> list[int]:
        return list(range(len(self["input_ids"])))


def make_encoder(kind: Any = "sequence-classification", **config: Any) -> Encoder:
    config = {"problem_type": None, "num_labels": 3, "vocab_size": 20, **config}
    return Encoder(kind, SimpleNamespace(**config), frozenset({"input_ids", "token_type_ids", "labels"}), Words())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a", "label": -1}, r"row 0 of the data: a label is not one of the model's: got -1, expected 0 to 2"),
        ({"text": "a", "label": 3}, "got 3, expected 0 to 2"),
        ({"text": "a", "label": 0.7}, "the number of a class"),
        ({"text": "a", "label": "7"}, "got 7, expected 0 to 2"),
        ({"text": "a", "label": [1, 2]}, "got 2 numbers, expected one class"),
        ({"text": "a", "label": [0.0, 1.0]}, "got 2 numbers, expected 3, one for each output"),
        ({"text": "a", "label": None}, "a training row has no label"),
        ({"text": "a", "label": float("nan")}, "a training row has no label"),
        ({"text": "a", "class": 1}, "a training row has no label: got columns text, class, expected .*'label'"),
        ({"text": "a", "label": -100}, "a training row has no label"),
        ({"text": None, "label": 1}, "column 'text' of a row is not text: got NoneType"),
        ({"text": 12, "label": 1}, "column 'text' of a row is not text: got int 12"),
        ({"text": ["a", "b"], "label": 1}, "column 'text' of a row is not text: got list"),
        ({"text": "a", "text_pair": 2.5, "label": 1}, "column 'text_pair' of a row is not text"),
        ({"text": " ", "label": 1}, "a row has no tokens"),
        ({"input_ids": [], "label": 1}, "a row has no tokens"),
        ({"input_ids": [3, 20], "label": 1}, "from 3 to 20, expected 0 to 19"),
        ({"input_ids": [-1, 2], "label": 1}, "from -1 to 2, expected 0 to 19"),
    ],
)
def test_a_training_row_that_a_classifier_cannot_use_is_an_error(record: Mapping[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message) as raised:
        EncodedRows([record], make_encoder(), needs_label=True)[0]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("label", "config", "expected"),
    [
        (1.0, {}, torch.tensor(1)),
        ("2", {}, torch.tensor(2)),
        (None, {}, torch.tensor(-100)),
        ([1.0, 0.0, 1.0], {}, torch.tensor([1.0, 0.0, 1.0])),
        ([1, 0, 1], {"problem_type": "multi_label_classification"}, torch.tensor([1, 0, 1])),
        (4, {"num_labels": 1}, torch.tensor(4)),
        (-2.5, {"num_labels": 1}, torch.tensor(-2.5)),
        (7.5, {"num_labels": 1, "problem_type": "regression"}, torch.tensor(7.5)),
    ],
)
def test_labels_of_every_form_are_those_of_the_record(label: Any, config: dict[str, Any], expected: Tensor) -> None:
    found = make_encoder(**config)({"text": "a", "label": label})["labels"]
    assert found.dtype == expected.dtype
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("problem_type", [None, "regression"])
def test_a_missing_target_of_a_regression_is_not_replaced_by_a_number(problem_type: str | None) -> None:
    with pytest.raises(TaskError, match="a row has no label"):
        make_encoder(num_labels=1, problem_type=problem_type)({"text": "a"})


def test_the_words_of_a_typed_text_are_those_between_spaces() -> None:
    encoder = make_encoder("token-classification")
    typed = encoder({"text": "w1 w20", "label": [0, 1]})
    assert typed["input_ids"].tolist() == encoder({"text": ["w1", "w20"], "label": [0, 1]})["input_ids"].tolist()


@pytest.mark.parametrize("labels", [[0], [0, 1, 2]])
def test_the_number_of_labels_is_that_of_the_words(labels: list[int]) -> None:
    with pytest.raises(TaskError, match=f"got {len(labels)} labels for 2 words"):
        make_encoder("token-classification")({"text": ["a", "b"], "label": labels})


def test_labels_of_tokens_are_classes_of_the_model() -> None:
    for record in ({"text": ["a", "b"], "label": [0, 9]}, {"input_ids": [1, 2], "labels": [0, 9]}):
        with pytest.raises(TaskError, match="got 9, expected 0 to 2"):
            make_encoder("token-classification")(record)


def test_an_empty_column_of_labels_is_as_none_for_a_language_model() -> None:
    assert make_encoder("causal-lm")({"input_ids": [1, 2], "labels": None})["labels"].tolist() == [1, 2]


def test_rows_of_a_batch_have_the_same_columns() -> None:
    encoder = make_encoder()
    rows = [encoder({"input_ids": [1], "label": 0}), encoder({"input_ids": [1], "token_type_ids": [1], "label": 0})]
    for pair in (rows, rows[::-1]):
        with pytest.raises(TaskError, match="rows have different columns: got token_type_ids in some rows only"):
            Padding()(pair)


def test_a_picture_is_upright_whether_it_is_an_image_or_bytes() -> None:
    image = pillow.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = pillow.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    encoder = Encoder(
        "image-classification",
        SimpleNamespace(problem_type=None, num_labels=3),
        frozenset({"pixel_values"}),
        processor=lambda image, return_tensors: {"pixel_values": [image]},
        columns=Columns(image="photo"),
    )
    for cell in (pillow.open(file), file.getvalue(), {"bytes": file.getvalue(), "path": None}):
        found: Any = encoder({"photo": cell, "label": 1})["pixel_values"]
        assert found.size == (2, 4)
        assert found.getpixel((1, 0)) == (255, 0, 0)
    for wrong in ("a.png", None, {"path": "a.png", "bytes": None}):
        with pytest.raises(TaskError, match="column 'photo' of a row is not an image"):
            encoder({"photo": wrong, "label": 1})
    with pytest.raises(TaskError, match="in column 'photo' cannot be read"):
        encoder({"photo": b"no picture", "label": 1})
