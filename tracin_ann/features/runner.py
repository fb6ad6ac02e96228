"""Runner of a task: its data sets, and its model, which is borrowed for a block and can be kept between blocks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from tracin_ann.choices import Precision
from tracin_ann.errors import TaskError, problem
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
        kept, precision = self._kept, precision or self.options.precision
        if kept is None:
            with preserve_globals():
                model = LoadedModel(self, self.loader, make_model(self.task))
                with model.use(precision):
                    yield model
            return
        with contextlib.ExitStack() as block:
            block.enter_context(kept.lock)
            block.enter_context(preserve_globals())
            if kept.model is None or kept.model.has_new_parts:
                kept.model = LoadedModel(self, self.loader, make_model(self.task), kept.memory_bytes)
            use = _Use(kept.model, precision, block)
            block.enter_context(use.model.use(precision))
            kept.uses.append(use)
            try:
                yield use.model
            finally:
                kept.uses.remove(use)

    @contextlib.contextmanager
    def release_model(self) -> Iterator[None]:
        """Leave the blocks of `model` that this thread is in, if the model is kept, and enter them again at the end.

        Inside, other threads may use the model, and the user's model and the global state are as outside of `model`.
        Afterwards the same checkpoint is loaded. A callback may call this where the library reports progress: between
        batches, with no other change of PyTorch's thread-local state in effect.

        Raises:
            CheckpointError: the checkpoint cannot be loaded again.
            TaskError: somebody has replaced parts of the model inside.
        """
        kept = self._kept
        used = () if kept is None else tuple(kept.uses)
        own = [use for use in used if use.thread == threading.get_ident() and not use.is_left]
        checkpoints = []
        for use in reversed(own):
            checkpoints.append(use.model.checkpoint)
            use.is_left = True
            use.block.close()
        try:
            yield
        finally:
            for use, checkpoint in zip(own, reversed(checkpoints), strict=True):
                self._enter_again(use, checkpoint)

    def _enter_again(self, use: _Use, checkpoint: int) -> None:
        assert self._kept is not None
        use.block.enter_context(self._kept.lock)
        use.block.enter_context(preserve_globals())
        if use.model.has_new_parts:
            raise TaskError(
                problem(
                    "the model has changed while its use was interrupted",
                    got="other modules or parameters",
                    expected="the parts that it had",
                    remedy="ask again",
                )
            )
        use.block.enter_context(use.model.use(use.precision))
        use.is_left = False
        if checkpoint >= 0:
            use.model.load(checkpoint)


class _KeptModel:
    """A model that is kept between uses.

    Attributes:
        memory_bytes: the largest number of bytes of its weights.
        lock: held by the thread that uses it.
        model: the model, after its first use.
        uses: the blocks that have begun and not ended, those that are left for a while included.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.lock = threading.RLock()
        self.model: LoadedModel | None = None
        self.uses: list[_Use] = []


@dataclass(eq=False)
class _Use:
    """A block of `TaskRunner.model`.

    Attributes:
        model: the model of the block.
        precision: its precision.
        block: the contexts of the block, to leave.
        thread: the thread that it is in.
        is_left: whether the block is left for a while.
    """

    model: LoadedModel
    precision: Precision
    block: contextlib.ExitStack
    thread: int = field(default_factory=threading.get_ident)
    is_left: bool = False
