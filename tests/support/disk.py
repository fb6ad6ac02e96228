"""A simulated disk: its present content, and what a loss of power may leave.

The model is harsher than file systems. Data written to a file since its last fsync may be lost, cut at any byte or
replaced by zeros; each name created, moved or removed in a directory since its last fsync may be undone, independently
of the others. A rename within a directory is one change.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from random import Random

# Every path below the root: a directory (None), or the number and the content of a file.
Tree = Mapping[str, "tuple[int, bytes] | None"]


@dataclass(eq=False)
class File:
    """A file: its content now and at its last fsync."""

    content: bytes = b""
    durable: bytes = b""

    def write(self, at: int, data: bytes) -> None:
        if not data:
            return
        self.content = self.content[:at].ljust(at, b"\0") + data + self.content[at + len(data) :]

    def sync(self) -> None:
        self.durable = self.content

    def after_loss(self, random: Random) -> bytes:
        if self.content == self.durable:
            return self.content
        at = random.randrange(len(self.content) + 1)
        cut = self.content[:at]
        return random.choice([self.durable, self.content, cut, cut.ljust(len(self.content), b"\0")])


@dataclass(eq=False)
class Folder:
    """A directory: its names now and at its last fsync, and the changes since; None: the name is removed."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    since: list[dict[str, File | Folder | None]] = field(default_factory=list)

    def set(self, names: dict[str, File | Folder | None]) -> None:
        self.since.append(names)
        _apply(self.names, names)

    def sync(self) -> None:
        self.durable, self.since = dict(self.names), []

    def after_loss(self, random: Random, share: float) -> dict[str, File | Folder]:
        names = dict(self.durable)
        for change in self.since:
            if random.random() < share:
                _apply(names, change)
        return names


def _apply(names: dict[str, File | Folder], change: dict[str, File | Folder | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """Directories and files below a root, which is durable itself; paths are relative to it."""

    def __init__(self, root: Path) -> None:
        """Treat the present content as durable."""
        self.root = Folder()
        known: dict[int, File] = {}
        for path in sorted(root.rglob("*")):
            if path.is_dir():
                node: File | Folder = Folder()
            else:
                content = path.read_bytes()
                node = known.setdefault(path.stat().st_ino, File(content, content))
            self._parent(str(path.relative_to(root))).set({path.name: node})
        _sync_all(self.root)

    def at(self, path: str) -> File | Folder:
        node: File | Folder = self.root
        for part in PurePosixPath(path).parts:
            assert isinstance(node, Folder)
            node = node.names[part]
        return node

    def has(self, path: str) -> bool:
        try:
            self.at(path)
        except KeyError:
            return False
        return True

    def name(self, path: str, node: File | Folder | None) -> None:
        """Add a name of a node, or remove the name."""
        self._parent(path).set({PurePosixPath(path).name: node})

    def rename(self, source: str, target: str) -> None:
        node, old, new = self.at(source), self._parent(source), self._parent(target)
        if self.has(target) and self.at(target) is node:
            return  # POSIX: a rename between two names of one file keeps both
        names: tuple[str, str] = PurePosixPath(source).name, PurePosixPath(target).name
        if old is new:
            new.set({names[1]: node, names[0]: None})
        else:
            new.set({names[1]: node})
            old.set({names[0]: None})

    def now(self) -> Tree:
        """Return the present content, which remains after a kill."""
        return self._tree(lambda folder: folder.names, lambda file: file.content)

    def after_loss(self, random: Random) -> Tree:
        """Return what a loss of power may leave."""
        share = random.choice([0.0, 0.5, 1.0])
        contents: dict[File, bytes] = {}

        def content(file: File) -> bytes:
            if file not in contents:
                contents[file] = file.after_loss(random)
            return contents[file]

        return self._tree(lambda folder: folder.after_loss(random, share), content)

    def _parent(self, path: str) -> Folder:
        node = self.at(str(PurePosixPath(path).parent))
        assert isinstance(node, Folder)
        return node

    def _tree(self, names, content) -> Tree:  # type: ignore[no-untyped-def]
        tree: dict[str, tuple[int, bytes] | None] = {}
        numbers: dict[File, int] = {}

        def visit(folder: Folder, prefix: str) -> None:
            for name, node in sorted(names(folder).items()):
                if isinstance(node, Folder):
                    tree[prefix + name] = None
                    visit(node, f"{prefix}{name}/")
                else:
                    tree[prefix + name] = numbers.setdefault(node, len(numbers)), content(node)

        visit(self.root, "")
        return tree


def _sync_all(folder: Folder) -> None:
    folder.sync()
    for node in folder.names.values():
        if isinstance(node, Folder):
            _sync_all(node)


def read_tree(root: Path) -> Tree:
    """Return the tree below a real directory."""
    return Disk(root).now()


def write_tree(tree: Tree, root: Path) -> None:
    """Replace the content of a real directory by a tree; a file with two names is linked."""
    root.mkdir()
    made: dict[int, Path] = {}
    for name, entry in tree.items():
        path = root / name
        if entry is None:
            path.mkdir()
        elif entry[0] in made:
            os.link(made[entry[0]], path)
        else:
            path.write_bytes(entry[1])
            made[entry[0]] = path


def digest(tree: Tree) -> str:
    """Return a digest of a tree."""
    state = hashlib.blake2b()
    for name, entry in tree.items():
        state.update(repr((name, None if entry is None else (entry[0], len(entry[1])))).encode())
        state.update(b"" if entry is None else entry[1])
    return state.hexdigest()
