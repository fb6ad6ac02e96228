"""Named arrays in one file: numbers as NumPy keeps them, texts as UTF-8 one after another with offsets.

The file is a `.npz` of which nothing is compressed: what is read takes no more memory than the file is large. An array
of texts, `NAME`, is two members: `utf8 NAME`, uint8, and `offsets NAME`, int64 [N + 1]; text i is the bytes from offset
i to offset i + 1. Lone surrogates are kept (`surrogatepass`). In memory, texts are an array of Python's own strings.

Files of earlier versions, with texts of fixed width, are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tracin_ann.files import atomic_path, open_plain, read_npz
from tracin_ann.types import Int64

_UTF8, _OFFSETS = "utf8 ", "offsets "
_ENCODING = ("utf-8", "surrogatepass")
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
        members |= _encode_text(name, array) if array.dtype == object else {name: array}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **members)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays that `write_arrays` wrote.

    Raises:
        OSError: the file cannot be read.
        Exception: of any kind, where the file is damaged: what zipfile and NumPy raise depends on the byte.
    """
    with open_plain(path) as file:
        members = read_npz(file)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, array in members.items():
        if name.startswith(_UTF8):
            plain = name.removeprefix(_UTF8)
            arrays[plain] = _decode_text(plain, array, members[_OFFSETS + plain])
        elif not name.startswith(_OFFSETS):
            arrays[name] = text_array(array.tolist()) if array.dtype.kind == "U" and array.ndim == 1 else array
    return arrays


def _encode_text(name: str, texts: Texts) -> dict[str, npt.NDArray[Any]]:
    coded = [text.encode(*_ENCODING) for text in texts]
    offsets = np.cumsum([0, *map(len, coded)], dtype=np.int64)
    return {_UTF8 + name: np.ndarray(offsets[-1], np.uint8, b"".join(coded)), _OFFSETS + name: offsets}


def _decode_text(name: str, utf8: npt.NDArray[Any], offsets: Int64) -> Texts:
    if utf8.dtype != np.uint8 or utf8.ndim != 1 or offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets):
        raise ValueError(f"{name} is no text: {utf8.dtype} {utf8.shape} with offsets {offsets.dtype} {offsets.shape}")
    # Compared, not subtracted: a difference may overflow.
    if offsets[0] != 0 or offsets[-1] != len(utf8) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"offsets of {name} that do not rise from 0 to {len(utf8)}")
    held, ends = utf8.tobytes(), offsets.tolist()
    texts = (held[start:stop].decode(*_ENCODING) for start, stop in zip(ends, ends[1:], strict=False))
    # Equal texts, such as labels, are held once.
    known: dict[str, str] = {}
    return text_array([known.setdefault(text, text) for text in texts])
