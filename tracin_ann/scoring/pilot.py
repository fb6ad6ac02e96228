"""The choice of D before a build (`--dim auto`), from exact scores and sketched norms of a sample of rows: a pilot.

Shapes: M rows of the pilot, Q queries, C checkpoints, D sketch dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tracin_ann.choices import DTYPES, Dtype
from tracin_ann.errors import NonFiniteError, UsageError, problem
from tracin_ann.features import FeatureOptions, TaskRunner
from tracin_ann.scoring.exact import Queries, make_exact_scorer
from tracin_ann.scoring.quality import count_queries, extract_finite, measure_deviations
from tracin_ann.scoring.sizes import IndexShape, IndexSize
from tracin_ann.scoring.true_recall import NoiseModel, bound_mean, predict_recall
from tracin_ann.store import Estimate, noise_ratio
from tracin_ann.text import format_size
from tracin_ann.types import Float64, ProgressCallback

DIMS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""The values of D among which the smallest sufficient one is chosen."""
ROWS = 4000
"""The most rows of a pilot."""
PILOT_DIM = 256
"""D of the sketches of a pilot, which measure norms and the errors of scores."""
_SPARE_QUERIES = 16
"""Further rows of query_data that are tried if some are not finite."""


@dataclass(frozen=True)
class DimTarget:
    """What D is chosen for.

    Attributes:
        recall: the share of the true top ten, in each direction,
        candidates: among this many first rows of the stored ranking.
        disk_bytes: the largest size of the index; None: any.
        memory_bytes: the largest memory for the rows of a partition, and for building the search index; None: any.
    """

    recall: float
    candidates: int
    disk_bytes: int | None
    memory_bytes: int | None

    def allows(self, size: IndexSize) -> bool:
        """Return whether an index is within the limits."""
        disk, memory = self.disk_bytes, self.memory_bytes
        return (disk is None or size.disk_bytes <= disk) and (memory is None or size.memory_bytes <= memory)


@dataclass(frozen=True)
class DimPrediction:
    """The recall and the sizes that an index with sketches of D numbers would have.

    Attributes:
        dim: D.
        proponents: expected share of the true top ten proponents among the candidates.
        opponents: the same for opponents.
        size: of the index.
        is_allowed: whether it is within the limits.
    """

    dim: int
    proponents: Estimate
    opponents: Estimate
    size: IndexSize
    is_allowed: bool

    @property
    def recall(self) -> float:
        """Return the expected recall of the worse direction."""
        return min(self.proponents.mean, self.opponents.mean)


@dataclass(frozen=True)
class DimChoice:
    """The choice of D.

    Attributes:
        target: what it was chosen for.
        table: the predictions, by ascending D.
        n_rows: the rows of the pilot.
        n_queries: its queries.
        others: for each dtype, if they were compared, the smallest D within the limits with which the recall would
            reach the target, or the largest one; a dtype of which none is within the limits is left out.
    """

    target: DimTarget
    table: tuple[DimPrediction, ...]
    n_rows: int
    n_queries: int
    others: Mapping[Dtype, DimPrediction] = field(default_factory=dict)

    @property
    def chosen(self) -> DimPrediction:
        """Return the smallest D within the limits whose expected recall reaches the target, or the largest one.

        Raises:
            UsageError: none is within the limits.
        """
        allowed = [row for row in self.table if row.is_allowed]
        if not allowed:
            least = self.table[0]
            sizes = f"{format_size(least.size.disk_bytes)} on disk and {format_size(least.size.memory_bytes)} of memory"
            raise UsageError(
                problem(
                    "no sketch dimension is within --disk and --memory",
                    got=f"{sizes} for D = {least.dim}",
                    expected="no more than the limits",
                    remedy="raise the limits, or set --dim",
                )
            )
        return next((row for row in allowed if row.recall >= self.target.recall), allowed[-1])

    @property
    def is_reached(self) -> bool:
        """Return whether the expected recall with the chosen D reaches the target."""
        return self.chosen.recall >= self.target.recall

    @property
    def summary(self) -> str:
        """Return the choice and the expected recall in one line."""
        chosen, target = self.chosen, self.target
        line = (
            f"{chosen.dim}; expected true recall@10 among {target.candidates:,} candidates: "
            f"{chosen.proponents.summary} for proponents, {chosen.opponents.summary} for opponents "
            f"({self.n_rows:,} rows, {self.n_queries} queries)"
        )
        if self.is_reached:
            return line
        larger = "within --disk and --memory" if chosen is not self.table[-1] else f"up to {chosen.dim}"
        return f"{line}; warning: no dimension {larger} reaches {target.recall:g}, use more --candidates"


