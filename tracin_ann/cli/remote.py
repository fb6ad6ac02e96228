"""Queries that a running `tracin-serve` answers: its address takes the place of the directory of an index.

The server has the index and the model in memory, so a query takes no longer than its answer, and this process imports
neither the task nor its libraries.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracin_ann.choices import CURVATURES
from tracin_ann.cli.command import find_given_options
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.index_options import Options
from tracin_ann.cli.parameters import Positions
from tracin_ann.cli.server_client import Json, ServerClient
from tracin_ann.errors import UsageError, problem

if TYPE_CHECKING:
    from tracin_ann.choices import SideName
    from tracin_ann.scoring import Answer, Answers, Fields

_SENT = ("k", "rerank", "search", "recall", "damping")
"""Options that are fields of the API with the same name."""
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
    with pause_collector():
        from tracin_ann.scoring import choose_fields
    questions = _Questions.describe(client, options)
    batches = questions.ask()
    first = next(batches)
    fields = choose_fields(
        tokens=False,
        amounts=questions.score in CURVATURES,
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
class _Questions:
    """The queries of a command, and what the server needs to answer them.

    Attributes:
        client: the server.
        options: those of the command.
        n_rows: number of rows of the sides `train` and `query`.
        limit: queries of a request at most.
        score: the name of the score.
    """

    client: ServerClient
    options: Options
    n_rows: dict[str, int]
    limit: int
    score: str

    @classmethod
    def describe(cls, client: ServerClient, options: Options) -> _Questions:
        """Return the queries of a command to a server, which tells the size of its index and its limits."""
        about = client.get("index")
        with client.check_reply():
            # A server without its task does not know the queries, and says what is wrong when it is asked.
            n_queries = sys.maxsize if about["query_rows"] is None else int(about["query_rows"])
            n_rows = {"train": int(about["rows"]), "query": n_queries}
            limit, score = int(about["limits"]["rows"]), str(about["default_score"])
        named = "cosine" if options["cosine"] else options["score"]
        return cls(client, options, n_rows, limit, named or score)

    def ask(self) -> Iterator[Answers]:
        """Yield the answers: of examples that are not in the index, of rows of query_data, and of training rows."""
        sides: dict[str, SideName] = {"ids": "query", "train_ids": "train"}
        rows = {side: self._list_rows(name, side) for name, side in sides.items() if self.options[name]}
        self._check_together(len(rows))
        start = 0
        for group in self._group_examples():
            yield self._read_answers(self._send_examples(group), start)
            start += 1 if isinstance(group, bytes) else len(group)
        if not start and not rows:
            # The server says that there is no query.
            rows = {"query": ()}
        for side, members in rows.items():
            for at in range(0, max(1, len(members)), self._step):
                yield self._read_answers(self._send_rows(side, members[at : at + self._step]), 0)

    @property
    def _step(self) -> int:
        """Return the largest number of queries of a request: all for a mean or a contrast."""
        return sys.maxsize if self.options["together"] or self.options["against"] else self.limit

    def _check_together(self, n_sides: int) -> None:
        """Check that the server can take the mean of all queries.

        Raises:
            UsageError: they are rows of two data sets, or pictures.
        """
        if self.options["together"] and (n_sides > 1 or any(isinstance(part, Path) for part in self._list_parts())):
            what, got = "a server takes the mean of rows of one data set, or of records", "others too"
            remedy = "leave out --together, or name the directory of the index"
            raise UsageError(problem(what, got=got, expected="--ids, --train-ids, or records", remedy=remedy))

    def _list_parts(self) -> list[Path | Sequence[Json]]:
        """Return the examples of `--input` and `--text`: paths of pictures, and records."""
        parts: list[Path | Sequence[Json]] = []
        if self.options["input"]:
            from tracin_ann.task import is_image_file, read_records

            parts += [Path(file) if is_image_file(file) else read_records(file) for file in self.options["input"]]
        return [*parts, [{"text": text} for text in self.options["text"]]]

    def _group_examples(self) -> Iterator[bytes | list[Json]]:
        """Yield the examples of `--input` and `--text` by request: a picture, or records."""
        group: list[Json] = []
        for part in self._list_parts():
            if isinstance(part, Path):
                if group:
                    yield group
                yield part.read_bytes()
                group = []
                continue
            for record in part:
                group.append(record)
                if len(group) == self._step:
                    yield group
                    group = []
        if group:
            yield group

    def _list_rows(self, name: str, side: SideName) -> tuple[Any, ...]:
        """Return the rows that an option names: positions, or the task's own ids."""
        named = self.options[name]
        return named.expand(self.n_rows[side], f"no such row in {side}_data") if isinstance(named, Positions) else named

    def _make_fields(self) -> Json:
        """Return the fields that all requests have."""
        fields = {name: self.options[name] for name in _SENT}
        only, without = self.options["only"], self.options["without"]
        return fields | {
            "score": "cosine" if self.options["cosine"] and not self.options["score"] else self.options["score"],
            "where": list(self.options["where"]),
            "only": None if only is None else self._list_rows("only", "train"),
            "without": self._list_rows("without", "train") if without else [],
            "checkpoints": self.options["checkpoints"],
        }

    def _send_examples(self, group: bytes | list[Json]) -> Json:
        if isinstance(group, bytes):
            return self.client.upload("answers/picture", self._make_fields(), group)
        asked = self._make_fields() | {"records": group, "together": self.options["together"]}
        return self.client.post("answers", asked)

    def _send_rows(self, side: SideName, members: Sequence[Any]) -> Json:
        named = {"ids" if self.options["own_ids"] else "rows": members}
        against = self._list_rows("against", "query") if self.options["against"] else ()
        others = {"side": side, "together": self.options["together"], "against": against}
        return self.client.get("answers", self._make_fields() | named | others)

    def _read_answers(self, reply: Json, start: int) -> Answers:
        """Return the answers of a reply; queries of the side `input` are counted from `start` on."""
        from tracin_ann.scoring import Answers, parse_answer_line

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
        answers = Answers(found, lambda side, row: None)
        answers.texts = lambda side, row: texts.get((side, row))
        return answers
