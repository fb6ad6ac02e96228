"""The default number of rows of a partition: chosen for a new index, and unchanged when an index grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.toy import CONFIG, Toy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import BuildConfig, Task, build
from tracin_ann.errors import IndexMismatchError, UsageError
from tracin_ann.operations.dry_run import plan
from tracin_ann.operations.verification import repair, verify
from tracin_ann.store import FeatureStore, choose_partition_rows, layout
from tracin_ann.store.manifest import Manifest

DEFAULT = replace(CONFIG, dim=8, yardstick=False)
SMALL_INDEX, LARGE_INDEX = 8, 20
SMALL, LARGE = 4, 16
"""Sizes of their partitions by the rule with small numbers."""


@pytest.fixture
def small_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the numbers of the rule so that small indexes have partitions of different sizes."""
    for name, value in (("_SMALLEST_PARTITION", SMALL), ("_LARGEST_PARTITION", LARGE), ("_MOST_PARTITIONS", 2)):
        monkeypatch.setattr(layout, name, value)


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[..., Task]:
    """Return a function that makes the task of a number of rows and checkpoints."""
    model = Toy()
    checkpoints = save_checkpoints(model, tmp_path)

    def make(n_rows: int, n_checkpoints: int = 2) -> Task:
        rows = make_rows(n_rows)
        return make_toy_task(tmp_path, model, train_data=lambda: rows, checkpoints=checkpoints[:n_checkpoints])

    return make


def read_size(index: Path) -> int:
    return Manifest.read(index).build.partition_rows


def read_features(index: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (index / "features").iterdir()}


@pytest.mark.parametrize(
    ("n_rows", "size"),
    [
        (1, 8192),
        (262_144, 8192),
        (262_145, 16_384),
        (400_000, 16_384),
        (524_288, 16_384),
        (524_289, 32_768),
        (1_000_000, 32_768),
        (1_048_577, 65_536),
        (10**7, 65_536),
        (10**10, 65_536),
    ],
)
def test_the_size_grows_with_the_number_of_rows(n_rows: int, size: int) -> None:
    assert choose_partition_rows(n_rows) == size


@given(st.integers(1, 10**8))
def test_there_are_few_partitions_and_none_is_large(n_rows: int) -> None:
    size = choose_partition_rows(n_rows)
    assert size == 8192 or size <= n_rows / 16
    assert size == 65_536 or n_rows <= 32 * size


@pytest.mark.usefixtures("small_numbers")
def test_a_new_index_has_the_size_of_the_rule_or_the_requested_one(
    tmp_path: Path, make_task: Callable[..., Task]
) -> None:
    for n_rows, requested, size in ((8, None, SMALL), (9, None, 8), (20, None, LARGE), (20, 5, 5)):
        out = tmp_path / f"{n_rows}-{requested}"
        build(make_task(n_rows), out, replace(DEFAULT, partition_rows=requested))
        assert read_size(out) == size
        assert Manifest.read(out).build.layout.rows(0) == (0, min(size, n_rows))
    with pytest.raises(UsageError, match="bad partition_rows: got 0"):
        BuildConfig(partition_rows=0)


@pytest.mark.usefixtures("small_numbers")
def test_the_same_build_gives_the_same_files(tmp_path: Path, make_task: Callable[..., Task]) -> None:
    names = {"a": None, "b": None, "c": LARGE}
    for name, requested in names.items():
        build(make_task(LARGE_INDEX), tmp_path / name, replace(DEFAULT, partition_rows=requested))
    a, b, c = (read_features(tmp_path / name) for name in names)
    assert a == b == c


