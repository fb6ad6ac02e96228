"""Every error a user can cause: one line each (what, got, expected, remedy) and an exit status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TracinAnnError(Exception):
    """Base of all errors that tracin_ann raises on purpose; `exit_code` is the command's status."""

    exit_code = 1


class UsageError(TracinAnnError):
    """An option or argument that cannot be understood or does not fit the others."""

    exit_code = 2


class TaskError(TracinAnnError):
    """The task cannot be used: its model, loss, data or checkpoints break the contract."""


class CheckpointError(TaskError):
    """A checkpoint is missing, unreadable, or does not match the model."""


class NonFiniteError(TaskError):
    """A loss or gradient is NaN or infinite; the message names checkpoint and example."""


class GradientProofError(TaskError):
    """No step of the ladder gives per-example gradients that agree with autograd."""


class MisplacedRowsError(GradientProofError):
    """Examples lie otherwise in a layer's input than when its gradients were proven; earlier batches may be wrong."""


class IndexMismatchError(TracinAnnError):
    """A query or a build does not fit the index in the directory."""

    exit_code = 3


class DamagedIndexError(TracinAnnError):
    """A file of the index is missing, truncated or altered."""

    exit_code = 4


class BusyIndexError(TracinAnnError):
    """Another process is writing the index."""

    exit_code = 5


class MissingPackageError(TracinAnnError):
    """A package that the request needs is not installed, or two that exclude each other are."""


def problem(what: str, *, got: object, expected: object, remedy: str) -> str:
    """Return the one-line message all errors share: what happened, got, expected, remedy."""
    return f"{what}: got {got}, expected {expected}; {remedy}"


def first_line(error: Exception) -> str:
    """Return an exception's kind and the first line of what it says, cut where it is long."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__


@contextmanager
def attach_path(path: Path, written_as: Path | None = None) -> Iterator[None]:
    """Let an error of the system name this file: those of fsync and write name none.

    Args:
        path: what the user knows.
        written_as: what stands for it meanwhile.

    Raises:
        OSError: with `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(written_as):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
