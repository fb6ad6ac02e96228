"""The work of jobs: exact scores and their parts, and analyses of all rows, as values that can be run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from tracin_ann.analysis import (
    By,
    Explanation,
    TokenExplanation,
    explain,
    find_duplicates,
    find_hubs,
    find_mislabelled,
)
from tracin_ann.choices import ScoreName, SideName
from tracin_ann.index import InfluenceIndex
from tracin_ann.results import Answer, Answers, Record, RowList
from tracin_ann.scoring import QueryOptions
from tracin_ann.store import RowFilter
from tracin_ann.types import ProgressCallback


@dataclass(frozen=True)
class Result:
    """The result of a job; it does not refer to the index.

    Attributes:
        rows: the objects of the result: Answer, SelfInfluence, Suspect, Duplicate or Hub.
        records: the same as the objects of JSON lines (docs/formats.md), with the texts of the rows.
        summary: what the result says about all rows.
    """

    rows: tuple[Any, ...]
    records: tuple[Record, ...]
    summary: Record


@dataclass(frozen=True)
class Steps:
    """The steps of a job.

    Attributes:
        report: called with (stage, done, total); raises if the job was cancelled.
        give_way: lets waiting requests go first. The library reports progress between batches, where a job may also
            release the model.
    """

    report: ProgressCallback
    give_way: Callable[[], None]

    def progress(self, stage: str, done: int, total: int) -> None:
        """Report progress, as a `ProgressCallback` of the library, and let requests go first."""
        self.report(stage, done, total)
        self.give_way()


class Work(ABC):
    """What a job does; its attributes are its options.

    Attributes:
        kind: its name in the API.
        limited: names of attributes, each with the name of the setting that limits it.
    """

    kind: ClassVar[str] = "page"
    limited: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def run(self, index: InfluenceIndex, steps: Steps) -> Result:
        """Return the result for an index."""


@dataclass(frozen=True)
class ComputeExactAnswers(Work):
    """Answers whose options request exact scores: of the candidates, or of all rows.

    Attributes:
        side: `query`, `train`, or `input`.
        rows: positions of the queries.
        options: with `rerank="exact"` or `exact`.
        examples: the examples of the side `input`.
        together: one answer, to the mean of the gradients of the queries.
    """

    kind = "exact"
    side: SideName
    rows: tuple[int, ...]
    options: QueryOptions
    examples: Sequence[Any] | None = None
    together: bool = False

    def run(self, index: InfluenceIndex, steps: Steps) -> Result:
        """Return the answers; one query is scored at a time."""
        questions = (self.rows,) if self.together else tuple((row,) for row in self.rows)
        answers: list[Answer] = []
        records: list[Record] = []
        for done, rows in enumerate(questions):
            answered = self._query(index, rows, steps.progress)
            answers += answered
            records += answered.lines()
            steps.progress("queries", done + 1, len(questions))
        return Result(tuple(answers), tuple(records), {"how": answers[0].how if answers else ""})

    def _query(self, index: InfluenceIndex, rows: tuple[int, ...], progress: ProgressCallback) -> Answers:
        options = self.options
        if self.examples is not None:
            return index.query_examples(self.examples, options, progress, ids=rows)
        train = self.side == "train"
        return index.query(() if train else rows, rows if train else (), options, progress, together=self.together)


@dataclass(frozen=True)
class ExplainScore(Work):
    """The parts of the exact score of a training row for a query; see `analysis.explain`.

    Attributes:
        row: position of the training row.
        query: position of the query in the data set `side`.
        side: `query`, `train`, or `input`.
        by: `layer` or `token`.
        options: the score, its damping and the checkpoints.
        examples: the examples of the side `input`.
    """

    kind = "explanation"
    row: int
    query: int
    side: SideName
    by: Literal["layer", "token"]
    options: QueryOptions
    examples: Sequence[Any] | None = None

    def run(self, index: InfluenceIndex, steps: Steps) -> Result:
        """Return the records of the parts; the summary has the score and the stored score."""
        found = self.explain(index, steps)
        return Result((), tuple(found.lines()), {"score": found.score, "stored_score": found.stored_score})

    def explain(self, index: InfluenceIndex, steps: Steps) -> Explanation | TokenExplanation:
        """Return the parts."""
        with nullcontext() if self.examples is None else index.lend(self.examples):
            found: Explanation | TokenExplanation = explain(
                index,
                self.row,
                self.query,
                self.side,
                steps.progress,
                checkpoints=self.options.checkpoints,
                by=self.by,
                score=self.options.score,
                damping=self.options.damping,
            )
            return found


@dataclass(frozen=True)
class RankSelfInfluence(Work):
    """Training rows by self-influence; see `InfluenceIndex.self_influence`."""

    kind = "self-influence"
    limited = {"k": "most_records"}
    k: int = 50
    checkpoints: tuple[int, ...] | None = None
    exact: bool = False
    where: RowFilter = field(default_factory=RowFilter)
    score: ScoreName = "tracin"
    damping: float | None = None

    def run(self, index: InfluenceIndex, steps: Steps) -> Result:
        """Return the first k rows."""
        ranked = index.self_influence(
            self.k,
            checkpoints=self.checkpoints,
            exact=self.exact,
            rows=self.where,
            score=self.score,
            damping=self.damping,
            progress=steps.progress,
        )
        return _make_result(ranked, {"score": self.score, "exact": self.exact})


@dataclass(frozen=True)
class FindMislabelled(Work):
    """Training rows whose label is probably wrong; see `analysis.find_mislabelled`."""

    kind = "mislabelled"
    limited = {"k": "most_records"}
    labels: str | None = "label"
    k: int = 50
    neighbours: int = 30
    by: By | None = None
    asked: int = 20_000
    checkpoints: tuple[int, ...] | None = None
    exact: bool = False
    where: RowFilter = field(default_factory=RowFilter)
    score: ScoreName = "tracin"
    damping: float | None = None

    def run(self, index: InfluenceIndex, steps: Steps) -> Result:
        """Return the first k suspects; the summary estimates how many rows to check."""
        suspects = find_mislabelled(
            index,
            self.labels,
            self.k,
            self.neighbours,
            by=self.by,
            asked=self.asked,
            checkpoints=self.checkpoints,
            exact=self.exact,
            rows=self.where,
            score=self.score,
            damping=self.damping,
            progress=steps.progress,
        )
        return _make_result(suspects, asdict(suspects.suspicion))


@dataclass(frozen=True)
class FindDuplicates(Work):
    """Groups of training rows with nearly equal features; see `analysis.find_duplicates`."""

    kind = "duplicates"
    limited = {"k": "most_records"}
    threshold: float = 0.999
    checkpoints: tuple[int, ...] | None = None
    where: RowFilter = field(default_factory=RowFilter)
    k: int = 1000

    def run(self, index: InfluenceIndex, steps: Steps) -> Result:
        """Return the first k rows of groups, the largest group first."""
        found = find_duplicates(
            index, self.threshold, self.where, checkpoints=self.checkpoints, progress=steps.progress
        )
        summary = {**asdict(found.extent), "groups": len(found.groups), "rows_in_groups": len(found)}
        del found[self.k :]
        return _make_result(found, summary)


@dataclass(frozen=True)
class FindHubs(Work):
    """Training rows that are hits of unusually many queries; see `analysis.find_hubs`.

    Attributes:
        k: the number of hits of a query that count.
        side: data set of the queries.
        top: the number of rows returned.
        options: query options.
    """

    kind = "hubs"
    limited = {"k": "most_hits", "top": "most_records"}
    k: int = 10
    side: SideName = "query"
    top: int = 100
    options: QueryOptions = field(default_factory=QueryOptions)

    def run(self, index: InfluenceIndex, steps: Steps) -> Result:
        """Return the rows that are proponents of most queries, and those that are opponents of most."""
        hubs = find_hubs(index, None, self.k, self.side, self.options, steps.progress)
        census = hubs.census
        chosen = {hub.row for by in ("proponents", "opponents") for hub in hubs.ranked(by, self.top)}
        hubs[:] = [hub for hub in hubs if hub.row in chosen]
        summary = {
            "queries": census.n_queries,
            "k": census.k,
            "how": census.how,
            **{
                f"{name}_{figure}": getattr(counts, figure)
                for name, counts in (("proponents", census.proponents), ("opponents", census.opponents))
                for figure in ("expected", "largest", "skewness", "histogram")
            },
        }
        return _make_result(hubs, summary)


def _make_result(found: RowList[Any], summary: Record) -> Result:
    return Result(tuple(found), tuple(found.lines()), summary)
