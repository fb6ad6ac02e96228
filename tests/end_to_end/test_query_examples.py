"""Queries that are not in the index get the answers of the same rows in query_data, to the bit."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import oracle
from tasks import texts
from tasks.toy import CONFIG, RATES, Toy, cross_entropy, make_rows, make_toy_task
from tracin_ann import InfluenceIndex, QueryOptions, build, write_report
from tracin_ann.analysis import explain
from tracin_ann.errors import NonFiniteError, TaskError, UsageError

N_TRAIN, N_QUERIES = 60, 11
ROWS = make_rows(N_QUERIES, seed=2)


def margin(model, batch):
    """Return the negative log-odds of the label: a query loss that is not the training loss."""
    log_p = F.log_softmax(model(batch[0]), dim=1).gather(1, batch[1][:, None])[:, 0]
    return torch.log1p(-log_p.exp()) - log_p


def make_task(folder, **changes):
    fields = {
        "train_data": lambda: make_rows(N_TRAIN),
        "query_data": lambda: ROWS,
        "query_loss": margin,
        "describe": lambda row: f"a {row[1]}",
    }
    return make_toy_task(folder, **(fields | changes))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "out"
    build(task, out, CONFIG)
    return out


@pytest.fixture
def index(task, folder):
    return InfluenceIndex.open(folder, task, device="cpu", batch_size=4)


def as_queries(answers):
    return [replace(answer, side="query") for answer in answers]


OPTIONS = {
    "stored": QueryOptions(k=5),
    "search only": QueryOptions(k=5, rerank="none"),
    "re-ranked": QueryOptions(k=3, candidates=20, rerank="exact"),
    "exact": QueryOptions(k=5, exact=True),
    "cosine": QueryOptions(k=5, cosine=True),
    "one checkpoint": QueryOptions(k=5, checkpoints=(1,)),
}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_answers_equal_those_of_query_data(index, name, together):
    found = index.query_examples(ROWS, OPTIONS[name], together=together)
    expected = index.query(range(N_QUERIES), (), OPTIONS[name], together=together)
    assert {answer.side for answer in found} == {"input"}
    assert as_queries(found) == list(expected)
    assert len(found) == (1 if together else N_QUERIES)
    assert all(hit.score for answer in found for hit in answer.hits)


def test_answers_of_a_new_process_are_equal(task, folder):
    """The first query of an open index verifies the gradients; which side it is from makes no difference."""
    first, second = (InfluenceIndex.open(folder, task, device="cpu", batch_size=4) for _ in range(2))
    exact = OPTIONS["re-ranked"]
    assert as_queries(first.query_examples(ROWS, exact)) == list(second.query(range(N_QUERIES), (), exact))


@pytest.mark.usefixtures("emulated_bf16")
@pytest.mark.parametrize("changes", [{"index": "ivf"}, {"precision": "bf16"}])
def test_padded_sequences_by_lists_and_in_half_precision(tmp_path, changes):
    """Of different lengths: the padding depends on the batch."""
    task = texts.task(str(tmp_path))
    with warnings.catch_warnings():
        # On a CPU on which bf16 is slower, a build warns.
        warnings.simplefilter("ignore", UserWarning)
        build(task, tmp_path / "out", replace(CONFIG, **changes))
    # Two open indexes: the estimated times of a search depend on the files that earlier queries have opened.
    one, other = (InfluenceIndex.open(tmp_path / "out", task, device="cpu", batch_size=3) for _ in range(2))
    options = QueryOptions(k=5, rerank="exact", candidates=20)
    found = one.query_examples(texts.query_data(), options)
    assert as_queries(found) == list(other.query(range(4), (), options))
    assert ("inverted lists" in found[0].how) == ("index" in changes)


def test_exact_scores_use_the_query_loss(index, task):
    new = make_rows(3, seed=7)
    names = [name for name, _ in Toy().named_parameters()]
    by_side = []
    for loss, rows in ((margin, new), (cross_entropy, make_rows(N_TRAIN))):
        each = []
        for checkpoint in task.checkpoints:
            model = Toy()
            model.load_state_dict(torch.load(checkpoint.path, weights_only=True))
            each.append(oracle.gradients(model, loss, rows, names))
        by_side.append(torch.stack(each, 1))
    true_QN = oracle.tracin(*by_side, RATES)
    answers = index.query_examples(new, QueryOptions(k=N_TRAIN, exact=True))
    found_QN = np.zeros((3, N_TRAIN))
    for answer, found_N in zip(answers, found_QN, strict=True):
        found_N[[hit.row for hit in answer.hits]] = [hit.score for hit in answer.hits]
    assert np.abs(found_QN - true_QN).max() <= 1e-5 * np.abs(true_QN).max()


def test_some_examples_of_a_data_set(index):
    found = index.query_examples(ROWS, ids=[8, 2])
    assert [answer.query for answer in found] == [8, 2]
    assert as_queries(found) == list(index.query([8, 2]))


def test_any_map_style_data_set_is_read_lazily(index):
    class Rows:
        read: list[int] = []

        def __len__(self):
            return 1000

        def __getitem__(self, i):
            self.read.append(i)
            return ROWS[i % N_QUERIES]

    found = index.query_examples(Rows(), ids=[997])
    assert set(Rows.read) == {997}
    assert found[0].hits == index.query([997 % N_QUERIES])[0].hits


def test_descriptions_outlive_the_call(index):
    found = index.query_examples(ROWS[3:5])
    index.query_examples(ROWS[:1])
    assert [line["text"] for line in found.lines()] == ["a 0", "a 1"]
    assert {record["side"] for record in found.records()} == {"input"}
    assert found.to_pandas()["query_text"].unique().tolist() == ["a 0", "a 1"]


def test_ids_of_the_task_name_the_examples(tmp_path):
    """A row has its id as its third part; an example without one is named by its position."""
    rows = [(x, y, f"row {i}") for i, (x, y) in enumerate(ROWS)]
    task = make_task(
        tmp_path, train_data=lambda: rows, query_data=lambda: rows, ids=lambda row: row[2], collate=collate_pairs
    )
    build(task, tmp_path / "out", CONFIG)
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu", batch_size=4)
    found = index.query_examples([rows[4], ROWS[4]])
    assert [answer.query for answer in found] == ["row 4", 1]
    for examples in (rows[:3], rows[3:5]):
        with index.lend(examples):
            assert index.positions("input", [examples[1][2]]) == (1,)
    assert [hit.row for hit in found[0].hits] == [hit.row for hit in found[1].hits] != []


def collate_pairs(rows):
    return torch.stack([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


def test_a_report_shows_the_examples(index, tmp_path):
    found = index.query_examples(ROWS[1:3])
    page = write_report(found, tmp_path / "page.html", index).read_text()
    assert "input 0" in page and "input 1" in page
    losses = {view: page.count(view) for view in ("a 1", "a 2")}
    assert all(losses.values())
    as_rows = write_report(index.query([1, 2]), tmp_path / "rows.html", index).read_text()
    # Only the names and anchors of the queries differ: losses, scores and texts are equal.
    assert page.replace("input 0", "query 1").replace("input 1", "query 2") == as_rows


def test_threads_have_their_own_examples(index):
    expected = [index.query([i])[0].hits for i in range(8)]

    def ask(i):
        return [index.query_examples([ROWS[i]])[0].hits for _ in range(5)]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(8)))
    assert found == [[hits] * 5 for hits in expected]


def test_one_example_is_explained(index):
    with index.lend([ROWS[6]]):
        found = explain(index, 17, 0, "input")
    expected = explain(index, 17, 6)
    assert list(found) == list(expected)
    assert found.stored_score == expected.stored_score
    assert found.pair.side == "input"


def test_lent_examples_are_contrasted(index):
    with index.lend(ROWS):
        found = index.contrast([0, 1], [2], "input")
    (expected,) = index.contrast([0, 1], [2])
    assert as_queries(found) == [expected]


def test_the_side_needs_examples(index):
    with pytest.raises(UsageError, match="no examples are given in this thread"):
        index.features("input", [0])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no query: got no examples"),
        (ROWS[0][0].numpy().item, "these are not examples: got a builtin_function_or_method"),
        (iter(ROWS), "these are not examples: got a list_iterator"),
        ({"x": torch.zeros(2, 5)}, "these are not examples: got a dict, expected a list .* not collated"),
        ("text", "these are not examples: got a str"),
    ],
)
def test_what_is_not_a_list_of_examples_is_rejected(index, examples, message):
    with pytest.raises(UsageError, match=message):
        index.query_examples(examples)


def test_a_position_beyond_the_examples_is_rejected(index):
    with pytest.raises(UsageError, match="no such row in the given examples: got 11, expected 0 to 10"):
        index.query_examples(ROWS, ids=[11])
    with pytest.raises(UsageError, match="no query: got no ids"):
        index.query_examples(ROWS, ids=[])


UNUSABLE = {
    "another type": ([object()], TaskError, "PyTorch's default collate cannot make a batch of these examples"),
    "a batch": ([torch.zeros(2, 5), torch.zeros(2)], TaskError, "PyTorch's default collate cannot"),
    "no label": ([torch.zeros(5)], TaskError, "the given examples cannot be used: got .*; pass what query_data"),
    "another width": ([(torch.zeros(7), 1)], TaskError, "the given examples cannot be used: got RuntimeError"),
    "NaN": ([(torch.full((5,), torch.nan), 1)], NonFiniteError, "cannot query with this row of the given examples"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_example_that_the_task_rejects_is_an_error_of_one_line(index, name):
    examples, kind, message = UNUSABLE[name]
    expected = list(index.query([0]))
    with pytest.raises(kind, match=message) as caught:
        index.query_examples(examples)
    assert "\n" not in str(caught.value)
    assert list(index.query([0])) == expected, "the index answers as before"


def test_an_error_of_reading_an_example_names_it(index):
    class Rows(list):
        def __getitem__(self, i):
            raise OSError("no such picture")

    with pytest.raises(TaskError, match=r"row 0 of the given examples cannot be read: got OSError: no such picture"):
        index.query_examples(Rows([1]))
