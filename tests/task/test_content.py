"""Content of rows: equal values have equal bytes, other values other bytes, and unknown types are reported."""

from __future__ import annotations

import array
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import hashlib
import io
import pathlib
import threading

import attr
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from tasks.toy import CONFIG, Toy, make_rows, make_toy_task
from tracin_ann import InfluenceIndex, build
from tracin_ann.errors import IndexMismatchError, TaskError
from tracin_ann.features.fingerprint import data_digest
from tracin_ann.task.content import encode_content

pandas = pytest.importorskip("pandas")
pictures = pytest.importorskip("PIL.Image")

NAN = float("nan")


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), True),
        (torch.tensor([1.0]), torch.tensor([1.0]).double(), False),
        (torch.zeros(2, 1), torch.zeros(1, 2), False),
        (torch.zeros(2), [0.0, 0.0], False),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16), True),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.5], dtype=torch.bfloat16), False),
        (torch.arange(6).view(2, 3).T, torch.arange(6).view(2, 3).T.contiguous(), True),
        (torch.ones(2, requires_grad=True), torch.ones(2), True),
        (np.array([1, 2]), np.array([1, 2]), True),
        (np.float32(1), np.float32(2), False),
        ({"a": 1, "b": "x"}, {"a": 1, "b": "x"}, True),
        ({"a": 1, "b": "x"}, {"a": 1, "b": "y"}, False),
        ((1, None), (1, 0), False),
        ((1,), (1, 2), False),
        (1, True, False),
        (b"ab", b"ab", True),
    ],
)
def test_two_reads_are_bit_identical(left, right, expected):
    assert (encode_content(left) == encode_content(right)) is expected


def test_leaves_have_the_bytes_that_digests_of_older_indexes_cover():
    row = {"x": torch.arange(3.0), "y": 2, "deep": [np.float32(1), ("text", None)], "half": torch.ones(1).bfloat16()}
    assert encode_content(row).pieces == (
        b"((3,), 'float32')" + torch.arange(3.0).numpy().tobytes(),
        b"2",
        b"((), 'float32')" + np.float32(1).tobytes(),
        b"'text'",
        b"None",
        b"((1,), 'float32')" + np.ones(1, np.float32).tobytes(),
    )
    expected = hashlib.blake2b(b"".join(encode_content(row).pieces), digest_size=8).hexdigest()
    assert data_digest([row], 1) == expected


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Example:
    x: object
    y: object = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: object


@attr.s(auto_attribs=True)
class Attrs:
    x: object


class Slots:
    __slots__ = ("absent", "x")

    def __init__(self, x):
        self.x = x


class Plain:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    @functools.cached_property
    def size(self):
        return object()


class Named(str):
    """A string with an attribute."""


Pair = collections.namedtuple("Pair", "x y")


def make_lazy_image(value, mode="RGB"):
    """Return an image of a file, which is decoded lazily."""
    file = io.BytesIO()
    image = pictures.new(mode, (3, 2), value)
    if mode == "P":
        image.putpalette([value * 9] * 768)
    image.save(file, "PNG")
    return pictures.open(io.BytesIO(file.getvalue()))


def frame(value):
    return pandas.DataFrame({"a": [1.0, value], "b": ["x", "y"], "c": pandas.Categorical(["u", "v"])})


def circle(value):
    instance = Plain(x=value)
    instance.me, instance.all = instance, [instance]
    return instance


def make_named(value):
    instance = Named("text")
    instance.value = value
    return instance


def dense(value):
    return torch.tensor([[0.0, value], [1.0, 0.0]])


ALIGNED = np.dtype([("a", "i1"), ("b", "f8")], align=True)


def aligned(value):
    """Return a structured array with uninitialised bytes between its fields."""
    instance = np.frombuffer(np.random.bytes(ALIGNED.itemsize * 2), dtype=ALIGNED).copy()
    instance["a"], instance["b"] = 1, value
    return instance


