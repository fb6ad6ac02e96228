"""Examples of Hugging Face models: records encoded by the run's tokenizer or image processor, padded, and described.

A record is a row of the user's data, `{column: value}`; an example is the model's input for it, `{name: tensor}`. A
record is encoded each time it is read; nothing is stored.
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tracin_ann.errors import TaskError, problem
from tracin_ann.task.datasets.pictures import decode_image, turn_upright
from tracin_ann.task.description import Description
from tracin_ann.task.integrations.architectures import Kind
from tracin_ann.task.integrations.losses import IGNORED, LABELS, TOKEN_KINDS
from tracin_ann.task.nested import is_instance_of

Example = dict[str, Tensor]
_LABEL_COLUMNS = ("labels", "label", "label_ids")
_IMAGE_COLUMNS = ("image", "img")
_UNLIMITED = 1 << 20
_MASKED_SHARE, _MASK_SHARE, _RANDOM_SHARE = 0.15, 0.8, 0.1
_IDS, _PIXELS, _MASK = "input_ids", "pixel_values", "attention_mask"


@dataclass(frozen=True)
class Columns:
    """The columns of records that are not encoded yet.

    Attributes:
        text: the text; for token classification a list of words.
        text_pair: a second text, used if the column exists.
        label: the label: an int, a name of the config's `label2id`, a float, or a list; "": `labels` or `label`.
        target: the text that a sequence-to-sequence model is trained to write.
        image: a PIL image, or the bytes of a picture, as they are or in `{"bytes": ...}`; "": `image` or `img`.
    """

    text: str = "text"
    text_pair: str = "text_pair"
    label: str = ""
    target: str = "target"
    image: str = ""


@dataclass(frozen=True)
class Encoder:
    """Turns a record into an example: tensors by the names of the model's arguments.

    A record that has `input_ids` or `pixel_values` is used as it is, without columns that the model does not take.
    Other records are tokenised, or processed as images. Labels are those of the record, except that the labels of a
    causal language model are its tokens if there are none. Those of a masked language model are chosen by a hash of the
    tokens if there are none, so that a row always has the same masks: 15% of its tokens, at least one, of which 80% are
    replaced by the mask token and 10% by a random one, as in BERT.

    Attributes:
        kind: the kind of task.
        config: the model's config.
        inputs: the names of the model's arguments.
        tokenizer: of the run, or None.
        processor: the image processor of the run, or None.
        columns: of records that are not encoded.
        max_length: the largest number of tokens; None: no limit.
        seed: of the choice of masked tokens.
    """

    kind: Kind
    config: Any
    inputs: frozenset[str]
    tokenizer: Any = None
    processor: Any = None
    columns: Columns = field(default_factory=Columns)
    max_length: int | None = None
    seed: int = 0

    def __call__(self, record: Any) -> Example:
        """Return the example of a record.

        Raises:
            TaskError: the record lacks columns that the kind of task needs.
        """
        if not isinstance(record, Mapping):
            raise TaskError(
                problem(
                    "a row of the data is not a record",
                    got=type(record).__name__,
                    expected="a mapping {column: value}",
                    remedy="return dicts from the data set",
                )
            )
        record = self._name_columns(record)
        if self.kind == "image-classification":
            example = self._encode_image(record)
        elif _IDS in record:
            example = {name: _as_tensor(name, record) for name in record if name in self.inputs and name != LABELS}
        else:
            example = self._tokenize(record)
        if _IDS in example:
            self._check_ids(example[_IDS])
            if _MASK in self.inputs and _MASK not in example:
                example[_MASK] = torch.ones_like(example[_IDS])
        if LABELS not in example:
            example |= self._make_labels(record, example)
        return example

    def is_unlabelled(self, example: Example) -> bool:
        """Return whether an example of a classification has no label."""
        label = example[LABELS]
        return self.kind not in TOKEN_KINDS and label.numel() == 1 and label.item() == IGNORED

    def _name_columns(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a record. The column of a text or picture from the command line gets the name that the task uses."""
        for name, column in (("text", self.columns.text), ("image", self.columns.image)):
            if column and set(record) == {name}:
                return {column: record[name]}
        return record

    def _check_ids(self, ids_T: Tensor) -> None:
        """Check that a row has tokens, and that the model knows them.

        Raises:
            TaskError: it has none, or one of another vocabulary.
        """
        if not ids_T.numel():
            raise TaskError(
                problem(
                    "a row has no tokens", got="none", expected="at least one", remedy="leave out rows without text"
                )
            )
        size = getattr(self.config, "vocab_size", None)
        if isinstance(size, int) and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < size:
            raise TaskError(
                problem(
                    "a row has a token that the model does not know",
                    got=f"{_IDS} from {int(ids_T.min())} to {int(ids_T.max())}",
                    expected=f"0 to {size - 1}",
                    remedy="encode the text with the tokenizer of the run",
                )
            )

    def _encode_image(self, record: Mapping[str, Any]) -> Example:
        if _PIXELS in record:
            return {_PIXELS: torch.as_tensor(record[_PIXELS], dtype=torch.float32)}
        name = self.columns.image or next((name for name in _IMAGE_COLUMNS if name in record), _IMAGE_COLUMNS[0])
        if name not in record:
            raise TaskError(_no_column_message(record, "image", f"{_PIXELS!r} or {name!r}"))
        if self.processor is None:
            raise TaskError(_no_encoder_message("image processor", "preprocessor_config.json", _PIXELS))
        image = _open_image(record[name], name)
        image = image.convert("RGB") if getattr(image, "mode", "RGB") != "RGB" else image
        return {_PIXELS: self.processor(image, return_tensors="pt")[_PIXELS][0]}

    def _tokenize(self, record: Mapping[str, Any]) -> Example:
        columns = self.columns
        if columns.text not in record:
            raise TaskError(_no_column_message(record, "text", f"{_IDS!r} or {columns.text!r}"))
        if self.tokenizer is None:
            raise TaskError(_no_encoder_message("tokenizer", "tokenizer.json", _IDS))
        text, pair = record[columns.text], record.get(columns.text_pair)
        for name in (columns.text, columns.text_pair, columns.target if self.kind == "seq2seq" else columns.text):
            self._check_text(name, record.get(name, ""))
        options: dict[str, Any] = {"truncation": True, "max_length": self.max_length} if self.max_length else {}
        if self.kind == "token-classification":
            return self._tokenize_words(record, text.split() if isinstance(text, str) else list(text), options)
        encoded = self.tokenizer(text, *([pair] if pair is not None else []), **options)
        example = {name: torch.tensor(encoded[name]) for name in encoded if name in self.inputs}
        if self.kind == "seq2seq":
            if columns.target not in record:
                if LABELS not in record:
                    raise TaskError(_no_column_message(record, "target", repr(columns.target)))
                return example
            example[LABELS] = torch.tensor(self.tokenizer(text_target=record[columns.target], **options)[_IDS])
        return example

    def _check_text(self, name: str, value: Any) -> None:
        """Check that the value of a column is a text; for token classification, a list of words is one too.

        Raises:
            TaskError: it is something else.
        """
        is_words = self.kind == "token-classification" and name == self.columns.text
        is_text = isinstance(value, str) or (value is None and name == self.columns.text_pair)
        if not is_text and not (is_words and _is_list_of_texts(value)):
            raise TaskError(
                problem(
                    f"column {name!r} of a row is not text",
                    got=f"{type(value).__name__} {value!r}"[:160],
                    expected="a list of words" if is_words else "a str",
                    remedy="correct the row, or name another column",
                )
            )

    def _tokenize_words(self, record: Mapping[str, Any], words: list[str], options: Mapping[str, Any]) -> Example:
        """Return the tokens of words; the label of a word is that of its first token."""
        encoded = self.tokenizer(words, is_split_into_words=True, **options)
        example = {name: torch.tensor(encoded[name]) for name in encoded if name in self.inputs}
        given = [self._find_label_id(label) for label in self._read_label(record)]
        if len(given) != len(words):
            raise TaskError(
                problem(
                    "the labels of a row do not match its words",
                    got=f"{len(given)} labels for {len(words)} words",
                    expected="one label for each word",
                    remedy="correct the row",
                )
            )
        places = encoded.word_ids()
        starts = [place is not None and place not in places[:t] for t, place in enumerate(places)]
        example[LABELS] = self._check_classes(
            torch.tensor(
                [given[place] if is_start else IGNORED for place, is_start in zip(places, starts, strict=True)]
            )
        )
        return example

    def _make_labels(self, record: Mapping[str, Any], example: Example) -> Example:
        if self.kind not in TOKEN_KINDS:
            return {LABELS: self._encode_label(record)}
        if record.get(LABELS) is not None:
            return {LABELS: self._check_classes(_as_tensor(LABELS, record))}
        if self.kind == "causal-lm":
            is_masked = example[_MASK] == 0 if _MASK in example else torch.zeros_like(example[_IDS], dtype=torch.bool)
            return {LABELS: example[_IDS].masked_fill(is_masked, IGNORED)}
        if self.kind == "masked-lm":
            return self._mask_tokens(example[_IDS])
        self._read_label(record)
        return {LABELS: self._check_classes(_as_tensor(str(self._find_label_column(record)), record))}

    def _mask_tokens(self, ids_T: Tensor) -> Example:
        if self.tokenizer is None or self.tokenizer.mask_token_id is None:
            raise TaskError(_no_encoder_message("tokenizer with a mask token", "tokenizer.json", LABELS))
        generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(ids_T.numpy().tobytes(), self.seed) >> 1)
        chance_T, action_T = torch.rand(2, len(ids_T), generator=generator)
        random_T = torch.randint(len(self.tokenizer), (len(ids_T),), generator=generator)
        special_T = torch.isin(ids_T, torch.tensor(self.tokenizer.all_special_ids))
        chance_T = chance_T.masked_fill(special_T, 1.0)
        chosen_T = (chance_T < _MASKED_SHARE) | (chance_T == chance_T.min()) & ~special_T
        replaced_T = torch.where(action_T < _MASK_SHARE, self.tokenizer.mask_token_id, ids_T)
        replaced_T = torch.where(action_T >= 1 - _RANDOM_SHARE, random_T, replaced_T)
        return {
            _IDS: torch.where(chosen_T, replaced_T, ids_T),
            LABELS: torch.where(chosen_T, ids_T, torch.tensor(IGNORED)),
        }

    def _encode_label(self, record: Mapping[str, Any]) -> Tensor:
        """Return the label of an example; -100 for a class if the record has none.

        Raises:
            TaskError: it is not a label of the model.
        """
        n_labels, problem_type = (getattr(self.config, name, None) for name in ("num_labels", "problem_type"))
        is_class = problem_type == "single_label_classification" or (problem_type is None and n_labels != 1)
        name = self._find_label_column(record)
        if is_class and name is None:
            return torch.tensor(IGNORED)
        label = self._read_label(record)
        label = torch.tensor(self._find_label_id(label)) if isinstance(label, str) else _as_tensor(str(name), record)
        if not is_class or (problem_type is None and label.is_floating_point() and label.numel() > 1):
            if n_labels is not None and label.numel() != n_labels:
                got, expected = f"{label.numel()} numbers", f"{n_labels}, one for each output of the model"
                raise TaskError(_label_message(got, expected))
            return label
        if label.numel() != 1:
            raise TaskError(_label_message(f"{label.numel()} numbers", "one class"))
        if label.is_floating_point():
            # A column of integers with gaps is one of floats in pandas.
            if label.item() != label.round().item():
                raise TaskError(_label_message(f"{label.item()}", "the number of a class"))
            label = label.long()
        return self._check_classes(label)

    def _check_classes(self, labels: Tensor) -> Tensor:
        """Return labels of a classification if each is a class of the model or -100, and others unchanged.

        Raises:
            TaskError: one is neither.
        """
        n_labels = getattr(self.config, "num_labels", None)
        if n_labels is not None and self.kind not in ("causal-lm", "masked-lm", "seq2seq"):
            wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= n_labels))]
            if wrong.numel():
                raise TaskError(_label_message(f"{wrong[0].item()}", f"0 to {n_labels - 1}, or {IGNORED} for none"))
        return labels

    def _find_label_column(self, record: Mapping[str, Any]) -> str | None:
        names = [self.columns.label] if self.columns.label else _LABEL_COLUMNS
        return next((name for name in names if not _is_missing(record.get(name))), None)

    def _read_label(self, record: Mapping[str, Any]) -> Any:
        name = self._find_label_column(record)
        if name is None:
            raise TaskError(_no_column_message(record, "label", repr(self.columns.label or _LABEL_COLUMNS[1])))
        return record[name]

    def _find_label_id(self, label: Any) -> int | float:
        """Return the number of a label that is a name, or a number as text."""
        if not isinstance(label, str):
            return int(label) if not isinstance(label, float) else label
        names: Mapping[Any, str] = getattr(self.config, "id2label", None) or {}
        known = {name: int(number) for number, name in names.items()} | (getattr(self.config, "label2id", None) or {})
        if label in known:
            return int(known[label])
        try:
            return int(label) if label.strip().lstrip("+-").isdecimal() else float(label)
        except ValueError as error:
            raise TaskError(
                problem(
                    "a label is unknown",
                    got=repr(label)[:160],
                    expected=f"a number, or a name in label2id of config.json ({', '.join(list(known)[:6])})",
                    remedy="correct the label, or the config",
                )
            ) from error


