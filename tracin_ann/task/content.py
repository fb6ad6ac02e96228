"""What a row holds, as bytes: equal content gives equal bytes, whatever objects the row is made of.

Tensors, arrays, numbers and texts give their own bytes, and containers those of their items. Other objects are
taken apart by the protocol that `copy` uses (`__reduce_ex__`), which covers dates, paths, enums, dataclasses and a
user's own classes alike. Nothing is pickled: pickle's bytes depend on which objects are shared and on the order of
sets. An object that cannot be taken apart is reported as unknown; it is never equal in silence.
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

_DEEPEST = 100
_MOST_PIECES = 1 << 18
_PLAIN = (type(None), bool, int, float, str, bytes)


@dataclass(frozen=True)
class Content:
    """What a row holds.

    Attributes:
        pieces: the bytes of its leaves, in the order of a walk.
        unknown: the names of the types of objects in it whose content cannot be known.
    """

    pieces: tuple[bytes, ...]
    unknown: tuple[str, ...] = ()


def encode_content(row: Any, collate: Callable[[list[Any]], Any] | None = None) -> Content:
    """Return what a row holds; where it cannot be known, what the batch of this row alone holds.

    Args:
        row: one example.
        collate: makes a batch of a list of examples.
    """
    found = _Walk().over(row)
    if not found.unknown or collate is None:
        return found
    made = _Walk().over(collate([row]))
    return Content(found.pieces + made.pieces, made.unknown) if made.unknown else made


class _Walk:
    """One walk over a value: collects its pieces, and the types of what it cannot take apart."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._unknown: dict[str, None] = {}
        # Where the walk is: the ids of the values that it is inside of, and how many of them are objects.
        self._inside: list[int] = []
        self._objects = 0

    def over(self, value: Any) -> Content:
        """Walk a value and return its content."""
        self._visit(value)
        return Content(tuple(self._pieces), tuple(self._unknown))

    def _visit(self, value: Any) -> None:
        plain = _plain(value)
        if plain is not None:
            self._pieces.append(plain)
        elif id(value) in self._inside:
            self._pieces.append(f"cycle {len(self._inside) - self._inside.index(id(value))}".encode())
        elif len(self._inside) >= _DEEPEST or len(self._pieces) >= _MOST_PIECES:
            self._give_up(value)
        else:
            self._inside.append(id(value))
            try:
                self._take_apart(value)
            except MemoryError:
                raise
            except Exception:
                # Foreign code says in its own way that an object cannot be taken apart.
                self._give_up(value)
            finally:
                self._inside.pop()

    def _give_up(self, value: Any) -> None:
        name = type(value).__qualname__
        self._unknown[name] = None
        self._pieces.append(name.encode())

    def _take_apart(self, value: Any) -> None:
        if isinstance(value, Mapping):
            # Keys of a row that is a dict itself are left out, as digests of older indexes have it.
            items = value.items() if self._objects else value.values()
            self._each(value, items)
        elif isinstance(value, (tuple, list)):
            self._each(value, value)
        elif isinstance(value, (set, frozenset)):
            self._as_object(value, sorted(self._apart(item) for item in value))
        else:
            self._as_object(value, _parts(value))

    def _each(self, value: Any, items: Iterable[Any]) -> None:
        if self._objects:
            self._pieces.append(f"{type(value).__qualname__} of {len(value)}".encode())
        for item in items:
            self._visit(item)

    def _as_object(self, value: Any, parts: Iterable[Any]) -> None:
        self._pieces.append(type(value).__qualname__.encode())
        self._objects += 1
        try:
            for part in parts:
                self._visit(part)
        finally:
            self._objects -= 1

    def _apart(self, value: Any) -> bytes:
        """Return the bytes of a value by itself."""
        outer, self._pieces = self._pieces, []
        try:
            self._visit(value)
            return b"\0".join(self._pieces)
        finally:
            self._pieces = outer