KINDS = {
    "picture": lambda v: make_lazy_image((v, 0, 0)),
    "grey picture": lambda v: make_lazy_image(v, "L"),
    "picture of a palette": lambda v: make_lazy_image(v, "P"),
    "dataclass": lambda v: Example(torch.tensor(v)),
    "nested dataclasses": lambda v: Example(Example({"a": v})),
    "keys in an object": lambda v: Example({"ab"[v - 1]: 0}),
    "frozen dataclass": Frozen,
    "attrs": Attrs,
    "slots": Slots,
    "attributes": lambda v: Plain(x=v),
    "order of attributes": lambda v: Plain(
        **dict(sorted({"x": v, "y": 0}.items(), reverse=bool(np.random.randint(2))))
    ),
    "named tuple": lambda v: Pair(v, 1),
    "text with attributes": make_named,
    "object array": lambda v: np.array([v, "s", None], dtype=object),
    "structured objects": lambda v: np.array([(1, v)], dtype=[("a", "i1"), ("b", "O")]),
    "structured array with padding": aligned,
    "masked array": lambda v: np.ma.masked_array([1, 2], [v - 1, 0]),
    "row of a frame": lambda v: frame(v).iloc[1].values,
    "series": lambda v: frame(v).iloc[1],
    "frame": frame,
    "index": lambda v: pandas.MultiIndex.from_tuples([(1, v)]),
    "nullable array": lambda v: pandas.array([v, None], dtype="Int64"),
    "timestamp": lambda v: pandas.Timestamp(2000, 1, v),
    "set": lambda v: {v, "a", ("b", 2), "cdef"},
    "frozen set": lambda v: frozenset([v]),
    "enum": Colour,
    "date": lambda v: datetime.date(2000, 1, v),
    "decimal": decimal.Decimal,
    "path": lambda v: pathlib.Path(str(v)),
    "complex": lambda v: complex(0, v),
    "deque": lambda v: collections.deque([v]),
    "array of numbers": lambda v: array.array("d", [v]),
    "bytearray": lambda v: bytearray([v]),
    "COO": lambda v: dense(v).to_sparse(),
    "CSR": lambda v: dense(v).to_sparse_csr(),
    "CSC": lambda v: dense(v).to_sparse_csc(),
    "BSR": lambda v: dense(v).to_sparse_bsr((1, 1)),
    "packed sequence": lambda v: pack_sequence([torch.arange(v + 1)]),
    "dtype": lambda v: (torch.float32, torch.float64)[v - 1],
    "device": lambda v: torch.device("cpu", v),
    "conjugate": lambda v: torch.tensor([v * 1j]).conj(),
    "float8": lambda v: torch.tensor([float(v)]).to(torch.float8_e4m3fn),
    "circle": circle,
    "class": lambda v: (int, str)[v - 1],
}


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR) tensor support")
@pytest.mark.parametrize("kind", KINDS)
def test_objects_are_compared_by_content(kind):
    create = KINDS[kind]
    assert encode_content(create(1)) == encode_content(create(1))
    assert encode_content([create(1)]).pieces != encode_content([create(2)]).pieces
    assert encode_content(create(1)).unknown == ()


def test_sparse_matrices_of_scipy_are_compared_without_their_cached_flags():
    sparse = pytest.importorskip("scipy.sparse")
    for kind in (sparse.csr_matrix, sparse.csr_array, sparse.coo_array):
        one, same, other = (kind(np.array([[0.0, v, 0.0], [1.0, 0.0, 0.0]])) for v in (1, 1, 2))
        same.tocsr().sort_indices()
        assert encode_content(one) == encode_content(same)
        assert encode_content(one) != encode_content(other)
        assert not encode_content(one).unknown


def test_cached_results_of_an_object_are_not_content():
    value = Plain(x=1)
    before = encode_content(value)
    assert value.size is value.size
    assert encode_content(value) == before


def endless():
    """Return an object that reduces to two new objects of its type, without end."""

    class Endless:
        def __reduce__(self):
            return Endless, (Endless(), Endless())

    return Endless()


def deep():
    value = []
    for _ in range(5000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (threading.Lock(), "lock"),
        (lambda: 0, "function"),
        (Plain(f=lambda: 0), "function"),
        (memoryview(b"a"), "memoryview"),
        (torch.zeros(2, device="meta"), "Tensor"),
        (endless(), "endless.<locals>.Endless"),
        (deep(), "list"),
    ],
)
def test_rows_without_readable_content_are_reported_and_the_batch_is_used_instead(value, name):
    assert name in encode_content(value).unknown
    assert encode_content((1, value), lambda examples: torch.zeros(1)) == encode_content(torch.zeros(1))
    assert name in encode_content((1, value), lambda examples: examples).unknown