@dataclass(frozen=True, eq=False)
class Pilot:
    """Exact scores of rows drawn uniformly, and what the errors of sketches depend on.

    Attributes:
        n_rows: N, of all training rows.
        exact_QM: exact scores of the rows of the pilot.
        deviation_QM: the standard deviation of a sketch's score for D = 1; it is in proportion to 1 / √D.
        norm_QM: the one for D = 1 that follows from the norms: `deviation_QM` is this times the root mean square of the
            errors of a query in the pilot.
    """

    n_rows: int
    exact_QM: Float64
    deviation_QM: Float64
    norm_QM: Float64

    def predict(self, dim: int, candidates: int, dtype: Dtype = "float16") -> tuple[Estimate, Estimate]:
        """Return the expected share of the true top ten proponents, and opponents, among the candidates.

        Args:
            dim: D.
            candidates: first rows of the stored ranking.
            dtype: how features are stored. The variance of codes adds to that of the sketch. It is the variance that
                follows from the norms, because codes are those of rotated rows.
        """
        coded_QM = (noise_ratio(dtype) - 1) ** 0.5 * self.norm_QM
        deviation_QM = np.hypot(self.deviation_QM, coded_QM) / dim**0.5
        proponents, opponents = (
            bound_mean(predict_recall(sign * self.exact_QM, deviation_QM, self.n_rows, candidates), 1.0)
            for sign in (1, -1)
        )
        return proponents, opponents

    def choose(self, target: DimTarget, shape: IndexShape, dims: Sequence[int] = DIMS) -> DimChoice:
        """Return the choice of D among some values."""
        table = tuple(self._predict_row(dim, target, shape) for dim in dims)
        return DimChoice(target, table, self.exact_QM.shape[1], len(self.exact_QM))

    def compare_dtypes(self, choice: DimChoice, shape: IndexShape) -> DimChoice:
        """Return the choice with those for the other dtypes; all are among the same values of D."""
        others: dict[Dtype, DimPrediction] = {}
        for dtype in DTYPES:
            own = replace(shape, dtype=dtype)
            for known in choice.table:
                row = known if dtype == shape.dtype else self._predict_row(known.dim, choice.target, own)
                if row.is_allowed:
                    others[dtype] = row
                if row.recall >= choice.target.recall:
                    break
        return replace(choice, others=others)

    def _predict_row(self, dim: int, target: DimTarget, shape: IndexShape) -> DimPrediction:
        size = shape.estimate_size(dim)
        return DimPrediction(dim, *self.predict(dim, target.candidates, shape.dtype), size, target.allows(size))


def run_pilot(runner: TaskRunner, features: FeatureOptions, progress: ProgressCallback) -> Pilot:
    """Return the exact scores of a sample of rows for a few queries, and the deviations of sketches.

    Args:
        runner: the task's data and model.
        features: how gradients become features, with D = PILOT_DIM.
        progress: called with (stage, done, total).

    Raises:
        NonFiniteError: a row's loss or gradient is NaN or infinite, and the options do not skip such rows; or no row of
            query_data, or none of the sample, is finite.
    """
    progress("pilot", 0, 1)
    n_rows, n_available = runner.n_rows("train"), runner.n_rows("query")
    random = np.random.default_rng(features.seed + 2)
    drawn = np.sort(random.permutation(n_rows)[:ROWS])
    with runner.model() as model:
        rate_C = np.array([rates.rate for rates in model.rates])
        n_queries = count_queries(sum(p.numel() for p in model.parameters.values()), n_available)
    asked = random.permutation(n_available)[: n_queries + _SPARE_QUERIES]
    ids, query_QF = extract_finite(runner, features, "query", np.sort(asked[:n_queries]))
    if not len(ids):
        ids, query_QF = extract_finite(runner, features, "query", asked[n_queries:], n_queries)
    rows, row_MF = extract_finite(runner, features, "train", drawn)
    if not len(ids) or not len(rows):
        raise NonFiniteError(
            problem(
                "the sketch dimension cannot be chosen",
                got=f"NaN or infinity for each of {len(asked) if not len(ids) else len(drawn)} rows",
                expected="rows of both data sets that are finite at every checkpoint",
                remedy="correct the data or the loss, or set --dim",
            )
        )
    with make_exact_scorer(runner, Queries("query", ids.tolist()), range(len(rate_C))) as scorer:
        exact_QM = scorer.scores(rows.tolist())
    stored_QM = query_QF.astype(np.float64) @ row_MF.T.astype(np.float64)
    deviation_QM = measure_deviations(query_QF, row_MF, len(rate_C))
    scale_Q = NoiseModel.fit(exact_QM, stored_QM, deviation_QM).scale_Q
    progress("pilot", 1, 1)
    norm_QM = deviation_QM * features.sketch.dim**0.5
    return Pilot(n_rows, exact_QM, scale_Q[:, None] * norm_QM, norm_QM)
