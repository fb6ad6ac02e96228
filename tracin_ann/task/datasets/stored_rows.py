"""Rows of a stream on disk: a folder that appears complete or not at all, and a map-style data set that reads it.

`rows.bin` contains the encoded rows one after the other, `ends.npy` the position of each one's end, and `index.json`
the format's name and version. A row is the size of its structure (4 bytes, little-endian), its structure in JSON, and
the bytes of its tensors, arrays, images and byte strings. Pickle is not used: reading a folder runs no code of it.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tracin_ann.errors import TaskError, first_line, problem
from tracin_ann.files import make_directory, map_array, save_array, sync_directory
from tracin_ann.packages import import_pillow
from tracin_ann.task.datasets.records import FileReader, Rows
from tracin_ann.task.nested import is_instance_of
from tracin_ann.types import Int64, ProgressCallback

FORMAT, VERSION = "tracin-rows", 1
_ROWS, _ENDS, _INDEX = "rows.bin", "ends.npy", "index.json"
_HEAD_BYTES = 4
_ROWS_PER_REPORT = 256
_PNG_MODES = ("1", "L", "LA", "RGB", "RGBA")
"""Modes of images that PNG stores without loss."""
_STORABLE = "tensors, arrays, numbers, text, bytes, images, and dicts, lists and tuples of them"
Progress = ProgressCallback | None


class StoredRows(Rows):
    """The rows that `write_rows` wrote to a folder.

    Args:
        folder: the folder.

    Raises:
        TaskError: it is no such folder, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path, self._reader = folder / _ROWS, FileReader()
        with _report_damaged(folder):
            index = json.loads((folder / _INDEX).read_bytes())
            if index.get("format") != FORMAT or index.get("version") != VERSION:
                raise ValueError(f"format {index.get('format')!r}, version {index.get('version')!r}")
            self._ends: Int64 = map_array(folder / _ENDS)
            if not len(self._ends) or self._ends[-1] != self._path.stat().st_size:
                raise ValueError(f"{_ROWS} of another size than {_ENDS} says")

    def __reduce__(self) -> tuple[type[StoredRows], tuple[Path]]:
        """Return a data set that opens the folder again."""
        return StoredRows, (self._path.parent,)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._ends)

    def read(self, row: int) -> Any:
        """Return a row.

        Raises:
            TaskError: the file is damaged.
        """
        start = int(self._ends[row - 1]) if row else 0
        with _report_damaged(self._path.parent):
            return decode_row(self._reader.read(self._path, start, int(self._ends[row]) - start))


def has_rows(folder: Path) -> bool:
    """Return whether a folder contains rows that `write_rows` wrote.

    Raises:
        TaskError: it is a file, or a folder with other content.
    """
    if (folder / _INDEX).is_file():
        return True
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    raise TaskError(
        problem(
            f"{folder} is not a folder of rows",
            got=f"a folder without {_INDEX}" if folder.is_dir() else "a file",
            expected="a new or empty folder, or one that materialise wrote",
            remedy="choose another folder",
        )
    )


def write_rows(rows: Iterable[Any], folder: Path, n_rows: int | None = None, progress: Progress = None) -> None:
    """Write rows to a folder, which appears when all are written; if it appears meanwhile, that one is left unchanged.

    Args:
        rows: the rows, in order.
        folder: the folder.
        n_rows: their number, for the progress; None: not known.
        progress: called with ("rows", rows written, rows in total or written).

    Raises:
        TaskError: there are no rows, or one contains an object that cannot be stored.
        OSError: the system cannot write.
    """
    make_directory(folder.parent)
    _remove_leftovers(folder)
    partial = folder.with_name(f"{_partial_prefix(folder)}{secrets.token_hex(6)}")
    partial.mkdir()
    try:
        with (partial / _ROWS).open("xb") as file:
            # Held until the file is closed: the folder of a writer that has ended is not locked.
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            ends = np.fromiter(_write_encoded(file, rows, n_rows, progress), np.int64)
            if not len(ends):
                raise TaskError(
                    problem("the stream has no rows", got="none", expected="at least one", remedy="correct the stream")
                )
            with (partial / _ENDS).open("xb") as ends_file:
                save_array(ends_file, ends)
                _sync(ends_file)
            with (partial / _INDEX).open("xb") as index_file:
                index_file.write(json.dumps({"format": FORMAT, "version": VERSION, "rows": len(ends)}).encode())
                _sync(index_file)
            _sync(file)
            sync_directory(partial)
            _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_encoded(file: BinaryIO, rows: Iterable[Any], n_rows: int | None, progress: Progress) -> Iterator[int]:
    """Write the rows, and yield the position of the end of each one."""
    position = done = 0
    for row in rows:
        try:
            encoded = encode_row(row)
        except TypeError as error:
            raise TaskError(
                problem(
                    f"row {done} of the stream cannot be written",
                    got=error,
                    expected=_STORABLE,
                    remedy="convert it, or call materialise without a folder",
                )
            ) from error
        file.write(encoded)
        position, done = position + len(encoded), done + 1
        if progress is not None and done % _ROWS_PER_REPORT == 0:
            progress("rows", done, max(n_rows or 0, done))
        yield position
    if progress is not None and done:
        progress("rows", done, done)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _publish(partial: Path, folder: Path) -> None:
    """Give the finished folder its name, unless another process has finished the same folder."""
    try:
        partial.rename(folder)
    except OSError:
        if not has_rows(folder):
            raise
    sync_directory(folder.parent)


