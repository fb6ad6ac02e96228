"""FeatureSpec and manifest: round trips, rejection of each different field, and detection of damage."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tasks.toy import CONFIG, Toy, make_rows, make_toy_task
from tracin_ann import InfluenceIndex, build
from tracin_ann.errors import DamagedIndexError, IndexMismatchError
from tracin_ann.features.compatibility import check_spec
from tracin_ann.features.fingerprint import data_digest, model_digest, parameter_specs
from tracin_ann.files import read_record, write_json_atomic
from tracin_ann.store.manifest import (
    BUILD_RECORD,
    FORMAT,
    MANIFEST,
    BuildRecord,
    Manifest,
    content_digest,
    read_build_record,
    write_build_record,
)
from tracin_ann.store.spec import CheckpointSpec, FeatureSpec, ParameterSpec, SketchSpec
from tracin_ann.task.references import TaskReference

SPEC = FeatureSpec(
    model="0123456789abcdef",
    train_rows=10,
    train_data="aaaa",
    parameters=(ParameterSpec("w", (2, 3), "torch.float32"), ParameterSpec("b", (2,), "torch.float32")),
    checkpoints=(CheckpointSpec("a.pt", "1" * 32, 0.5), CheckpointSpec("b.pt", "2" * 32, 0.25)),
    sketch=SketchSpec("factored", 1, 64, 1),
    dtype="float16",
    norms="sketch",
    versions={"torch": "2.13.0"},
)
THIRD = CheckpointSpec("c.pt", "3" * 32, 0.125)


def sketch(**changes):
    return replace(SPEC, sketch=replace(SPEC.sketch, **changes))


def second(**changes):
    return replace(SPEC, checkpoints=(SPEC.checkpoints[0], replace(SPEC.checkpoints[1], **changes)))


def parameters(*given_parameters):
    return replace(SPEC, parameters=given_parameters)


REFUSALS = {
    "sketch": (
        sketch(name="dense"),
        "sketch factored, this command asks for sketch dense; pass --sketch factored or build a new index",
    ),
    "seed": (sketch(seed=0), "seed 1, this command asks for seed 0; pass --seed 1 or build a new index"),
    "dim": (sketch(dim=32), "dimension 64, this command asks for dimension 32; pass --dim 64 or build a new index"),
    "version": (
        sketch(version=2),
        "sketch version 1, this command asks for sketch version 2; install the tracin_ann that built it or build a new "
        "index",
    ),
    "dtype": (
        replace(SPEC, dtype="float32"),
        "feature type float16, this task has float32; pass --dtype float16 or build a new index",
    ),
    "norms": (
        replace(SPEC, norms="exact"),
        "norms sketch, this task has exact; pass --norms sketch or build a new index",
    ),
    "model": (
        replace(SPEC, model="fedcba9876543210"),
        "a model with layers of digest 0123456789abcdef, this task has fedcba9876543210; restore the model's "
        "code or build a new index",
    ),
    "train_rows": (
        replace(SPEC, train_rows=11),
        "10 training rows, this task has 11; build with --append, or build a new index",
    ),
    "train_data": (
        replace(SPEC, train_data="bbbb"),
        "training data of digest aaaa, this task has bbbb; restore train_data or build a new index",
    ),
    "parameter's shape": (
        parameters(replace(SPEC.parameters[0], shape=(3, 2)), SPEC.parameters[1]),
        "parameter w ([2, 3] torch.float32), the task has [3, 2] torch.float32; restore Task.parameters and the "
        "model or build a new index",
    ),
    "parameter's dtype": (
        parameters(SPEC.parameters[0], replace(SPEC.parameters[1], dtype="torch.float64")),
        "parameter b ([2] torch.float32), the task has [2] torch.float64; restore Task.parameters and the model or "
        "build a new index",
    ),
    "parameter missing": (
        parameters(SPEC.parameters[0]),
        "parameter b ([2] torch.float32), the task does not have it; restore Task.parameters and the model or "
        "build a new index",
    ),
    "parameter added": (
        parameters(*SPEC.parameters, ParameterSpec("c", (1,), "torch.float32")),
        "no parameter c, the task has [1] torch.float32; restore Task.parameters and the model or build a new index",
    ),
    "checkpoint's bytes": (
        second(digest="9" * 32),
        "checkpoint 1 (b.pt) of digest 222222222222, the task's b.pt has 999999999999; restore that file or build a "
        "new index",
    ),
    "learning rate": (
        second(learning_rate=0.3),
        "learning rate 0.25 at checkpoint 1, the task has 0.3; restore Task.checkpoints or build a new index",
    ),
    "checkpoint missing": (
        replace(SPEC, checkpoints=SPEC.checkpoints[:1]),
        "b.pt as checkpoint 1, the task has nothing; restore Task.checkpoints or build a new index",
    ),
    "checkpoint added": (
        replace(SPEC, checkpoints=(*SPEC.checkpoints, THIRD)),
        "nothing as checkpoint 2, the task has c.pt; build with --add-checkpoint, or build a new index",
    ),
}


@pytest.mark.parametrize("field", REFUSALS)
def test_each_different_field_is_rejected_with_what_got_expected_and_remedy(field):
    asked, message = REFUSALS[field]
    assert asked.digest() != SPEC.digest()
    with pytest.raises(IndexMismatchError) as caught:
        check_spec(SPEC, asked, "runs/mnist")
    assert str(caught.value) == f"index runs/mnist was built with {message}"
    check_spec(asked, asked, "runs/mnist")


def test_several_differences_are_counted():
    with pytest.raises(IndexMismatchError, match=r"^index x was built with seed 1, .* \(and 2 more differences\)$"):
        check_spec(SPEC, replace(sketch(seed=0, dim=3), dtype="float32"), "x")


def test_the_digest_excludes_library_versions_and_paths_of_checkpoints():
    other = replace(SPEC, versions={"torch": "3.0", "numpy": "9"})
    assert other.digest() == SPEC.digest()
    check_spec(SPEC, other, "x")
    check_spec(SPEC, second(name="moved.pt"), "x")


NAMES = st.text(min_size=1, max_size=6)
SPECS = st.builds(
    FeatureSpec,
    model=NAMES,
    train_rows=st.integers(1, 1 << 40),
    train_data=NAMES,
    parameters=st.lists(
        st.builds(ParameterSpec, NAMES, st.lists(st.integers(1, 99), max_size=4).map(tuple), NAMES), max_size=3
    ).map(tuple),
    checkpoints=st.lists(
        st.builds(CheckpointSpec, NAMES, NAMES, st.floats(min_value=1e-12, max_value=1e12)), min_size=1, max_size=3
    ).map(tuple),
    sketch=st.builds(SketchSpec, NAMES, st.integers(0, 9), st.integers(1, 4096), st.integers(-(1 << 70), 1 << 70)),
    dtype=st.sampled_from(["float16", "float32"]),
    norms=st.sampled_from(["sketch", "exact"]),
    versions=st.dictionaries(NAMES, NAMES, max_size=2),
)


@given(SPECS)
def test_a_spec_is_read_back_from_json_unchanged(spec):
    back = read_record(FeatureSpec, json.loads(json.dumps(asdict(spec))))
    assert back == spec
    assert back.digest() == spec.digest()


def test_a_build_record_is_read_back_unchanged(tmp_path):
    record = BuildRecord(SPEC, TaskReference("tasks.named:ready", {"rate": "0.5", "ünï": "c\\ode"}), 512, True)
    write_build_record(tmp_path, record)
    assert read_build_record(tmp_path) == record
    assert record.layout.n_rows == 10 and record.layout.digests == (SPEC.row_digest(0), SPEC.row_digest(1))


def test_the_digest_of_a_model_covers_its_layers_and_not_its_weights():
    torch.manual_seed(1)
    digests = [model_digest(m) for m in (Toy(), Toy(), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))]
    assert digests[0] == digests[1]
    assert model_digest(nn.Sequential(nn.Linear(2, 2), nn.Tanh())) != digests[2]
    specs = parameter_specs(dict(Toy().named_parameters()), frozenset(["first.weight"]))
    assert specs[1] == ParameterSpec("first.bias", (6,), "torch.float32")
    assert [spec.rank_one for spec in specs[:2]] == [True, False]


def test_the_digest_of_a_data_set_covers_rows_spread_over_it():
    plain = data_digest(make_rows(31), 31)
    assert plain == data_digest(make_rows(31), 31)
    for row, noticed in ((0, True), (2, True), (30, True), (1, False)):
        changed = make_rows(31)
        changed[row] = (changed[row][0], 7)
        assert (data_digest(changed, 31) != plain) is noticed
    assert data_digest([1], 1) != data_digest([2], 1)
    assert data_digest(make_rows(50)[:31], 31) == data_digest(make_rows(50), 31)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return an index directory, its task, and the content of its manifest."""
    folder = tmp_path_factory.mktemp("built")
    task = make_toy_task(folder)
    manifest = build(task, folder / "out", CONFIG).manifest
    return folder / "out", task, manifest, json.loads((folder / "out" / MANIFEST).read_text())


