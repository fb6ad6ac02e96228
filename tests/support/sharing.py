"""Builds in shares: a named task of small files, the result of one process, and comparisons with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.results import strip_times
from tasks import texts
from tracin_ann import BuildConfig, build
from tracin_ann.store.manifest import MANIFEST
from trees import read_contents

NAME = f"{Path(texts.__file__).resolve()}:task"
CONFIG = BuildConfig(dim=64, device="cpu", dtype="float32", index="flat", partition_rows=20, yardstick=False)
N_FILES = 24
STORE_BYTES = 80 << 20
"""Of the object store of a Ray node; features do not go through it."""


@dataclass(frozen=True)
class OneProcess:
    """The result of a build by one process.

    Attributes:
        arguments: of the task.
        content: of all files, without measured times.
    """

    arguments: dict[str, str]
    content: dict[str, bytes]


def read_index(out: Path) -> dict[str, bytes]:
    """Return the content of all files of an index, without the times in its manifests."""
    return {
        name: strip_times(content) if name.endswith(MANIFEST) else content
        for name, content in read_contents(out).items()
    }


def build_in_one_process(folder: Path, **arguments: str) -> OneProcess:
    """Return the result of a build of the task by this process."""
    given: dict[str, Any] = {"folder": str(folder), **arguments}
    build(NAME, folder / "one", CONFIG, arguments=given)
    return OneProcess(given, read_index(folder / "one"))


def assert_same_index(out: Path, expected: OneProcess) -> None:
    """Check that all files of an index are those of one process, bit for bit."""
    found = read_index(out)
    assert found.keys() == expected.content.keys()
    assert [name for name in found if found[name] != expected.content[name]] == []
