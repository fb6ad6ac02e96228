"""Exceptions of the library, their exit statuses, and the one-line form of their messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROBLEM = re.compile(r"(?P<what>.*?): got (?P<got>.*), expected (?P<expected>.*); (?P<remedy>.*?)", re.DOTALL)


class TracinAnnError(Exception):
    """Base class of all errors that tracin_ann raises; `exit_code` is the exit status of the command."""

    exit_code = 1


class UsageError(TracinAnnError):
    """An option or argument is invalid or conflicts with another one."""

    exit_code = 2


class UnknownRowError(UsageError):
    """There is no row with this position or id."""


class TaskError(TracinAnnError):
    """The task cannot be used: its model, loss, data or checkpoints violate the contract of `Task`."""


class CheckpointError(TaskError):
    """A checkpoint is missing, unreadable, or does not match the model."""


class NonFiniteError(TaskError):
    """A loss or gradient is NaN or infinite; the message names checkpoint and example."""


class GradientProofError(TaskError):
    """No gradient method computes per-example gradients that agree with autograd."""


class MisplacedRowsError(GradientProofError):
    """The examples are laid out in a layer's input differently than when its gradients were verified.

    The gradients of earlier batches may be wrong too.
    """


class IndexMismatchError(TracinAnnError):
    """A query or a build is not compatible with the index in the directory."""

    exit_code = 3


class DamagedIndexError(TracinAnnError):
    """A file of the index is missing, truncated or altered."""

    exit_code = 4


class BusyIndexError(TracinAnnError):
    """Another process is writing the index."""

    exit_code = 5


class WorkerError(TracinAnnError):
    """A worker process failed, ended, or did not reply in time."""


class MissingPackageError(TracinAnnError):
    """A required package is not installed, or two packages that exclude each other are."""


def problem(what: str, *, got: object, expected: object, remedy: str) -> str:
    """Return the one-line message of an error: what happened, got, expected, remedy."""
    return f"{what}: got {got}, expected {expected}; {remedy}"


def split_problem(message: str) -> dict[str, str]:
    """Return the parts `what`, `got`, `expected` and `remedy` of a message of `problem`.

    Of another message, `what` is all of it, and the other parts are empty.
    """
    match = _PROBLEM.fullmatch(message)
    return {"what": message, "got": "", "expected": "", "remedy": ""} if match is None else match.groupdict()


def first_line(error: Exception) -> str:
    """Return the type of an exception and the first line of its message, at most 160 characters of it."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__


@contextmanager
def attach_path(path: Path, written_as: Path | None = None) -> Iterator[None]:
    """Set the filename of system errors raised in the block: those of fsync and write have none.

    Args:
        path: the file as the user knows it.
        written_as: the temporary file that later replaces it; errors that name it name `path` instead.

    Raises:
        OSError: raised in the block, with `filename` set.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(written_as):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
