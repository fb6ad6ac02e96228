"""tracin-verify finds and names every altered byte, lists must match the features, repair restores the built index."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from faults import Watch
from tasks.toy import CONFIG, Toy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import InfluenceIndex, QueryOptions, Task, build
from tracin_ann.cli.verify import main as verify_command
from tracin_ann.errors import BusyIndexError, DamagedIndexError, IndexMismatchError
from tracin_ann.operations.removal import remove
from tracin_ann.operations.verification import repair, verify
from tracin_ann.search import load_index
from tracin_ann.store import FeatureStore
from tracin_ann.store.generations import UNFINISHED_INDEX
from tracin_ann.store.locks import WRITER
from tracin_ann.store.manifest import BUILD_RECORD, MANIFEST, Manifest, record_file

N = 300


_SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("bounds", "graph")]


@pytest.fixture(scope="module", params=["flat", "ivf", "codes", *_SLOW_KINDS])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Task]:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = Toy()
    task = make_toy_task(
        folder,
        model,
        train_data=lambda: make_rows(N),
        query_data=lambda: make_rows(20, seed=2),
        checkpoints=save_checkpoints(model, folder),
        columns=lambda row: {"label": row[1]},
    )
    build(task, folder / "index", replace(CONFIG, index=request.param, partition_rows=128))
    remove(folder / "index", [3, 200])
    return folder / "index", task


@pytest.fixture
def index(original: tuple[Path, Task], tmp_path: Path) -> Path:
    shutil.copytree(original[0], tmp_path / "index")
    return tmp_path / "index"


def read_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def read_answers(directory: Path, task: Task, search: str = "scan") -> list:
    found = InfluenceIndex.open(directory, task).query(range(5), options=QueryOptions(search=search))
    return [[(h.id, round(h.score, 5)) for h in (*a.proponents, *a.opponents)] for a in found]


def test_an_intact_index_is_reported_as_intact(index: Path) -> None:
    result = CliRunner().invoke(verify_command, [str(index)])
    n_files = len(read_files(index)) - 1  # the manifest's copy is counted with it
    assert (result.exit_code, verify(index).files) == (0, n_files)
    assert f"{n_files} files, " in result.output and "all intact" in result.output


def test_every_flipped_byte_is_found_in_its_file(index: Path) -> None:
    random = np.random.default_rng(0)
    paths = read_files(index)
    for case in range(80):
        path = paths[case % len(paths)]
        content = bytearray(path.read_bytes())
        place = int(random.integers(len(content)))
        content[place] ^= 1 << int(random.integers(8))
        before = path.read_bytes()
        path.write_bytes(content)
        found = {damage.path for damage in verify(index).damage}
        # A change of white space in JSON is harmless.
        harmless = (
            path.suffix == ".json"
            and _same_json(before, bytes(content))
            and path.name not in ("ivf.json", "codes.json")
        )
        assert found == (set() if harmless else {path}), (path, place)
        path.write_bytes(before)


def _same_json(before: bytes, after: bytes) -> bool:
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["gone", "empty", "cut", "longer"])
def test_missing_and_truncated_files_are_found_and_rebuilt(original: tuple[Path, Task], index: Path, harm: str) -> None:
    expected = read_answers(*original)
    for path in [path for path in read_files(index) if path.name != "removed.npy"]:
        content = path.read_bytes()
        path.unlink()
        if harm != "gone":
            path.write_bytes({"empty": b"", "cut": content[:-9], "longer": content + b"x"}[harm])
        seen = verify(index)
        assert [damage.path for damage in seen.damage] == [path]
        assert path.name in seen.damage[0].message and "\n" not in seen.damage[0].message
        if harm in ("gone", "cut"):
            repair(index, original[1])
            assert verify(index).damage == ()
            assert read_answers(index, original[1]) == expected
            shutil.rmtree(index)
            shutil.copytree(original[0], index)
        else:
            path.write_bytes(content)


def test_a_repair_without_damage_removes_leftovers_of_a_killed_one(index: Path) -> None:
    before = read_files(index)
    for left in (index / "generation-000009" / "canaries.h5", index / UNFINISHED_INDEX / "ivf.faiss"):
        left.parent.mkdir()
        left.write_bytes(b"")
    result = CliRunner().invoke(verify_command, [str(index)])
    assert result.exit_code == 0 and len(read_files(index)) == len(before) + 2
    result = CliRunner().invoke(verify_command, [str(index), "--repair"])
    assert result.exit_code == 0 and "all intact" in result.output
    assert read_files(index) == before and not (index / UNFINISHED_INDEX).exists()


def test_swapped_feature_files_are_found(index: Path) -> None:
    one, other = sorted((index / "features").iterdir())[:2]
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    assert {damage.path for damage in verify(index).damage} == {one, other}


def test_the_rows_of_a_damaged_block_are_named(index: Path) -> None:
    path = sorted((index / "features").iterdir())[0]
    content = bytearray(path.read_bytes())
    stored = InfluenceIndex.open(index).view().take([0])[:, :4].tobytes()[:8]
    at = content.find(stored)
    assert at > 0
    content[at] ^= 1
    path.write_bytes(content)
    (damage,) = verify(index).damage
    assert "row 0 is altered" in damage.message


@pytest.mark.parametrize("search", ["scan", "lists"])
def test_a_query_rejects_damaged_features_and_answers_after_repair(
    original: tuple[Path, Task], index: Path, search: str
) -> None:
    if search == "lists" and Manifest.read(index).index.kind == "flat":
        pytest.skip("a flat index has no codes")
    row = int(
        InfluenceIndex.open(index, original[1]).query([0], options=QueryOptions(search=search))[0].proponents[0].row
    )
    store = FeatureStore(index / "features", Manifest.read(index).build.layout)
    partition = row // store.layout.partition_rows
    path = store.path(partition, 1)
    with h5py.File(path, "r+") as file:
        place = file["feature"].id.get_offset() + (row % store.layout.partition_rows) * file["feature"][0].nbytes + 1
    content = bytearray(path.read_bytes())
    content[place] ^= 2
    path.write_bytes(content)
    with pytest.raises(DamagedIndexError, match=rf"{path.name}: row {row} is altered.*tracin-verify --repair"):
        read_answers(index, original[1], search)
    repair(index, original[1])
    assert verify(index).damage == () and read_answers(index, original[1]) == read_answers(*original)


@pytest.mark.parametrize("name", ["sqnorm", "exponent", "loss"])
def test_self_influence_rejects_damaged_columns(original: tuple[Path, Task], index: Path, name: str) -> None:
    path = sorted((index / "features").iterdir())[1]
    with h5py.File(path) as file:
        place = file[name].id.get_offset() + 1
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedIndexError, match=rf"{path.name}: .*header or columns are altered"):
        InfluenceIndex.open(index, original[1]).self_influence(5)


def test_the_command_repairs_many_damaged_files_at_once(original: tuple[Path, Task], index: Path) -> None:
    hurt = [path for path in read_files(index) if path.name != "removed.npy"][::3]
    for path in hurt:
        path.write_bytes(path.read_bytes()[:-5])
    result = CliRunner().invoke(verify_command, [str(index)])
    assert result.exit_code == 4
    assert all(path.name in result.output for path in hurt)
    assert f"{len(hurt)} damaged files; run tracin-verify --repair to rebuild them" in result.output
    repair(index, original[1])
    assert verify(index).damage == () and read_answers(index, original[1]) == read_answers(*original)


def test_removed_rows_stay_removed_if_their_list_is_lost(original: tuple[Path, Task], index: Path) -> None:
    (path,) = index.rglob("removed.npy")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedIndexError, match=r"removed.npy cannot be rebuilt.*restore that file"):
        repair(index, original[1])
    with pytest.raises(DamagedIndexError):
        InfluenceIndex.open(index, original[1])


def test_a_directory_that_is_not_an_index_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DamagedIndexError, match="manifest.json: got no file"):
        verify(tmp_path)


def test_damaged_lists_are_rejected_before_faiss_reads_them(
    original: tuple[Path, Task], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(index.rglob("*.faiss"))
    if not found:
        pytest.skip("no file of FAISS")
    content = bytearray(found[0].read_bytes())
    content[100] ^= 1
    found[0].write_bytes(content)
    monkeypatch.setattr("faiss.read_index", lambda *given: pytest.fail("read"))
    assert [damage.path for damage in verify(index).damage] == found
    with pytest.raises(DamagedIndexError, match=rf"{found[0].name} is damaged: got different content"):
        InfluenceIndex.open(index, original[1])


def test_lists_of_other_rows_with_matching_digests_are_found(original: tuple[Path, Task], index: Path) -> None:
    manifest = Manifest.read(index)
    if manifest.index.kind == "flat":
        pytest.skip("a flat index has no codes")
    folder = index / f"generation-{manifest.generation:06d}"
    view = FeatureStore(index / "features", manifest.build.layout).view()

    class Shuffled:
        """The same rows with ids of other rows."""

        dim = view.dim

        def __len__(self) -> int:
            return len(view)

        def blocks(self, block_rows: int, start: int = 0):
            for ids, block in view.blocks(block_rows, start):
                yield ids, block[::-1].copy()

        def take(self, ids):
            return view.take(ids)

    cpu = torch.device("cpu")
    kind = type(load_index(manifest.index.kind, folder, view, cpu))
    kind.build(Shuffled(), kind.load(folder, view, cpu).params, cpu).save(folder)
    records = tuple(record_file(folder / name) for name in kind.FILES)
    changed = replace(manifest, index=replace(manifest.index, files=records))
    for place in (folder, index):
        changed.write(place)
    (damage,) = verify(index).damage
    assert re.search("have wrong (codes|bounds)", damage.message)
    repair(index, original[1])
    assert verify(index).damage == ()


def test_a_damaged_manifest_is_restored_from_its_copy(original: tuple[Path, Task], index: Path) -> None:
    before = (index / MANIFEST).read_bytes()
    (index / MANIFEST).write_bytes(b"{")
    (index / BUILD_RECORD).unlink()
    assert {damage.path.name for damage in verify(index).damage} == {MANIFEST, BUILD_RECORD}
    assert repair(index, original[1]) is None
    assert (index / MANIFEST).read_bytes() == before


def test_a_build_rejects_a_damaged_list_of_removed_rows(original: tuple[Path, Task], index: Path) -> None:
    (path,) = index.rglob("removed.npy")
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedIndexError, match="removed.npy is damaged"):
        remove(index, [9])
    grown = replace(original[1], train_data=lambda: make_rows(N + 1))
    with pytest.raises(DamagedIndexError, match="removed.npy is damaged"):
        build(grown, index, replace(CONFIG, index=Manifest.read(index).index.kind, partition_rows=128, append=True))


def test_a_build_does_not_restart_if_the_manifest_is_lost(original: tuple[Path, Task], index: Path) -> None:
    (index / MANIFEST).unlink()
    with pytest.raises(DamagedIndexError, match="manifest.json: got no file.*tracin-verify --repair"):
        build(original[1], index, replace(CONFIG, partition_rows=128))
    assert repair(index, original[1]) is None
    assert InfluenceIndex.open(index, original[1]).removed.tolist() == [3, 200]


def test_a_lost_manifest_is_not_replaced_by_that_of_an_older_generation(
    original: tuple[Path, Task], index: Path
) -> None:
    reader = InfluenceIndex.open(index, original[1])
    manifest = remove(index, [7])
    for place in (index, index / f"generation-{manifest.generation:06d}"):
        (place / MANIFEST).write_bytes(b"{}")
    with pytest.raises(DamagedIndexError):
        repair(index, original[1])
    assert len(reader) == N


def test_damaged_rows_are_not_recomputed_with_another_loss(original: tuple[Path, Task], index: Path) -> None:
    path = sorted((index / "features").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-1])
    other = replace(original[1], loss=lambda model, batch: 2 * original[1].loss(model, batch))
    with pytest.raises(IndexMismatchError, match="the gradient of .* has changed since index"):
        repair(index, other)
    assert verify(index).damage != ()
    repair(index, original[1])
    assert verify(index).damage == ()


def test_a_repeated_build_rebuilds_damaged_canaries(original: tuple[Path, Task], index: Path) -> None:
    (path,) = index.rglob("canaries.h5")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    build(original[1], index, replace(CONFIG, index=Manifest.read(index).index.kind, partition_rows=128))
    assert verify(index).damage == ()


def test_repair_locks_out_other_writers_from_removal_to_rebuild(original: tuple[Path, Task], index: Path) -> None:
    hurt = [sorted((index / "features").iterdir())[0], *index.rglob("canaries.h5")]
    for path in hurt:
        path.write_bytes(path.read_bytes()[:-9])
    stages: set[str] = set()

    def tried(stage: str, done: int, total: int) -> None:
        stages.add(stage)
        with pytest.raises(BusyIndexError, match="is being written"):
            remove(index, [9])

    with Watch(index) as watch:
        repair(index, original[1], progress=tried)
    assert stages >= {"files", "columns", "features", "index"}
    calls = [(call.kind, call.path) for call in watch.calls]
    removed = [calls.index(("unlink", str(path.relative_to(index)))) for path in hurt]
    again = calls.index(("replace", str(hurt[0].relative_to(index))))
    assert calls.index(("open", WRITER)) < min(removed) < again < calls.index(("unlink", WRITER))
    assert calls.count(("unlink", WRITER)) == 1
    assert verify(index).damage == () and read_answers(index, original[1]) == read_answers(*original)
