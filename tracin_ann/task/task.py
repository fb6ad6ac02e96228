"""Task and Checkpoint: what the user brings, a model, a loss per example, data and saved checkpoints."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from tracin_ann.errors import TaskError, problem
from tracin_ann.task.nested import default_batch

# How the functions of a Task look, for errors.
EXAMPLES = {
    "loss": "loss=lambda model, batch: ...",
    "query_loss": "query_loss=lambda model, batch: ...",
    "collate": "collate=lambda examples: ...",
    "load": "load=lambda model, path: ...",
    "describe": 'describe=lambda row: f"a {row[1]}"',
    "columns": 'columns=lambda row: {"label": row[1]}',
    "ids": "ids=lambda row: row[2]",
}
LossFunction = Callable[[nn.Module, Any], Tensor]
ParameterFilter = str | Sequence[str] | Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class Checkpoint:
    """A saved state of the model and the learning rate in force when it was saved.

    Attributes:
        path: a file that `torch.load(weights_only=True)` or safetensors reads, or whatever the
            task's own `load` reads (a directory too).
        learning_rate: η_c of TracInCP (Pruthi et al. 2020, section 3.3); a finite number, which a tensor or array of
            one number is too, kept as a float. With 0, as at the first step of a warm-up, the checkpoint adds nothing.
    """

    path: str | os.PathLike[str]
    learning_rate: float

    def __post_init__(self) -> None:
        """Keep the learning rate as a float.

        Raises:
            TaskError: the learning rate is negative, NaN, infinite or no number.
        """
        rate = _as_float(self.learning_rate)
        if rate is None or not 0 <= rate < math.inf:
            raise TaskError(
                problem(
                    f"checkpoint {os.fspath(self.path)} has a bad learning rate",
                    got=" ".join(repr(self.learning_rate).split())[:160],
                    expected="a finite number, 0 or more",
                    remedy="give the learning rate that training used at this checkpoint",
                )
            )
        # Without the sign of -0.0, which a manifest would keep.
        object.__setattr__(self, "learning_rate", abs(rate))


def _as_float(number: object) -> float | None:
    """Return a number, or the one number of a tensor or array, as a float; None for anything else."""
    try:
        if isinstance(number, Tensor | np.ndarray | np.generic):
            number = number.item()
        return float(number) if isinstance(number, Real) else None
    # An array of several numbers, one on meta, an int beyond all floats.
    except (RuntimeError, ValueError, OverflowError):
        return None


@dataclass(frozen=True)
class Description:
    """An example for people: a text, a picture, a table, tokens with scores, or several of these.

    Attributes:
        text: what it says; commands and tables show this alone.
        image: an array or tensor, H×W, 1×H×W, 3×H×W or H×W×3.
        table: names and values of a tabular row, what matters most first.
        tokens: the pieces of a text.
        token_scores: one finite number a token, shown as its shade; needs `tokens`.
    """

    text: str | None = None
    image: Any | None = None
    table: Mapping[str, Any] | None = None
    tokens: Sequence[str] | None = None
    token_scores: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check that tokens and their scores fit each other.

        Raises:
            TaskError: there are scores and no tokens, not one for each, or one that is NaN or infinite.
        """
        if self.token_scores is None:
            return
        n_tokens, n_scores = len(self.tokens or ()), len(self.token_scores)
        wrong = [score for score in self.token_scores if not math.isfinite(float(score))]
        if n_tokens != n_scores or wrong:
            raise TaskError(
                problem(
                    "Description.token_scores does not fit its tokens",
                    got=f"a score {wrong[0]}" if wrong else f"{n_scores} scores for {n_tokens} tokens",
                    expected="one finite number for each of Description.tokens",
                    remedy="mend Task.describe",
                )
            )


