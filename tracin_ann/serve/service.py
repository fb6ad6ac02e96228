"""The service: one open index, whose requests are answered in passes, and new generations of the index.

A page or a route gets a `Reader` for each request (`dependencies.ReaderOfRequest`). All its calls read one generation
of the index, also if another one is published meanwhile:

    answered = await reader.answer("query", [3], options)         # records as in /api/v1, and the Answer objects
    view = await reader.run(lambda index: build_view(index, 3))   # anything else that reads the index

`run` and `answer` wait for their turn (`turns.Turns`): one thread at a time uses the index and the model. So the
function that `run` gets may use the whole library, and nothing else may: no route calls a method of the index itself.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tracin_ann.choices import SideName
from tracin_ann.distributed import ServiceLauncher, ShardOptions
from tracin_ann.errors import TracinAnnError, UsageError, first_line, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.results import Answer, Answers, Record, RowText
from tracin_ann.scoring import QueryOptions
from tracin_ann.serve.jobs import Job, Jobs
from tracin_ann.serve.problems import BusyError, make_changed_error
from tracin_ann.serve.settings import Settings
from tracin_ann.serve.turns import Turns
from tracin_ann.serve.work import ComputeExactAnswers, Work

T = TypeVar("T")
_MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexLocation:
    """Where the index is and how it is opened: the arguments of `InfluenceIndex.open`."""

    directory: str | Path
    task: Any = None
    arguments: Mapping[str, str] | None = None
    device: str = "auto"
    batch_size: int = 64
    memory_bytes: int | None = None
    launcher: ServiceLauncher | None = None
    shard_options: ShardOptions | None = None

    def open(self) -> InfluenceIndex:
        """Open the current generation and its task; without the task, only what is stored can be shown."""
        index = InfluenceIndex.open(
            self.directory,
            self.task,
            arguments=self.arguments,
            device=self.device,
            batch_size=self.batch_size,
            memory_bytes=self.memory_bytes,
            launcher=self.launcher,
            shard_options=self.shard_options,
        )
        try:
            # Before a writer appends to the index, whose data then have more rows than this generation.
            _ = index.runner
        except TracinAnnError as error:
            logger.warning("no queries can be answered: %s", error)
        return index

    def identify_manifest(self) -> tuple[int, ...]:
        """Return what changes when a generation is published; () if there is no manifest."""
        try:
            status = os.stat(Path(self.directory) / _MANIFEST)
        except OSError:
            return ()
        return status.st_ino, status.st_mtime_ns, status.st_size


@dataclass(frozen=True)
class Answered:
    """Answers of one request.

    Attributes:
        generation: the generation of the index that they are from.
        answers: the answers, in the order of the queries.
        lines: the same as the objects of JSON lines (docs/formats.md), with the texts of the rows.
        fellows: queries of all requests that were answered in the same pass.
    """

    generation: int
    answers: tuple[Answer, ...]
    lines: tuple[Record, ...]
    fellows: int = 0


@dataclass(frozen=True, eq=False)
class _Question:
    """Queries of one request that wait for a pass."""

    index: InfluenceIndex
    side: SideName
    rows: tuple[int, ...]
    options: QueryOptions
    examples: Any = None
    together: bool = False
    against: tuple[int, ...] = ()
    result: Future[Answered] = field(default_factory=Future)

    def joins(self, other: _Question) -> bool:
        """Return whether one pass can answer both."""
        return (
            not (self.is_single or other.is_single)
            and self.index is other.index
            and self.side == other.side
            and self.options == other.options
        )

    @property
    def is_single(self) -> bool:
        """Return whether it is answered alone."""
        return self.examples is not None or self.together or bool(self.against)


class Reader:
    """One request's access to one generation of the index."""

    def __init__(self, service: Service, index: InfluenceIndex) -> None:
        self._service, self._index = service, index

    @property
    def generation(self) -> int:
        """Return the number of the generation."""
        return self._index.manifest.generation

    def expect(self, generation: int | None) -> None:
        """Check that a request that continues another one reads the same generation.

        Raises:
            IndexChangedError: it does not.
        """
        if generation is not None and generation != self.generation:
            raise make_changed_error(generation, self.generation)

    async def run(self, function: Callable[[InfluenceIndex], T]) -> T:
        """Return what the function returns for the index; it runs when it is its turn.

        Raises:
            BusyError: too many requests wait.
        """
        return await self._service.run(partial(function, self._index))

    async def answer(
        self,
        side: SideName,
        rows: Sequence[int],
        options: QueryOptions | None = None,
        *,
        together: bool = False,
        against: Sequence[int] = (),
    ) -> Answered:
        """Return the answers of rows of `query_data` or `train_data`, as `InfluenceIndex.query` and `contrast` do.

        Requests with the same side and options that wait at the same time are answered in one pass.

        Raises:
            UnknownRowError: there is no such row.
            UsageError: an option is out of range or above its limit.
            BusyError: too many requests wait.
            TracinAnnError: as `InfluenceIndex.query` raises it.
        """
        options = options or QueryOptions()
        if not rows:
            raise UsageError(problem("no query", got="no rows", expected="one or more", remedy="name a row"))
        self._service.check_limits(len(rows) + len(against), options)
        question = _Question(
            self._index, side, tuple(rows), options, together=together or bool(against), against=tuple(against)
        )
        return await self._service.ask(question)

    async def answer_examples(
        self, examples: Sequence[Any], options: QueryOptions | None = None, *, together: bool = False
    ) -> Answered:
        """Return the answers of examples that are not in the index, as `InfluenceIndex.query_examples` does.

        Raises:
            UsageError: an option is out of range or above its limit.
            TaskError: the task cannot read an example.
            BusyError: too many requests wait.
        """
        options = options or QueryOptions()
        self._service.check_limits(len(examples), options)
        rows = tuple(range(len(examples)))
        return await self._service.ask(_Question(self._index, "input", rows, options, examples, together))

    def start_job(self, work: Work) -> Job:
        """Start slow work on this generation.

        Raises:
            UsageError: a number is above its limit.
            TooManyJobsError: as many jobs are queued as may be.
        """
        self._service.check_work(work)
        return self._service.jobs.start(work, self._index)


