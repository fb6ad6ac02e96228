"""The work of jobs that only pages ask for: features of the queries, and the parts of one score."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from tracin_ann.analysis import explain
from tracin_ann.choices import SideName
from tracin_ann.index import InfluenceIndex
from tracin_ann.scoring import QueryOptions
from tracin_ann.serve.pages.rows import QueryFeatures
from tracin_ann.serve.work import Result, Steps, Work


@dataclass(frozen=True)
class ComputeQueryFeatures(Work):
    """The features of the queries; the only row of the result is a `QueryFeatures`."""

    options: QueryOptions = field(default_factory=QueryOptions)

    def run(self, index: InfluenceIndex, steps: Steps) -> Result:
        """Return the features."""
        return Result((QueryFeatures.compute(index, self.options, steps.progress),), (), {})


@dataclass(frozen=True)
class ExplainPair(Work):
    """The parts of a score; the only row of the result is an `Explanation` or a `TokenExplanation`.

    Attributes:
        row: position of the training row.
        query: position of the query in the data set `side`.
        side: `query`, `train`, or `input`.
        by: `layer` or `token`.
        options: the score and the checkpoints.
        examples: the examples of the side `input`.
    """

    row: int
    query: int
    side: SideName
    by: Literal["layer", "token"]
    options: QueryOptions
    examples: Sequence[Any] | None = None

    def run(self, index: InfluenceIndex, steps: Steps) -> Result:
        """Return the explanation, and its records."""
        with nullcontext() if self.examples is None else index.lend(self.examples):
            found = explain(  # type: ignore[call-overload]
                index,
                self.row,
                self.query,
                self.side,
                steps.report,
                checkpoints=self.options.checkpoints,
                by=self.by,
                score=self.options.score,
            )
        return Result((found,), tuple(found.lines()), {})
