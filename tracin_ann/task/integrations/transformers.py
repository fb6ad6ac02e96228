"""Tasks from run folders of the Trainer: `Task.from_transformers` and `tracin-build --from-transformers`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from tracin_ann.errors import TaskError, UsageError, problem
from tracin_ann.packages import import_transformers
from tracin_ann.task.checkpoint import Checkpoint
from tracin_ann.task.datasets.sources import open_records
from tracin_ann.task.integrations.architectures import (
    ATTENTION,
    CONFIG,
    KINDS,
    Kind,
    find_class,
    find_kind,
    load_config,
    make_model_from_config,
)
from tracin_ann.task.integrations.examples import (
    Columns,
    Describer,
    EncodedRows,
    Encoder,
    LabelColumn,
    Padding,
    choose_max_length,
)
from tracin_ann.task.integrations.losses import TOKEN_KINDS, ClassLoss, Reduction, make_loss
from tracin_ann.task.integrations.param_groups import Rate
from tracin_ann.task.integrations.rates import (
    ADAPTER_CONFIG,
    RateRule,
    TrainerCheckpoint,
    find_optimizer,
    list_trainer_checkpoints,
    read_trainer_rates,
    read_trainer_steps,
)
from tracin_ann.task.integrations.run_record import derive_steps, has_run_record, read_run_record, select_rates
from tracin_ann.task.integrations.weights import find_weights, load_weights
from tracin_ann.task.task import ParameterFilter, Task

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class RunOptions:
    """Options of a task that is made from a run.

    Attributes:
        kind: the kind of task, one of `KINDS`; None: that of the class in `architectures` of config.json.
        rates: "at": the learning rate that the scheduler had when a checkpoint was saved; "sum": the sum of the rates
            since the checkpoint before (see `read_trainer_rates`); or a list of numbers, one for each checkpoint. In a
            run with a record (`TracInCallback`), "at" is the rate of the last update before the checkpoint.
        loss: how the losses of an example's tokens are combined: "sum" or "mean".
        tokenizer: a tokenizer, or the folder of one; None: that of the run, if there is one.
        dtype: of the weights, such as "float32"; None: that of config.json, in which they were saved.
        parameters: the parameters whose gradients are used, as for `Task`.
        attention: the implementation of attention: "sdpa" or "eager".
        max_length: the largest number of tokens of a text; None: that of the tokenizer or the model.
        seed: of the masks of a masked language model.
        base: the folder of the base model of adapters; None: that which the adapters name.
        quantization: "int8": weights of linear layers of the base model in int8 (by torchao).
        text, text_pair, label, target, image: names of columns of records that are not encoded; see `Columns`.
    """

    kind: Kind | None = None
    rates: RateRule | Sequence[float] = "at"
    loss: Reduction = "sum"
    tokenizer: Any = None
    dtype: torch.dtype | str | None = None
    parameters: ParameterFilter | None = None
    attention: str = ATTENTION
    max_length: int | None = None
    seed: int = 0
    base: str | os.PathLike[str] | None = None
    quantization: Literal["int8"] | None = None
    text: str = Columns.text
    text_pair: str = Columns.text_pair
    label: str = Columns.label
    target: str = Columns.target
    image: str = Columns.image

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: an option has a value that it cannot have.
        """
        if isinstance(self.dtype, str) and self.dtype.removeprefix("torch.") in _DTYPES:
            object.__setattr__(self, "dtype", _DTYPES[self.dtype.removeprefix("torch.")])
        choices: dict[str, tuple[Any, ...]] = {
            "kind": (None, *KINDS),
            "loss": get_args(Reduction),
            "dtype": (None, *_DTYPES.values()),
            "attention": ("sdpa", "eager"),
            "quantization": (None, "int8"),
        }
        if isinstance(self.rates, str):
            choices["rates"] = get_args(RateRule)
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    problem(
                        f"option {name} has an unknown value",
                        got=repr(getattr(self, name)),
                        expected=", ".join(str(value) for value in allowed if value is not None),
                        remedy=f"correct {name}",
                    )
                )

    @property
    def columns(self) -> Columns:
        """Return the names of columns."""
        return Columns(**{each.name: getattr(self, each.name) for each in fields(Columns)})


