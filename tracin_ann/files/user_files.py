"""Files that a user names: results go where a shell's redirection would, texts are read to a bound."""

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
from tracin_ann.files.durable import atomic_write, sweep_temporaries_of

_CHUNK_BYTES = 1 << 20
_MOST_LINKS = 40
_PATIENCE_S = 3


@contextmanager
def open_output(path: Path) -> Iterator[BinaryIO]:
    """Yield a file for what a user wants at `path`, which may be anything that a shell could redirect to.

    A regular file, or one that is not there yet, is replaced on a clean exit and keeps its rights; behind a symbolic
    link, that is the file that the link leads to. Anything else (a device, a FIFO, a descriptor such as /dev/stdout) is
    written to as it is. What killed runs left of an earlier output to the same path is removed.

    Raises:
        OSError: with the name of `path`, or of the file behind the link.
    """
    target, is_regular = _followed(path)
    if not is_regular:
        with attach_path(path), os.fdopen(_opened_as_it_is(target), "wb") as file:
            yield file
        return
    sweep_temporaries_of(target)
    with atomic_write(target) as file:
        with suppress(FileNotFoundError):
            os.fchmod(file.fileno(), target.stat().st_mode & 0o777)
        yield file


def _followed(path: Path) -> tuple[Path, bool]:
    """Return where the symbolic links of a path end, and whether a regular file is there, or may come to be."""
    for _ in range(_MOST_LINKS):
        # A process's open file is no link to follow: what it leads to may have no name.
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


def _opened_as_it_is(path: Path) -> int:
    """Open what is no regular file for writing; an open file of this process is shared, as a shell does it."""
    own = (Path(f"/proc/{os.getpid()}/fd"), Path("/dev/fd"))
    if path.name.isdecimal() and path.parent.resolve() in own:
        return os.dup(int(path.name))
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def read_user_text(path: Path, most_bytes: int) -> str:
    """Return the text, in UTF-8, of a file that the user names; a FIFO, as of `<(command)`, is read to its end.

    Raises:
        OSError: it cannot be read; of a FIFO, nobody writes to it.
        ValueError: it is no text, or longer than it may be.
    """
    decoder, parts, n_bytes = codecs.getincrementaldecoder("utf-8")("surrogatepass"), [], 0
    with (
        attach_path(path),
        os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file,
    ):
        first = _first_byte(file, path)
        os.set_blocking(file.fileno(), True)
        for chunk in chain([first], iter(lambda: file.read(_CHUNK_BYTES), b"")):
            n_bytes += len(chunk)
            if b"\0" in chunk:
                raise ValueError("no text: it holds a NUL byte")
            if n_bytes > most_bytes:
                raise ValueError(f"more than {most_bytes:,} bytes")
            parts.append(decoder.decode(chunk))
    return "".join((*parts, decoder.decode(b"", final=True)))


def _first_byte(file: BinaryIO, path: Path) -> bytes:
    """Wait a little for whoever writes to a FIFO, and return what had to be read to know: it reads as empty before."""
    if not stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
        return b""
    polled = select.poll()
    polled.register(file.fileno(), select.POLLIN)
    if polled.poll(_PATIENCE_S * 1000):
        return b""
    first: bytes | None = file.read(1)
    if first == b"":
        raise OSError(errno.ENXIO, "nobody writes to it", str(path))
    return first or b""
