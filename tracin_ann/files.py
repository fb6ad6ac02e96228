"""Durable small primitives of files: whole or not at all, digests, JSON, sweeping after a killed run (POSIX)."""

from __future__ import annotations

import errno
import json
import os
import platform
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import xxhash

from tracin_ann.errors import DamagedIndexError, problem

_PREFIX = ".tracin-tmp-"
_CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it becomes `path`, durably, else it is removed.

    For libraries that write by path (h5py, faiss): the caller creates the file and closes it before the
    block ends. The temporary name keeps the suffix of `path`.
    """
    name = f"{_PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(6)}{path.suffix}"
    temporary = path.with_name(name)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` on a clean exit and is removed on any other."""
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        yield file


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` as the whole of `path`, or leave what was there."""
    with atomic_write(path) as file:
        file.write(data)


def write_json_atomic(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object as the whole of `path`; NaN and inf are refused (ValueError)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes_atomic(path, (text + "\n").encode())


def read_json(path: Path) -> dict[str, object]:
    """Return the JSON object in `path`.

    Raises:
        DamagedIndexError: there is no such file, or it holds something else than a JSON object.
    """
    remedy = "name the directory of a finished index, or run the build again"
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedIndexError(problem(f"{path}", got="no file", expected="a JSON file", remedy=remedy)) from None
    except ValueError as error:
        message = problem(f"{path}", got=f"no JSON ({error})", expected="a JSON object", remedy=remedy)
        raise DamagedIndexError(message) from error
    if not isinstance(value, dict):
        got = f"a JSON {type(value).__name__}"
        raise DamagedIndexError(problem(f"{path}", got=got, expected="a JSON object", remedy=remedy))
    return value


def file_digest(path: Path) -> str:
    """Return the xxh3_128 of the file's bytes, as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sweep_temporaries(directory: Path, *, idle_s: float = 3600.0) -> list[Path]:
    """Remove the temporaries that killed runs left in `directory`, and return their paths.

    A temporary is left over when its process, on this machine, is gone, or when nothing has been written to
    it for `idle_s` seconds (another machine's process can't be seen, and process ids are used again).
    """
    swept = []
    for path in sorted(directory.glob(f"{_PREFIX}*")):
        # A writer may finish, or another sweep may win, between the listing and here.
        with suppress(FileNotFoundError):
            if _writer_is_gone(path.name) or time.time() - path.stat().st_mtime >= idle_s:
                path.unlink()
                swept.append(path)
    return swept


def _writer_is_gone(name: str) -> bool:
    host, _, rest = name.removeprefix(_PREFIX).partition("-")
    pid = rest.partition("-")[0]
    if host != _host() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _host() -> str:
    return xxhash.xxh3_64_hexdigest(platform.node().encode())[:8]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    try:
        _sync(directory)
    except OSError as error:
        # Some network file systems can't sync a directory at all and say EINVAL; there is nothing more to do.
        if error.errno != errno.EINVAL:
            raise
