"""The objects of the API: options of queries and jobs in requests, and the responses, for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tracin_ann.analysis import By
from tracin_ann.choices import ScoreName, Search
from tracin_ann.results import SCHEMA, Id
from tracin_ann.scoring import QueryOptions
from tracin_ann.serve.work import (
    ComputeExactAnswers,
    ExplainScore,
    FindDuplicates,
    FindHubs,
    FindMislabelled,
    RankSelfInfluence,
    Work,
)
from tracin_ann.store import RowFilter

StoredSide = Literal["query", "train"]
Positions = list[int]


class Request(BaseModel):
    """A base of objects in requests: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class Filters(Request):
    """Which training rows are considered."""

    where: list[str] = Field([], description="Conditions on columns, such as `label=3` or `length>=10`.")
    only: Positions | None = Field(None, description="Positions of the rows to consider; default: all.")
    without: Positions = Field([], description="Positions of rows to leave out.")
    checkpoints: Positions | None = Field(None, description="Positions of the checkpoints; default: all.")

    def make_filter(self) -> RowFilter:
        """Return the filter."""
        return RowFilter(None if self.only is None else tuple(self.only), tuple(self.without), tuple(self.where))

    def choose_checkpoints(self) -> tuple[int, ...] | None:
        """Return the positions of the checkpoints; None: all."""
        return None if self.checkpoints is None else tuple(self.checkpoints)


class SearchFields(Filters):
    """Options of a query that the stored features answer; see `QueryOptions`."""

    k: int = Field(10, description="Proponents, and opponents, to return.")
    rerank: Literal["none", "stored"] = Field("stored", description="The scores of the hits.")
    search: Search = "auto"
    recall: float | None = None
    score: ScoreName | None = None
    damping: float | None = None

    def make_options(self) -> QueryOptions:
        """Return the options.

        Raises:
            UsageError: a value is out of range, or options exclude each other.
        """
        return QueryOptions(
            k=self.k,
            rerank=self.rerank,
            checkpoints=self.choose_checkpoints(),
            search=self.search,
            recall=self.recall,
            rows=self.make_filter(),
            score=self.score,
            damping=self.damping,
        )


class Continuation(Request):
    """The query parameter that every route has, see `dependencies.open_reader`."""

    generation: int | None = Field(None, ge=0, description="The generation of the index that the request continues.")


class PictureParameters(SearchFields, Continuation):
    """The query parameters of `POST /answers/picture`."""


class AnswerParameters(SearchFields, Continuation):
    """The query parameters of `GET /answers`."""

    side: StoredSide = Field("query", description="The data set of the queries.")
    rows: Positions = Field([], description="Positions of the queries.")
    ids: list[str] = Field([], description="The task's own ids of the queries, instead of `rows`.")
    together: bool = Field(False, description="One answer, to the mean of the gradients of the queries.")
    against: Positions = Field([], description="Positions of a second set: what supports `rows` rather than these.")


class ExampleQuery(SearchFields):
    """Queries that are not in the index: records for the task's `read_query`, such as `{"text": "a fine film"}`."""

    records: list[dict[str, Any]] = Field(min_length=1)
    first: int = Field(0, ge=0, description="The number of the first record in messages.")
    together: bool = Field(False, description="One answer, to the mean of the gradients of the queries.")


class ExactJob(Filters):
    """Answers with exact scores over all parameters: of the candidates, or with `every_row` of all rows."""

    kind: Literal["exact"]
    side: StoredSide = "query"
    rows: Positions = Field(min_length=1)
    k: int = 10
    candidates: int = 200
    every_row: bool = False
    tokens: bool = False
    score: ScoreName | None = None
    damping: float | None = None

    def make_work(self) -> Work:
        """Return the work of the job."""
        options = QueryOptions(
            k=self.k,
            candidates=self.candidates,
            rerank="exact",
            exact=self.every_row,
            checkpoints=self.choose_checkpoints(),
            rows=self.make_filter(),
            tokens=self.tokens,
            score=self.score,
            damping=self.damping,
        )
        return ComputeExactAnswers(self.side, tuple(self.rows), options)


class ExplanationFields(Request):
    """What is explained."""

    row: int = Field(description="The position of the training row.")
    query: int = Field(description="The position of the query.")
    side: StoredSide = Field("query", description="The data set of the query.")
    by_token: bool = Field(False, description="Parts by token instead of by parameter.")
    checkpoints: Positions | None = Field(None, description="Positions of the checkpoints; default: all.")
    score: ScoreName | None = None
    damping: float | None = None

    def make_work(self) -> ExplainScore:
        """Return the work."""
        chosen = None if self.checkpoints is None else tuple(self.checkpoints)
        options = QueryOptions(rerank="exact", checkpoints=chosen, score=self.score, damping=self.damping)
        return ExplainScore(self.row, self.query, self.side, "token" if self.by_token else "layer", options)


