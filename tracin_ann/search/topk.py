"""Top-k selection and merging: results by decreasing score, equal scores by increasing id, without padding.

Shapes: Q queries, M candidates per query, K results.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tracin_ann.types import Float32, Int64, TopK

_NO_ID = -1
_LARGE_ID = 2**32
_SIGN = np.uint32(1 << 31)
_PADDING = np.uint64(2**64 - 1)


def best_positions(scores_QM: Tensor, k: int) -> Tensor:
    """Return the positions of the best scores of each row, int64 [Q, min(k, M)]; ties by increasing position.

    `torch.topk` has no defined order for ties, so a row whose k-th and next score are equal is sorted completely.
    """
    n = scores_QM.shape[1]
    k = min(k, n)
    values, where = scores_QM.topk(min(k + 1, n))
    if k < n:
        tied = values[:, k - 1] == values[:, k]
        if bool(tied.any()):
            order = scores_QM[tied].argsort(dim=1, descending=True, stable=True)
            where[tied] = order[:, : k + 1]
    where = where[:, :k].sort(dim=1).values
    by_score = scores_QM.gather(1, where).argsort(dim=1, descending=True, stable=True)
    return where.gather(1, by_score)


def from_padded(ids_QM: Int64, scores_QM: Float32, k: int, rows_scored: Int64) -> TopK:
    """Return the best k of each row of padded candidates; entries with a negative id are padding and dropped.

    Args:
        ids_QM: int64, distinct within a row except for padding; in any order.
        scores_QM: float32 scores of the ids; those of padding are ignored.
        k: number of results.
        rows_scored: int64 [Q], copied to the result.
    """
    ids, scores = select_padded(ids_QM, scores_QM, k)
    n_results_Q = (ids >= 0).sum(axis=1).tolist()
    return TopK(
        ids=tuple(row[:n] for row, n in zip(ids, n_results_Q, strict=True)),
        scores=tuple(row[:n] for row, n in zip(scores, n_results_Q, strict=True)),
        rows_scored=np.asarray(rows_scored, dtype=np.int64),
    )


def select_padded(ids_QM: Int64, scores_QM: Float32, k: int) -> tuple[Int64, Float32]:
    """Return the best k of each row of padded candidates, as (ids, scores) [Q, min(k, M)] with the padding last."""
    if ids_QM.max(initial=0) >= _LARGE_ID:
        order_QK = np.lexsort((ids_QM, -scores_QM, ids_QM < 0))[:, :k]
        return np.take_along_axis(ids_QM, order_QK, axis=1), np.take_along_axis(scores_QM, order_QK, axis=1)
    key_QM = _make_keys(ids_QM, scores_QM)
    if k < key_QM.shape[1]:
        key_QM = np.partition(key_QM, k - 1, axis=1)[:, :k] if k else key_QM[:, :0]
    key_QM.sort(axis=1)
    return _split_keys(key_QM)


def _make_keys(ids_QM: Int64, scores_QM: Float32) -> npt.NDArray[np.uint64]:
    """Return 64-bit numbers that increase as scores decrease, then with the ids; those of padding are the largest.

    NumPy sorts and partitions such numbers by vector instructions, ten times as fast as by several keys.
    """
    # Adding zero makes -0.0 equal to 0.0. The bits of a number without sign increase with it, and all bits of a
    # negative one are inverted.
    bits_QM = (scores_QM + np.float32(0)).view(np.uint32)
    ascending_QM = np.where(bits_QM >> 31, ~bits_QM, bits_QM | _SIGN)
    key_QM: npt.NDArray[np.uint64] = (~ascending_QM).astype(np.uint64) << np.uint64(32) | ids_QM.astype(np.uint64)
    key_QM[ids_QM < 0] = _PADDING
    return key_QM


def _split_keys(key_QK: npt.NDArray[np.uint64]) -> tuple[Int64, Float32]:
    """Return the ids and scores of keys; the padding has the id -1."""
    ids_QK = (key_QK & np.uint64(_LARGE_ID - 1)).astype(np.int64)
    ids_QK[key_QK == _PADDING] = _NO_ID
    ascending_QK = ~(key_QK >> 32).astype(np.uint32)
    bits_QK = np.where(ascending_QK >> 31, ascending_QK ^ _SIGN, ~ascending_QK)
    return ids_QK, bits_QK.view(np.float32)


def merge(parts: Sequence[TopK], k: int) -> TopK:
    """Return the best k of parts that have disjoint ids for the same queries; rows_scored are added.

    The best k of the best k of shards are the best k of all rows, including ties.

    Raises:
        ValueError: there is no part, or parts have different numbers of queries.
    """
    if len({len(part.ids) for part in parts}) != 1:
        raise ValueError(f"merge of parts with {[len(part.ids) for part in parts]} queries")
    padded = [_pad(part) for part in parts]
    return from_padded(
        np.concatenate([ids for ids, _ in padded], axis=1),
        np.concatenate([scores for _, scores in padded], axis=1),
        k,
        np.sum([part.rows_scored for part in parts], axis=0, dtype=np.int64),
    )


def make_empty(n_queries: int) -> TopK:
    """Return no results for these many queries."""
    nothing = (np.zeros(0, np.int64),) * n_queries, (np.zeros(0, np.float32),) * n_queries
    return TopK(*nothing, np.zeros(n_queries, np.int64))


def concatenate(parts: Sequence[TopK]) -> TopK:
    """Return the results of several batches of queries, one batch after the other."""
    return TopK(
        ids=tuple(ids for part in parts for ids in part.ids),
        scores=tuple(scores for part in parts for scores in part.scores),
        rows_scored=np.concatenate([part.rows_scored for part in parts] or [np.zeros(0, np.int64)]),
    )


def split(top: TopK, at: int) -> tuple[TopK, TopK]:
    """Return the results of the first `at` queries and of the rest."""
    return (
        TopK(top.ids[:at], top.scores[:at], top.rows_scored[:at]),
        TopK(top.ids[at:], top.scores[at:], top.rows_scored[at:]),
    )


def negate(top: TopK) -> TopK:
    """Return the results with negated scores (without -0.0), which then increase."""
    return TopK(top.ids, tuple(np.float32(0) - scores for scores in top.scores), top.rows_scored)


def _pad(top: TopK) -> tuple[Int64, Float32]:
    """Return the results as rectangles (ids, scores) [Q, M], padded with id -1."""
    width = max((len(ids) for ids in top.ids), default=0)
    ids_QM = np.full((len(top.ids), width), _NO_ID, dtype=np.int64)
    scores_QM = np.zeros((len(top.ids), width), dtype=np.float32)
    for row, (ids, scores) in enumerate(zip(top.ids, top.scores, strict=True)):
        ids_QM[row, : len(ids)] = ids
        scores_QM[row, : len(scores)] = scores
    return ids_QM, scores_QM