class Service:
    """The open index of a process, and its jobs.

    Args:
        location: the index.
        settings: limits.
        turns: of another service of the process, whose model does not run at the same time; None: there is none.
    """

    def __init__(self, location: IndexLocation, settings: Settings, turns: Turns | None = None) -> None:
        self.settings, self.turns = settings, turns or Turns()
        self.jobs = Jobs(self.turns, settings)
        self._location = location
        self._manifest = location.identify_manifest()
        self._index = location.open()
        self._questions: list[_Question] = []
        self._lock = threading.Lock()
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="index")

    @property
    def directory(self) -> Path:
        """Return the directory of the index."""
        return Path(self._location.directory)

    @property
    def generation(self) -> int:
        """Return the number of the generation that new requests read."""
        return self._index.manifest.generation

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Reader]:
        """Yield a reader of the current generation; a generation that was published meanwhile is opened first."""
        if self._location.identify_manifest() != self._manifest:
            await self.run(self._open_current)
        yield Reader(self, self._index)

    def close(self) -> None:
        """Cancel the jobs, wait for the pass that is being answered, and close the index."""
        self.jobs.close()
        self._thread.shutdown(cancel_futures=True)
        self._index.close()

    def check_limits(self, n_queries: int, options: QueryOptions) -> None:
        """Check a query against the limits.

        Raises:
            UsageError: a number is above its limit.
        """
        limits = self.settings
        _check_sizes(
            ("k", options.k, limits.most_hits),
            ("candidates", options.candidates, limits.most_candidates),
            ("rows", n_queries, limits.most_rows),
        )

    def check_work(self, work: Work) -> None:
        """Check the work of a job against the limits.

        Raises:
            UsageError: a number is above its limit.
        """
        if isinstance(work, ComputeExactAnswers):
            self.check_limits(len(work.rows), work.options)
        limits = vars(self.settings)
        _check_sizes(*((name, getattr(work, name), limits[limit]) for name, limit in work.limited.items()))

    async def run(self, function: Callable[[], T]) -> T:
        """Return what the function returns; it runs in the thread of the index, in the turn of requests.

        Raises:
            BusyError: too many requests wait.
        """
        self._enter()
        try:
            return await asyncio.wrap_future(self._thread.submit(self._take_turn, function))
        finally:
            self._waiting -= 1

    async def ask(self, question: _Question) -> Answered:
        """Return the answer of a question, from the pass that it joins."""
        self._enter()
        try:
            with self._lock:
                self._questions.append(question)
            # Whichever pass comes first answers the question; later ones find nothing to do.
            self._thread.submit(self._take_turn, self._answer_pass)
            return await asyncio.wrap_future(question.result)
        finally:
            self._waiting -= 1

    def _enter(self) -> None:
        if self._waiting >= self.settings.most_waiting:
            raise BusyError(
                problem(
                    "too many requests wait for the index",
                    got=self._waiting,
                    expected=f"fewer than {self.settings.most_waiting}",
                    remedy="try again in a few seconds",
                )
            )
        self._waiting += 1

    def _take_turn(self, function: Callable[[], T]) -> T:
        with self.turns.take_for_request():
            return function()

    def _open_current(self) -> None:
        """Open the current generation; the last one remains open for the requests and jobs that use it."""
        found = self._location.identify_manifest()
        if found == self._manifest:
            return
        try:
            self._index = self._location.open()
        except Exception as error:
            # It may be damaged, or its task may fail. It is not tried again for every request.
            logger.warning("generation %d remains open: %s", self.generation, first_line(error))
        else:
            logger.info("generation %d is open", self.generation)
        self._manifest = found
        gc.collect()

    def _answer_pass(self) -> None:
        """Answer the first question, and all others that one pass can answer with it."""
        questions = self._take_questions()
        try:
            answered = _answer_questions(questions)
        except Exception:
            # Each question alone gets its own answer, or its own error.
            for question in questions:
                _answer_alone(question)
        else:
            for question, result in zip(questions, answered, strict=True):
                question.result.set_result(result)

    def _take_questions(self) -> list[_Question]:
        chosen: list[_Question] = []
        rest: list[_Question] = []
        n_queries = 0
        with self._lock:
            for question in self._questions:
                n_together = n_queries + len(question.rows)
                if chosen and not (question.joins(chosen[0]) and n_together <= self.settings.pass_queries):
                    rest.append(question)
                # A question whose client has gone is not answered.
                elif question.result.set_running_or_notify_cancel():
                    chosen.append(question)
                    n_queries = n_together
            self._questions = rest
        return chosen