def _partial_prefix(folder: Path) -> str:
    return f".{folder.name}.partial-"


def _remove_leftovers(folder: Path) -> None:
    """Remove what interrupted writers of the same folder left."""
    for partial in folder.parent.glob(f"{_partial_prefix(folder)}*"):
        # Another process may remove it at the same time, or write to it.
        with suppress(OSError), (partial / _ROWS).open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial)


@contextmanager
def _report_damaged(folder: Path) -> Iterator[None]:
    try:
        yield
    # The exception depends on which byte is damaged.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OSError) as error:
        raise TaskError(
            problem(
                f"the rows in {folder} cannot be read",
                got=first_line(error),
                expected="the files that materialise wrote",
                remedy="delete the folder, to write it again",
            )
        ) from error


def encode_row(row: Any) -> bytes:
    """Return a row as bytes.

    Raises:
        TypeError: it contains an object that cannot be stored.
    """
    buffers: list[bytes] = []
    structure = json.dumps(_encode(row, buffers)).encode()
    return b"".join((len(structure).to_bytes(_HEAD_BYTES, "little"), structure, *buffers))


def decode_row(encoded: bytes) -> Any:
    """Return the row that `encode_row` encoded; mappings are dicts.

    Raises:
        Exception: the bytes are damaged; of a type that depends on the damage.
    """
    start = _HEAD_BYTES + int.from_bytes(encoded[:_HEAD_BYTES], "little")
    buffers = io.BytesIO(encoded)
    buffers.seek(start)
    row = _decode(json.loads(encoded[_HEAD_BYTES:start]), buffers)
    if buffers.tell() != len(encoded):
        raise ValueError("a row of another size")
    return row


def _encode(value: Any, buffers: list[bytes]) -> Any:
    """Return the structure of a value: JSON, in which a list begins with the kind of a container or buffer."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return [type(value).__name__, *(_encode(item, buffers) for item in value)]
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return ["dict", *([key, _encode(item, buffers)] for key, item in value.items())]
    head, content = _encode_buffer(value)
    buffers.append(content)
    return head


def _encode_buffer(value: Any) -> tuple[list[Any], bytes]:
    """Return the structure of a value without items, and its bytes."""
    is_image = is_instance_of(value, "PIL.Image", "Image")
    if type(value) is bytes:
        return ["bytes", len(value)], value
    if isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_quantized or value.is_nested):
        dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        content = dense.reshape(-1).view(torch.uint8).numpy().tobytes()
        return ["tensor", str(dense.dtype).removeprefix("torch."), *dense.shape], content
    if isinstance(value, np.ndarray | np.generic) and not np.ma.isMA(value) and value.dtype.kind in "biufc":
        kind = "array" if isinstance(value, np.ndarray) else "number"
        return [kind, value.dtype.str, *value.shape], np.ascontiguousarray(value).tobytes()
    if is_image and value.mode in _PNG_MODES:
        file = io.BytesIO()
        value.save(file, "PNG")
        return ["image", len(file.getvalue())], file.getvalue()
    raise TypeError(f"a {type(value).__name__}" + (f" of mode {value.mode}" if is_image else ""))


def _decode(node: Any, buffers: BinaryIO) -> Any:
    if not isinstance(node, list):
        return node
    kind, *rest = node
    if kind in ("list", "tuple"):
        items = [_decode(item, buffers) for item in rest]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {key: _decode(item, buffers) for key, item in rest}
    if kind in ("bytes", "image"):
        content = _read(buffers, rest[0])
        return content if kind == "bytes" else _decode_png(content)
    name, *shape = rest
    if kind == "tensor":
        dtype = getattr(torch, name)
        n_bytes = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        flat = bytearray(_read(buffers, n_bytes))
        # frombuffer refuses an empty buffer.
        return torch.frombuffer(flat, dtype=dtype).reshape(shape) if flat else torch.empty(shape, dtype=dtype)
    if kind not in ("array", "number"):
        raise ValueError(f"a {kind}")
    plain = np.dtype(name)
    array = np.frombuffer(bytearray(_read(buffers, math.prod(shape) * plain.itemsize)), plain).reshape(shape)
    return array if kind == "array" else array[()]


def _read(buffers: BinaryIO, n_bytes: int) -> bytes:
    content = buffers.read(n_bytes)
    if len(content) != n_bytes:
        raise ValueError("a row that is too short")
    return content


def _decode_png(content: bytes) -> Any:
    image = import_pillow("pictures").open(io.BytesIO(content), formats=["PNG"])
    image.load()
    return image
