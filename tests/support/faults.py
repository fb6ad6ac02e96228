"""Fault injection: every call that changes a disk is numbered, and can fail, be cut short, or be the last.

`Watch` intercepts the calls below a root: opening for writing, writes, truncations, fsyncs, renames, links, unlinks,
creation and removal of directories, and memory maps of files, which change nothing but can fail. Nothing is really
fsynced: a `Disk` records what would be durable.
"""

from __future__ import annotations

import builtins
import errno
import io
import mmap
import os
import pathlib
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from unittest import mock

from disk import Disk, File, Folder
from tracin_ann.files import mapping

R = TypeVar("R")

# Calls whose errors name the file.
_NAMING = frozenset({"open", "replace", "link", "unlink", "mkdir", "rmdir"})
# Calls that need space: they fail, and continue to fail, on a full disk.
FILLING = frozenset({"open", "write", "mkdir", "link"})
_OPEN, _FD_OPEN, _CLOSE = builtins.open, os.open, os.close
_FTRUNCATE, _PWRITE, _FSYNC = os.ftruncate, os.pwrite, os.fsync
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Crash(BaseException):
    """The process has ended: its further calls have no effect."""


@dataclass(frozen=True)
class Call:
    """An intercepted call: its number, its kind, and the path below the root."""

    number: int
    kind: str
    path: str


@dataclass(frozen=True)
class Fault:
    """The fault at the n-th call.

    Attributes:
        at: number of the call.
        error: an errno, or None for a crash, after which no call has an effect.
        kinds: kinds of later calls that fail as well.
        part: share of a write that is still performed.
    """

    at: int
    error: int | None = None
    kinds: frozenset[str] = frozenset()
    part: float = 0.0

    def hits(self, call: Call) -> bool:
        return call.number == self.at or (call.number > self.at and (self.error is None or call.kind in self.kinds))

    def make_error(self, call: Call, root: Path) -> BaseException:
        if self.error is None:
            return Crash()
        text = os.strerror(self.error)
        return OSError(self.error, text, str(root / call.path)) if call.kind in _NAMING else OSError(self.error, text)


