"""Interface of a search index: the rows of largest and of most negative inner product with a query.

Shapes: N rows, Q queries, F feature dimension, K results.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch

from tracin_ann.errors import NonFiniteError, UsageError, problem
from tracin_ann.search.settings import Setting
from tracin_ann.search.topk import negate, split
from tracin_ann.types import Float32, Float64, Int64, RowSource, TopK

if TYPE_CHECKING:
    from typing_extensions import Self

_FLOAT32_POWERS = 125
"""Powers of two with exponents from −125 to 125 are exact in float32, and so are their products with rows in range."""


class SearchIndex(Protocol):
    """Rows with ids, searched for the largest inner products with queries."""

    @property
    def kind(self) -> str:
        """Return the name of the backend, such as `flat`."""

    @property
    def dim(self) -> int:
        """Return F, the length of rows and queries."""

    def __len__(self) -> int:
        """Return N, the number of rows."""

    def search(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> TopK:
        """Return the k rows of largest inner product with each query; fewer only where there are fewer rows.

        `allowed` restricts the search to rows with these ids (int64, increasing); None: all rows.
        """


@runtime_checkable
class TwoSidedIndex(Protocol):
    """An index with its own search for both directions: in one pass, or with one setting per direction."""

    def search_both(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
        """Return (proponents, opponents) as the function `search_both` does."""


@runtime_checkable
class PlacedIndex(Protocol):
    """An index that tells which device it was searched on."""

    def describe_place(self, k: int, allowed: Int64 | None = None) -> str:
        """Return where the last search of this thread, with these arguments, ran, as text for users; "" for a CPU."""


class CalibratedIndex(ABC):
    """An index of rows with files of its own, whose recall and cost a build measures; results have exact scores."""

    kind: ClassVar[str]
    """The name in the manifest, such as "ivf"."""
    name: ClassVar[str]
    """The name for users, such as "inverted lists"."""
    FILES: ClassVar[tuple[str, ...]]
    """Names of the files that `save` writes."""
    is_exact: ClassVar[bool] = False
    """Whether the results are the exact top k, for any queries."""
    settings: tuple[Setting, Setting]
    """The settings for proponents and opponents."""

    @classmethod
    @abstractmethod
    def load(cls, directory: Path, source: RowSource, device: torch.device) -> Self:
        """Return the index that `save` wrote to the directory, for the same rows.

        Raises:
            DamagedIndexError: a file is missing, truncated or of another version, or the files do not belong together.
            OSError: the system has no memory or file descriptors left.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the files `FILES` to a directory; the caller renames and fsyncs."""

    @abstractmethod
    def find_faults(self, sample: int, seed: int) -> list[str]:
        """Compare the files with the source and return descriptions of the differences.

        All ids are compared; what is stored of a row is computed again for at least `sample` rows.
        """

    @abstractmethod
    def with_settings(self, proponents: Setting, opponents: Setting | None = None) -> Self:
        """Return an index with the same files and these settings; without `opponents`, one setting for both."""

    @abstractmethod
    def propose_settings(self, recall_of: Callable[[Setting], float]) -> Iterator[Sequence[Setting]]:
        """Yield settings to measure, in rounds of increasing budget; the last one of a round finds the most results.

        Args:
            recall_of: returns the recall of a setting, measured with some queries.
        """

    @property
    @abstractmethod
    def source(self) -> RowSource:
        """Return the rows."""

    @property
    @abstractmethod
    def resident_bytes(self) -> int:
        """Return the bytes that the index uses in memory or mapped, without the features."""

    @property
    def dim(self) -> int:
        """Return F, the length of a row."""
        return self.source.dim

    def __len__(self) -> int:
        """Return N, the number of rows."""
        return len(self.source)

    @abstractmethod
    def measure(self, queries_QF: Float32) -> tuple[Float64, Float64]:
        """Return the norm of each query [Q], and a statistic of its direction, between 0 and 1 [Q]."""

    @abstractmethod
    def will_scan(self, k: int, allowed: Int64 | None = None) -> bool:
        """Return whether a search scans all (allowed) rows."""

    @abstractmethod
    def most_rows_read(self, n_queries: int, k: int) -> int:
        """Return the largest number of stored rows that a search in both directions reads by id."""

    @abstractmethod
    def search(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> TopK:
        """Return the k rows of largest inner product among those that the setting reaches; always min(k, N) rows."""

    @abstractmethod
    def search_both(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
        """Return (proponents, opponents), each with its own setting, as two separate searches do."""

    def describe_exactness(self, proponents: TopK, opponents: TopK) -> str:
        """Return why the results are the exact top k, as text for users; "" if they may not be."""
        return ""


def search_both(index: SearchIndex, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
    """Return (proponents, opponents): the k rows of largest and of most negative inner product.

    Opponents are the results for −q with negated scores, so their scores increase from the most negative one.
    Results are not filtered by sign: where few scores are negative, opponents can have positive scores.
    """
    if isinstance(index, TwoSidedIndex):
        return index.search_both(queries_QF, k, allowed)
    queries = check_queries(index, queries_QF, k)
    proponents, opponents = split(index.search(np.concatenate([queries, -queries]), k, allowed), len(queries))
    return proponents, negate(opponents)


def scale_to_unit(queries_QF: Float32) -> tuple[Float32, Int64]:
    """Return each query times a power of two, so that its norm is in [1/2, 1), and the exponents [Q] to undo it.

    Scores change by exactly these powers, except scores that overflow or underflow float32 without the scaling.
    """
    norm_Q = np.linalg.norm(queries_QF.astype(np.float64), axis=1)
    exponent_Q = np.where(np.isfinite(norm_Q), np.frexp(norm_Q)[1], 0).astype(np.int64)
    if (np.abs(exponent_Q) <= _FLOAT32_POWERS).all():
        # A product takes a tenth of the time of `ldexp`.
        return queries_QF * np.ldexp(np.float32(1), -exponent_Q)[:, None], exponent_Q
    scaled_QF: Float32 = np.ldexp(queries_QF, -exponent_Q[:, None])
    return scaled_QF, exponent_Q


def check_queries(index: SearchIndex, queries_QF: Float32, k: int) -> Float32:
    """Return the queries as contiguous float32 [Q, F].

    Raises:
        UsageError: k < 1, or the queries do not have the dimension of the index.
        NonFiniteError: a query contains NaN or infinity.
    """
    if k < 1:
        raise UsageError(
            problem("the number of results is too small", got=f"k = {k}", expected="k ≥ 1", remedy="raise k")
        )
    queries = np.ascontiguousarray(queries_QF, dtype=np.float32)
    if queries.shape != (len(queries), index.dim):
        raise UsageError(
            problem(
                "the queries do not have the shape that the index expects",
                got=f"shape {queries.shape}",
                expected=f"(number of queries, {index.dim})",
                remedy="compute their features with the sketch that the index was built with",
            )
        )
    bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(bad):
        raise NonFiniteError(
            problem(
                f"query {bad[0]} is not finite",
                got="NaN or infinity",
                expected="finite features",
                remedy="fix the query, or the checkpoint that its features were computed with",
            )
        )
    return queries
