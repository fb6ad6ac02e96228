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
from tracin_ann.task.checkpoint import Checkpoint
from tracin_ann.task.checkpoint_loader import CheckpointLoader, checkpoint_digest
from tracin_ann.task.content import encode_content
from tracin_ann.task.data import materialise, open_data, open_examples
from tracin_ann.task.datasets.pictures import ImageFolder, is_image_file, read_image
from tracin_ann.task.datasets.records import read_records
from tracin_ann.task.datasets.tar_shards import TarShards
from tracin_ann.task.description import Description
from tracin_ann.task.inputs import read_query_example, require_read_query
from tracin_ann.task.integrations.callback import TracInCallback
from tracin_ann.task.integrations.recorder import LossFall, RunRecorder
from tracin_ann.task.integrations.run_record import RunRecord, has_run_record, read_order, read_run_record
from tracin_ann.task.model import OriginalModel, make_model, preserve_globals, preserve_model, preserve_registry
from tracin_ann.task.nested import (
    batched_tensors,
    leaves,
    map_leaves,
    pin_memory,
    rebuild,
    tensors_within,
    to_device,
)
from tracin_ann.task.references import TaskReference, absolute_reference, load_task
from tracin_ann.task.second_moments import SecondMoment, digest_second_moments, read_second_moments
from tracin_ann.task.task import EXAMPLES, LossFunction, PartialLoad, Task
from tracin_ann.task.trust import TRANSFORMERS_TASK, load_named_task
from tracin_ann.task.weight_cache import FileIdentity, WeightCache, identify_checkpoint, list_memory

__all__ = [
    "BatchOptions",
    "BatchStream",
    "Checkpoint",
    "CheckpointLoader",
    "CollatedBatch",
    "Description",
    "EXAMPLES",
    "FileIdentity",
    "ImageFolder",
    "LossFall",
    "LossFunction",
    "OriginalModel",
    "PartialLoad",
    "RunRecord",
    "RunRecorder",
    "SecondMoment",
    "TRANSFORMERS_TASK",
    "TarShards",
    "Task",
    "TaskReference",
    "TracInCallback",
    "WeightCache",
    "WindowReader",
    "absolute_reference",
    "batched_tensors",
    "checkpoint_digest",
    "differ_in_length",
    "digest_second_moments",
    "encode_content",
    "has_run_record",
    "identify_checkpoint",
    "is_image_file",
    "leaves",
    "list_memory",
    "load_named_task",
    "load_task",
    "make_batches",
    "make_model",
    "map_leaves",
    "materialise",
    "open_data",
    "open_examples",
    "pickle_reader",
    "pin_memory",
    "preserve_globals",
    "preserve_model",
    "preserve_registry",
    "read_image",
    "read_order",
    "read_query_example",
    "read_records",
    "read_run_record",
    "read_second_moments",
    "rebuild",
    "require_read_query",
    "tensors_within",
    "to_device",
]
