"""Wrong rows: swapped gradients of two examples, and altered stored rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tracin_ann.gradients.engine import GradientEngine
from tracin_ann.store import FeatureBlock, FeatureStore
from tracin_ann.store.manifest import FEATURES, Manifest, record_file


def swap_gradients(monkeypatch: pytest.MonkeyPatch, is_mixed: Callable[[tuple[int, ...]], bool], name: str) -> None:
    """Swap a parameter's gradients of the first two examples of a batch that its ids select.

    The sum is unchanged, so a check of sums does not detect the swap.
    """
    run = GradientEngine.run

    def mixing(engine: GradientEngine, batch: Any, start: Any) -> Tensor:
        def begun() -> Any:
            sink = start()

            def mixed(parameter: str, form: Any, part: slice) -> None:
                if parameter == name and len(batch) > 1 and is_mixed(batch.ids):
                    form = form[torch.tensor([1, 0, *range(2, len(batch))])]
                sink(parameter, form, part)

            return mixed

        return run(engine, batch, begun)

    monkeypatch.setattr(GradientEngine, "run", mixing)


def alter_rows(directory: Path, rows: Sequence[int], checkpoint: int = 1, factor: float = 1.01) -> None:
    """Multiply stored rows of one partition, with valid digests in the file and the manifests."""
    manifest = Manifest.read(directory)
    store = FeatureStore(directory / FEATURES, manifest.build.layout)
    partition = rows[0] // store.layout.partition_rows
    file = store.file(partition, checkpoint)
    feature_ND = file.read(0, file.header.n_rows)
    feature_ND[[row - file.header.start for row in rows]] *= factor
    ids_N = np.arange(file.header.start, file.header.stop, dtype=np.int64)
    store.write(partition, checkpoint, FeatureBlock(ids_N, feature_ND, file.sqnorm_N, file.loss_N))
    path = store.path(partition, checkpoint)
    records = tuple(record_file(path) if record.name == path.name else record for record in manifest.features)
    for place in (directory, directory / f"generation-{manifest.generation:06d}"):
        replace(manifest, features=records).write(place)