class Drawn:
    """Rows as objects, with new noise at every read."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return self.kind(*make_rows(10)[i])


def read_as_image(x, y):
    return pictures.fromarray(np.random.randint(0, 255, (4, 4), dtype=np.uint8)), y


OBJECTS = {
    "picture": read_as_image,
    "dataclass": lambda x, y: Example(x + torch.randn(5), y),
    "object array": lambda x, y: np.array([*(x + torch.randn(5)).tolist(), y], dtype=object),
    "known after collate": lambda x, y: (threading.Lock(), x + torch.randn(5), y),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_random_rows_that_are_objects_are_rejected(tmp_path, kind):
    def collate(examples):
        return torch.stack([example[1] for example in examples]), torch.tensor([example[2] for example in examples])

    task = make_toy_task(tmp_path, train_data=lambda: Drawn(OBJECTS[kind]), collate=collate)
    with pytest.raises(TaskError, match="rows of train_data change when they are read twice: got two different readin"):
        build(task, tmp_path / "out", CONFIG)


def test_rows_that_reuse_one_object_are_rejected(tmp_path):
    buffer = torch.zeros(5)

    class Filled(Drawn):
        def __getitem__(self, i):
            return buffer.normal_(), 0

    with pytest.raises(TaskError, match="rows of train_data change when they are read twice"):
        build(make_toy_task(tmp_path, train_data=lambda: Filled(None)), tmp_path / "out", CONFIG)


def collate_objects(examples):
    return torch.stack([torch.tensor(e[:5].astype(np.float32)) for e in examples]), torch.tensor(
        [int(e[6]) for e in examples]
    )


class Table:
    """Numbers and strings; rows are arrays of new objects at every read."""

    def __init__(self, n, shift=0.0):
        self.frame = pandas.DataFrame([[*(x + shift).tolist(), f"row {i}", y] for i, (x, y) in enumerate(make_rows(n))])

    def __len__(self):
        return len(self.frame)

    def __getitem__(self, i):
        return self.frame.iloc[i].values


def test_rows_of_a_table_are_accepted_and_distinguished_from_those_of_another(tmp_path):
    model = Toy()
    plain = make_toy_task(tmp_path, model, query_data=lambda: make_rows(10))
    task = make_toy_task(
        tmp_path,
        model,
        checkpoints=plain.checkpoints,
        train_data=lambda: Table(10),
        query_data=lambda: Table(10),
        collate=collate_objects,
    )
    for name, one in (("table", task), ("plain", plain)):
        build(one, tmp_path / name, CONFIG)
    left, right = (InfluenceIndex.open(tmp_path / n, t, device="cpu") for n, t in (("table", task), ("plain", plain)))
    np.testing.assert_allclose(left.view().take(range(10)), right.view().take(range(10)), rtol=1e-5, atol=1e-6)
    other = dataclasses.replace(task, train_data=lambda: Table(10, shift=1e-3))
    with pytest.raises(
        IndexMismatchError, match="training data of digest [0-9a-f]{16}, this task has [0-9a-f]{16}; rest"
    ):
        InfluenceIndex.open(tmp_path / "table", other, device="cpu").query([0])


class Handle:
    """An object with inaccessible numbers."""

    def __init__(self, x, y):
        self.read = lambda: (x, y)


def loss_of_handles(model, batch):
    x, y = torch.utils.data.default_collate([handle.read() for handle in batch])
    return torch.nn.functional.cross_entropy(model(x), y, reduction="none")


def test_content_that_no_digest_covers_is_logged_and_recorded(tmp_path, caplog):
    task = make_toy_task(
        tmp_path,
        train_data=lambda: [Handle(x, y) for x, y in make_rows(10)],
        query_data=lambda: [Handle(x, y) for x, y in make_rows(5, seed=2)],
        collate=lambda examples: examples,
        loss=loss_of_handles,
    )
    build(task, tmp_path / "out", CONFIG)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "rows of train_data hold function, whose content cannot be read: changes between two reads are not detected",
        "rows of query_data hold function, whose content cannot be read: changes between two reads are not detected",
        "rows of train_data hold function, whose content cannot be read: the digest of the data excludes it",
    ]
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu")
    assert index.manifest.build.spec.train_data.endswith(" without function")
    assert len(index.query([0])) == 1