@pytest.mark.usefixtures("small_numbers")
@pytest.mark.parametrize("change", ["append", "add_checkpoint", "rebuild_index"])
def test_an_index_keeps_its_size(tmp_path: Path, make_task: Callable[..., Task], change: str) -> None:
    first, grown, new_rows = {
        "append": ((SMALL_INDEX, 2), (LARGE_INDEX, 2), 2 * (LARGE_INDEX - SMALL_INDEX)),
        "add_checkpoint": ((LARGE_INDEX, 1), (LARGE_INDEX, 2), LARGE_INDEX),
        "rebuild_index": ((LARGE_INDEX, 2), (LARGE_INDEX, 2), 0),
    }[change]
    options: dict[str, Any] = {"partition_rows": SMALL}
    for requested in (None, SMALL):
        out = tmp_path / str(requested)
        build(make_task(*first), out, replace(DEFAULT, **options))
        config = replace(DEFAULT, partition_rows=requested, **{change: True})
        assert build(make_task(*grown), out, config).rows_extracted == new_rows
        assert read_size(out) == SMALL
        assert build(make_task(*grown), out, replace(DEFAULT, partition_rows=requested)).rows_extracted == 0
    build(make_task(*grown), tmp_path / "new", replace(DEFAULT, **options))
    assert read_features(tmp_path / "None") == read_features(tmp_path / "4") == read_features(tmp_path / "new")


@pytest.mark.usefixtures("small_numbers")
def test_a_resumed_build_keeps_its_size(
    tmp_path: Path, make_task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, task = FeatureStore.write, make_task(LARGE_INDEX)

    def killed(self: FeatureStore, partition: int, checkpoint: int, block: Any) -> Any:
        if (partition, checkpoint) == (1, 1):
            raise KeyboardInterrupt
        return write(self, partition, checkpoint, block)

    build(task, tmp_path / "new", DEFAULT)
    with monkeypatch.context() as patched:
        patched.setattr(FeatureStore, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            build(task, tmp_path / "killed", DEFAULT)
    # As if the rule of a later version were another one.
    monkeypatch.setattr(layout, "_LARGEST_PARTITION", SMALL)
    assert 0 < build(task, tmp_path / "killed", DEFAULT).rows_extracted < 2 * LARGE_INDEX
    assert read_size(tmp_path / "killed") == LARGE
    assert read_features(tmp_path / "killed") == read_features(tmp_path / "new")


@pytest.mark.usefixtures("small_numbers")
def test_a_repaired_index_keeps_its_size(tmp_path: Path, make_task: Callable[..., Task]) -> None:
    out, task = tmp_path / "index", make_task(LARGE_INDEX)
    build(task, out, replace(DEFAULT, partition_rows=SMALL))
    before = read_features(out)
    next((out / "features").iterdir()).unlink()
    repair(out, task)
    assert (verify(out).damage, read_size(out), read_features(out)) == ((), SMALL, before)


@pytest.mark.usefixtures("small_numbers")
def test_a_dry_run_plans_with_the_size_of_the_build(tmp_path: Path, make_task: Callable[..., Task]) -> None:
    out, task = tmp_path / "index", make_task(LARGE_INDEX)

    def planned_bytes(out: Path, requested: int | None) -> int:
        return plan(task, out, replace(DEFAULT, partition_rows=requested, append=True)).memory_bytes

    new = tmp_path / "none"
    assert planned_bytes(new, None) == planned_bytes(new, LARGE) > planned_bytes(new, SMALL)
    build(make_task(SMALL_INDEX), out, DEFAULT)
    assert planned_bytes(out, None) == planned_bytes(out, SMALL) == planned_bytes(new, SMALL)


@pytest.mark.usefixtures("small_numbers")
def test_another_size_than_that_of_the_index_is_rejected(tmp_path: Path, make_task: Callable[..., Task]) -> None:
    out = tmp_path / "index"
    build(make_task(SMALL_INDEX), out, DEFAULT)
    message = "was built with partition_rows 4 and .* this build asks for 16 and"
    for config in (DEFAULT, replace(DEFAULT, append=True)):
        with pytest.raises(IndexMismatchError, match=message):
            build(make_task(LARGE_INDEX if config.append else SMALL_INDEX), out, replace(config, partition_rows=LARGE))
