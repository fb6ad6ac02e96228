"""Digests of files, and the comparison of a file with its recorded size and digest."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from tracin_ann.errors import attach_path
from tracin_ann.files.opening import NotRegularFileError, open_regular

_CHUNK_BYTES = 1 << 20


def file_digest(path: Path) -> str:
    """Return the xxh3_128 of the file's bytes, as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with attach_path(path), open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def describe_difference(path: Path, size: int, digest: str | None) -> str:
    """Return how a file of an index differs from its record, or "" if it does not.

    Args:
        path: the file.
        size: recorded number of bytes.
        digest: recorded `file_digest`; None: the content is not compared.

    Raises:
        OSError: the system cannot read the file.
    """
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno()).st_size
    except (FileNotFoundError, NotADirectoryError):
        return "no file"
    except NotRegularFileError as error:
        return str(error)
    if found != size:
        return f"{found} bytes"
    return "different content" if digest is not None and file_digest(path) != digest else ""
