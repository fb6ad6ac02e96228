"""Nested batches: traversal, device moves, splitting, sizes; and builds and queries with them."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import attr
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from tasks.toy import CONFIG, make_rows, make_toy_task
from tracin_ann import InfluenceIndex, build
from tracin_ann.errors import TaskError
from tracin_ann.task.nested import (
    batched_tensors,
    leaves,
    length,
    map_leaves,
    pin_memory,
    rebuild,
    tensors_within,
    to_device,
)


class Pair(NamedTuple):
    x: object
    y: object


class Encoding(UserDict):
    """A Mapping with attributes and a constructor with more arguments than items, as Hugging Face's BatchEncoding."""

    def __init__(self, data, encodings):
        super().__init__(data)
        self.encodings = encodings


@dataclass
class Derived:
    """A dataclass that computes one field from another in its constructor."""

    x: object
    y: object = field(init=False)

    def __post_init__(self):
        self.y = [2, 3]


@dataclass(frozen=True, slots=True)
class Frozen:
    x: object
    y: object = field(default=(2, 3), kw_only=True)


@attr.s(auto_attribs=True)
class Attrs:
    x: object
    y: object = (2, 3)


NESTED = {
    "dict": {"a": 1, "b": [2, 3]},
    "tuple": (1, (2, [3])),
    "named tuple": Pair(1, Pair(2, 3)),
    "ordered": OrderedDict(b=1, a=[2, 3]),
    "default dict": defaultdict(list, a=1, b=(2, 3)),
    "user dict": UserDict(a=1, b={"c": 2, "d": 3}),
    "encoding": Encoding({"a": 1, "b": [2, 3]}, "kept"),
    "mapping proxy": MappingProxyType({"a": 1, "b": [2, 3]}),
    "dataclass": Derived(1),
    "frozen dataclass": Frozen(1),
    "attrs": Attrs(1),
    "leaf": 1,
}


@pytest.mark.parametrize("name", NESTED)
def test_containers_preserve_type_and_order_and_the_original_is_unchanged(name):
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


META = torch.device("meta")


class Own:
    """A custom batch with `to` and `pin_memory`, as in torch_geometric and transformers; its lengths are not moved."""

    def __init__(self, x, returned):
        self.x, self.lengths, self.returned = x, torch.tensor([2, 1]), returned

    def to(self, device):
        self.x = self.x.to(device)
        return self if self.returned else None

    def pin_memory(self):
        self.x = "pinned"
        return self


@dataclass
class OwnFields(Own):
    """A dataclass with a method."""

    x: object
    lengths: object
    returned: bool = True


@pytest.mark.parametrize("returned", [True, False])
def test_an_object_with_to_is_moved_and_the_original_is_unchanged(returned):
    for own in (Own(torch.zeros(2), returned), OwnFields(torch.zeros(2), torch.tensor([2, 1]), returned)):
        batch = {"own": own, "y": torch.zeros(2)}
        moved = to_device(batch, META)
        assert type(moved["own"]) is type(own)
        assert moved["own"].x.device.type == moved["y"].device.type == "meta"
        assert moved["own"].lengths.device.type == "cpu"
        assert own.x.device.type == "cpu" and moved["own"] is not own


def test_a_packed_sequence_is_moved_with_its_lengths():
    packed = pack_sequence([torch.arange(3.0), torch.arange(2.0)])
    moved = to_device((packed, torch.zeros(2)), META)[0]
    assert isinstance(moved, PackedSequence)
    assert moved.data.device.type == "meta" and moved.batch_sizes.device.type == "cpu"
    assert batched_tensors(packed, 2) == "a batch that holds PackedSequence cannot be split into examples"


@pytest.mark.parametrize("kind", [Derived, Frozen, Attrs])
def test_a_dataclass_is_moved_field_by_field_without_its_constructor(kind):
    value = kind((torch.zeros(2), "text"))
    moved = to_device(value, META)
    assert type(moved) is kind and moved is not value
    assert moved.x[0].device.type == "meta" and value.x[0].device.type == "cpu"
    assert moved.x[1] == "text" and moved.y == value.y


def test_an_unset_field_stays_unset():
    value = Derived(torch.zeros(2))
    del value.y
    assert not hasattr(to_device(value, META), "y")


def test_an_object_that_fails_to_move_is_rejected():
    class Failing:
        def to(self, device):
            raise ValueError("not mine")

    with pytest.raises(
        TaskError, match="^a Failing in the batch cannot be moved to meta: got ValueError: not mine, ex"
    ):
        to_device([Failing()], META)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_tensors_are_moved_and_not_split():
    for value in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()):
        assert to_device([value], META)[0].device.type == "meta"
        assert to_device([value], META)[0].layout is value.layout
        assert batched_tensors([value], 3) == (
            f"a batch that holds a tensor of layout {value.layout} cannot be split into examples"
        )