def make_task(
    run: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], data: Any, query_data: Any = None, **options: Any
) -> Task:
    """Return the task of a run folder of the Trainer; see `Task.from_transformers`.

    Raises:
        UsageError: an option has a value that it cannot have.
        TaskError: the run, its architecture, its learning rates or the data cannot be used.
        CheckpointError: weights are missing.
        MissingPackageError: transformers is not installed.
    """
    chosen = RunOptions(**options)
    runs = [run] if isinstance(run, str | os.PathLike) else list(run)
    checkpoints = [checkpoint for each in runs for checkpoint in list_checkpoints(each)]
    if all((checkpoint.path / ADAPTER_CONFIG).is_file() for checkpoint in checkpoints):
        made: Task = import_module("tracin_ann.task.integrations.adapter_runs").make_run_task(
            runs, checkpoints, (data, query_data), chosen
        )
        return made
    if len(runs) > 1:
        raise UsageError(
            problem(
                "several runs are given",
                got=", ".join(str(each) for each in runs[:3]),
                expected="one run, or a list of adapter folders",
                remedy="name the output_dir of one run",
            )
        )
    run = runs[0]
    folders = [Path(run), *(checkpoint.path for checkpoint in reversed(checkpoints))]
    # The tokenizer may be in the run only, and the run may be given as one of its checkpoints.
    folders += [Path(run).resolve().parent] if checkpoints[0].path == Path(run) else []
    config = load_config(next((folder for folder in folders if (folder / CONFIG).is_file()), folders[-1]))
    rates = read_rates(run, chosen.rates, len(checkpoints))
    steps = read_steps(run, chosen.rates, rates)
    found = [
        Checkpoint(find_weights(each.path), rate, second_moments=each.second_moments, steps=count)
        for each, rate, count in zip(checkpoints, rates, steps, strict=True)
    ]
    check_rates(run, chosen.rates, found)
    encoder = make_encoder(config, folders, chosen)
    assert not isinstance(chosen.dtype, str)
    model = partial(make_model_from_config, encoder.config, chosen.dtype, kind=encoder.kind, attention=chosen.attention)
    return assemble_task(encoder, chosen, (data, query_data), model=model, load=load_weights, checkpoints=found)


def assemble_task(
    encoder: Encoder,
    options: RunOptions,
    data: tuple[Any, Any],
    *,
    model: Callable[[], nn.Module],
    load: Callable[[nn.Module, str], object],
    checkpoints: Sequence[Checkpoint],
) -> Task:
    """Return the task of a model and its checkpoints, with the data, losses and descriptions of an encoder.

    Args:
        encoder: makes examples of records.
        options: of the task.
        data: the training data and the query data; None for the query data: the training data.
        model: returns the model.
        load: fills the model with the weights of a path.
        checkpoints: of the task.

    Raises:
        TaskError: the data cannot be used.
        UsageError: the kind of the run has no loss.
    """
    loss, token_losses = make_loss(encoder.kind, encoder.config, options.loss)
    if encoder.kind in TOKEN_KINDS and options.loss == "sum":
        # Training minimizes the mean over tokens. The steps are those of another loss.
        checkpoints = [replace(checkpoint, steps=None) for checkpoint in checkpoints]
    train = EncodedRows(open_records(data[0]), encoder, needs_label=True)
    # A query without a label has the class that the model predicts; a training row must have the one it was trained on.
    query = train if data[1] is None else EncodedRows(open_records(data[1]), encoder)
    describer = Describer(encoder)
    train[0], query[0]  # noqa: B018 - the first rows show whether the data have the columns that are needed
    return Task(
        model=model,
        loss=loss,
        train_data=partial(_identity, train),
        query_data=partial(_identity, query),
        checkpoints=checkpoints,
        parameters=options.parameters,
        collate=Padding(_choose_pad_id(encoder)),
        describe=describer,
        columns=LabelColumn(describer) if describer.name_label(train[0]) is not None else None,
        load=load,
        read_query=encoder,
        token_losses=token_losses,
        # Measured with a language model: docs/benchmarks.md, attribution.
        score="fisher" if encoder.kind in TOKEN_KINDS else None,
        loss_is_nll=loss.is_nll(encoder.config.num_labels, train[0]) if isinstance(loss, ClassLoss) else None,
    )


