"""Decisions survive the process, replace each other, and are exported for people and programs."""

from __future__ import annotations

import csv
import io
import json
import signal
import sqlite3
import subprocess
import sys

import pytest

from tracin_ann.errors import UsageError
from tracin_ann.serve.decisions import FIELDS, Decision, Decisions, default_path

DECIDE = """
import sys
from pathlib import Path
from tracin_ann.serve.decisions import Decision, Decisions
decisions, row = Decisions(Path(sys.argv[1])), 0
while True:
    decisions.record(Decision(row, f"row {row}", "keep"))
    print(row, flush=True)
    row += 1
"""


@pytest.fixture
def decisions(tmp_path):
    return Decisions(tmp_path / "index.decisions.sqlite")


def test_the_last_decision_about_a_row_counts(decisions):
    assert decisions.read() == {} and not decisions.path.exists()
    decisions.record(Decision(7, "seven", "drop", "3"))
    decisions.record(Decision(2, 2, "keep", "1"))
    last = decisions.record(Decision(7, "seven", "relabel", "3", "5"))
    assert [(d.row, d.id, d.verdict, d.new_label) for d in decisions.read().values()] == [
        (2, 2, "keep", ""),
        (7, "seven", "relabel", "5"),
    ]
    assert Decisions(decisions.path).find(7) == last and last.decided_at.endswith("+00:00")
    decisions.forget(7)
    assert decisions.find(7) is None and decisions.find(2) is not None


def test_ids_keep_their_type_and_texts_their_characters(decisions):
    for row, name in enumerate((1, "1", "é\u202e\0'\"", "\ud800")):
        decisions.record(Decision(row, name, "keep", "=1+1"))
    assert [d.id for d in decisions.read().values()] == [1, "1", "é\u202e\0'\"", "\ud800"]


def test_exports_hold_all_fields_and_no_formula(decisions):
    decisions.record(Decision(0, "=cmd()", "relabel", "@a", "-b"))
    (row,) = csv.DictReader(io.StringIO(decisions.export_csv()))
    assert list(row) == FIELDS.names
    assert (row["id"], row["label"], row["new_label"]) == ("'=cmd()", "'@a", "'-b")
    (record,) = json.loads(decisions.export_json())
    assert (record["id"], record["label"], record["new_label"]) == ("=cmd()", "@a", "-b")
    assert set(record) == set(FIELDS.names)


def test_other_verdicts_and_files_are_rejected(decisions, tmp_path):
    with pytest.raises(UsageError, match="keep or relabel or drop"):
        Decision(0, 0, "burn")  # type: ignore[arg-type]
    (tmp_path / "text").write_text("not a database, but long enough to look at its header" * 20)
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE t (x)")
    other.close()
    for name, got in (("text", "not a database"), ("other", "another SQLite file")):
        with pytest.raises(UsageError, match=got):
            Decisions(tmp_path / name).record(Decision(0, 0, "keep"))


@pytest.mark.slow
def test_decisions_of_a_killed_process_are_complete(tmp_path):
    path = tmp_path / "index.decisions.sqlite"
    process = subprocess.Popen([sys.executable, "-c", DECIDE, path], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(20)][-1]
        process.send_signal(signal.SIGKILL)
    rows = list(Decisions(path).read())
    # The last one may be stored, and not yet reported.
    assert rows == list(range(len(rows))) and len(rows) > seen


def test_the_file_is_beside_the_index(tmp_path):
    assert default_path(tmp_path / "runs" / "index") == tmp_path / "runs" / "index.decisions.sqlite"
