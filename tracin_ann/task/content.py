"""Content of a row as bytes: rows with equal values have equal bytes, whatever objects they consist of.

Tensors, arrays, numbers and strings are encoded as their bytes, containers as their encoded items. Other objects are
decomposed by the protocol that `copy` uses (`__reduce_ex__`), which covers dates, paths, enums, dataclasses and
user-defined classes. Pickle is not used, because its bytes depend on which objects are shared and on the order of sets.
An object that cannot be decomposed is reported in `Content.unknown`, so that it is not taken as equal to another.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.recfunctions import repack_fields
from torch import Tensor

from tracin_ann.task.nested import is_instance_of

_MAX_DEPTH = 100
_MAX_PIECES = 1 << 18
_LEAF_TYPES = (type(None), bool, int, float, str, bytes)


@dataclass(frozen=True)
class Content:
    """The encoded content of a row.

    Attributes:
        pieces: the bytes of its leaves, in depth-first order.
        unknown: names of the types of its objects that cannot be decomposed.
    """

    pieces: tuple[bytes, ...]
    unknown: tuple[str, ...] = ()


def encode_content(row: Any, collate: Callable[[list[Any]], Any] | None = None) -> Content:
    """Return the content of a row; if an object of it cannot be decomposed, the content of its batch of one.

    Args:
        row: one example.
        collate: turns a list of examples into a batch; None: the row alone is encoded.
    """
    content = _Encoder().encode(row)
    if not content.unknown or collate is None:
        return content
    batch = _Encoder().encode(collate([row]))
    return Content(content.pieces + batch.pieces, batch.unknown) if batch.unknown else batch


class _Encoder:
    """A depth-first traversal of one value that collects its pieces and the types that it cannot decompose."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._unknown: dict[str, None] = {}
        # The ids of the values on the path to the current one, and how many of them are objects.
        self._inside: list[int] = []
        self._objects = 0

    def encode(self, value: Any) -> Content:
        """Return the content of a value."""
        self._visit(value)
        return Content(tuple(self._pieces), tuple(self._unknown))

    def _visit(self, value: Any) -> None:
        leaf = _leaf_bytes(value)
        if leaf is not None:
            self._pieces.append(leaf)
        elif id(value) in self._inside:
            self._pieces.append(f"cycle {len(self._inside) - self._inside.index(id(value))}".encode())
        elif len(self._inside) >= _MAX_DEPTH or len(self._pieces) >= _MAX_PIECES:
            self._add_unknown(value)
        else:
            self._inside.append(id(value))
            try:
                self._decompose(value)
            except MemoryError:
                raise
            except Exception:
                # Other packages' code may raise any exception for an object that cannot be decomposed.
                self._add_unknown(value)
            finally:
                self._inside.pop()

    def _add_unknown(self, value: Any) -> None:
        name = type(value).__qualname__
        self._unknown[name] = None
        self._pieces.append(name.encode())

    def _decompose(self, value: Any) -> None:
        if isinstance(value, Mapping):
            # Keys of containers outside objects are not encoded, for compatibility with digests of older indexes.
            items = value.items() if self._objects else value.values()
            self._visit_items(value, items)
        elif isinstance(value, (tuple, list)):
            self._visit_items(value, value)
        elif isinstance(value, (set, frozenset)):
            self._visit_object(value, sorted(self._encode_separately(item) for item in value))
        else:
            self._visit_object(value, _object_parts(value))

    def _visit_items(self, value: Any, items: Iterable[Any]) -> None:
        if self._objects:
            self._pieces.append(f"{type(value).__qualname__} of {len(value)}".encode())
        for item in items:
            self._visit(item)

    def _visit_object(self, value: Any, parts: Iterable[Any]) -> None:
        self._pieces.append(type(value).__qualname__.encode())
        self._objects += 1
        try:
            for part in parts:
                self._visit(part)
        finally:
            self._objects -= 1

    def _encode_separately(self, value: Any) -> bytes:
        """Return the bytes of a value without adding them to the pieces."""
        outer, self._pieces = self._pieces, []
        try:
            self._visit(value)
            return b"\0".join(self._pieces)
        finally:
            self._pieces = outer


