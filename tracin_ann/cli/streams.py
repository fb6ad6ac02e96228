"""The standard streams of a command: any character in any locale, closed streams, and a full or closed stdout."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def prepare_streams() -> Iterator[None]:
    """Let stdout accept every character, and reserve the descriptors of closed streams.

    A character that stdout's encoding cannot express is written as an escape. Messages to a closed stderr are dropped.
    """
    _reserve_descriptors()
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


def require_stdout() -> None:
    """Fail before results are computed that cannot be printed.

    Raises:
        OSError: stdout is closed.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, "the stream is closed", "stdout")


def discard_stdout() -> None:
    """Discard buffered output that stdout did not accept: Python would try to write it again at exit and fail."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


def _reserve_descriptors() -> None:
    """Open the null device on each closed descriptor of 0, 1 and 2.

    `open` returns the lowest free descriptor: without this, a file that the command opens could become its stdout.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
