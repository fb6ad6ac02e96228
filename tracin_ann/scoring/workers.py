"""Interface of worker processes that search and scan the shards of an index and compute exact scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tracin_ann.scoring.exact import Queries, RowScorer
from tracin_ann.search import FlatIndex, SearchIndex
from tracin_ann.types import RowSource


@dataclass
class Coverage:
    """The shards that answered the searches of a query.

    Attributes:
        n_shards: number of shards.
        missing: those that did not answer a search.
        is_asked: whether there was a search.
    """

    n_shards: int
    missing: set[int] = field(default_factory=set)
    is_asked: bool = False

    @property
    def answered(self) -> tuple[int, ...]:
        """Return the shards that answered all searches; empty without a search."""
        return tuple(shard for shard in range(self.n_shards) if shard not in self.missing) if self.is_asked else ()

    @property
    def summary(self) -> str:
        """Return the numbers of shards as text for users; "" without a search."""
        if not self.is_asked:
            return ""
        text = f"{len(self.answered)} of {self.n_shards} shards answered"
        return f"{text}: partial results" if self.missing else text


class SearchWorkers(Protocol):
    """Workers of an open index."""

    @property
    def index(self) -> SearchIndex:
        """Return the search index, whose shards the workers search."""

    def open_scan(self, rows: RowSource, device: torch.device) -> FlatIndex:
        """Return the exact scan of rows: by the workers if these are rows of the feature files.

        Args:
            rows: the rows.
            device: of scans that are not by the workers.
        """

    def watch(self) -> AbstractContextManager[Coverage]:
        """Return a context that records which shards answer the searches of this thread."""

    def open_scorer(
        self,
        queries: Queries,
        checkpoints: Sequence[int],
        examples: Sequence[Any] | None,
        progress: Callable[[int], None] | None,
    ) -> RowScorer | None:
        """Return exact scores by the workers; None if they cannot import the task.

        Args:
            queries: see `Queries`.
            checkpoints: positions of the checkpoints to sum over.
            examples: the data set of the side `input`, if the queries are of this side.
            progress: called with the number of finished rows, each once per checkpoint.
        """

    def close(self) -> None:
        """End the workers."""
