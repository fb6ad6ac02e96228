"""Data sets: a row that cannot be read is named, also in workers; a stream is read into a list."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
import torch

from tasks.toy import CONFIG, Toy, cross_entropy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import InfluenceIndex, Task, build, materialise, plan
from tracin_ann.errors import TaskError
from tracin_ann.task.data import open_data

N = 40


class Broken:
    """A data set that counts 40 rows and raises at row 37."""

    def __init__(self, error):
        self.rows, self.error = make_rows(N), error

    def __len__(self):
        return N

    def __getitem__(self, i):
        if i == 37:
            raise self.error
        return self.rows[i]


class Miscounted(Broken):
    def __getitem__(self, i):
        return self.rows[:37][i]


def make_broken_data():
    return Broken(ValueError("no such picture"))


WORKING = re.escape(
    "expected an example for each of the 40 rows that its len() counts; correct the data set's __getitem__, or its"
)
FAULTS = {
    "len() that lies": (lambda: Miscounted(None), r"IndexError: list index out of range \(test_data.py:\d+\)"),
    "an error of the user's": (make_broken_data, r"ValueError: no such picture \(test_data.py:\d+\)"),
    "a key": (lambda: Broken(KeyError("label")), r"KeyError: 'label' \(test_data.py:\d+\)"),
    "lines": (lambda: Broken(RuntimeError("two\nlines")), r"RuntimeError: two lines \(test_data.py:\d+\)"),
    "the end of an iterator": (lambda: Broken(StopIteration()), r"StopIteration \(test_data.py:\d+\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("side", ["train", "query"])
def test_a_row_that_cannot_be_read_is_named(tmp_path, fault, side):
    data, got = FAULTS[fault]
    task = make_toy_task(tmp_path, **{f"{side}_data": data})
    # If len() is wrong, any row that does not exist.
    with pytest.raises(TaskError, match=rf"^row 3[79] of {side}_data cannot be read: got {got}, {WORKING}") as caught:
        build(task, tmp_path / "out", replace(CONFIG, yardstick=False))
        InfluenceIndex.open(tmp_path / "out", task, device="cpu").query([37])
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, Exception) and not isinstance(caught.value.__cause__, TaskError)


def test_a_row_that_a_worker_cannot_read_is_named(tmp_path):
    checkpoints = save_checkpoints(Toy(), tmp_path)
    task = Task(
        model=Toy, loss=cross_entropy, train_data=make_broken_data, query_data=rows_of_queries, checkpoints=checkpoints
    )
    with pytest.raises(
        TaskError, match=rf"^row 37 of train_data cannot be read: got ValueError.*, {WORKING}"
    ) as caught:
        build(task, tmp_path / "out", replace(CONFIG, workers=1))
    # --debug shows the traceback of the worker.
    assert "ValueError: no such picture" in str(caught.value.__cause__)


def rows_of_queries():
    return make_rows(5, seed=2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, SystemExit])
def test_an_error_not_caused_by_a_row_is_raised_unchanged(tmp_path, error):
    data = open_data(make_toy_task(tmp_path, train_data=lambda: Broken(error())), "train")
    with pytest.raises(error):
        data[37]


def test_the_number_of_rows_is_fixed_when_the_data_is_opened(tmp_path):
    growing = make_rows(3)
    data = open_data(make_toy_task(tmp_path, train_data=lambda: growing), "train")
    growing.append(growing[0])
    assert len(data) == 3


class Stream(torch.utils.data.IterableDataset):
    """An iterable with a length, which PyTorch's IterableDataset may have, and that may be wrong."""

    def __init__(self, n=10, wrong=None):
        self.n, self.wrong = n, wrong

    def __iter__(self):
        for i, row in enumerate(make_rows(self.n)):
            if i == self.wrong:
                raise OSError("connection lost")
            yield row

    def __len__(self):
        return 7


def test_a_stream_is_rejected_until_it_is_materialised(tmp_path):
    model = Toy()
    task = make_toy_task(tmp_path, model, train_data=Stream)
    with pytest.raises(
        TaskError, match=re.escape("got Stream, an IterableDataset, expected a map-style data set")
    ) as e:
        plan(task, tmp_path / "out", CONFIG)
    assert str(e.value).endswith("return tracin_ann.materialise(data), which reads it into a list")
    build(replace(task, train_data=lambda: materialise(Stream())), tmp_path / "out", CONFIG)
    longer = make_toy_task(tmp_path, model, train_data=lambda: make_rows(10), checkpoints=task.checkpoints)
    assert len(InfluenceIndex.open(tmp_path / "out", longer, device="cpu").query([0])) == 1


def test_any_iterable_is_materialised_in_order():
    assert materialise(iter("abc")) == ["a", "b", "c"]
    assert materialise([]) == []


def test_a_stream_that_fails_names_the_row():
    with pytest.raises(
        TaskError, match=r"^row 4 of the stream cannot be read: got OSError: connection lost \(test_data"
    ):
        materialise(Stream(wrong=4))


def test_a_stream_that_reuses_one_buffer_is_rejected():
    def stream():
        buffer = torch.zeros(2)
        for i in range(3):
            yield buffer.fill_(i), i

    with pytest.raises(TaskError, match="^the rows of the stream share memory: got a first row that changed while"):
        materialise(stream())


def test_rows_that_cannot_be_collated_are_rejected_with_the_remedy(tmp_path):
    task = make_toy_task(tmp_path, train_data=lambda: [(x.to_sparse(), y) for x, y in make_rows(10)])
    assert os.linesep not in read_error(task, tmp_path)
    assert read_error(task, tmp_path).endswith(
        "; pass Task.collate, a function that turns a list of examples into a batch"
    )


def read_error(task, tmp_path):
    with pytest.raises(TaskError, match="^PyTorch's default collate cannot make a batch of these examples: got ") as e:
        plan(task, tmp_path / "out", CONFIG)
    return str(e.value)
