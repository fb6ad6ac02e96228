"""Named arrays in one file: numbers as NumPy keeps them, texts as UTF-8 one after another with offsets.

The file is a `.npz` of which nothing is compressed: what is read takes no more memory than the file is large. An array
of texts, `NAME`, is two members: `utf8 NAME`, uint8, and `offsets NAME`, int64 [N + 1]; text i is the bytes from offset
i to offset i + 1. Lone surrogates are kept (`surrogatepass`). In memory, texts are an array of Python's own strings.

Files of earlier versions, with texts of fixed width, are read as well.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tracin_ann.files import atomic_path, open_regular
from tracin_ann.types import Int64

_UTF8, _OFFSETS, _SUFFIX = "utf8 ", "offsets ", ".npy"
_CODING = ("utf-8", "surrogatepass")
Texts = npt.NDArray[np.object_]


def text_array(texts: Sequence[str]) -> Texts:
    """Return an array [N] of texts; it holds each as it is, whatever the others' lengths."""
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays by name, durably; those of dtype object hold texts."""
    members: dict[str, npt.NDArray[Any]] = {}
    for name, array in arrays.items():
        members |= _encoded(name, array) if array.dtype == object else {name: array}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **members)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays that `write_arrays` wrote.

    Raises:
        OSError: the file cannot be read.
        Exception: of any kind, where the file is damaged: what zipfile and NumPy raise depends on the byte.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        infos, size = archive.infolist(), os.fstat(file.fileno()).st_size
        # Compressed or overlapping members could hold far more than the file is large.
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos) or sum(i.file_size for i in infos) > size:
            raise ValueError("members that are compressed, or larger than the file")
        members: dict[str, npt.NDArray[Any]] = {}
        for info in infos:
            with archive.open(info) as member:
                members[info.filename.removesuffix(_SUFFIX)] = _member(member, info)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, array in members.items():
        if name.startswith(_UTF8):
            plain = name.removeprefix(_UTF8)
            arrays[plain] = _decoded(plain, array, members[_OFFSETS + plain])
        elif not name.startswith(_OFFSETS):
            arrays[name] = text_array(array.tolist()) if array.dtype.kind == "U" and array.ndim == 1 else array
    return arrays


def _member(file: IO[bytes], info: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """Return an array of the size that its header says, which must be that of the member."""
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, is_fortran, dtype = header(file)
    held = info.file_size - file.tell()
    if dtype.hasobject or not dtype.itemsize or math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{info.filename} of {dtype} {shape} in {held} bytes")
    return np.ndarray(shape, dtype, file.read(), order="F" if is_fortran else "C")


def _encoded(name: str, texts: Texts) -> dict[str, npt.NDArray[Any]]:
    coded = [text.encode(*_CODING) for text in texts]
    offsets = np.cumsum([0, *map(len, coded)], dtype=np.int64)
    return {_UTF8 + name: np.ndarray(offsets[-1], np.uint8, b"".join(coded)), _OFFSETS + name: offsets}


def _decoded(name: str, utf8: npt.NDArray[Any], offsets: Int64) -> Texts:
    if utf8.dtype != np.uint8 or utf8.ndim != 1 or offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets):
        raise ValueError(f"{name} is no text: {utf8.dtype} {utf8.shape} with offsets {offsets.dtype} {offsets.shape}")
    # Compared, not subtracted: a difference may overflow.
    if offsets[0] != 0 or offsets[-1] != len(utf8) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"offsets of {name} that do not rise from 0 to {len(utf8)}")
    held, ends = utf8.tobytes(), offsets.tolist()
    texts = (held[start:stop].decode(*_CODING) for start, stop in zip(ends, ends[1:], strict=False))
    # Equal texts, such as labels, are held once.
    known: dict[str, str] = {}
    return text_array([known.setdefault(text, text) for text in texts])
