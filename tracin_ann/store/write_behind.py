"""Writing behind the compute: one file at a time in a thread of its own, at most one waiting."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from tracin_ann.store.feature_file import FeatureBlock, FileRecord
from tracin_ann.store.feature_store import FeatureStore


class WriteBehind:
    """Writes a store's files while the caller computes the next; holds two blocks at most.

    A context: on leaving, what was handed over is written. An error of a write is raised by the next
    call of `write` or on leaving; files are whole or absent, as by `FeatureStore.write`.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracin-write")
        self._pending: Future[FileRecord] | None = None

    def __enter__(self) -> WriteBehind:
        return self

    def write(self, partition: int, checkpoint: int, block: FeatureBlock) -> None:
        """Hand a block over, after the one before is on disk.

        Raises:
            OSError, NonFiniteError: the block before could not be written.
        """
        self._wait_for_pending()
        self._pending = self._thread.submit(self._store.write, partition, checkpoint, block)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self._wait_for_pending()

    def _wait_for_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