def _leaf_bytes(value: Any) -> bytes | None:
    """Return the bytes of a value without parts, or None for other values."""
    if type(value) in _LEAF_TYPES:
        return repr(value).encode()
    if isinstance(value, type):
        return f"class {value.__qualname__}".encode()
    if isinstance(value, Tensor):
        array = _to_numpy(value)
    elif isinstance(value, (np.ndarray, np.generic)) and not isinstance(value, np.ma.MaskedArray):
        array = np.asarray(value)
    else:
        return None
    if array is None or array.dtype.hasobject:
        return None
    if array.dtype.names:
        # Padding bytes between fields are removed: their values are arbitrary.
        array = repack_fields(array, recurse=True)
    return repr((array.shape, str(array.dtype))).encode() + np.ascontiguousarray(array).tobytes()


def _to_numpy(tensor: Tensor) -> np.ndarray[Any, Any] | None:
    """Return the values of a dense tensor as a numpy array, or None for other tensors and for dtypes numpy lacks."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return None
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError):
        return None


def _object_parts(value: Any) -> Iterable[Any]:
    """Return the values that an object consists of.

    Raises:
        Exception: it cannot be decomposed; any type that the object's code raises.
    """
    if isinstance(value, Tensor):
        return _tensor_parts(value.detach())
    if isinstance(value, (np.ndarray, np.generic)):
        return _array_parts(np.asanyarray(value))
    for module, name, parts in _KNOWN_TYPES:
        if is_instance_of(value, module, name):
            return parts(value)
    return _reduce_parts(value)


def _image_parts(image: Any) -> Iterable[Any]:
    image.load()
    yield from (image.mode, image.size, image.getpalette(None), image.info.get("transparency"))
    yield image.tobytes()


def _sparse_parts(matrix: Any) -> Iterable[Any]:
    entries = matrix.tocoo(copy=True)
    entries.sum_duplicates()
    return entries.shape, entries.row, entries.col, entries.data


# Types of other packages whose `__reduce_ex__` returns more than their content, such as a file name or cached values.
_KNOWN_TYPES: tuple[tuple[str, str, Callable[[Any], Iterable[Any]]], ...] = (
    ("PIL.Image", "Image", _image_parts),
    ("pandas", "DataFrame", lambda frame: (frame.columns, *(frame.iloc[:, j] for j in range(frame.shape[1])))),
    ("pandas", "Series", lambda series: (series.name, series.index, series.array)),
    ("pandas", "Index", lambda index: (str(index.dtype), index.to_numpy())),
    ("pandas.api.extensions", "ExtensionArray", lambda array: (str(array.dtype), array.to_numpy())),
    ("scipy.sparse", "sparray", _sparse_parts),
    ("scipy.sparse", "spmatrix", _sparse_parts),
)


def _tensor_parts(tensor: Tensor) -> Iterable[Any]:
    parts: tuple[Tensor, ...]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        parts = (tensor.indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.is_quantized:
        parts = (tensor.dequantize(),)
    else:
        # A dense tensor of a dtype that numpy lacks.
        parts = (tensor.cpu().contiguous().view(torch.uint8),)
    return str(tensor.layout), str(tensor.dtype), tuple(tensor.shape), *parts


def _array_parts(array: np.ndarray[Any, Any]) -> Iterable[Any]:
    if isinstance(array, np.ma.MaskedArray):
        return array.filled(), np.ma.getmaskarray(array)
    if array.dtype.names:
        return [(name, array[name]) for name in array.dtype.names]
    return array.shape, *array.flat


def _reduce_parts(value: Any) -> Iterable[Any]:
    """Return the parts from which `copy` would rebuild the object."""
    kind = type(value)
    reduce: Callable[[Any], Any] | None = copyreg.dispatch_table.get(kind)
    reduced = reduce(value) if reduce else value.__reduce_ex__(2)
    if isinstance(reduced, str):
        return (reduced,)
    function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    states = state if isinstance(state, tuple) else (state,)
    return (
        getattr(function, "__qualname__", ""),
        arguments,
        *(_sort_attributes(kind, part) if isinstance(part, dict) else part for part in states),
        *(list(part) for part in (items, pairs) if part is not None),
    )


def _sort_attributes(kind: type, state: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Return an object's attributes, sorted by name, without cached properties."""
    attributes = {
        name: attribute
        for name, attribute in state.items()
        if not isinstance(getattr(kind, str(name), None), functools.cached_property)
    }
    return sorted(attributes.items(), key=lambda pair: str(pair[0]))
