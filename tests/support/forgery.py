"""Forged index directories: arbitrary content with valid digests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tracin_ann.store.generations import generation_folder
from tracin_ann.store.manifest import FEATURES, FORMAT, MANIFEST, Manifest, content_digest, record_file


def forge(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of both copies of an index's manifest, and recompute their digests."""
    content = json.loads((directory / MANIFEST).read_text())
    own = generation_folder(directory, content["generation"])
    for name in ("digest", "format"):
        del content[name]
    change(content)
    text = json.dumps({"format": FORMAT, "digest": content_digest(content), **content})
    for place in (directory, own):
        (place / MANIFEST).write_text(text)


def name_task(directory: Path, reference: object, /, **arguments: object) -> None:
    """Replace the task that the manifest names."""
    forge(directory, lambda content: content["build"].update(task={"reference": reference, "arguments": arguments}))


def update_digest(directory: Path, path: Path) -> None:
    """Update the digest of a file in the manifests."""
    manifest, record = Manifest.read(directory), record_file(path)

    def newer(records: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(record if old.name == record.name else old for old in records)

    if path.parent.name == FEATURES:
        manifest = replace(manifest, features=newer(manifest.features))
    else:
        own = {name: getattr(manifest, name) for name in ("canaries", "columns", "removed", "skipped")}
        own = {name: record if old is not None and old.name == record.name else old for name, old in own.items()}
        manifest = replace(manifest, index=replace(manifest.index, files=newer(manifest.index.files)), **own)
    for place in (directory, generation_folder(directory, manifest.generation)):
        manifest.write(place)