def _plain(value: Any) -> bytes | None:
    """Return the bytes of a value that has no parts, or None."""
    if type(value) in _PLAIN:
        return repr(value).encode()
    if isinstance(value, type):
        return f"class {value.__qualname__}".encode()
    if isinstance(value, Tensor):
        array = _array(value)
    elif isinstance(value, (np.ndarray, np.generic)) and not isinstance(value, np.ma.MaskedArray):
        array = np.asarray(value)
    else:
        return None
    if array is None or array.dtype.hasobject:
        return None
    if array.dtype.names:
        # Without the bytes between fields, which hold whatever was there before.
        array = repack_fields(array, recurse=True)
    return repr((array.shape, str(array.dtype))).encode() + np.ascontiguousarray(array).tobytes()


def _array(tensor: Tensor) -> np.ndarray[Any, Any] | None:
    """Return a tensor's numbers as numpy has them, or None."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return None
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError):
        return None


def _parts(value: Any) -> Iterable[Any]:
    """Return what an object is made of.

    Raises:
        Exception: it cannot be taken apart; of whatever kind its own code raises.
    """
    if isinstance(value, Tensor):
        return _tensor_parts(value.detach())
    if isinstance(value, (np.ndarray, np.generic)):
        return _array_parts(np.asanyarray(value))
    for module, name, parts in _FOREIGN:
        if is_instance_of(value, module, name):
            return parts(value)
    return _reduced(value)


def _picture_parts(picture: Any) -> Iterable[Any]:
    picture.load()
    yield from (picture.mode, picture.size, picture.getpalette(None), picture.info.get("transparency"))
    yield picture.tobytes()


def _sparse_parts(matrix: Any) -> Iterable[Any]:
    entries = matrix.tocoo(copy=True)
    entries.sum_duplicates()
    return entries.shape, entries.row, entries.col, entries.data


# Objects of other packages whose reduction holds more than their content: a file's name, what was cached.
_FOREIGN: tuple[tuple[str, str, Callable[[Any], Iterable[Any]]], ...] = (
    ("PIL.Image", "Image", _picture_parts),
    ("pandas", "DataFrame", lambda frame: (frame.columns, *(frame.iloc[:, j] for j in range(frame.shape[1])))),
    ("pandas", "Series", lambda series: (series.name, series.index, series.array)),
    ("pandas", "Index", lambda index: (str(index.dtype), index.to_numpy())),
    ("pandas.api.extensions", "ExtensionArray", lambda array: (str(array.dtype), array.to_numpy())),
    ("scipy.sparse", "sparray", _sparse_parts),
    ("scipy.sparse", "spmatrix", _sparse_parts),
)


def _tensor_parts(tensor: Tensor) -> Iterable[Any]:
    held: tuple[Tensor, ...]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        held = (tensor.indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        held = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        held = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.is_quantized:
        held = (tensor.dequantize(),)
    else:
        # A dtype that numpy lacks.
        held = (tensor.cpu().contiguous().view(torch.uint8),)
    return str(tensor.layout), str(tensor.dtype), tuple(tensor.shape), *held


def _array_parts(array: np.ndarray[Any, Any]) -> Iterable[Any]:
    if isinstance(array, np.ma.MaskedArray):
        return array.filled(), np.ma.getmaskarray(array)
    if array.dtype.names:
        return [(name, array[name]) for name in array.dtype.names]
    return array.shape, *array.flat


def _reduced(value: Any) -> Iterable[Any]:
    """Return the parts by which `copy` would make the object anew."""
    kind = type(value)
    reduce: Callable[[Any], Any] | None = copyreg.dispatch_table.get(kind)
    reduced = reduce(value) if reduce else value.__reduce_ex__(2)
    if isinstance(reduced, str):
        return (reduced,)
    made, given, state, items, pairs = (*reduced, None, None, None)[:5]
    states = state if isinstance(state, tuple) else (state,)
    return (
        getattr(made, "__qualname__", ""),
        given,
        *(_sorted(kind, part) if isinstance(part, dict) else part for part in states),
        *(list(part) for part in (items, pairs) if part is not None),
    )


def _sorted(kind: type, state: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Return an object's attributes by name, without what it merely keeps of its own computing."""
    kept = {
        name: held
        for name, held in state.items()
        if not isinstance(getattr(kind, str(name), None), functools.cached_property)
    }
    return sorted(kept.items(), key=lambda pair: str(pair[0]))