def test_a_manifest_is_read_back_unchanged(built):
    out, _, manifest, _ = built
    assert Manifest.read(out) == manifest
    assert read_build_record(out) == manifest.build
    assert len(InfluenceIndex.open(out, device="cpu")) == 10


def find_places(value, here=()):
    """Yield the path to every key and item of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*here, key)
        yield from find_places(item, (*here, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("x" * 300),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def alter(content, data):
    """Return the content with one key removed or its value replaced."""
    content = copy.deepcopy(content)
    *way, last = data.draw(st.sampled_from(list(find_places(content))))
    node = content
    for key in way:
        node = node[key]
    if data.draw(st.booleans()):
        del node[last]
    else:
        node[last] = data.draw(JSON)
    return content


@pytest.mark.parametrize("name", [MANIFEST, BUILD_RECORD])
@given(data=st.data())
def test_any_altered_manifest_or_build_record_is_reported_as_damaged(built, tmp_path_factory, name, data):
    out = built[0]
    content = json.loads((out / name).read_text())
    folder = tmp_path_factory.getbasetemp()
    changed = alter(content, data)
    if json.dumps(changed, sort_keys=True) == json.dumps(content, sort_keys=True):
        return
    (folder / name).write_text(json.dumps(changed))
    with pytest.raises(DamagedIndexError):
        Manifest.read(folder) if name == MANIFEST else read_build_record(folder)


@given(data=st.data())
def test_a_manifest_with_a_valid_digest_is_read_or_reported_as_damaged(built, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    content = alter({k: v for k, v in built[3].items() if k not in ("format", "digest")}, data)
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "digest": content_digest(content), **content}))
    try:
        found = Manifest.read(folder)
    except DamagedIndexError:
        return
    assert isinstance(found, Manifest)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\x00\xff", '{"format": 1}', '{"format": 3}', '{"format": 4}', "{}"],
)
def test_a_file_that_is_not_a_manifest_is_reported_as_damaged(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DamagedIndexError, match=f"^{tmp_path}/manifest.json"):
        InfluenceIndex.open(tmp_path)


def test_a_directory_without_a_manifest_is_not_an_index(tmp_path):
    with pytest.raises(
        DamagedIndexError, match="manifest.json: got no file, expected a JSON file; name the directory of"
    ):
        InfluenceIndex.open(tmp_path / "nowhere")


def test_another_format_is_rejected_with_its_number(built, tmp_path):
    write_json_atomic(tmp_path / MANIFEST, {**built[3], "format": FORMAT + 1})
    with pytest.raises(DamagedIndexError, match="has another format: got 5, expected 4; use the tracin_ann that wrote"):
        Manifest.read(tmp_path)


OUTSIDE = ["../features.h5", "/etc/passwd", "a/b", "a\\b", "", ".", "..", ".hidden", "x" * 300, "nul\0", 3, None]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("place", ["features", "canaries", "index"])
def test_a_file_name_outside_of_the_index_is_rejected(built, tmp_path, place, name):
    content = {key: value for key, value in copy.deepcopy(built[3]).items() if key not in ("format", "digest")}
    record = {"name": name, "size": 1, "digest": "0"}
    if place == "canaries":
        content["canaries"] = record
    else:
        (content["features"] if place == "features" else content["index"]["files"]).append(record)
    write_json_atomic(tmp_path / MANIFEST, {"format": FORMAT, "digest": content_digest(content), **content})
    with pytest.raises(
        DamagedIndexError,
        match="manifest.json cannot be understood: got ValueError: (a file named .* is|FileRecord.name is)",
    ):
        Manifest.read(tmp_path)
