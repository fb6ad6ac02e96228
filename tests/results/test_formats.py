"""JSON lines, CSV, Parquet and frames contain the same answers; ids of the task; groups and contrasts of rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import oracle
from tasks import own_ids
from tasks.own_ids import QUERIES, N, make_numbered_rows, make_task
from tasks.toy import CONFIG, RATES, Toy, cross_entropy, make_rows, make_toy_task
from tracin_ann import InfluenceIndex, QueryOptions, build
from tracin_ann.choices import SCORES, SIDE_NAMES
from tracin_ann.cli.query import main as query_command
from tracin_ann.errors import TaskError, UsageError
from tracin_ann.results import Answer, Hit
from tracin_ann.results.formats import HITS, SCHEMA, Fields, answer_line, open_writer, parse_answer_line
from tracin_ann.store.columns import RowFilter

_IDS = st.integers(0, 2**60) | st.text(max_size=5)
_NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
_ROWS = st.integers(0, 9)
_SEVERAL = st.lists(_NUMBERS, max_size=2).map(tuple)
_HITS = st.lists(
    st.builds(
        Hit,
        id=_IDS,
        row=_ROWS,
        score=_NUMBERS,
        stored_score=st.none() | _NUMBERS,
        error=st.none() | _NUMBERS,
        by_checkpoint=_SEVERAL,
        of_means=_SEVERAL,
        tokens=st.none() | _SEVERAL,
        amount=st.none() | _NUMBERS,
    ),
    max_size=3,
).map(tuple)
_PLACES = st.lists(_ROWS, max_size=2).map(tuple)
_ANSWERS = st.builds(
    Answer,
    query=_IDS,
    side=st.sampled_from(list(SIDE_NAMES)),
    members=st.lists(_ROWS, min_size=1, max_size=3).map(tuple),
    proponents=_HITS,
    opponents=_HITS,
    rows_scored=st.just(0),
    strange=st.booleans(),
    against=_PLACES,
    score=st.sampled_from(SCORES),
    shards=_PLACES,
    missing_shards=_PLACES,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("formats")
    own_ids.build_indexes(directory, "formats_task.py", ("words", "numbers", "positions"))
    return directory


@pytest.fixture(scope="module")
def index(folder: Path) -> InfluenceIndex:
    return InfluenceIndex.open(folder / "words", make_task(folder, "words"), device="cpu")


@pytest.fixture(scope="module")
def true_scores(folder: Path) -> np.ndarray:
    """True scores [queries, rows] in float64."""
    nets = []
    for i in range(len(RATES)):
        nets.append(Toy())
        nets[-1].load_state_dict(torch.load(folder / f"checkpoint{i}.pt"))
    asked, train = (
        [oracle.gradients(net, cross_entropy, make_rows(n, seed)) for net in nets] for n, seed in ((QUERIES, 2), (N, 1))
    )
    return oracle.tracin(torch.stack(asked, 1), torch.stack(train, 1), RATES)


@given(_ANSWERS, st.dictionaries(st.tuples(st.sampled_from(list(SIDE_NAMES)), _ROWS), st.text(max_size=3)))
def test_a_line_is_parsed_to_the_answer_and_the_texts_that_it_was_made_of(answer: Answer, texts: Any) -> None:
    line = json.loads(json.dumps(answer_line(answer, lambda side, row: texts.get((side, row)))))
    parsed, found = parse_answer_line(line)
    assert parsed == answer
    assert answer_line(parsed, lambda side, row: found.get((side, row))) == line
    assert found.items() <= texts.items()


def run_query(folder: Path, kind: str, *arguments: object) -> Result:
    named = ("--task", folder / "formats_task.py:task", "--task-arg", f"folder={folder}", "--task-arg", f"kind={kind}")
    words = [str(argument) for argument in (folder / kind, *named, "--device", "cpu", *arguments)]
    return CliRunner().invoke(query_command, words)


def flatten(lines: str) -> pd.DataFrame:
    """Return the frame of JSON lines that the other formats must equal."""
    records = []
    for answer in map(json.loads, lines.splitlines()):
        assert answer["schema"] == SCHEMA
        for kind in ("proponent", "opponent"):
            for rank, hit in enumerate(answer[f"{kind}s"], start=1):
                query = {"query": answer["query"], "query_row": answer.get("row"), "side": answer["side"]}
                query |= {"strange": answer.get("strange", False), "query_text": answer.get("text")}
                records.append({**query, **hit, "kind": kind, "rank": rank})
    return pd.DataFrame.from_records(records, columns=HITS.names)


def assert_same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    assert list(one.columns) == list(other.columns) == HITS.names
    assert len(one) == len(other) > 0
    for name in HITS.names:
        for mine, theirs in zip(one[name], other[name], strict=True):
            if isinstance(mine, list | np.ndarray) or isinstance(theirs, list | np.ndarray):
                assert list(mine) == list(theirs), name
            else:
                assert mine == theirs or (pd.isna(mine) and pd.isna(theirs)), (name, mine, theirs)


@pytest.mark.parametrize("kind", ["words", "numbers", "positions"])
@pytest.mark.parametrize("more", [(), ("--rerank", "exact"), ("--rerank", "none"), ("--cosine",)], ids=" ".join)
def test_every_format_contains_the_same(folder: Path, tmp_path: Path, kind: str, more: tuple[str, ...]) -> None:
    arguments = ("--ids", "0-6", "--train-ids", "3", "-k", 4, *more)
    lines = run_query(folder, kind, *arguments, "--format", "jsonl").stdout
    for name, raw in (("a.csv", ("--csv-raw",)), ("a.parquet", ())):
        assert run_query(folder, kind, *arguments, *raw, "--output", tmp_path / name).exit_code == 0
    index = InfluenceIndex.open(folder / kind, make_task(folder, kind), device="cpu")
    rerank: Any = more[1] if "--rerank" in more else "stored"
    answers = index.query(range(7), [3], QueryOptions(k=4, rerank=rerank, cosine="--cosine" in more))
    assert [json.dumps(line, ensure_ascii=False) for line in answers.lines()] == lines.splitlines()
    frame = answers.to_pandas()
    assert frame.attrs["tracin_ann.schema"] == SCHEMA
    assert_same(frame, flatten(lines))
    parquet = pq.read_table(tmp_path / "a.parquet")
    assert parquet.schema.metadata[b"tracin_ann.schema"] == str(SCHEMA).encode()
    assert str(parquet.schema.field("id").type) == ("string" if kind == "words" else "int64")
    assert_same(pd.read_parquet(tmp_path / "a.parquet"), flatten(lines))
    texts: Any = {"keep_default_na": False, "na_values": {name: [""] for name in HITS.names}}
    texts["converters"] = {name: lambda v: json.loads(v) if v else None for name in ("by_checkpoint", "of_means")}
    read = pd.read_csv(tmp_path / "a.csv", **texts)
    assert_same(read, flatten(lines))


def test_ids_come_from_the_task_and_rows_are_positions(index: InfluenceIndex) -> None:
    answer = index.query([2], options=QueryOptions(k=N))[0]
    assert (answer.query, answer.row) == ("row-0202", 2)
    assert {hit.id: hit.row for hit in answer.hits} == {f"row-{100 + hit.row:04}": hit.row for hit in answer.hits}
    assert [row.id for row in index.self_influence()] == [f"row-{100 + row.row:04}" for row in index.self_influence()]


def test_rows_are_selected_by_ids_of_the_task(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("row-0203\n\nrow, 206\nrow-0201\n")
    own = run_query(
        folder, "words", "--own-ids", "--ids", f"@{tmp_path / 'ids.txt'}", "--without", "row-0100", "--format", "jsonl"
    )
    plain = run_query(folder, "words", "--ids", "3,6,1", "--without", "0", "--format", "jsonl")
    assert own.exit_code == plain.exit_code == 0
    assert own.stdout == plain.stdout
    numbers = run_query(folder, "numbers", "--own-ids", "--train-ids", "107", "--format", "jsonl").stdout
    assert json.loads(numbers)["row"] == 7


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("words", ("--own-ids", "--ids", "row-9999"), ["no such id in query_data", "'row-9999'", "such as 'row-0200'"]),
        ("words", ("--own-ids", "--only", "row-0200", "--ids", "row-0200"), ["no such id in train_data", "row-0200"]),
        ("positions", ("--own-ids", "--ids", "0"), ["no such id", "a task with ids", "positions, or define Task.ids"]),
        ("words", ("--ids", "@nowhere.txt"), ["cannot read nowhere.txt"]),
        ("words", ("--ids", "0", "--format", "parquet"), ["Parquet cannot be written to stdout", "--output"]),
        ("words", ("--ids", "0", "--output", "a.txt"), ["a table cannot be written to a file", "jsonl, csv, parquet"]),
        ("words", ("--against", "0"), ["a contrast needs two sets", "--ids"]),
        ("words", ("--ids", "0", "--against", "1", "--together"), ["--against", "--together", "remove one"]),
    ],
)
def test_impossible_options_are_rejected(
    folder: Path, kind: str, arguments: tuple[str, ...], message: list[str]
) -> None:
    result = run_query(folder, kind, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert all(word in result.stderr for word in message), result.stderr


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (lambda row: row[1], "an invalid id for row 3: got 0, the id of row 0"),
        (lambda row: row[2] if row[2] % 2 else str(row[2]), "got 101, the first row's is '100'"),
        (lambda row: 1.5, "got 1.5, expected an int or a str"),
        (lambda row: True, "got True, expected an int or a str"),
    ],
)
def test_invalid_ids_leave_no_index(folder: Path, tmp_path: Path, ids: Any, message: str) -> None:
    with pytest.raises(TaskError, match="Task.ids") as refused:
        sides = {"train_data": lambda: make_numbered_rows(N, 1), "query_data": lambda: make_numbered_rows(QUERIES, 2)}
        build(make_toy_task(tmp_path, **sides, ids=ids), tmp_path / "out", CONFIG)
    assert message in str(refused.value)
    with pytest.raises(Exception, match="no file, expected a JSON file"):
        InfluenceIndex.open(tmp_path / "out")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    fields = Fields((("id", "id"), ("score", "float")))
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        path = tmp_path / name
        path.write_text("before")
        with pytest.raises(RuntimeError, match="stop"), open_writer(path.suffix[1:], path, fields) as write:  # type: ignore[arg-type]
            write([{"id": 1, "score": 0.5}])
            raise RuntimeError("stop")
        assert path.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.jsonl", "a.parquet"]


def test_several_writes_make_one_file(tmp_path: Path) -> None:
    fields = Fields((("id", "id"), ("score", "float")))
    lots = [[{"id": i, "score": i / 2}] for i in range(5)]
    for form in ("csv", "parquet", "jsonl"):
        with open_writer(form, tmp_path / f"a.{form}", fields) as write:  # type: ignore[arg-type]
            for lot in lots:
                write(lot)
    read = pd.read_json(tmp_path / "a.jsonl", lines=True)
    for other in (pd.read_csv(tmp_path / "a.csv"), pd.read_parquet(tmp_path / "a.parquet")):
        assert other.to_dict("list") == read.to_dict("list") == {"id": [*range(5)], "score": [i / 2 for i in range(5)]}
    stream = io.StringIO()
    with open_writer("csv", stream, fields) as write:
        write([])
    assert stream.getvalue() == "id,score\n"


def test_parquet_rejects_ids_of_two_types(tmp_path: Path) -> None:
    fields = Fields((("id", "id"),))
    with (
        pytest.raises(UsageError, match="ids of two types"),
        open_writer("parquet", tmp_path / "a.parquet", fields) as write,
    ):
        write([{"id": 1}])
        write([{"id": "one"}])
    assert list(tmp_path.iterdir()) == []


GROUP, AGAINST = [0, 2, 5], [1, 6]


@pytest.mark.parametrize("how", ["stored", "exact scan", "re-scored exactly"])
def test_a_group_scores_as_the_mean_of_its_members(index: InfluenceIndex, true_scores: np.ndarray, how: str) -> None:
    options = QueryOptions(k=N, exact=how == "exact scan", rerank="exact" if how == "re-scored exactly" else "stored")
    (group,) = index.query(GROUP, options=options, together=True)
    assert (group.members, group.row, group.query) == (tuple(GROUP), None, "mean of 3")
    each = index.query(GROUP, options=options)
    mean: dict[int, float] = dict.fromkeys(range(N), 0.0)
    for answer in each:
        for hit in answer.hits:
            mean[hit.row] += hit.score / len(GROUP)
    assert len(group.hits) == N
    assert {hit.row: hit.score for hit in group.hits} == pytest.approx(mean, rel=1e-5, abs=1e-7)
    if how != "stored":
        of_rows = true_scores[GROUP].mean(axis=0)
        assert {hit.row: hit.score for hit in group.hits} == pytest.approx(dict(enumerate(of_rows)), rel=1e-5, abs=1e-7)
        assert [hit.row for hit in group.proponents] == [i for i in np.argsort(-of_rows) if of_rows[i] > 0]


@pytest.mark.parametrize("exact", [False, True])
def test_a_contrast_is_the_difference_of_two_means(index: InfluenceIndex, true_scores: np.ndarray, exact: bool) -> None:
    (answer,) = index.contrast(GROUP, AGAINST, options=QueryOptions(k=N, exact=exact))
    assert (answer.members, answer.against) == (tuple(GROUP), tuple(AGAINST))
    if exact:
        means = np.stack([true_scores[GROUP].mean(axis=0), true_scores[AGAINST].mean(axis=0)])
    else:
        scores = index.features("query", range(QUERIES)).astype(np.float64) @ index.view().take(np.arange(N)).T
        means = np.stack([scores[GROUP].mean(axis=0), scores[AGAINST].mean(axis=0)])
    for hit in answer.hits:
        assert hit.of_means == pytest.approx(means[:, hit.row], rel=1e-4, abs=1e-6)
        assert hit.score == pytest.approx(hit.of_means[0] - hit.of_means[1], rel=1e-4, abs=1e-6)
    assert len(answer.hits) == N


def test_contributions_of_checkpoints_add_up(index: InfluenceIndex) -> None:
    for checkpoints in ((0, 1), (1,), (1, 0)):
        for hit in index.query([3], options=QueryOptions(k=N, checkpoints=checkpoints))[0].hits:
            assert len(hit.by_checkpoint) == len(checkpoints)
            assert sum(hit.by_checkpoint) == pytest.approx(hit.score, rel=1e-5, abs=1e-7)
    exact = index.query([3], options=QueryOptions(k=N, exact=True))[0].hits
    assert all(sum(hit.by_checkpoint) == pytest.approx(hit.stored_score) for hit in exact)


def test_a_filter_that_passes_no_row_gives_no_hit(index: InfluenceIndex) -> None:
    options = QueryOptions(rows=RowFilter(where=("label=9",)))
    assert index.query([0], options=options)[0].hits == ()
    assert index.query([0, 1], options=options, together=True).records() == []


def test_a_notebook_shows_text_as_text(index: InfluenceIndex) -> None:
    shown = index.query([4], options=QueryOptions(k=N))._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "<script" not in shown
    assert shown.count("<table>") == 1
    assert "<script" not in index.self_influence()._repr_html_()


def test_results_have_plots(index: InfluenceIndex) -> None:
    figure = index.query([0, 1], options=QueryOptions(k=3)).plot()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["query row-0200", "query row-0201"]
    assert len(index.self_influence(5).plot().axes[0].lines[0].get_xdata()) == 5
