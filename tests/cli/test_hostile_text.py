"""Text that attacks a terminal, a spreadsheet or an HTML page is shown and written safely, in every locale."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest

from hostile import RAW, SIGNS, TEXTS, hostile_task, query_arguments, query_index, shell
from invocation import run
from pages import Page
from tasks.own_ids import QUERIES, N, make_numbered_rows
from tracin_ann import InfluenceIndex, QueryOptions
from tracin_ann.cli.info import main as info_command
from tracin_ann.cli.query import main as query_command
from tracin_ann.results.formats import guard_formula
from tracin_ann.store.arrays import read_arrays
from tracin_ann.store.generations import generation_folder
from tracin_ann.store.manifest import FORMAT, Manifest, content_digest
from tracin_ann.text import escape_control


def test_visible_text_is_one_line_without_terminal_controls() -> None:
    for text, shown in SIGNS.items():
        assert escape_control(text) == shown
    assert escape_control("naïve ✓ 😀 א") == "naïve ✓ 😀 א"
    assert escape_control("a\tb\nc\u2028d") == r"a\tb\nc\u2028d"
    assert escape_control("a\tb\nc", "\n\t") == "a\tb\nc"


def test_tables_escape_control_characters_in_text_and_ids(
    hostile_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    answers, ranked = (
        query_index(hostile_folder, "--ids", f"0-{QUERIES - 1}", "-k", N).stdout,
        query_index(hostile_folder, "--self-influence").stdout,
    )
    assert not RAW.search(answers) and not RAW.search(ranked)
    for shown in SIGNS.values():
        assert shown in answers


def test_text_of_a_manifest_is_escaped_on_a_terminal(hostile_folder: Path, index_copy: Path) -> None:
    manifest = Manifest.read(index_copy)
    forged = json.loads((index_copy / "manifest.json").read_text())
    forged["index"]["reason"] = "\x1b]0;owned\x07\u202eflat\nrows        7"
    forged["build"]["task"]["reference"] = "\x1b[31mnowhere.py:task"
    content = {name: value for name, value in forged.items() if name not in ("format", "digest")}
    text = json.dumps({"format": FORMAT, "digest": content_digest(content), **content})
    for path in (index_copy / "manifest.json", generation_folder(index_copy, manifest.generation) / "manifest.json"):
        path.write_text(text)
    output = run(info_command, index_copy).stdout
    assert not RAW.search(output) and r"\x1b]0;owned\x07\u202eflat\nrows" in output
    for result in (
        run(query_command, index_copy, "--ids", "0"),
        run(query_command, index_copy, "--ids", "0", "--debug"),
    ):
        assert result.exit_code and not RAW.search(result.stderr)


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1+1", "'+1+1"),
        ("-1+1", "'-1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1+1", "'\t=1+1"),
        ("\r=1+1", "'\r=1+1"),
        ("\x1b=1", "'\x1b=1"),
        ("-2.5", "-2.5"),
        ("+1e-7", "+1e-7"),
        ("-.5", "-.5"),
        ("-٣", "'-٣"),
        ("-1\n", "'-1\n"),
        ("a=1", "a=1"),
        ("'=1", "'=1"),
        ("", ""),
    ],
)
def test_cells_that_a_spreadsheet_would_evaluate_are_escaped(text: str, cell: str) -> None:
    assert guard_formula(text) == cell


def test_csv_escapes_text_unless_the_option_disables_it(hostile_folder: Path, tmp_path: Path) -> None:
    arguments = ("--ids", f"0-{QUERIES - 1}", "-k", N)
    for more, guards in (((), True), (("--csv-raw",), False)):
        assert query_index(hostile_folder, *arguments, *more, "--output", tmp_path / "a.csv").exit_code == 0
        with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
            records = list(csv.DictReader(file))
        texts = {record["text"] for record in records}
        assert ("'=HYPERLINK(A1)" in texts, "=HYPERLINK(A1)" in texts) == (guards, not guards)
        assert ("'@SUM(A1)" in texts, "-2.5" in texts) == (guards, True)
        assert {float(record["score"]) < 0 for record in records} == {True, False}
    refused = query_index(hostile_folder, *arguments, "--csv-raw", "--format", "jsonl")
    assert refused.exit_code == 2 and "--csv-raw applies to CSV only: got --format jsonl" in refused.stderr
    refused = query_index(hostile_folder, *arguments, "--csv-raw", "--html", tmp_path / "a.html")
    assert refused.exit_code == 2 and "--csv-raw applies to CSV only: got --html alone" in refused.stderr


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
def test_every_format_is_written_in_every_locale(hostile_folder: Path, tmp_path: Path) -> None:
    arguments = ("--ids", f"0-{QUERIES - 1}", "-k", N, "-q")
    index = InfluenceIndex.open(hostile_folder / "index", hostile_task(hostile_folder), device="cpu")
    expected = index.query(range(QUERIES), options=QueryOptions(k=N)).lines()
    for form in ("jsonl", "csv", "table"):
        done = shell('"$@"', *query_arguments(hostile_folder, *arguments, "--format", form), **ASCII)
        assert (done.returncode, done.stderr) == (0, b"")
        output = done.stdout.decode("ascii")
        if form == "jsonl":
            assert [json.loads(line) for line in output.splitlines()] == expected
    for form in ("jsonl", "csv", "parquet"):
        assert (
            shell(
                '"$@"', *query_arguments(hostile_folder, *arguments, "--output", tmp_path / f"ascii.{form}"), **ASCII
            ).returncode
            == 0
        )
        assert query_index(hostile_folder, *arguments, "--output", tmp_path / f"utf8.{form}").exit_code == 0
        assert (tmp_path / f"ascii.{form}").read_bytes() == (tmp_path / f"utf8.{form}").read_bytes()
    lines = (tmp_path / "ascii.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == expected
    texts = set(pd.read_parquet(tmp_path / "ascii.parquet")["text"])
    assert r"lone \ud800" in texts and "\x1b[2Jcleared" in texts
    assert r"lone \ud800" in (tmp_path / "ascii.csv").read_text(encoding="utf-8")


def test_lone_surrogates_are_accepted_in_frames_and_columns(hostile_folder: Path) -> None:
    index = InfluenceIndex.open(hostile_folder / "index", hostile_task(hostile_folder), device="cpu")
    answers = index.query(range(QUERIES), options=QueryOptions(k=N))
    assert r"lone \ud800" in set(answers.to_pandas()["text"])
    assert "lone \ud800" in index.columns["label"]
    assert not RAW.search(answers._repr_html_()) and not RAW.search(index.self_influence()._repr_html_())
    (path,) = (hostile_folder / "index").rglob("columns.npz")
    assert read_arrays(path)["ids"].tolist() == [
        f"{row[2]} {TEXTS[row[2] % len(TEXTS)]}" for row in make_numbered_rows(N, 1)
    ]
    assert index.positions("train", [f"{row[2]} {TEXTS[row[2] % len(TEXTS)]}" for row in make_numbered_rows(3, 1)]) == (
        0,
        1,
        2,
    )


@pytest.mark.parametrize("options", [("--ids", "0-6"), ("--self-influence",)], ids=lambda options: options[0])
def test_pages_contain_escapes_in_place_of_control_characters(
    hostile_folder: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    path = tmp_path / "page.html"
    result = query_index(hostile_folder, *options, "-k", N, "--html", path)
    assert result.exit_code == 0, result.stderr
    page = Page(path)
    assert not RAW.search(page.source)
    for shown in SIGNS.values():
        assert shown in page.text
    data = json.loads(page.scripts[0])
    if options[0] == "--self-influence":
        assert {row["text"] for row in data["rows"]} >= set(SIGNS)