class ExplanationParameters(ExplanationFields, Continuation):
    """The query parameters of `GET /explanations`."""


class ExplanationJob(ExplanationFields):
    """The parts of the exact score of a training row for a query, by parameter or token, and checkpoint."""

    kind: Literal["explanation"]


class SelfInfluenceJob(Filters):
    """Training rows by self-influence."""

    kind: Literal["self-influence"]
    k: int = 50
    exact: bool = False
    score: ScoreName = "tracin"
    damping: float | None = None

    def make_work(self) -> Work:
        """Return the work of the job."""
        return RankSelfInfluence(
            self.k, self.choose_checkpoints(), self.exact, self.make_filter(), self.score, self.damping
        )


class MislabelledJob(Filters):
    """Training rows whose label is probably wrong."""

    kind: Literal["mislabelled"]
    labels: str | None = Field("label", description="The column with the labels; null: rank without labels.")
    k: int = 50
    neighbours: int = Field(30, le=1000)
    by: By | None = None
    asked: int = 20_000
    exact: bool = False
    score: ScoreName = "tracin"
    damping: float | None = None

    def make_work(self) -> Work:
        """Return the work of the job."""
        return FindMislabelled(
            self.labels,
            self.k,
            self.neighbours,
            self.by,
            self.asked,
            self.choose_checkpoints(),
            self.exact,
            self.make_filter(),
            self.score,
            self.damping,
        )


class DuplicatesJob(Filters):
    """Groups of training rows with nearly equal features."""

    kind: Literal["duplicates"]
    threshold: float = 0.999
    k: int = Field(1000, description="Rows to return.")

    def make_work(self) -> Work:
        """Return the work of the job."""
        return FindDuplicates(self.threshold, self.choose_checkpoints(), self.make_filter(), self.k)


class HubsJob(Filters):
    """Training rows that are hits of unusually many queries."""

    kind: Literal["hubs"]
    side: StoredSide = "query"
    hits: int = Field(10, description="Hits of a query that count.")
    k: int = Field(100, description="Rows to return, of each direction.")
    score: ScoreName | None = None

    def make_work(self) -> Work:
        """Return the work of the job."""
        options = QueryOptions(checkpoints=self.choose_checkpoints(), rows=self.make_filter(), score=self.score)
        return FindHubs(self.hits, self.side, self.k, options)


JobRequest = Annotated[
    ExactJob | ExplanationJob | SelfInfluenceJob | MislabelledJob | DuplicatesJob | HubsJob, Field(discriminator="kind")
]


class Response(BaseModel):
    """A base of responses.

    Attributes:
        schema_number: the number of the schema of the records (docs/formats.md).
    """

    model_config = ConfigDict(populate_by_name=True)
    schema_number: int = Field(SCHEMA, alias="schema")


class IndexInfo(Response):
    """What the index holds, and the limits of requests."""

    generation: int
    rows: int
    removed: int
    skipped: int
    query_rows: int | None = Field(description="Rows of query_data; null if the task cannot be found.")
    checkpoints: list[dict[str, Any]]
    columns: dict[str, str]
    default_score: str
    index: str
    quality: str
    audit: str
    limits: dict[str, int]


class Row(BaseModel):
    """A row of a data set; `columns` of training rows."""

    id: Id
    row: int
    text: str | None = None
    columns: dict[str, Any] | None = None
    self_influence: float | None = None


class RowsPage(Response):
    """Some rows of a data set."""

    generation: int
    offset: int
    total: int
    next: int | None = Field(description="The offset of the next page; null: this is the last one.")
    records: list[Row]


class SingleRow(Response):
    """One row of a data set."""

    generation: int
    record: Row


class AnswersResponse(Response):
    """Answers, each as a line of `tracin-query --format jsonl`; and for each how it was found, and the rows scored."""

    generation: int
    answers: list[dict[str, Any]]
    how: list[str]
    rows_scored: list[int] = Field(description="Stored rows and centroids that the search compared.")


class RecordsPage(Response):
    """Some records of the result of a job."""

    generation: int
    offset: int
    total: int
    next: int | None
    summary: dict[str, Any]
    records: list[dict[str, Any]]


class ExplanationResponse(Response):
    """The parts of a score, each as a line of `tracin-explain --format jsonl`, and their sums."""

    generation: int
    score: float
    stored_score: float
    records: list[dict[str, Any]]


class JobState(Response):
    """A job: its progress, and its error if it failed."""

    name: str
    kind: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    generation: int
    stage: str
    done: int
    total: int
    records: int | None = Field(None, description="Records of the result of a job that is done.")
    error: dict[str, str] | None = None


class JobList(Response):
    """The jobs whose results are kept, the latest first."""

    jobs: list[JobState]


class ErrorParts(BaseModel):
    """What happened, what was found, what was expected, and what to do."""

    type: str
    what: str
    got: str
    expected: str
    remedy: str


class ErrorResponse(BaseModel):
    """The response to a request that failed."""

    error: ErrorParts
