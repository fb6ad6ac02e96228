"""Writing of feature files in a background thread, while the next block of features is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from tracin_ann.store.feature_file import FeatureBlock, FileRecord
from tracin_ann.store.feature_store import FeatureStore


class WriteBehind:
    """A context manager that writes a store's files in the background, one at a time.

    At most two blocks are in memory: the one being written and the one being computed. The context ends after all
    blocks are written. An error is raised by the next call of `write` or at the end of the context. As with
    `FeatureStore.write`, a file is complete or absent.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracin-write")
        self._pending: Future[FileRecord] | None = None

    def __enter__(self) -> WriteBehind:
        return self

    def write(self, partition: int, checkpoint: int, block: FeatureBlock) -> None:
        """Start to write a block, after the previous one is on disk.

        Raises:
            OSError, NonFiniteError: the previous block could not be written.
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