def list_checkpoints(run: str | os.PathLike[str]) -> list[TrainerCheckpoint]:
    """Return the checkpoints of a run: those of its record, if it has one (`TracInCallback`), or `checkpoint-STEP`.

    Raises:
        TaskError: there are none.
        CheckpointError: the record is damaged, or a checkpoint is missing.
    """
    if not has_run_record(run):
        found = list_trainer_checkpoints(run)
        return [replace(each, second_moments=find_optimizer(each.path)) for each in found]
    record = read_run_record(run)
    paths = [record.folder / each.path for each in record.checkpoints]
    moments = [
        find_optimizer(path) if each.optimizer is None else record.folder / each.optimizer
        for path, each in zip(paths, record.checkpoints, strict=True)
    ]
    return [
        TrainerCheckpoint(path, each.step, own)
        for path, each, own in zip(paths, record.checkpoints, moments, strict=True)
    ]


def read_rates(run: str | os.PathLike[str], rates: RateRule | Sequence[float], n_checkpoints: int) -> list[Rate]:
    """Return the learning rate of each checkpoint: those of the run, or the given ones.

    Raises:
        UsageError: the number of given rates is not that of the checkpoints.
        TaskError: the rates of the run are unknown.
    """
    if rates in get_args(RateRule):
        if has_run_record(run):
            return select_rates(read_run_record(run), summed=rates == "sum")
        return read_trainer_rates(run, rates)  # type: ignore[arg-type]
    given: list[Rate] = list(rates)  # type: ignore[arg-type]
    if len(given) != n_checkpoints:
        raise UsageError(
            problem(
                "the number of learning rates is wrong",
                got=f"{len(given)} in rates",
                expected=f"{n_checkpoints}, one for each checkpoint of {Path(run)}",
                remedy="give one rate for each checkpoint, in the order of their steps",
            )
        )
    return given


def read_steps(
    run: str | os.PathLike[str], rule: RateRule | Sequence[float], rates: Sequence[Rate]
) -> list[float | None]:
    """Return `Checkpoint.steps` of each checkpoint with the rates of `read_rates`; None where they are not known.

    Raises:
        TaskError: the rates of the run are unknown.
    """
    if rule not in get_args(RateRule):
        return [None] * len(rates)
    return derive_steps(read_run_record(run), rates) if has_run_record(run) else read_trainer_steps(run, rates)


def check_rates(run: str | os.PathLike[str], rates: RateRule | Sequence[float], checkpoints: list[Checkpoint]) -> None:
    """Check that the schedule had not decayed to 0 at every checkpoint.

    Raises:
        TaskError: every rate is 0.
    """
    if rates == "at" and not any(checkpoint.largest_rate for checkpoint in checkpoints):
        raise TaskError(
            problem(
                f"the learning rate is 0 at every checkpoint of {Path(run)}",
                got="a schedule that had decayed to 0 when the last checkpoint was saved",
                expected="a rate above 0 for at least one checkpoint",
                remedy="use rates='sum', the sum of the learning rates since the checkpoint before",
            )
        )


