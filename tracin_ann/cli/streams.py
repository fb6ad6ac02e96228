"""The standard streams of a command: in no locale does a character stop it, and a closed one is left closed."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def usable_streams() -> Iterator[None]:
    """Let stdout take every character, and no file that the command opens be taken for a stream that is closed.

    What stdout's encoding cannot express is written as an escape. Messages to a closed stderr are dropped.
    """
    _occupy()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):
        yield
        return
    before = out.errors
    out.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if not out.closed:
            out.reconfigure(errors=before)


def expect_stdout() -> None:
    """Refuse to compute results that nobody could be told.

    Raises:
        OSError: stdout is closed.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed", "stdout")


def abandon_stdout() -> None:
    """Drop what stdout could not take: written again as the process ends, it would fail again, without a line."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


def _occupy() -> None:
    """Give each of the first three descriptors that is closed to the null device, as open gives out the lowest."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