@dataclass(frozen=True)
class EncodedRows(Sequence[Example]):
    """A map-style data set of examples, each encoded from its record when it is read.

    Attributes:
        records: the rows.
        encoder: makes examples of them.
        needs_label: a row without a class is an error.
    """

    records: Any
    encoder: Encoder
    needs_label: bool = False

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.records)

    def __getitem__(self, i: Any) -> Any:
        """Return an example.

        Raises:
            TaskError: its record has not the columns that the kind of task needs.
        """
        record = self.records[i]
        try:
            example = self.encoder(record)
            if self.needs_label and self.encoder.is_unlabelled(example):
                columns = ", ".join(map(str, record))
                name = self.encoder.columns.label or _LABEL_COLUMNS[1]
                raise TaskError(
                    problem(
                        "a training row has no label",
                        got=f"columns {columns}",
                        expected=f"a class in column {name!r}",
                        remedy="pass label= with the name of the column, or leave out rows without a label",
                    )
                )
        except TaskError as error:
            raise TaskError(f"row {i} of the data: {error}") from error
        return example


@dataclass(frozen=True)
class Padding:
    """Collates examples: sequences are padded on the right to the longest of the batch.

    Attributes:
        pad_id: the token of padded positions; their attention mask is 0 and their label is -100.
    """

    pad_id: int = 0

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the batch of these examples."""
        values = {_IDS: self.pad_id, "decoder_input_ids": self.pad_id, LABELS: IGNORED}
        batch = {}
        for example in examples[1:]:
            if example.keys() != examples[0].keys():
                different = sorted(example.keys() ^ examples[0].keys())
                raise TaskError(
                    problem(
                        "rows have different columns",
                        got=f"{', '.join(different)} in some rows only",
                        expected="the same inputs of the model in every row",
                        remedy="add the columns to all rows, or remove them",
                    )
                )
        for name, first in examples[0].items():
            tensors = [example[name] for example in examples]
            is_sequence = first.dim() == 1
            batch[name] = (
                pad_sequence(tensors, batch_first=True, padding_value=values.get(name, 0))
                if is_sequence
                else torch.stack(tensors)
            )
        return batch


@dataclass(frozen=True)
class Describer:
    """Describes an example: its text, tokens and label, or its image.

    Attributes:
        encoder: that made the example.
    """

    encoder: Encoder

    def __call__(self, example: Example) -> Description:
        """Return the description of an example."""
        encoder, label = self.encoder, self.name_label(example)
        prefix = f"{label}: " if label is not None else ""
        if _PIXELS in example:
            return Description(text=f"{label if label is not None else 'image'}", image=self._restore_image(example))
        text = self._decode(example[_IDS])
        if encoder.kind == "seq2seq":
            target = example[LABELS]
            target = target[target != IGNORED]
            return Description(text=f"{text} -> {self._decode(target)}", tokens=self._split(example[LABELS]))
        if encoder.kind == "masked-lm":
            text = self._decode(torch.where(example[LABELS] == IGNORED, example[_IDS], example[LABELS]))
        tokens = self._split(example[_IDS]) if encoder.kind in TOKEN_KINDS else None
        return Description(text=prefix + text, tokens=tokens)

    def name_label(self, example: Example) -> str | int | float | None:
        """Return the label of a classified or scored example; None if there is none."""
        label = example[LABELS]
        if self.encoder.kind in TOKEN_KINDS or label.numel() != 1 or self.encoder.is_unlabelled(example):
            return None
        value: int | float = label.item()
        names: Mapping[Any, str] = getattr(self.encoder.config, "id2label", None) or {}
        name = names.get(value) if isinstance(value, int) else None
        return value if name is None or name.startswith("LABEL_") else name

    def _decode(self, ids_T: Tensor) -> str:
        if self.encoder.tokenizer is None:
            return " ".join(map(str, ids_T.tolist()))
        return str(self.encoder.tokenizer.decode(ids_T.tolist(), skip_special_tokens=True))

    def _split(self, ids_T: Tensor) -> list[str]:
        """Return the text of each token; "" for a label of -100."""
        ids = ids_T.tolist()
        if self.encoder.tokenizer is None:
            return [str(each) for each in ids]
        return ["" if each == IGNORED else str(self.encoder.tokenizer.decode([each])) for each in ids]

    def _restore_image(self, example: Example) -> Tensor:
        """Return the image before it was normalised, with values from 0 to 1."""
        pixels, processor = example[_PIXELS], self.encoder.processor
        mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
        if mean is not None and std is not None and len(mean) == len(pixels):
            pixels = pixels * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
            return pixels.clamp(0, 1)
        low, high = pixels.min(), pixels.max()
        return (pixels - low) / (high - low).clamp(min=torch.finfo(pixels.dtype).tiny)


@dataclass(frozen=True)
class LabelColumn:
    """The stored columns of an example: its label.

    Attributes:
        describer: names the label.
    """

    describer: Describer

    def __call__(self, example: Example) -> dict[str, str | int | float]:
        """Return `{"label": name or number}`, empty without a label."""
        label = self.describer.name_label(example)
        return {} if label is None else {"label": label}


def choose_max_length(tokenizer: Any, config: Any) -> int | None:
    """Return the largest number of tokens: that of the tokenizer, or else of the config, if there is one."""
    limit = getattr(tokenizer, "model_max_length", None)
    if limit is None or limit > _UNLIMITED:
        limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit is not None and 0 < limit <= _UNLIMITED else None


def _as_tensor(name: str, record: Mapping[str, Any]) -> Tensor:
    try:
        return torch.as_tensor(record[name])
    except (TypeError, ValueError, RuntimeError) as error:
        raise TaskError(
            problem(
                f"column {name!r} of the data is not a list of numbers",
                got=repr(record[name])[:160],
                expected="a list of numbers of one row",
                remedy="tokenise each row alone, without return_tensors and without a batch dimension",
            )
        ) from error


def _open_image(value: Any, name: str) -> Any:
    """Return the image of a cell, upright as its EXIF data say, as `datasets` decodes images.

    A cell may also contain the bytes of a picture, or `{"bytes": ...}` as in Parquet files of `datasets`.

    Raises:
        TaskError: it contains no image.
    """
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, bytes):
        content = decode_image(io.BytesIO(content), f"in column {name!r}")
    if is_instance_of(content, "PIL.Image", "Image"):
        return turn_upright(content)
    if content is None or isinstance(content, str | os.PathLike | int | float):
        raise TaskError(
            problem(
                f"column {name!r} of a row is not an image",
                got=f"{type(value).__name__} {value!r}"[:160],
                expected="a PIL image, or the bytes of a picture",
                remedy="open the picture in the data set, or name another column with image=",
            )
        )
    return content


def _is_missing(value: Any) -> bool:
    """Return whether a cell is empty: None, or NaN as in pandas."""
    return value is None or (isinstance(value, float) and value != value)  # noqa: PLR0124 - NaN alone differs


def _is_list_of_texts(value: Any) -> bool:
    is_list = isinstance(value, Collection) and not isinstance(value, Mapping)
    return is_list and all(isinstance(each, str) for each in value)


def _label_message(got: str, expected: str) -> str:
    remedy = "correct the label, name its column with label=, or leave out rows without one"
    return problem("a label is not one of the model's", got=got, expected=expected, remedy=remedy)


def _no_column_message(record: Mapping[str, Any], what: str, expected: str) -> str:
    return problem(
        f"a row has no {what}",
        got=f"columns {', '.join(map(str, record))}",
        expected=expected,
        remedy=f"pass {what}= with the name of the column",
    )


def _no_encoder_message(what: str, file: str, column: str) -> str:
    return problem(
        f"the run has no {what}",
        got=f"no {file} in the run and its checkpoints",
        expected=f"one, to make {column} of the rows",
        remedy=f"pass data with {column}, or copy the file into the run"
        + (" or pass tokenizer=" if "tokenizer" in what else ""),
    )