def _check_sizes(*sizes: tuple[str, int, int]) -> None:
    """Check numbers, each given with its name and its limit.

    Raises:
        UsageError: one is above its limit.
    """
    for name, value, most in sizes:
        if value > most:
            raise UsageError(
                problem(f"{name} is above the limit", got=value, expected=f"at most {most:,}", remedy=f"lower {name}")
            )


def _answer_alone(question: _Question) -> None:
    try:
        (result,) = _answer_questions([question])
    except Exception as error:
        question.result.set_exception(error)
    else:
        question.result.set_result(result)


def _answer_questions(questions: Sequence[_Question]) -> list[Answered]:
    """Return the results of questions that one pass can answer."""
    if not questions:
        return []
    first = questions[0]
    rows = tuple(dict.fromkeys(row for question in questions for row in question.rows))
    answers = _answer(first, rows if not first.is_single else first.rows)
    answers.texts = _read_texts(first.index, answers)
    lines = answers.lines()
    place = {row: at for at, row in enumerate(rows)}
    return [
        Answered(
            first.index.manifest.generation,
            tuple(answers[at] for at in places),
            tuple(lines[at] for at in places),
            sum(len(each.rows) for each in questions),
        )
        for question in questions
        for places in [range(len(answers)) if question.is_single else [place[row] for row in question.rows]]
    ]


def _read_texts(index: InfluenceIndex, answers: Answers) -> RowText:
    """Return the texts of the rows in answers; those of hits are read together."""
    rows = list({hit.row for answer in answers for hit in answer.hits})
    texts = {
        row: None if found is None else found.text
        for row, found in zip(rows, index.describe_rows("train", rows), strict=True)
    }
    read = answers.texts
    return lambda side, row: texts[row] if side == "train" and row in texts else read(side, row)


def _answer(question: _Question, rows: tuple[int, ...]) -> Answers:
    index, options = question.index, question.options
    if question.examples is not None:
        return index.query_examples(question.examples, options, together=question.together)
    if question.against:
        return index.contrast(rows, question.against, question.side, options)
    if question.side == "train":
        return index.query((), rows, options, together=question.together)
    return index.query(rows, (), options, together=question.together)
