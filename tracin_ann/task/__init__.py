"""The task: what the user brings, its data, batches and checkpoint files."""

from __future__ import annotations

from tracin_ann.task.batches import BatchOptions, Collated, Reader, Reading, collated, lengths_differ, pickled
from tracin_ann.task.checkpoints import CheckpointLoader, checkpoint_digest
from tracin_ann.task.content import content_of
from tracin_ann.task.data import materialise, open_data
from tracin_ann.task.model import borrowed_model, preserved_globals, preserved_registry
from tracin_ann.task.nested import batched_tensors, leaves, map_leaves, rebuild, tensors_within, to_device
from tracin_ann.task.references import TaskReference, absolute_reference, load_task
from tracin_ann.task.task import EXAMPLES, Checkpoint, Description, LossFunction, Task
from tracin_ann.task.trust import load_named_task

__all__ = [
    "BatchOptions",
    "Checkpoint",
    "CheckpointLoader",
    "Collated",
    "Description",
    "EXAMPLES",
    "LossFunction",
    "Reader",
    "Reading",
    "Task",
    "TaskReference",
    "absolute_reference",
    "batched_tensors",
    "borrowed_model",
    "checkpoint_digest",
    "collated",
    "content_of",
    "leaves",
    "lengths_differ",
    "load_named_task",
    "load_task",
    "map_leaves",
    "materialise",
    "open_data",
    "pickled",
    "preserved_globals",
    "preserved_registry",
    "rebuild",
    "tensors_within",
    "to_device",
]