class Watch:
    """A context that counts the calls below a root, records them on a `Disk`, and injects a fault.

    Args:
        root: directory below which calls are intercepted.
        disk: its earlier state; None: the present content is durable.
        fault: the fault to inject.
        seen: called before every call, with the call and the bytes that it writes.
    """

    def __init__(
        self,
        root: Path,
        disk: Disk | None = None,
        fault: Fault | None = None,
        seen: Callable[[Call, bytes], None] | None = None,
    ) -> None:
        self.root, self.fault, self.calls, self.seen = root, fault, [], seen
        self.disk = disk if disk is not None else Disk(root)
        self.calls: list[Call] = []
        self._lock = threading.RLock()
        self._open: dict[int, Any] = {}
        self._patches: list[Any] = []

    def __enter__(self) -> Watch:
        wrapped: dict[tuple[Any, str], Any] = {
            (builtins, "open"): self._open_file,
            (io, "open"): self._open_file,
            (os, "open"): self._open_descriptor,
            (os, "close"): self._close,
            (os, "ftruncate"): self._ftruncate,
            (os, "pwrite"): self._pwrite,
            (os, "fsync"): self._sync,
            (os, "replace"): self._wrap_two_paths("replace", os.replace, self.disk.rename),
            (os, "rename"): self._wrap_two_paths("replace", os.rename, self.disk.rename),
            (os, "link"): self._wrap_two_paths(
                "link", os.link, lambda old, new: self.disk.name(new, self.disk.at(old))
            ),
            (os, "unlink"): self._wrap_one_path("unlink", os.unlink, self._record_removal),
            (os, "remove"): self._wrap_one_path("unlink", os.unlink, self._record_removal),
            (os, "rmdir"): self._wrap_one_path("rmdir", os.rmdir, self._record_removal),
            (mmap, "mmap"): self._wrap_map(mmap.mmap),
            (mapping, "map_pages"): self._wrap_map(mapping.map_pages),
            (os, "mkdir"): self._wrap_one_path("mkdir", os.mkdir, self._record_directory),
            # These would bypass the patched names.
            (shutil, "_use_fd_functions"): False,
            (shutil, "_USE_CP_SENDFILE"): False,
        }
        # Python 3.10: pathlib has separate functions.
        paths = getattr(pathlib, "_normal_accessor", None)
        if paths is not None:
            names = {"mkdir", "rename", "replace", "rmdir", "unlink"}
            wrapped |= {(paths, name): value for (_, name), value in wrapped.items() if name in names}
            wrapped[paths, "open"] = self._open_file
        for (owner, name), value in wrapped.items():
            patch = mock.patch.object(owner, name, value)
            patch.start()
            self._patches.append(patch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._patches:
            self._patches.pop().stop()

    def call(
        self,
        kind: str,
        path: str,
        act: Callable[[], R],
        change: Callable[[], None],
        *,
        data: bytes = b"",
        part: Callable[[int], None] | None = None,
    ) -> R:
        """Perform a call unless it is to fail; a failing write with `part` writes some of its bytes."""
        with self._lock:
            call = Call(len(self.calls), kind, path)
            self.calls.append(call)
            if self.seen is not None:
                self.seen(call, data)
            if self.fault is not None and self.fault.hits(call):
                if part is not None:
                    # A process that has ended does not start later writes.
                    part(int(len(data) * self.fault.part) if call.number == self.fault.at else 0)
                raise self.fault.make_error(call, self.root)
            result = act()
            change()
            return result

    def relative_path(self, path: Any) -> str | None:
        """Return a path relative to the root, or None if it is not below the root."""
        if not isinstance(path, str | os.PathLike):
            return None
        text = os.path.abspath(os.fspath(path))
        return os.path.relpath(text, self.root) if f"{text}{os.sep}".startswith(f"{self.root}{os.sep}") else None

    def _open_file(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
        path = self.relative_path(file)
        if path is None or not set(mode) & set("wxa+"):
            return _OPEN(file, mode, buffering, *rest, **more)
        raw = self.call(
            "open", path, lambda: _Raw(self, path, file, mode), lambda: self._record_file(path, "w" in mode)
        )
        raw.node = self.disk.at(path)
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)  # type: ignore[type-var]
        return buffer if "b" in mode else io.TextIOWrapper(buffer, *rest, **more)

    def _open_descriptor(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        inside = self.relative_path(path)
        if inside is None:
            return _FD_OPEN(path, flags, mode, **more)
        if flags & _WRITING:
            number = self.call(
                "open",
                inside,
                lambda: _FD_OPEN(path, flags, mode, **more),
                lambda: self._record_file(inside, bool(flags & os.O_TRUNC)),
            )
        else:
            number = _FD_OPEN(path, flags, mode, **more)
        self._open[number] = (inside, self.disk.at(inside))
        return number

    def _close(self, number: int) -> None:
        self._open.pop(number, None)
        _CLOSE(number)

    def _ftruncate(self, number: int, size: int) -> None:
        if number not in self._open:
            return _FTRUNCATE(number, size)
        path, node = self._open[number]
        change = lambda: setattr(node, "content", node.content[:size].ljust(size, b"\0"))  # noqa: E731
        return self.call("truncate", path, lambda: _FTRUNCATE(number, size), change)

    def _pwrite(self, number: int, data: bytes, at: int) -> int:
        if number not in self._open:
            return _PWRITE(number, data, at)
        path, node = self._open[number]

        def part(size: int) -> None:
            _PWRITE(number, data[:size], at)
            node.write(at, data[:size])

        act = lambda: _PWRITE(number, data, at)  # noqa: E731
        return self.call("write", path, act, lambda: node.write(at, data), data=data, part=part)

    def _sync(self, number: int) -> None:
        if number not in self._open:
            return _FSYNC(number)
        path, node = self._open[number]
        return self.call("fsync", path, lambda: None, node.sync)

    def _wrap_map(self, function: Callable[..., R]) -> Callable[..., R]:
        def called(number: int, *rest: Any, **more: Any) -> R:
            named = Path(f"/proc/self/fd/{number}")
            path = self.relative_path(os.readlink(named)) if named.is_symlink() else None
            act = lambda: function(number, *rest, **more)  # noqa: E731
            return act() if path is None else self.call("map", path, act, lambda: None)

        return called

    def _wrap_one_path(
        self, kind: str, function: Callable[..., None], change: Callable[[str], None]
    ) -> Callable[..., None]:
        def called(path: Any, *rest: Any, **more: Any) -> None:
            folder = more.get("dir_fd")
            inside = self.relative_path(
                path if folder is None else self.root / self._open.get(folder, (os.pardir,))[0] / path
            )
            if inside is None:
                return function(path, *rest, **more)
            return self.call(kind, inside, lambda: function(path, *rest, **more), lambda: change(inside))

        return called

    def _wrap_two_paths(
        self, kind: str, function: Callable[..., None], change: Callable[[str, str], None]
    ) -> Callable[..., None]:
        def called(source: Any, target: Any) -> None:
            old, new = self.relative_path(source), self.relative_path(target)
            if old is None or new is None:
                return function(source, target)
            return self.call(kind, new, lambda: function(source, target), lambda: change(old, new))

        return called

    def _record_file(self, path: str, truncated: bool) -> None:
        if not self.disk.has(path):
            self.disk.name(path, File())
        elif truncated:
            self.disk.at(path).content = b""  # type: ignore[union-attr]

    def _record_removal(self, path: str) -> None:
        self.disk.name(path, None)

    def _record_directory(self, path: str) -> None:
        self.disk.name(path, Folder())


class _Raw(io.FileIO):
    """A file opened for writing; each write is an intercepted call."""

    node: Any = None

    def __init__(self, watch: Watch, path: str, file: Any, mode: str) -> None:
        super().__init__(file, mode.replace("b", "").replace("t", ""))
        self._watch, self._path = watch, path

    def write(self, data: Any) -> int:  # type: ignore[override]
        written, at = bytes(data), self.tell()

        def done(size: int) -> int:
            super(_Raw, self).write(written[:size])
            self.node.write(at, written[:size])
            return size

        act = lambda: done(len(written))  # noqa: E731
        return self._watch.call("write", self._path, act, lambda: None, data=written, part=done)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        change = lambda: setattr(self.node, "content", self.node.content[:size].ljust(size, b"\0"))  # noqa: E731
        return self._watch.call("truncate", self._path, lambda: super(_Raw, self).truncate(size), change)


def list_faults(call: Call) -> list[Fault]:
    """Return the faults of a call: no effect, or a short write."""
    n, every = call.number, _NAMING | {"write", "truncate", "fsync"}
    found = [Fault(n, errno.EIO), Fault(n, errno.EIO, every, part=0.3)]
    if call.kind == "map":
        found.append(Fault(n, errno.ENOMEM, frozenset({"map"})))
    if call.kind in FILLING:
        found += [Fault(n, errno.ENOSPC, part=0.7), Fault(n, errno.ENOSPC, FILLING, part=1 / 3)]
    return found
