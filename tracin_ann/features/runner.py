"""Runner of a task: its data sets, and its model, which is borrowed for a block and can be kept between blocks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from tracin_ann.choices import Precision
from tracin_ann.features.loaded_model import LoadedModel
from tracin_ann.features.task_data import RunOptions, TaskData
from tracin_ann.task import CheckpointLoader, Task, TaskReference, make_model, preserve_globals


class TaskRunner(TaskData):
    """The examples and the model of a task.

    Args:
        task: the task.
        options: how the model runs; may be replaced later, as tuning does.
        origin: the name of the task, by which worker processes open it.
    """

    def __init__(self, task: Task, options: RunOptions, origin: TaskReference | None = None) -> None:
        super().__init__(task, options, origin)
        self.loader = CheckpointLoader(task)
        self._kept: _KeptModel | None = None

    def keep_model(self, memory_bytes: int) -> None:
        """Keep the model between the blocks of `model`, with the weights of its checkpoints and its gradient engines.

        Args:
            memory_bytes: the largest number of bytes of the weights.
        """
        self._kept = _KeptModel(memory_bytes)

    @contextlib.contextmanager
    def model(self, precision: Precision | None = None) -> Iterator[LoadedModel]:
        """Yield the model, ready to load checkpoints.

        Its original state and global state (random states, grad mode, default dtype, the setting for fused attention)
        are restored when the block ends. One thread at a time uses a model that is kept between blocks.

        Args:
            precision: of forward and backward; None: that of the options.

        Raises:
            TaskError: `Task.model` does not return a module, or one with uninitialized lazy layers.
        """
        kept = self._kept
        with kept.lock if kept is not None else contextlib.nullcontext(), preserve_globals():
            model = kept.model if kept is not None else None
            if model is None or model.has_new_parts:
                model = LoadedModel(self, self.loader, make_model(self.task), 0 if kept is None else kept.memory_bytes)
            if kept is not None:
                kept.model = model
            with model.use(precision or self.options.precision):
                yield model


class _KeptModel:
    """A model that is kept between uses.

    Attributes:
        memory_bytes: the largest number of bytes of its weights.
        lock: held by the thread that uses it.
        model: the model, after its first use.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.lock = threading.RLock()
        self.model: LoadedModel | None = None
