"""Tasks: a user's model, loss, data and checkpoints; reading rows in batches and loading weights."""

from __future__ import annotations

from tracin_ann.task.batches import (
    BatchOptions,
    BatchStream,
    CollatedBatch,
    WindowReader,
    differ_in_length,
    make_batches,
    pickle_reader,
)
from tracin_ann.task.checkpoints import CheckpointLoader, checkpoint_digest
from tracin_ann.task.content import encode_content
from tracin_ann.task.data import materialise, open_data
from tracin_ann.task.model import borrow_model, preserve_globals, preserve_registry
from tracin_ann.task.nested import batched_tensors, leaves, map_leaves, rebuild, tensors_within, to_device
from tracin_ann.task.references import TaskReference, absolute_reference, load_task
from tracin_ann.task.task import EXAMPLES, Checkpoint, Description, LossFunction, Task
from tracin_ann.task.trust import load_named_task

__all__ = [
    "BatchOptions",
    "BatchStream",
    "Checkpoint",
    "CheckpointLoader",
    "CollatedBatch",
    "Description",
    "EXAMPLES",
    "LossFunction",
    "Task",
    "TaskReference",
    "WindowReader",
    "absolute_reference",
    "batched_tensors",
    "borrow_model",
    "checkpoint_digest",
    "differ_in_length",
    "encode_content",
    "leaves",
    "load_named_task",
    "load_task",
    "make_batches",
    "map_leaves",
    "materialise",
    "open_data",
    "pickle_reader",
    "preserve_globals",
    "preserve_registry",
    "rebuild",
    "tensors_within",
    "to_device",
]