def make_encoder(config: Any, folders: Sequence[Path], options: RunOptions) -> Encoder:
    """Return the encoder of a model's examples, with the tokenizer or image processor that is first found.

    Args:
        config: the model's config; its copy in the encoder has the tokenizer's padding token if it has none.
        folders: to search for a tokenizer and an image processor.
        options: of the task.

    Raises:
        TaskError: the kind of task is unknown, or a tokenizer cannot be read.
    """
    kind = options.kind or find_kind(config)
    inputs = frozenset(inspect.signature(find_class(config, kind).forward).parameters)
    tokenizer = processor = None
    if kind == "image-classification":
        processor = _open_pretrained("AutoImageProcessor", folders, _PROCESSOR_FILES)
    elif options.tokenizer is None or isinstance(options.tokenizer, str | os.PathLike):
        places = folders if options.tokenizer is None else [Path(options.tokenizer)]
        tokenizer = _open_pretrained("AutoTokenizer", places, _TOKENIZER_FILES)
        if tokenizer is None and options.tokenizer is not None:
            raise TaskError(
                problem(
                    f"{options.tokenizer} has no tokenizer",
                    got="no such file",
                    expected=" or ".join(_TOKENIZER_FILES),
                    remedy="correct tokenizer=",
                )
            )
    else:
        tokenizer = options.tokenizer
    encoder = Encoder(kind, config, inputs, tokenizer, processor, options.columns)
    if kind == "sequence-classification" and getattr(config, "pad_token_id", None) is None and tokenizer is not None:
        # Classifiers on decoders look for the last token that is not padding.
        config = type(config).from_dict({**config.to_dict(), "pad_token_id": tokenizer.pad_token_id})
        encoder = replace(encoder, config=config)
    limit = options.max_length or choose_max_length(tokenizer, config)
    return replace(encoder, max_length=limit, seed=options.seed)


def _open_pretrained(name: str, folders: Sequence[Path], files: Sequence[str]) -> Any:
    """Return the object of an Auto class of transformers from the first folder with its files; None without one.

    Raises:
        TaskError: the files cannot be read.
    """
    folder = next((folder for folder in folders if any((folder / file).is_file() for file in files)), None)
    if folder is None:
        return None
    cls = getattr(import_transformers(), name)
    try:
        return cls.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    # transformers raises errors of several types for missing and damaged files.
    except Exception as error:
        raise TaskError(
            problem(
                f"{name} cannot read {folder}",
                got=" ".join(str(error).split())[:160],
                expected=f"the files that save_pretrained writes ({', '.join(files)})",
                remedy="copy the files from the base model",
            )
        ) from error


def _choose_pad_id(encoder: Encoder) -> int:
    for owner in (encoder.tokenizer, encoder.config):
        value = getattr(owner, "pad_token_id", None)
        if isinstance(value, int) and value >= 0:
            return value
    return 0


def _identity(value: Any) -> Any:
    return value


def task(run: str, data: str, query_data: str = "", **options: str) -> Task:
    """Return the task of a run folder from arguments that are strings, as given on the command line.

    Args:
        run: the folder of the run.
        data: a data file, or a folder of `save_to_disk`.
        query_data: the same for queries; "": the training data.
        options: those of `RunOptions`; `rates` and `parameters` may be lists with commas.

    Raises:
        UsageError: an option is unknown or has a value that it cannot have.
    """
    known = {each.name for each in fields(RunOptions)}
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise UsageError(
                problem(
                    "an option of the run is unknown",
                    got=name,
                    expected=", ".join(sorted(known)),
                    remedy="correct --task-arg",
                )
            )
        given[name] = _parse_option(name, value)
    return Task.from_transformers(run, data, query_data or None, **given)


def _parse_option(name: str, value: str) -> Any:
    """Return the value of an option.

    Raises:
        UsageError: it is not a number where one is needed.
    """
    try:
        if name in ("max_length", "seed"):
            return int(value)
        if name == "rates" and value not in get_args(RateRule):
            return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise UsageError(
            problem(f"option {name} is not a number", got=repr(value), expected="a number", remedy=f"correct {name}")
        ) from error
    return value.split(",") if name == "parameters" else value
