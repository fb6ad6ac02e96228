"""Batches of any nesting: walked, moved, split, compared; and served from end to end."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks.toy import CONFIG, rows, toy
from tracin_ann import InfluenceIndex, build
from tracin_ann.nested import batched_tensors, leaves, map_leaves, rebuild, to_device


class Pair(NamedTuple):
    x: object
    y: object


class Encoding(UserDict):
    """As HF's BatchEncoding: a Mapping with attributes of its own and a constructor that needs more than items."""

    def __init__(self, data, encodings):
        super().__init__(data)
        self.encodings = encodings


NESTED = {
    "dict": {"a": 1, "b": [2, 3]},
    "tuple": (1, (2, [3])),
    "named tuple": Pair(1, Pair(2, 3)),
    "ordered": OrderedDict(b=1, a=[2, 3]),
    "default dict": defaultdict(list, a=1, b=(2, 3)),
    "user dict": UserDict(a=1, b={"c": 2, "d": 3}),
    "encoding": Encoding({"a": 1, "b": [2, 3]}, "kept"),
    "mapping proxy": MappingProxyType({"a": 1, "b": [2, 3]}),
    "leaf": 1,
}


@pytest.mark.parametrize("name", NESTED)
def test_containers_keep_their_kind_and_order_and_the_original_is_left_alone(name):
    value = NESTED[name]
    mapped = map_leaves(lambda leaf: leaf * 10, value)
    assert type(mapped) is type(value)
    assert leaves(mapped) == [10 * leaf for leaf in leaves(value)]
    assert leaves(value) == ([1] if name == "leaf" else [1, 2, 3])
    if name == "encoding":
        assert mapped.encodings == "kept"
    if name == "default dict":
        assert mapped["absent"] == []


def test_only_tensors_move():
    text, array = "text", np.zeros(2)
    moved = to_device({"t": torch.zeros(2), "s": text, "n": None, "a": array}, torch.device("meta"))
    assert moved["t"].device.type == "meta"
    assert moved["s"] is text and moved["n"] is None and moved["a"] is array


def test_a_batch_is_split_where_every_tensor_has_its_rows():
    x, y = torch.zeros(3, 2), torch.zeros(3)
    assert [
        id(t) for t in batched_tensors({"x": x, "flag": True, "n": 3, "rate": 0.1, "none": None, "y": (y,)}, 3)
    ] == [
        id(x),
        id(y),
    ]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ((torch.zeros(3), torch.zeros(2, 3)), "a tensor of shape [2, 3] in a batch of 3 is not batch-first"),
        ((torch.zeros(3), torch.tensor(1.0)), "a tensor of shape [] in a batch of 3 is not batch-first"),
        ((torch.zeros(3), "text"), "a batch that holds str cannot be split into examples"),
        ((torch.zeros(3), np.zeros(3)), "a batch that holds ndarray cannot be split into examples"),
        ({"n": 3}, "a batch without tensors cannot be split into examples"),
    ],
)
def test_a_batch_that_cannot_be_split_says_why(value, why):
    assert batched_tensors(value, 3) == why


def test_rebuilding_puts_the_tensors_where_they_were():
    value = Encoding({"x": torch.zeros(2), "n": 3, "deep": [torch.ones(2), None]}, "kept")
    built = rebuild(value, [torch.full((1,), 5.0), torch.full((1,), 6.0)])
    assert (built["x"].item(), built["n"], built["deep"][0].item(), built["deep"][1]) == (5.0, 3, 6.0, None)


def as_dict(x, y):
    return {"x": x, "y": y, "note": "words", "nothing": 0}


def collate_encoding(examples):
    batch = torch.utils.data.default_collate([(e["x"], e["y"]) for e in examples])
    return Encoding({"x": batch[0], "y": batch[1], "text": [e["note"] for e in examples], "none": None, "n": 7}, "kept")


def loss_of_dict(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


KINDS = {
    "dict": (as_dict, None, loss_of_dict),
    "user dict": (lambda x, y: UserDict(x=x, y=y), None, loss_of_dict),
    "default dict": (lambda x, y: defaultdict(list, x=x, y=y), None, loss_of_dict),
    "encoding": (as_dict, collate_encoding, loss_of_dict),
    "nested tuple": (
        lambda x, y: ((x, [y]), {"z": y}),
        None,
        lambda m, b: F.cross_entropy(m(b[0][0]), b[0][1][0], reduction="none"),
    ),
    "named tuple": (Pair, None, lambda m, b: F.cross_entropy(m(b.x), b.y, reduction="none")),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [False, True], ids=["layer rules", "a raw parameter too"])
def test_batches_of_every_kind_give_the_same_answers(tmp_path, kind, hidden):
    example, collate, loss = KINDS[kind]

    def with_scale(model, batch):
        return loss(model, batch) * (model.first.weight.square().sum() if hidden else 1)

    def plain(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * (
            model.first.weight.square().sum() if hidden else 1
        )

    def made(n, seed=1):
        return [example(x, y) for x, y in rows(n, seed)]

    task = toy(tmp_path, loss=with_scale, collate=collate, train_data=lambda: made(10), query_data=lambda: made(5, 2))
    expected = toy(tmp_path, task.model(), loss=plain, checkpoints=task.checkpoints)
    answers = []
    for name, one in (("given", task), ("plain", expected)):
        build(one, tmp_path / name, CONFIG)
        answers.append(InfluenceIndex.open(tmp_path / name, one, device="cpu", batch_size=4).query(range(5)))
    for given, plain_answer in zip(*answers, strict=True):
        assert [hit.id for hit in given.proponents] == [hit.id for hit in plain_answer.proponents]
        assert [hit.score for hit in given.proponents] == pytest.approx(
            [hit.score for hit in plain_answer.proponents], rel=1e-4
        )
