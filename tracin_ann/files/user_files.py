"""Files that a user names on the command line: output to any path that a shell accepts, bounded reading of text."""

from __future__ import annotations

import codecs
import errno
import os
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from tracin_ann.errors import attach_path
from tracin_ann.files.durable import atomic_write, remove_leftovers_of

_CHUNK_BYTES = 1 << 20
_MAX_LINKS = 40
_FIFO_WAIT_S = 3


@contextmanager
def open_output(path: Path) -> Iterator[BinaryIO]:
    """Yield a file whose content goes to `path`, which may be anything that a shell can redirect output to.

    A regular file, or one that does not exist yet, is replaced on a clean exit and keeps its permissions; for a
    symbolic link, this is the file that the link points to. Anything else (a device, a FIFO, a descriptor such as
    /dev/stdout) is written to directly. Temporary files that interrupted writers of the same path left are removed.

    Raises:
        OSError: the system cannot write; `filename` is `path`, or the file that the link points to.
    """
    target, is_regular = _resolve_links(path)
    if not is_regular:
        with attach_path(path), os.fdopen(_open_special(target), "wb") as file:
            yield file
        return
    remove_leftovers_of(target)
    with atomic_write(target) as file:
        with suppress(FileNotFoundError):
            os.fchmod(file.fileno(), target.stat().st_mode & 0o777)
        yield file


def _resolve_links(path: Path) -> tuple[Path, bool]:
    """Return the end of a chain of symbolic links, and whether it is a regular file or does not exist."""
    for _ in range(_MAX_LINKS):
        # A link of /proc to an open file is not followed: that file may have no name.
        if _is_descriptor(path):
            return path, False
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return path, True
        if not stat.S_ISLNK(mode):
            return path, stat.S_ISREG(mode)
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _is_descriptor(path: Path) -> bool:
    return f"{path.parent.resolve()}/".startswith(("/proc/", "/dev/fd/"))


def _open_special(path: Path) -> int:
    """Open a path that is not a regular file for writing; a descriptor of this process is duplicated, as in a shell."""
    own = (Path(f"/proc/{os.getpid()}/fd"), Path("/dev/fd"))
    if path.name.isdecimal() and path.parent.resolve() in own:
        return os.dup(int(path.name))
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def read_user_text(path: Path, most_bytes: int) -> str:
    """Return the UTF-8 text of a file that the user names; a FIFO, such as `<(command)`, is read to its end.

    Raises:
        OSError: the file cannot be read, or no process writes to the FIFO.
        ValueError: it is not text, or longer than `most_bytes` bytes.
    """
    decoder, parts, n_bytes = codecs.getincrementaldecoder("utf-8")("surrogatepass"), [], 0
    with (
        attach_path(path),
        os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file,
    ):
        first = _wait_for_writer(file, path)
        os.set_blocking(file.fileno(), True)
        for chunk in chain([first], iter(lambda: file.read(_CHUNK_BYTES), b"")):
            n_bytes += len(chunk)
            if b"\0" in chunk:
                raise ValueError("binary data with a NUL byte")
            if n_bytes > most_bytes:
                raise ValueError(f"more than {most_bytes:,} bytes")
            parts.append(decoder.decode(chunk))
    return "".join((*parts, decoder.decode(b"", final=True)))


def _wait_for_writer(file: BinaryIO, path: Path) -> bytes:
    """Wait up to 3 s for a process that writes to a FIFO, and return the bytes that were read to detect one."""
    if not stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
        return b""
    poll = select.poll()
    poll.register(file.fileno(), select.POLLIN)
    if poll.poll(_FIFO_WAIT_S * 1000):
        return b""
    # Without a writer, a FIFO reads as empty.
    first: bytes | None = file.read(1)
    if first == b"":
        raise OSError(errno.ENXIO, "no process writes to it", str(path))
    return first or b""
