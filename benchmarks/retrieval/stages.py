"""The stages of a query, one by one: its features, the search kernel, the candidates' rows and their scores.

All uses of parts of the library that are not public, for the latency benchmarks, are in this module.

Shapes: Q queries, N rows, K candidates of a query, F feature dimension.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np

from tracin_ann import InfluenceIndex, QueryOptions
from tracin_ann.device import import_faiss
from tracin_ann.features import FeatureExtractor, FeatureOptions, TaskRunner
from tracin_ann.scoring.strategy import choose_strategy
from tracin_ann.search import FlatIndex, SearchIndex, scale_to_unit, search_both
from tracin_ann.sketch import make_sketch
from tracin_ann.types import Float32, Float64, Int64

_TIMES = re.compile(r"([0-9.]+) (ms|s), exact scan ([0-9.]+) (ms|s)\)")


@dataclass(frozen=True)
class Stages:
    """The stages of the queries of an open index; create it by `open_stages`."""

    index: InfluenceIndex
    extractors: tuple[FeatureExtractor, ...]

    def compute_features(self, ids: list[int]) -> Float32:
        """Return the features [Q, F] of queries: forward, backward and sketch, without any check of the index."""
        return np.concatenate([each.rows("query", ids).feature_ND for each in self.extractors], axis=1)

    def choose_search(self, features_QF: Float32, options: QueryOptions) -> SearchIndex:
        """Return the index with the settings that a query with these options searches."""
        scan = FlatIndex(self.index.view(), self.index.device)
        return choose_strategy(self.index.manifest.index, self.index.search_index, scan, features_QF, options).index

    def search(self, search: SearchIndex, features_QF: Float32, k: int) -> list[Int64]:
        """Return the candidates [K] of each query: both directions, each row once. This is the search kernel."""
        scaled_QF, _ = scale_to_unit(features_QF)
        proponents, opponents = search_both(search, scaled_QF, k)
        return [np.union1d(a, b) for a, b in zip(proponents.ids, opponents.ids, strict=True)]

    def read_rows(self, candidates: list[Int64]) -> list[Float32]:
        """Return the stored rows [K, F] of each query's candidates."""
        view = self.index.view()
        return [view.take(ids) for ids in candidates]


def score_rows(rows: list[Float32], features_QF: Float32) -> list[Float64]:
    """Return the scores [K] of decoded rows in memory."""
    return [
        row_KF.astype(np.float64) @ query_F.astype(np.float64)
        for row_KF, query_F in zip(rows, features_QF, strict=True)
    ]


@contextmanager
def open_stages(index: InfluenceIndex) -> Iterator[Stages]:
    """Yield the stages of an index, with a model for each checkpoint that remains loaded.

    Raises:
        RuntimeError: the features of a query differ from those that the index computes.
    """
    spec = index.manifest.build.spec
    options = FeatureOptions(make_sketch(spec.sketch.name, spec.sketch.dim), spec.sketch.seed, spec.rank_one)
    with ExitStack() as stack:
        extractors = []
        for checkpoint in range(len(spec.checkpoints)):
            # The runner of the index may have one model for all checkpoints.
            model = stack.enter_context(TaskRunner(index.task, index.runner.options).model())
            model.load(checkpoint)
            extractors.append(FeatureExtractor(model, options))
        found = Stages(index, tuple(extractors))
        if not np.allclose(found.compute_features([0]), index.features("query", [0]), rtol=1e-3, atol=1e-5):
            raise RuntimeError("the stages compute other features than the index")
        yield found


def read_estimates(how: str) -> dict[str, float]:
    """Return the estimated seconds of the index (`lists`) and of a scan that an answer names; empty without any."""
    found = _TIMES.search(how)
    if found is None:
        return {}
    seconds = [float(number) / (1000 if unit == "ms" else 1) for number, unit in (found.group(1, 2), found.group(3, 4))]
    return dict(zip(("lists", "scan"), seconds, strict=True))


def read_search(how: str) -> str:
    """Return `lists`, for an index of any kind, or `scan`: how an answer says that its candidates were found."""
    return "scan" if how.startswith("exact scan") else "lists"


def has_lists(index: InfluenceIndex) -> bool:
    """Return whether the index has inverted lists."""
    return index.manifest.index.calibration is not None


def count_stored_bytes(index: InfluenceIndex) -> int:
    """Return the bytes of the stored features, without columns."""
    layout = index.manifest.build.layout
    return layout.n_rows * layout.n_checkpoints * layout.dim * np.dtype(layout.dtype).itemsize


def describe_index(index: InfluenceIndex) -> dict[str, int | str]:
    """Return the number of rows, checkpoints, dimensions, rows of a partition, and the kind of an index."""
    layout = index.manifest.build.layout
    figures = {name: getattr(layout, name) for name in ("partition_rows", "n_checkpoints", "dim")}
    return {**figures, "kind": index.manifest.index.kind}


def read_expected_recall(index: InfluenceIndex) -> list[float]:
    """Return the recall of proponents and of opponents with the lists' default settings, as the build measured it."""
    calibration = index.manifest.index.calibration
    if calibration is None:
        return [1.0, 1.0]
    return [calibration.usual_point("proponents").recall, calibration.usual_point("opponents").recall]


def set_faiss_threads(threads: int) -> None:
    """Set the number of threads of FAISS."""
    import_faiss().omp_set_num_threads(threads)


def with_search(options: QueryOptions, search: str, rerank: str) -> QueryOptions:
    """Return the options with another search and another re-ranking."""
    return replace(options, search=search, rerank=rerank)  # type: ignore[arg-type]
