"""Which rows of a batch are finite by themselves, and batches in which the others are replaced by these.

A proof on the first batch would fail because of a single row that is to be skipped.
"""

from __future__ import annotations

import torch

from tracin_ann.gradients import Batch, GradientEngine


def sound(engine: GradientEngine, batch: Batch) -> tuple[Batch, tuple[int, ...]] | None:
    """Return a batch whose every row has a finite loss and gradient, and the places that other rows took.

    Each row stays in its place or is replaced by one of the others: whatever runs a batch of this size and layout runs
    the batch returned, and with the same rounding. None where no row is finite. A backward a row.
    """
    finite = torch.isfinite(engine.loss_values(batch)).tolist()
    kept = [i for i, fine in enumerate(finite) if fine and bool(torch.isfinite(engine.alone(batch, i)[1]).all())]
    if not kept:
        return None
    if len(kept) == len(batch):
        return batch, ()
    replaced = sorted(set(range(len(batch))) - set(kept))
    places = list(range(len(batch)))
    for j, i in enumerate(replaced):
        places[i] = kept[j % len(kept)]
    return engine.batch([batch.ids[i] for i in places], [batch.examples[i] for i in places]), tuple(replaced)
