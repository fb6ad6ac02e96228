"""Queries that a running `tracin-serve` answers: its address takes the place of the directory of an index.

The server has the index and the model in memory, so a query takes no longer than its answer, and this process imports
neither torch nor the task.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracin_ann.choices import CURVATURES
from tracin_ann.cli.command import find_given_options
from tracin_ann.cli.index_options import Options, choose_score
from tracin_ann.cli.parameters import Positions
from tracin_ann.cli.server_client import Json, ServerClient
from tracin_ann.errors import TaskError, UsageError, problem
from tracin_ann.results import Answer, Answers, Fields, choose_fields, parse_answer_line

if TYPE_CHECKING:
    from tracin_ann.choices import SideName

_SENT = ("k", "rerank", "search", "recall", "damping")
"""Options that are fields of the API with the same name."""
_OTHER_BYTES = 1000
"""Of a request, besides the fields and the examples."""
_LOCAL = (
    *("exact", "tokens", "candidates", "self_influence", "html", "sketch", "dim", "seed"),
    *("task", "task_args", "batch_size", "memory_bytes", "device"),
    *("shard_workers", "ray_address", "deadline", "allow_partial"),
)
"""Options of an index that this process opens."""


@dataclass(frozen=True)
class Reply:
    """What a server answers.

    Attributes:
        n_rows: number of training rows of its index.
        fields: the fields of the records.
        batches: the answers, a batch for each request, which is sent when the batch is taken.
    """

    n_rows: int
    fields: Fields
    batches: Iterator[Answers]


def ask_server(address: str, options: Options) -> Reply:
    """Send the queries that the options of `tracin-query` describe, and return the answers.

    Raises:
        UsageError: an option is for an index in a directory, or there is no query.
        TaskError: a file of `--input` is missing, empty or malformed.
        TracinAnnError: the server rejects the query, cannot be reached, or does not reply as expected.
    """
    _reject_local_options(address, options)
    client = ServerClient(address, options["token"])
    questions = _Questions.describe(client, options)
    batches = questions.ask()
    first = next(batches)
    fields = choose_fields(
        tokens=False,
        amounts=questions.has_amounts,
        partial=any(answer.shards for answer in first),
    )
    return Reply(questions.n_rows["train"], fields, chain([first], batches))


def _reject_local_options(address: str, options: Options) -> None:
    """Reject options that only an index in a directory has.

    Raises:
        UsageError: naming the option.
    """
    given = find_given_options()
    flags = {str(parameter.name): parameter.opts[0] for parameter in click.get_current_context().command.params}
    got = [flags[name] for name in _LOCAL if name in given]
    if options["rerank"] == "exact":
        got.append("--rerank exact")
    if options["own_ids"]:
        got += [f"--own-ids with {flags[name]}" for name in ("only", "without", "against") if options[name]]
    if got:
        what, remedy = f"{got[0]} needs an index in a directory", f"name its directory, or leave out {got[0]}"
        raise UsageError(problem(what, got=address, expected="DIR", remedy=remedy))


@dataclass(frozen=True)
class _Group:
    """Examples of one request.

    Attributes:
        name: the file that they are from, or `--text`; "" if they are from several.
        first: the position of the first one in it.
        records: the records.
        picture: the bytes of a picture, instead of records.
    """

    name: str
    first: int = 0
    records: list[Json] = field(default_factory=list)
    picture: bytes | None = None

    @property
    def size(self) -> int:
        """Return the number of examples."""
        return len(self.records) if self.picture is None else 1


@dataclass(frozen=True)
class _Questions:
    """The queries of a command, and what the server needs to answer them.

    Attributes:
        client: the server.
        options: those of the command.
        score: the name of the score; None: that of the index.
        about: the server's description of the index.
        n_rows: number of rows of the sides `train` and `query`.
        limit: queries of a request at most.
        most_bytes: bytes of a request at most.
    """

    client: ServerClient
    options: Options
    score: str | None
    about: Json
    n_rows: dict[str, int]
    limit: int
    most_bytes: int

    @classmethod
    def describe(cls, client: ServerClient, options: Options) -> _Questions:
        """Return the queries of a command to a server, which tells the size of its index and its limits.

        Raises:
            UsageError: the options name two scores.
        """
        score, about = choose_score(options), client.get("index")
        with client.check_reply():
            # A server without its task does not know the queries, and says what is wrong when it is asked.
            n_queries = sys.maxsize if about["query_rows"] is None else int(about["query_rows"])
            n_rows = {"train": int(about["rows"]), "query": n_queries}
            limit, most_bytes = (int(about["limits"][name]) for name in ("rows", "bytes"))
            if limit < 1:
                raise ValueError(f"at most {limit} queries")
            _ = about["generation"], about["default_score"]
        return cls(client, options, score, about, n_rows, limit, most_bytes)

    @property
    def has_amounts(self) -> bool:
        """Return whether hits have estimated changes of the loss."""
        return (self.score or self.about["default_score"]) in CURVATURES

    def ask(self) -> Iterator[Answers]:
        """Yield the answers: of examples that are not in the index, of rows of query_data, and of training rows."""
        sides: dict[str, SideName] = {"ids": "query", "train_ids": "train"}
        rows = {side: self._list_rows(name, side) for name, side in sides.items() if self.options[name]}
        self._check_together(len(rows))
        start = 0
        for group in self._group_examples():
            yield self._read_answers(self._send_examples(group), start, group.size)
            start += group.size
        if not start and not rows:
            # The server says that there is no query.
            rows = {"query": ()}
        for side, members in rows.items():
            for at in range(0, max(1, len(members)), self._step):
                part = members[at : at + self._step]
                yield self._read_answers(self._send_rows(side, part), 0, len(part))

    @property
    def _is_single(self) -> bool:
        """Return whether all queries have one answer."""
        return bool(self.options["together"] or self.options["against"])

    @property
    def _step(self) -> int:
        """Return the largest number of queries of a request."""
        return sys.maxsize if self._is_single else self.limit

    def _check_together(self, n_sides: int) -> None:
        """Check that the server can take the mean of all queries.

        Raises:
            UsageError: they are rows of two data sets, or pictures.
        """
        if self.options["together"] and (n_sides > 1 or any(isinstance(part, Path) for _, part in self._parts)):
            what, got = "a server takes the mean of rows of one data set, or of records", "others too"
            remedy = "leave out --together, or name the directory of the index"
            raise UsageError(problem(what, got=got, expected="--ids, --train-ids, or records", remedy=remedy))

    @cached_property
    def _parts(self) -> list[tuple[str, Path | Sequence[Json]]]:
        """Return the examples of `--input` and `--text` with their names: paths of pictures, and records."""
        parts: list[tuple[str, Path | Sequence[Json]]] = []
        if self.options["input"]:
            from tracin_ann.task import is_image_file, read_records

            for file in self.options["input"]:
                parts.append((file, Path(file) if is_image_file(file) else read_records(file)))
        return [*parts, ("--text", [{"text": text} for text in self.options["text"]])]

    def _group_examples(self) -> Iterator[_Group]:
        """Yield the examples of `--input` and `--text` by request: a picture, or records.

        Raises:
            UsageError: an example is larger than a request may be, or JSON cannot represent it.
        """
        most = self.most_bytes - _OTHER_BYTES - len(json.dumps(self._fields))
        if self._is_single:
            parts = [(name, part) for name, part in self._parts if not isinstance(part, Path)]
            records = [record for _, part in parts for record in part]
            used = sum(_measure(record, f"{place} of all records") for place, record in enumerate(records))
            _check_size("all records", used, most)
            if records:
                yield _Group("", records=records)
            return
        for name, part in self._parts:
            if isinstance(part, Path):
                _check_size(name, part.stat().st_size, most)
                yield _Group(name, picture=part.read_bytes())
                continue
            group, used = _Group(name), 0
            for place, record in enumerate(part):
                size = _measure(record, f"{place} of {name}")
                _check_size(f"record {place} of {name}", size, most)
                if group.size == self._step or used + size > most:
                    yield group
                    group, used = _Group(name, place), 0
                group.records.append(record)
                used += size
            if group.records:
                yield group

    def _list_rows(self, name: str, side: SideName) -> tuple[Any, ...]:
        """Return the rows that an option names: positions, or the task's own ids."""
        named = self.options[name]
        return named.expand(self.n_rows[side], f"no such row in {side}_data") if isinstance(named, Positions) else named

    @cached_property
    def _fields(self) -> Json:
        """Return the fields that all requests have."""
        only, without = self.options["only"], self.options["without"]
        return {name: self.options[name] for name in _SENT} | {
            "score": self.score,
            "where": list(self.options["where"]),
            "only": None if only is None else self._list_rows("only", "train"),
            "without": self._list_rows("without", "train") if without else [],
            "checkpoints": self.options["checkpoints"],
        }

    @property
    def _same(self) -> Json:
        """Return the parameter by which all requests read one generation of the index."""
        return {"generation": self.about["generation"]}

    def _send_examples(self, group: _Group) -> Json:
        try:
            if group.picture is not None:
                return self.client.upload("answers/picture", self._fields | self._same, group.picture)
            others = {"records": group.records, "first": group.first, "together": bool(self.options["together"])}
            return self.client.post("answers", self._same, self._fields | others)
        except TaskError as error:
            raise type(error)(f"{group.name}: {error}" if group.name else str(error)) from error

    def _send_rows(self, side: SideName, members: Sequence[Any]) -> Json:
        named = {"ids" if self.options["own_ids"] else "rows": members}
        against = self._list_rows("against", "query") if self.options["against"] else ()
        others = {"side": side, "together": self.options["together"], "against": against}
        return self.client.get("answers", self._fields | named | others | self._same)

    def _read_answers(self, reply: Json, start: int, n_queries: int) -> Answers:
        """Return the answers of a reply; queries of the side `input` are counted from `start` on."""
        found: list[Answer] = []
        texts: dict[tuple[SideName, int], str] = {}
        with self.client.check_reply():
            for line, how, scored in zip(reply["answers"], reply["how"], reply["rows_scored"], strict=True):
                answer, shown = parse_answer_line(line)
                first = start if answer.side == "input" else 0
                query = first + answer.query if isinstance(answer.query, int) else answer.query
                members = tuple(first + row for row in answer.members)
                found.append(replace(answer, query=query, members=members, how=str(how), rows_scored=int(scored)))
                texts |= {(side, row + first * (side == "input")): text for (side, row), text in shown.items()}
            n_expected = 1 if self._is_single else n_queries
            if len(found) != n_expected:
                raise ValueError(f"{len(found)} answers to {n_expected} queries")
        answers = Answers(found, lambda side, row: None)
        answers.texts = lambda side, row: texts.get((side, row))
        return answers


def _measure(record: Json, place: str) -> int:
    """Return the bytes of a record in a request.

    Raises:
        UsageError: JSON cannot represent a value.
    """
    try:
        return len(json.dumps(record)) + len(", ")
    except (TypeError, ValueError, RecursionError) as error:
        expected, remedy = "text, numbers, lists and null", "convert its values, or name the directory of the index"
        raise UsageError(problem(f"record {place} has no JSON", got=error, expected=expected, remedy=remedy)) from error


def _check_size(what: str, size: int, most: int) -> None:
    """Check that examples fit into a request.

    Raises:
        UsageError: they do not.
    """
    if size > most:
        got, expected, remedy = f"{size:,} bytes", f"at most {most:,}", "name the directory of the index"
        raise UsageError(problem(f"{what}: too large for a request", got=got, expected=expected, remedy=remedy))
