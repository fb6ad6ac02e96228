"""Decisions of reviewers about training rows, in a SQLite file beside the index.

Every decision is one transaction with SQLite's rollback journal and full synchronisation: when `record` returns, the
decision survives a killed process and a power failure. The file is separate from the index, so a new generation or a
new build leaves it as it is. A decision holds the id of its row: pages do not show it for a row with another id.
"""

from __future__ import annotations

import datetime
import io
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from tracin_ann.errors import UsageError, problem
from tracin_ann.results import Fields, Id, open_writer
from tracin_ann.text import escape_surrogates

Verdict = Literal["keep", "relabel", "drop"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
FIELDS = Fields(
    (
        ("row", "int"),
        ("id", "id"),
        ("verdict", "text"),
        ("label", "text"),
        ("new_label", "text"),
        ("decided_at", "text"),
    )
)
_APPLICATION = 0x74726163
"""SQLite's application id of these files: "trac"."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS decisions (
    row INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    verdict TEXT NOT NULL,
    label TEXT,
    new_label TEXT,
    decided_at TEXT NOT NULL
)
"""
_WAIT = 10.0
"""Seconds to wait for another process that writes the file."""


@dataclass(frozen=True)
class Decision:
    """What a reviewer decided about a training row.

    Attributes:
        row: its position in train_data.
        id: its id.
        verdict: `keep` (the label is right), `relabel` (use `new_label`) or `drop` (remove the row).
        label: its label when the decision was made; "" if it is not known.
        new_label: the label to use; "" if there is none.
        decided_at: time in UTC, ISO 8601.
    """

    row: int
    id: Id
    verdict: Verdict
    label: str = ""
    new_label: str = ""
    decided_at: str = ""

    def __post_init__(self) -> None:
        """Reject verdicts that do not exist.

        Raises:
            UsageError: naming the verdict.
        """
        if self.verdict not in VERDICTS:
            expected = " or ".join(VERDICTS)
            raise UsageError(problem("bad verdict", got=self.verdict, expected=expected, remedy="change the verdict"))


class Decisions:
    """The decisions in a file, at most one for each row; the file is created with the first decision."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, decision: Decision) -> Decision:
        """Store a decision durably, in place of an earlier one about the row, and return it with its time."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        dated = replace(decision, decided_at=now)
        # As JSON, the ids 7 and "7" differ.
        labels = (escape_surrogates(label) for label in (dated.label, dated.new_label))
        values = [dated.row, json.dumps(dated.id), dated.verdict, *labels, now]
        with self._open() as connection:
            connection.execute("INSERT OR REPLACE INTO decisions VALUES (?, ?, ?, ?, ?, ?)", values)
        return dated

    def forget(self, row: int) -> None:
        """Remove the decision about a row, if there is one."""
        if self.path.exists():
            with self._open() as connection:
                connection.execute("DELETE FROM decisions WHERE row = ?", [row])

    def read(self) -> dict[int, Decision]:
        """Return all decisions by the position of their row, in ascending order."""
        return self._select("ORDER BY row")

    def find(self, row: int) -> Decision | None:
        """Return the decision about a row, or None if there is none."""
        return self._select("WHERE row = ?", row).get(row)

    def export_csv(self) -> str:
        """Return the decisions as CSV that no spreadsheet reads as formulas."""
        file = io.StringIO()
        with open_writer("csv", file, FIELDS) as write:
            write([asdict(decision) for decision in self.read().values()])
        return file.getvalue()

    def export_json(self) -> str:
        """Return the decisions as a JSON array."""
        return json.dumps([asdict(decision) for decision in self.read().values()], indent=2) + "\n"

    def _select(self, condition: str, *values: int) -> dict[int, Decision]:
        if not self.path.exists():
            return {}
        with self._open("BEGIN") as connection:
            found = connection.execute(f"SELECT * FROM decisions {condition}", values).fetchall()
        return {row: Decision(row, json.loads(name), *rest) for row, name, *rest in found}

    @contextmanager
    def _open(self, begin: Literal["BEGIN", "BEGIN IMMEDIATE"] = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """Yield a connection in a transaction, which is committed at the end.

        Args:
            begin: begins the transaction; one that writes begins immediate, so that it waits for another writer.

        Raises:
            UsageError: the file is not one of decisions, or cannot be opened.
        """
        try:
            with closing(sqlite3.connect(self.path, timeout=_WAIT)) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                with connection:
                    connection.execute(begin)
                    self._check(connection)
                    yield connection
        except sqlite3.Error as error:
            raise UsageError(self._describe(str(error))) from error

    def _check(self, connection: sqlite3.Connection) -> None:
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        if not tables:
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(_SCHEMA)
        elif application != _APPLICATION:
            raise UsageError(self._describe("another SQLite file"))

    def _describe(self, got: str) -> str:
        remedy = "name another file with --decisions"
        return problem(f"cannot use {self.path} for decisions", got=got, expected="a file of decisions", remedy=remedy)


def default_path(directory: Path) -> Path:
    """Return the path of the decisions of an index, beside its directory."""
    resolved = directory.resolve()
    return resolved.with_name(f"{resolved.name}.decisions.sqlite")