def test_objects_with_pin_memory_are_copied_and_pinned():
    own = Own(torch.zeros(2), True)
    assert pin_memory({"own": own}, lambda tensor: tensor)["own"].x == "pinned"
    assert isinstance(own.x, torch.Tensor)


def test_objects_on_a_device_are_not_pinned():
    own = Own(torch.zeros(2, device="meta"), True)
    assert pin_memory({"own": own}, lambda tensor: tensor)["own"] is own


class Waiting:
    """An object whose method `to` has the argument `non_blocking`, as that of transformers and torch_geometric."""

    def __init__(self):
        self.asked = None

    def to(self, device, non_blocking=False):
        self.asked = non_blocking
        return self


@pytest.mark.parametrize(("place", "asked"), [("meta", True), ("cpu", False)])
def test_copies_to_a_device_do_not_wait_and_copies_to_the_cpu_do(place, asked, monkeypatch):
    """Without a wait, the CPU would read a copy that is not complete."""
    seen, own = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: seen.append(k["non_blocking"]) or own(t, *a, **k))
    assert to_device([Waiting(), torch.zeros(2)], torch.device(place))[0].asked is asked
    assert seen == [asked]


def test_a_value_that_contains_itself_is_visited_once():
    value = Derived(1)
    value.y = [2, value]
    assert leaves(value) == [1, 2]
    assert map_leaves(lambda leaf: leaf * 10, value).x == 10


def test_all_tensors_of_a_batch_and_its_objects_are_found():
    x, y, packed = torch.zeros(2), torch.zeros(3), pack_sequence([torch.arange(3.0), torch.arange(2.0)])
    own = Own(x, True)
    found = tensors_within({"own": own, "y": [y, 1, "text"], "packed": packed})
    assert {id(t) for t in found} == {id(t) for t in (x, own.lengths, y, *packed) if t is not None}


def test_the_length_of_an_object_is_that_of_its_content():
    class Graph:
        def __init__(self, n):
            self.nodes, self.stores, self.n, self.parent = torch.zeros(n, 2), {"edges": torch.zeros(2, n)}, n, self

    assert length(Derived(torch.zeros(2, 3))) == 6 + 2
    assert length(Graph(5)) == 20
    assert length(("four", 1, None)) == 4 + 1 + 1
    image = pytest.importorskip("PIL.Image")
    assert length((image.new("RGB", (4, 3)), 0)) == 13


def test_a_batch_is_split_if_every_tensor_has_one_row_per_example():
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
def test_a_batch_that_cannot_be_split_has_a_reason(value, why):
    assert batched_tensors(value, 3) == why


def test_rebuilding_restores_the_tensors_in_place():
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


def frozen(x, y):
    return Frozen(x, y=y)


def collate_fields(examples):
    return Frozen(torch.stack([e.x for e in examples]), y=torch.tensor([e.y for e in examples]))


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
    "dataclass": (frozen, collate_fields, lambda m, b: F.cross_entropy(m(b.x), b.y, reduction="none")),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [False, True], ids=["layer rules", "a raw parameter too"])
def test_every_type_of_batch_gives_the_same_answers(tmp_path, kind, hidden):
    example, collate, loss = KINDS[kind]

    def with_scale(model, batch):
        return loss(model, batch) * (model.first.weight.square().sum() if hidden else 1)

    def plain(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * (
            model.first.weight.square().sum() if hidden else 1
        )

    def make_data(n, seed=1):
        return [example(x, y) for x, y in make_rows(n, seed)]

    task = make_toy_task(
        tmp_path, loss=with_scale, collate=collate, train_data=lambda: make_data(10), query_data=lambda: make_data(5, 2)
    )
    expected = make_toy_task(tmp_path, task.model(), loss=plain, checkpoints=task.checkpoints)
    answers = []
    for name, one in (("given", task), ("plain", expected)):
        build(one, tmp_path / name, CONFIG)
        answers.append(InfluenceIndex.open(tmp_path / name, one, device="cpu", batch_size=4).query(range(5)))
    for given, plain_answer in zip(*answers, strict=True):
        assert [hit.id for hit in given.proponents] == [hit.id for hit in plain_answer.proponents]
        assert [hit.score for hit in given.proponents] == pytest.approx(
            [hit.score for hit in plain_answer.proponents], rel=1e-4
        )
