"""Tar shards of the WebDataset convention as a map-style data set, which reads samples by their position (`TarShards`).

Files of one sample are consecutive and have the same key: the path up to the first dot of the file's name. The rest of
the name is the field: `00017.jpg` and `00017.cls` are the fields `jpg` and `cls` of the sample `00017`.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tracin_ann.errors import TaskError, first_line, problem
from tracin_ann.task.datasets.pictures import decode_image, is_image_file
from tracin_ann.task.datasets.records import (
    FileReader,
    Identity,
    Record,
    Rows,
    Transform,
    check_file,
    check_identity,
    identify,
)

KEY = "__key__"
_BLOCK = tarfile.BLOCKSIZE


class TarShards(Rows):
    """The samples of uncompressed tar files: rows are dicts of the fields, with the key as `__key__`.

    Opening reads the headers of all files once, in the order given; the content of a file is read with its sample.
    Fields are decoded by their last suffix: `txt` and `text` to str, `cls`, `id` and `index` to int, `json` to its
    value, `npy` to an array (never by pickle), suffixes of pictures to RGB images; all others stay bytes.

    Args:
        paths: of the tar files, in order; one path is a list of one.
        transform: sample -> example; None: the sample.
        decode: whether fields are decoded; False: all are bytes.

    Raises:
        TaskError: a file is missing, empty, compressed, truncated or not a tar file, or a sample has a field twice;
            when a row is read: a field cannot be decoded.
        MissingPackageError: a picture is read, and Pillow is not installed.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        transform: Transform | None = None,
        *,
        decode: bool = True,
    ) -> None:
        super().__init__(transform)
        listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        self._paths, self._decode, self._reader = [Path(path) for path in listed], decode, FileReader()
        self._identities: list[Identity] = []
        self._members = _Members()
        for path in self._paths:
            check_file(path)
            self._identities.append(identify(path))
            self._members.add_shard(path, _read_headers(path))
        if not len(self):
            raise TaskError(
                problem(
                    "the tar files have no samples",
                    got=", ".join(map(str, self._paths[:3])) or "no paths",
                    expected="at least one file such as 00017.jpg",
                    remedy="correct the paths",
                )
            )

    def __setstate__(self, state: Record) -> None:
        """Check that the tar files are those that were indexed."""
        vars(self).update(state)
        for path, identity in zip(self._paths, self._identities, strict=True):
            check_identity(path, identity)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._members.keys)

    def read(self, row: int) -> Record:
        """Return a sample.

        Raises:
            TaskError: a tar file has changed, or a field cannot be decoded.
        """
        key, path = self._members.keys[row], self._paths[self._members.shards[row]]
        fields: Record = {KEY: key}
        for name, start, size in self._members.of_sample(row):
            content = self._reader.read(path, start, size)
            fields[name] = _decode(name, content, f"{key}.{name} in {path}") if self._decode else content
        return fields


Header = tuple[str, int, int]


def _read_headers(path: Path) -> Iterator[Header]:
    """Yield name, start and size of each regular file in a tar file.

    Raises:
        TaskError: the tar file is compressed, truncated or damaged.
    """
    n_bytes = path.stat().st_size
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                # tarfile keeps an object for every member.
                archive.members.clear()  # type: ignore[attr-defined]
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is a sparse file")
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK if member.isreg() else member.offset_data
                if member.isreg():
                    if member.offset_data + member.size > n_bytes:
                        raise tarfile.ReadError(f"the file ends inside {member.name}")
                    yield member.name, member.offset_data, member.size
    except (tarfile.TarError, OSError, ValueError) as error:
        raise TaskError(_unreadable_tar(path, first_line(error))) from error
    # A tar file ends with blocks of zeros; without them it may have lost members.
    with path.open("rb") as file:
        file.seek(end)
        if len(file.read(_BLOCK)) < _BLOCK:
            raise TaskError(_unreadable_tar(path, "a file without its end"))


def _unreadable_tar(path: Path, got: str) -> str:
    return problem(
        f"{path} cannot be read",
        got=got,
        expected="a complete tar file, not compressed",
        remedy="decompress it, or write or download it again",
    )


class _Members:
    """The members of all shards by sample: consecutive files with the same key.

    Attributes:
        keys: of the samples.
        shards: their tar files, by position.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.shards = array("q")
        # By member; the members of sample i are those from `_firsts[i]` to `_firsts[i + 1]`.
        self._fields: list[str] = []
        self._starts, self._sizes, self._firsts = array("q"), array("q"), array("q")
        self._n_shards = 0

    def add_shard(self, path: Path, headers: Iterator[Header]) -> None:
        """Add the members of a tar file; files without a key or a field are skipped.

        Raises:
            TaskError: a sample has a field twice.
        """
        n_before = len(self.keys)
        for name, start, size in headers:
            folder, _, base = name.rpartition("/")
            stem, dot, field = base.partition(".")
            if not dot or not stem:
                continue
            key, field = f"{folder}/{stem}" if folder else stem, sys.intern(field.lower())
            if len(self.keys) == n_before or self.keys[-1] != key:
                self.keys.append(key)
                self.shards.append(self._n_shards)
                self._firsts.append(len(self._fields))
            elif field in self._fields[self._firsts[-1] :]:
                raise TaskError(
                    problem(
                        f"{path} has a file twice",
                        got=f"{name} again",
                        expected="one file for each field of a sample",
                        remedy="write the tar file again",
                    )
                )
            self._fields.append(field)
            self._starts.append(start)
            self._sizes.append(size)
        self._n_shards += 1

    def of_sample(self, row: int) -> list[tuple[str, int, int]]:
        """Return field, start and size of each file of a sample."""
        end = self._firsts[row + 1] if row + 1 < len(self.keys) else len(self._fields)
        chosen = slice(self._firsts[row], end)
        return list(zip(self._fields[chosen], self._starts[chosen], self._sizes[chosen], strict=True))


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(("txt", "text"), lambda content: content.decode("utf-8")),
    **dict.fromkeys(("cls", "id", "index"), int),
    "json": json.loads,
    "npy": lambda content: np.load(io.BytesIO(content), allow_pickle=False),
}


def _decode(name: str, content: bytes, where: str) -> Any:
    """Return the value of a field.

    Raises:
        TaskError: the content is not of the kind that its name says.
    """
    suffix = name.rpartition(".")[2]
    if is_image_file(f"x.{name}"):
        return decode_image(io.BytesIO(content), where, "RGB")
    if suffix not in _DECODERS:
        return content
    try:
        return _DECODERS[suffix](content)
    except (ValueError, EOFError) as error:
        raise TaskError(
            problem(
                f"{where} cannot be decoded",
                got=first_line(error),
                expected=f"the content of a .{suffix} file",
                remedy="write the tar file again, or pass decode=False",
            )
        ) from error
