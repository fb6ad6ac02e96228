"""Altered files for every reader: seeded mutations of an index's files, each read in a child process under limits.

A reader must read a file or raise a TracinAnnError; anything else (another exception, a crash, a hang, more memory than
twice the file and a constant) is a failure, reported with reader and case. The structure of JSON is changed as well,
with a recomputed digest, so that the checks of its content run.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.toy import CONFIG, Toy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import build
from tracin_ann.errors import TracinAnnError
from tracin_ann.features.canaries import read_canaries
from tracin_ann.operations.removal import remove
from tracin_ann.search import IVFIndex
from tracin_ann.store import FeatureFile, FeatureStore
from tracin_ann.store.columns import read_columns
from tracin_ann.store.exclusions import read_removed_ids
from tracin_ann.store.generations import generation_folder
from tracin_ann.store.manifest import BUILD_RECORD, FORMAT, MANIFEST, Manifest, content_digest, read_build_record

SECONDS_A_CASE = 10
BYTES_BESIDES = 64 << 20
BOUNDARIES = (0, 1, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
JSON_VALUES = (None, True, -1, 0, 1, 2**31, 2**70, 1e308, -0.0, "", "x" * 200, "../x", "\x00", [], {}, [[]], {"a": 1})


@dataclass(frozen=True)
class Reader:
    """A file of an intact index, and the function that reads it."""

    path: Path
    read: Callable[[], object]
    is_json: bool = False


def build_readers(folder: Path) -> dict[str, Reader]:
    """Build a small index in the folder and return its readers by name."""
    torch.manual_seed(0)
    model = Toy()
    fields: dict[str, Any] = {"train_data": lambda: make_rows(120), "query_data": lambda: make_rows(10, seed=2)}
    fields |= {"checkpoints": save_checkpoints(model, folder), "columns": lambda row: {"label": row[1], "name": "abc"}}
    fields |= {"ids": lambda row: f"{float(row[0][0]):.9f}"}
    out = folder / "index"
    build(make_toy_task(folder, model, **fields), out, replace(CONFIG, index="ivf", partition_rows=64, dim=8))
    manifest = remove(out, [3, 4])
    own = generation_folder(out, manifest.generation)
    store = FeatureStore(out / "features", manifest.build.layout)
    feature = store.path(0, 0)
    header = manifest.build.layout.header(0, 0)

    def features() -> object:
        file = FeatureFile.open(feature, header)
        file.verify()
        return file.read(0, file.header.n_rows)

    def lists() -> object:
        index = IVFIndex.load(own, store.view(), torch.device("cpu"))
        return index.search(np.ones((1, index.dim), np.float32), 3)

    readers = {
        "manifest": Reader(out / MANIFEST, lambda: Manifest.read(out), is_json=True),
        "build record": Reader(out / BUILD_RECORD, lambda: read_build_record(out), is_json=True),
        "features": Reader(feature, features),
        "canaries": Reader(own / "canaries.h5", lambda: read_canaries(own / "canaries.h5", 120, 2, 8)),
        "columns": Reader(own / "columns.npz", lambda: read_columns(own / "columns.npz", 120).check_unique_ids()),
        "removed": Reader(own / "removed.npy", lambda: read_removed_ids(out, manifest)),
    }
    return readers | {name: Reader(own / name, lists) for name in IVFIndex.FILES}


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """Return the content with one to four changes."""
    changed = bytearray(content)
    for _ in range(int(random.integers(1, 5))):
        size = len(changed)
        if not size:
            break
        at = int(random.integers(size))
        length = int(min(size - at, 2 ** random.integers(0, 10)))
        kind = int(random.integers(7))
        if kind == 0:
            changed[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            width = int(random.choice([1, 2, 4, 8]))
            number = int(random.choice(len(BOUNDARIES)))
            changed[at : at + width] = (BOUNDARIES[number] % 2 ** (8 * width)).to_bytes(width, "little")[: size - at]
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        elif kind == 5:
            changed[at : at + length] = bytes(length)
        else:
            changed[at : at + length] = random.bytes(length)
    return bytes(changed)


def restructure(content: bytes, random: np.random.Generator) -> bytes:
    """Return a JSON object with a few values removed, replaced or moved, with valid format and digest."""
    original = json.loads(content)
    original.pop("digest", None)
    original.pop("format", None)
    changed = copy.deepcopy(original)
    for _ in range(int(random.integers(1, 4))):
        places = list(_places(changed))
        if not places:
            break
        node, key = places[int(random.integers(len(places)))]
        kind = int(random.integers(3))
        if kind == 0:
            del node[key]
        elif kind == 1:
            node[key] = copy.deepcopy(JSON_VALUES[int(random.integers(len(JSON_VALUES)))])
        else:
            other, name = places[int(random.integers(len(places)))]
            node[key] = copy.deepcopy(other[name]) if _has(other, name) else None
    return json.dumps({"format": FORMAT, "digest": content_digest(changed), **changed}).encode()


def _has(node: Any, key: Any) -> bool:
    return key in node if isinstance(node, dict) else key < len(node)


def _places(value: Any) -> Any:
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, item in inner:
        yield value, key
        yield from _places(item)


def find_failures(name: str, reader: Reader, cases: range) -> list[str]:
    """Run cases of one reader in a child process, return one line per failure, and restore the file."""
    intact, wrong = reader.path.read_bytes(), []
    first = cases.start
    while first < cases.stop:
        ends, begins = os.pipe()
        child = os.fork()
        if not child:
            os.close(ends)
            _run_cases(name, reader, intact, range(first, cases.stop), begins)
        os.close(begins)
        with os.fdopen(ends) as output:
            lines = output.read().splitlines()
        _, status = os.waitpid(child, 0)
        wrong += [line for line in lines if not line.isdecimal()]
        last = max((int(line) for line in lines if line.isdecimal()), default=first)
        if status == 0:
            break
        wrong.append(f"{name} case {last}: the process ended with status {status}")
        first = last + 1
    reader.path.unlink(missing_ok=True)
    reader.path.write_bytes(intact)
    return wrong


def _run_cases(name: str, reader: Reader, sound: bytes, cases: range, told: int) -> None:
    """Run cases, and report each before it starts; does not return."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = now + 2 * len(sound) + BYTES_BESIDES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    kind = sum(name.encode())
    for case in cases:
        os.write(told, f"{case}\n".encode())
        random = np.random.default_rng([kind, case])
        change = restructure if reader.is_json and random.random() < 0.5 else mutate  # noqa: PLR2004
        # A new file, so that memory maps of the old one do not change.
        reader.path.unlink(missing_ok=True)
        reader.path.write_bytes(change(sound, random))
        signal.alarm(SECONDS_A_CASE)
        try:
            reader.read()
        except TracinAnnError as error:
            if "\n" in str(error):
                os.write(told, f"{name} case {case}: an error of several lines\n".encode())
        except BaseException as error:  # noqa: BLE001
            line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            os.write(told, f"{name} case {case}: {line}\n".encode())
        signal.alarm(0)
    os._exit(0)