@dataclass(frozen=True)
class Task:
    """Everything tracin_ann needs to know of a model and its data, in ordinary PyTorch.

    Attributes:
        model: returns the model; its weights are then read from each checkpoint in turn.
        loss: `loss(model, batch) -> Tensor[B]`, one loss an example, no reduction.
        train_data: returns the map-style training set (`len`, `[i]`); the rows of the index.
        query_data: returns the map-style set that `--ids` counts in.
        checkpoints: paths with learning rates, in training order.
        query_loss: the query side's differentiable score an example; `loss` where it is None.
        parameters: which parameters take part: a glob, a list of names or globs, or a predicate
            `(name, parameter) -> bool`; None: all that require a gradient.
        collate: examples -> batch; torch's default collate where it is None.
        describe: example -> str or Description, for people.
        columns: training example -> {name: number, bool or text}, kept with the index for filters.
        ids: example of either side -> its own id, an int or str, which answers then name; None: its position.
        load: `load(model, path)` for checkpoints that are no plain state_dict: fills the model, or returns a module
            of the same layers, whose parameters and buffers are then copied into the model.
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

    def __post_init__(self) -> None:
        """Check the kinds of the fields.

        Raises:
            TaskError: a field that must be callable is not, there is no checkpoint, or none that counts.
        """
        required = ("model", "loss", "train_data", "query_data")
        optional = ("query_loss", "collate", "describe", "load", "columns", "ids")
        for name in required + optional:
            value = getattr(self, name)
            if not callable(value) and not (name in optional and value is None):
                raise TaskError(
                    problem(
                        f"Task.{name} cannot be called",
                        got=type(value).__name__,
                        expected="a function",
                        remedy=f"pass a function, for example {EXAMPLES.get(name, f'{name}=lambda: ...')}",
                    )
                )
        given: object = self.checkpoints
        if not isinstance(given, Sequence) or not all(isinstance(c, Checkpoint) for c in given):
            raise TaskError(
                problem(
                    "Task.checkpoints is no list of checkpoints",
                    got=f"{type(given).__name__} {given!r}",
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

        if not any(checkpoint.learning_rate for checkpoint in self.checkpoints):
            raise TaskError(
                problem(
                    "no checkpoint counts",
                    got=f"learning rate 0 at {'each of ' * (len(self.checkpoints) > 1)}{len(self.checkpoints)}",
                    expected="a learning rate above 0 at one at least",
                    remedy="name a checkpoint that training left with a learning rate above 0",
                )
            )

    def select_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that take part, by name, in the model's order; tied ones once.

        Raises:
            TaskError: nothing is selected, a name or glob matches nothing, or a selected
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
                    raise TaskError(_nothing_matches(f"Task.parameters names {pattern!r}", named))
            chosen = {n: p for n, p in named.items() if any(fnmatch.fnmatchcase(n, pat) for pat in patterns)}
        if not chosen:
            raise TaskError(_nothing_matches("no parameter takes part", named))
        for name, parameter in chosen.items():
            if not parameter.is_floating_point():
                raise TaskError(
                    problem(
                        f"parameter {name} cannot be used",
                        got=parameter.dtype,
                        expected="a real floating-point parameter",
                        remedy="leave it out with Task.parameters",
                    )
                )
        return chosen

    def collate_rows(self, examples: list[Any]) -> Any:
        """Return the batch of these examples.

        Raises:
            TaskError: the default collate cannot make one.
        """
        return (self.collate or default_batch)(examples)

    def id_of(self, example: Any) -> int | str | None:
        """Return the example's own id, or None where the task gives none.

        Raises:
            TaskError: it is neither an int nor a str.
        """
        if self.ids is None:
            return None
        given: object = self.ids(example)
        plain = given.item() if hasattr(given, "item") else given
        if isinstance(plain, bool) or not isinstance(plain, int | str):
            raise TaskError(
                problem(
                    "Task.ids gives no id",
                    got=repr(given)[:160],
                    expected="an int or a str",
                    remedy="return one of these, the same kind for every example",
                )
            )
        return plain

    def described(self, example: Any) -> Description | None:
        """Return what people are shown of an example, or None where the task does not say."""
        if self.describe is None:
            return None
        shown = self.describe(example)
        return shown if isinstance(shown, Description) else Description(text=str(shown))


def _nothing_matches(what: str, named: Mapping[str, nn.Parameter]) -> str:
    names = ", ".join(list(named)[:6]) + (", ..." if len(named) > 6 else "")  # noqa: PLR2004
    return problem(
        what,
        got="no match",
        expected=f"some of the model's {len(named)} parameters ({names})",
        remedy="mend Task.parameters, or requires_grad in the model",
    )
