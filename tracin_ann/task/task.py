"""The task: a user's model, loss per example, data sets and checkpoints (`Task`)."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from tracin_ann.choices import SCORES, ScoreName, SideName
from tracin_ann.errors import TaskError, problem
from tracin_ann.task.checkpoint import Checkpoint
from tracin_ann.task.description import Description
from tracin_ann.task.nested import default_batch

# Examples of the functions of a Task, for error messages.
EXAMPLES = {
    "loss": "loss=lambda model, batch: ...",
    "query_loss": "query_loss=lambda model, batch: ...",
    "collate": "collate=lambda examples: ...",
    "load": "load=lambda model, path: ...",
    "describe": 'describe=lambda row: f"a {row[1]}"',
    "columns": 'columns=lambda row: {"label": row[1]}',
    "ids": "ids=lambda row: row[2]",
    "read_query": 'read_query=lambda record: encode(record["text"])',
    "token_losses": "token_losses=lambda model, batch: ...",
    "query_token_losses": "query_token_losses=lambda model, batch: ...",
    "retrain": "retrain=lambda rows, seed, out: ...",
}
_MAX_SHOWN = 6
LossFunction = Callable[[nn.Module, Any], Tensor]
ParameterFilter = str | Sequence[str] | Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class Task:
    """A model, its loss, its data and its checkpoints: all that tracin_ann needs, in ordinary PyTorch.

    Attributes:
        model: returns the model; its weights are then read from each checkpoint in turn.
        loss: `loss(model, batch) -> Tensor[B]`, one loss per example, without reduction.
        train_data: returns the map-style training set (`len`, `[i]`), whose rows are indexed.
        query_data: returns the map-style query set; `--ids` are positions in it.
        checkpoints: paths with learning rates, in training order.
        query_loss: the differentiable score of each query example; None: `loss`.
        parameters: the parameters whose gradients are used: a glob, a list of names or globs, or a predicate
            `(name, parameter) -> bool`; None: all that require a gradient.
        collate: list of examples -> batch; None: torch's default collate.
        describe: example -> str or Description, for display.
        columns: training example -> {name: number, bool or str}, stored with the index for filters.
        ids: example of either side -> its id, an int or str, which answers name; None: its position.
        load: `load(model, path)` for checkpoints that are not a plain state_dict: fills the model, or returns a module
            of the same layers, whose parameters and buffers are then copied into the model.
        read_query: record -> example as in query_data, for queries that are not in query_data: `tracin-query --input`
            and `--text`. A record is a dict: of a line of JSON Lines, a row of CSV or Parquet, `{"text": str}` or
            `{"image": PIL.Image.Image}`.
        token_losses: `token_losses(model, batch) -> Tensor[B, T]`, the terms of `loss` by target position: their sum
            over T is the loss of each example, and positions without a loss are 0. Position t belongs to token t of
            `Description.tokens`. It splits scores by token; None: they are not split.
        query_token_losses: the same for `query_loss`; without `query_loss`, `token_losses` applies to queries too.
        retrain: `retrain(rows, seed, out)` trains the model on these rows, positions in train_data, as the run of the
            checkpoints did, with this random seed, and writes a checkpoint to the path `out`, a file or a folder that
            is loaded like those of `checkpoints`. `tracin-evaluate` compares scores with its results; None: they are
            not compared.
        loss_is_nll: whether `loss` is −log p of the one label of an example, such as cross-entropy of a classifier. The
            scores `gauss-newton` and `trak` need p. None: not known.
        score: the default score of the index (`QueryOptions.score`). None: `gauss-newton` if `loss_is_nll`, `fisher` if
            all checkpoints have `steps`, else `tracin`.
    """

    model: Callable[[], nn.Module]
    loss: LossFunction
    train_data: Callable[[], Any]
    query_data: Callable[[], Any]
    checkpoints: Sequence[Checkpoint]
    query_loss: LossFunction | None = None
    parameters: ParameterFilter | None = None
    collate: Callable[[list[Any]], Any] | None = None
    describe: Callable[[Any], str | Description] | None = None
    load: Callable[[nn.Module, str], object] | None = None
    columns: Callable[[Any], Mapping[str, Any]] | None = None
    ids: Callable[[Any], int | str] | None = None
    read_query: Callable[[Any], Any] | None = None
    token_losses: LossFunction | None = None
    query_token_losses: LossFunction | None = None
    retrain: Callable[[Sequence[int], int, Path], object] | None = None
    loss_is_nll: bool | None = None
    score: ScoreName | None = None

    def __post_init__(self) -> None:
        """Check the types of the fields.

        Raises:
            TaskError: a field that must be callable is not, there is no checkpoint, every learning rate is 0, or the
                score is unknown or contradicts `loss_is_nll`.
        """
        required = ("model", "loss", "train_data", "query_data")
        optional = (
            *("query_loss", "collate", "describe", "load", "columns", "ids", "read_query"),
            *("token_losses", "query_token_losses", "retrain"),
        )
        for name in required + optional:
            value = getattr(self, name)
            if not callable(value) and not (name in optional and value is None):
                raise TaskError(
                    problem(
                        f"Task.{name} is not callable",
                        got=type(value).__name__,
                        expected="a function",
                        remedy=f"pass a function, for example {EXAMPLES.get(name, f'{name}=lambda: ...')}",
                    )
                )
        if self.score not in (None, *SCORES):
            expected, remedy = " or ".join(SCORES), "change score, or leave it out"
            raise TaskError(problem("Task.score is unknown", got=repr(self.score), expected=expected, remedy=remedy))
        if self.score in ("gauss-newton", "trak") and self.loss_is_nll is False:
            what, got = "Task.score needs the probability of the label", f"{self.score!r} and loss_is_nll=False"
            raise TaskError(problem(what, got=got, expected="'fisher' for such a loss", remedy="change score"))
        checkpoints: object = self.checkpoints
        if not isinstance(checkpoints, Sequence) or not all(isinstance(c, Checkpoint) for c in checkpoints):
            raise TaskError(
                problem(
                    "Task.checkpoints is not a list of checkpoints",
                    got=f"{type(checkpoints).__name__} {checkpoints!r}",
                    expected="a list of Checkpoint",
                    remedy="pass checkpoints=[Checkpoint(path, learning_rate=...), ...]",
                )
            )
        object.__setattr__(self, "checkpoints", tuple(self.checkpoints))
        if not self.checkpoints:
            raise TaskError(
                problem(
                    "Task.checkpoints is empty",
                    got="no checkpoint",
                    expected="at least one",
                    remedy="pass checkpoints=[Checkpoint(path, learning_rate=...), ...]",
                )
            )
        keyed = next((c for c in self.checkpoints if c.key is not None), None)
        if self.load is not None and keyed is not None:
            raise TaskError(
                problem(
                    "Task.load and Checkpoint.key exclude each other",
                    got=f"key={keyed.key!r} of {os.fspath(keyed.path)}",
                    expected="checkpoints without a key, whose files Task.load reads",
                    remedy="remove Task.load or the key",
                )
            )
        if not any(checkpoint.largest_rate for checkpoint in self.checkpoints):
            raise TaskError(
                problem(
                    "every checkpoint has learning rate 0",
                    got=f"{len(self.checkpoints)} checkpoint{'s' * (len(self.checkpoints) > 1)} with learning rate 0",
                    expected="a learning rate above 0 for at least one",
                    remedy="add a checkpoint that training saved with a learning rate above 0",
                )
            )

    @classmethod
    def from_transformers(
        cls,
        run: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        data: Any,
        query_data: Any = None,
        **options: Any,
    ) -> Task:
        """Return the task of a run folder of the Hugging Face Trainer.

        The model, its loss, the checkpoints `checkpoint-STEP` with their learning rates, the tokenizer and the padding
        come from the folder. The checkpoints may be adapters of PEFT: gradients are then those of their parameters.
        Only local files are read, and no code of the folder is run. A row is encoded when it is read: `datasets` stay
        on disk.

        Args:
            run: the `output_dir` of the Trainer, or one of its checkpoints; or a list of adapter folders.
            data: the training data: a `datasets.Dataset`, a folder of `save_to_disk`, a JSONL, Parquet or CSV file, a
                list of dicts, or a function that returns one of these. Its rows have `input_ids` or `pixel_values`, or
                are encoded here from the columns `text` and `label`, or those that are named in the options.
            query_data: the same for queries; None: the training data.
            options: see `tracin_ann.task.integrations.transformers.RunOptions`: kind, rates, loss, tokenizer, dtype,
                parameters, attention, max_length, seed, base, quantization, and the names of columns.

        Raises:
            UsageError: an option has a value that it cannot have.
            TaskError: the run, its architecture, its learning rates or the data cannot be used.
            CheckpointError: weights are missing.
            MissingPackageError: transformers is not installed.
        """
        made: Task = import_module("tracin_ann.task.integrations.transformers").make_task(
            run, data, query_data, **options
        )
        return made

    @classmethod
    def from_lightning(
        cls,
        module: Any,
        checkpoints: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        train_data: Any,
        query_data: Any = None,
        *,
        loss: LossFunction | None = None,
        learning_rates: Sequence[float | Mapping[str, float]] | None = None,
        **fields: Any,
    ) -> Task:
        """Return the task of a run of Lightning.

        The learning rates are those in the record of the run (`TracInCallback`), else those of the optimizers' states
        in the files, else those that LearningRateMonitor logged in `metrics.csv`. If the rates of parameter groups
        differ, their parameters are found by the names in the file, or by `configure_optimizers`.

        Args:
            module: the class of the LightningModule, which the saved hyper-parameters make; `functools.partial(Class,
                name=value)` replaces some of them. Also a module, or a function that returns one.
            checkpoints: `.ckpt` files, or a folder that contains them or `tracin.json`; they are sorted by step.
            train_data: the map-style training set, or a function that returns it.
            query_data: the same for queries; None: the training set.
            loss: `loss(module, batch) -> Tensor[B]`, one loss per example.
            learning_rates: one rate for each checkpoint, or one mapping of parameter names to rates.
            **fields: other fields of the task.

        Raises:
            TaskError: there is no loss, or the module cannot be made.
            CheckpointError: a file is missing or unreadable, or its learning rates are not found.
        """
        from tracin_ann.task.integrations.lightning import (  # noqa: PLC0415 - only for such runs
            STATE_DICT,
            read_lightning_run,
        )

        if loss is None:
            raise TaskError(
                problem(
                    "Task.from_lightning needs a loss per example",
                    got="no loss; training_step returns one number for a batch",
                    expected="a function loss(module, batch) -> Tensor[B]",
                    remedy="pass loss=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], "
                    'reduction="none"), or the loss of your training_step without its mean',
                )
            )
        run = read_lightning_run(module, checkpoints, learning_rates, all_parameters=fields.get("parameters") is None)
        open_train, open_query = (
            data if callable(data) else lambda data=data: data for data in (train_data, query_data)
        )
        return cls(
            model=run.model,
            loss=loss,
            train_data=open_train,
            query_data=open_train if query_data is None else open_query,
            checkpoints=[
                Checkpoint(saved.path, saved.rates, saved.second_moments, STATE_DICT, saved.steps)
                for saved in run.checkpoints
            ],
            **fields,
        )

    def select_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the selected parameters by name, in the model's order; a tied parameter appears once.

        Raises:
            TaskError: no parameter is selected, a name or glob matches nothing, or a selected
                parameter is not a real floating-point tensor.
        """
        named = dict(model.named_parameters())
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        if callable(self.parameters):
            chosen = {name: p for name, p in named.items() if self.parameters(name, p)}
        elif self.parameters is not None:
            patterns = [self.parameters] if isinstance(self.parameters, str) else list(self.parameters)
            for pattern in patterns:
                if not fnmatch.filter(named, pattern):
                    raise TaskError(_no_match_message(f"Task.parameters names {pattern!r}", named))
            chosen = {n: p for n, p in named.items() if any(fnmatch.fnmatchcase(n, pat) for pat in patterns)}
        if not chosen:
            raise TaskError(_no_match_message("no parameter is selected", named))
        for name, parameter in chosen.items():
            if not parameter.is_floating_point():
                raise TaskError(
                    problem(
                        f"parameter {name} cannot be used",
                        got=parameter.dtype,
                        expected="a real floating-point parameter",
                        remedy="exclude it with Task.parameters",
                    )
                )
        return chosen

    def collate_rows(self, examples: list[Any]) -> Any:
        """Return the batch of these examples.

        Raises:
            TaskError: PyTorch's default collate fails on them.
        """
        return (self.collate or default_batch)(examples)

    def with_adapters(self, *, quantization: Literal["int8"] | None = None) -> Task:
        """Return the task of PEFT adapters over this task's model.

        The model of this task is the base model with its weights, and its checkpoints are adapter folders. Gradients
        are those of the adapter's parameters.

        Args:
            quantization: `int8`: weights of linear layers of the base model in int8 (by torchao).

        Raises:
            CheckpointError: a folder has no configuration, or the configurations differ.
            MissingPackageError: peft, or for `int8` torchao, is not installed.
        """
        made: Task = import_module("tracin_ann.task.integrations.peft").make_adapter_task(
            self, quantization=quantization
        )
        return made

    def id_of(self, example: Any) -> int | str | None:
        """Return the id that `ids` gives to the example, or None without `ids`.

        Raises:
            TaskError: the id is neither an int nor a str.
        """
        if self.ids is None:
            return None
        given: object = self.ids(example)
        plain = given.item() if hasattr(given, "item") else given
        if isinstance(plain, bool) or not isinstance(plain, int | str):
            raise TaskError(
                problem(
                    "Task.ids returned an invalid id",
                    got=repr(given)[:160],
                    expected="an int or a str",
                    remedy="return an int or a str, of the same type for every example",
                )
            )
        return plain

    def find_token_losses(self, side: SideName) -> LossFunction | None:
        """Return the function that splits the loss of a side's examples by position, or None if there is none."""
        if side == "train" or (self.query_loss is None and self.query_token_losses is None):
            return self.token_losses
        return self.query_token_losses

    def describe_example(self, example: Any) -> Description | None:
        """Return the description of an example, or None without `describe`."""
        if self.describe is None:
            return None
        shown = self.describe(example)
        return shown if isinstance(shown, Description) else Description(text=str(shown))


@dataclass(frozen=True)
class PartialLoad:
    """A `Task.load` that sets a part of the model, such as an adapter; other tensors keep their values of `Task.model`.

    When a checkpoint is loaded, only the tensors of this part are copied and compared.

    Attributes:
        load: `load(model, path)`.
        find_written: a model of `Task.model` -> the names of the parameters and buffers that `load` sets.
    """

    load: Callable[[nn.Module, str], object]
    find_written: Callable[[nn.Module], Collection[str]]

    def __call__(self, model: nn.Module, path: str) -> object:
        """Load a checkpoint."""
        return self.load(model, path)

    @staticmethod
    def list_written(task: Task, model: nn.Module) -> Collection[str] | None:
        """Return the names of the tensors that a task's checkpoints set, or None for all."""
        return task.load.find_written(model) if isinstance(task.load, PartialLoad) else None


def _no_match_message(what: str, named: Mapping[str, nn.Parameter]) -> str:
    names = ", ".join(list(named)[:_MAX_SHOWN]) + (", ..." if len(named) > _MAX_SHOWN else "")
    return problem(
        what,
        got="no match",
        expected=f"some of the model's {len(named)} parameters ({names})",
        remedy="correct Task.parameters, or requires_grad in the model",
    )
