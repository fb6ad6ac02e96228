"""What may be believed of an index: its lists' recall and its sketch's fidelity, on the task's own rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracin_ann import fidelity
from tracin_ann.features import FeatureExtractor, FeatureOptions
from tracin_ann.fidelity import Fidelity
from tracin_ann.loading import SideName
from tracin_ann.passes import Passes
from tracin_ann.search import FlatIndex, IVFIndex
from tracin_ann.search.calibrate import Calibration, calibrated
from tracin_ann.store import FeatureStore
from tracin_ann.types import Float32, Int64, ProgressCallback

CALIBRATION_QUERIES = 400
FEWEST_QUERIES = 100
"""Under so many rows of query_data, training rows are asked as well."""


@dataclass(frozen=True)
class Yardstick:
    """What is measured, and with what.

    Attributes:
        passes: the task's data and model.
        store: the feature rows.
        features: how queries become features.
        seed: which queries and rows.
        progress: told the steps done.
    """

    passes: Passes
    store: FeatureStore
    features: FeatureOptions
    seed: int
    progress: ProgressCallback

    def recall(self, lists: IVFIndex, target: float) -> Calibration:
        """Return the lists' recall on rows of query_data, and on training rows where those are few."""
        view = self.store.view()
        random = np.random.default_rng(self.seed)
        n_queries = self.passes.n_rows("query")
        asked_QF = self._queries(random.permutation(n_queries)[:CALIBRATION_QUERIES])
        n_train = min(len(view), max(0, FEWEST_QUERIES - n_queries))
        rows = np.sort(random.choice(len(view), n_train, replace=False)).astype(np.int64)
        queries_QF = np.concatenate([asked_QF, view.take(rows)])
        queries_QF = queries_QF[random.permutation(len(queries_QF))]
        exact = FlatIndex(view, self.passes.options.device)
        return calibrated(
            lists, exact, queries_QF, target, n_train, lambda done, total: self.progress("calibration", done, total)
        )

    def fidelity(self) -> Fidelity:
        """Return how well the sketch ranks a sample of the rows for a few queries."""
        self.progress("fidelity", 0, 1)
        n_queries = self.passes.n_rows("query")
        with self.passes.model() as model:
            entries = sum(p.numel() for p in model.parameters.values())
        random = np.random.default_rng(self.seed + 1)
        ids = np.sort(random.permutation(n_queries)[: fidelity.query_count(entries, n_queries)])
        norm_N = np.sqrt(self.store.sqnorms().astype(np.float64) @ self._rates())
        sample = fidelity.sample_rows(norm_N, self.seed)
        side: SideName = "query"
        found = fidelity.measured(self.passes, (side, ids.tolist()), self._queries(ids), self.store.view(), sample)
        self.progress("fidelity", 1, 1)
        return found

    def _rates(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.array([c.learning_rate for c in self.passes.task.checkpoints])

    def _queries(self, ids: Int64) -> Float32:
        blocks = []
        with self.passes.model() as model:
            for checkpoint in range(len(self.passes.task.checkpoints)):
                model.load(checkpoint)
                blocks.append(FeatureExtractor(model, self.features).rows("query", ids.tolist()).feature_ND)
        return np.concatenate(blocks, axis=1)
