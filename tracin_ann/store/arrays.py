"""An uncompressed `.npz` file of named arrays of numbers and strings.

Numbers are stored in NumPy's format. An array of strings `NAME` is two members: `utf8 NAME`, uint8, the concatenated
UTF-8 bytes, and `offsets NAME`, int64 [N + 1]; string i is the bytes from offset i to offset i + 1. Lone surrogates
are preserved (`surrogatepass`). In memory, an array of strings has dtype object and contains Python strings.

Because nothing is compressed, reading a file takes no more memory than its size. Files of earlier versions, which
store strings with a fixed width, can be read too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tracin_ann.files import atomic_path, open_regular, read_npz
from tracin_ann.types import Int64

_UTF8, _OFFSETS = "utf8 ", "offsets "
_ENCODING = ("utf-8", "surrogatepass")
Texts = npt.NDArray[np.object_]


def make_text_array(texts: Sequence[str]) -> Texts:
    """Return an array [N] of strings, dtype object: the longest string does not determine the size of the others."""
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write named arrays to a file, durably; arrays of dtype object contain strings."""
    members: dict[str, npt.NDArray[Any]] = {}
    for name, array in arrays.items():
        members |= _encode_text(name, array) if array.dtype == object else {name: array}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **members)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays that `write_arrays` wrote.

    Raises:
        OSError: the file cannot be read.
        Exception: the file is damaged; the type of the exception depends on which byte is damaged.
    """
    with open_regular(path) as file:
        members = read_npz(file)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, array in members.items():
        if name.startswith(_UTF8):
            plain = name.removeprefix(_UTF8)
            arrays[plain] = _decode_text(plain, array, members[_OFFSETS + plain])
        elif not name.startswith(_OFFSETS):
            arrays[name] = make_text_array(array.tolist()) if array.dtype.kind == "U" and array.ndim == 1 else array
    return arrays


def _encode_text(name: str, texts: Texts) -> dict[str, npt.NDArray[Any]]:
    encoded = [text.encode(*_ENCODING) for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return {_UTF8 + name: np.ndarray(offsets[-1], np.uint8, b"".join(encoded)), _OFFSETS + name: offsets}


def _decode_text(name: str, utf8: npt.NDArray[Any], offsets: Int64) -> Texts:
    if utf8.dtype != np.uint8 or utf8.ndim != 1 or offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets):
        raise ValueError(
            f"{name} is not an array of strings: {utf8.dtype} {utf8.shape} with offsets {offsets.dtype} {offsets.shape}"
        )
    # Compare instead of subtracting: a difference may overflow.
    if offsets[0] != 0 or offsets[-1] != len(utf8) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"the offsets of {name} do not increase from 0 to {len(utf8)}")
    data, ends = utf8.tobytes(), offsets.tolist()
    texts = (data[start:stop].decode(*_ENCODING) for start, stop in zip(ends, ends[1:], strict=False))
    # Equal strings, such as labels, share one object in memory.
    known: dict[str, str] = {}
    return make_text_array([known.setdefault(text, text) for text in texts])
