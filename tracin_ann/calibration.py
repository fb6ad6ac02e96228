"""What may be believed of an index: its lists' recall and its sketch's fidelity, on the task's own rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracin_ann import fidelity
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.features import FeatureExtractor, FeatureOptions, unsound
from tracin_ann.fidelity import Fidelity
from tracin_ann.loading import SideName
from tracin_ann.passes import Passes
from tracin_ann.search import FlatIndex, IVFIndex
from tracin_ann.search.calibrate import Calibration, calibrated
from tracin_ann.store import FeatureStore
from tracin_ann.types import Float32, Float64, Int64, ProgressCallback

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
        skipped: ids of training rows that are neither asked nor scored, rising.
        progress: told the steps done.
    """

    passes: Passes
    store: FeatureStore
    features: FeatureOptions
    seed: int
    skipped: Int64
    progress: ProgressCallback

    def recall(self, lists: IVFIndex, target: float) -> Calibration:
        """Return the lists' recall on rows of query_data, and on training rows where those are few."""
        view = self.store.view()
        random = np.random.default_rng(self.seed)
        _, asked_QF = self._queries(random.permutation(self.passes.n_rows("query"))[:CALIBRATION_QUERIES])
        rows_N = self._rows()
        n_train = min(len(rows_N), max(0, FEWEST_QUERIES - len(asked_QF)))
        rows = rows_N[np.sort(random.choice(len(rows_N), n_train, replace=False))]
        queries_QF = np.concatenate([asked_QF, view.take(rows)])
        queries_QF = queries_QF[random.permutation(len(queries_QF))]
        exact = FlatIndex(lists.source, self.passes.options.device)
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
        order, wanted = random.permutation(n_queries), fidelity.query_count(entries, n_queries)
        ids, query_QF = self._queries(np.sort(order[:wanted]))
        if not len(ids) and wanted < n_queries:
            ids, query_QF = self._queries(order[wanted : wanted + CALIBRATION_QUERIES], wanted)
        if not len(ids):
            tried = min(n_queries, wanted + CALIBRATION_QUERIES)
            raise NonFiniteError(
                problem(
                    "the fidelity cannot be measured",
                    got=f"NaN or infinity for each of {tried} rows of query_data",
                    expected="some that are finite at every checkpoint",
                    remedy="mend query_data or query_loss, or build with --no-yardstick",
                )
            )
        rows_N = self._rows()
        norm_N = np.sqrt(self.store.sqnorms() @ self._rates())[rows_N]
        sample = rows_N[fidelity.sample_rows(norm_N, self.seed)]
        side: SideName = "query"
        allowed = rows_N if len(self.skipped) else None
        asked = side, ids.tolist()
        found = fidelity.measured(self.passes, asked, query_QF, self.store.view(), sample, allowed)
        self.progress("fidelity", 1, 1)
        return found

    def _rows(self) -> Int64:
        """Return the ids of the training rows that were not skipped, rising."""
        return np.setdiff1d(np.arange(self.store.layout.n_rows, dtype=np.int64), self.skipped, assume_unique=True)

    def _rates(self) -> Float64:
        return np.array([c.learning_rate for c in self.passes.task.checkpoints])

    def _queries(self, ids: Int64, wanted: int | None = None) -> tuple[Int64, Float32]:
        """Return those of these rows of query_data that are finite, the first `wanted` or all, and their features."""
        taken = []
        with self.passes.model() as model:
            for checkpoint in range(len(self.passes.task.checkpoints)):
                model.load(checkpoint)
                taken.append(FeatureExtractor(model, self.features).rows("query", ids.tolist()))
        fine = np.flatnonzero(~np.any([unsound(rows) for rows in taken], axis=0))[:wanted]
        return ids[fine], np.concatenate([rows.feature_ND[fine] for rows in taken], axis=1)
