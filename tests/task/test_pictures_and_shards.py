"""Folders of pictures and tar shards: rows, workers, and errors that name the file."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from tasks.toy import CONFIG, Toy, make_toy_task
from tracin_ann import ImageFolder, InfluenceIndex, TarShards, build
from tracin_ann.errors import TaskError

Image = pytest.importorskip("PIL.Image")


def make_picture(seed, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "pictures" / name / "more").mkdir(parents=True)
        for i in range(3):
            place = tmp_path / "pictures" / name / ("more" if i == 2 else "") / f"{i}.png"
            place.write_bytes(encode(make_picture(10 * label + i)))
    (tmp_path / "pictures" / "cat" / "notes.txt").write_text("not a picture")
    (tmp_path / "pictures" / ".hidden").mkdir()
    return tmp_path / "pictures"


def test_classes_are_sub_folders(folder):
    data = ImageFolder(folder)
    assert data.classes == ["cat", "dog"] and data.labels == [0, 0, 0, 1, 1, 1]
    assert [os.path.relpath(path, folder) for path in data.paths[:3]] == ["cat/0.png", "cat/1.png", "cat/more/2.png"]
    for row, seed in enumerate((0, 1, 2, 10, 11, 12)):
        image, label = data[row]
        assert label == row // 3 and image.mode == "RGB"
        assert image.tobytes() == make_picture(seed).tobytes()


def test_links_are_followed_once(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "bird").symlink_to(folder / "cat")
    (folder / "cat" / "more" / "loop").symlink_to(folder / "cat")
    data = ImageFolder(tmp_path / "linked")
    assert data.classes == ["bird"] and len(data) == 3


def test_modes_and_transforms(folder):
    assert ImageFolder(folder, mode="L")[0][0].tobytes() == make_picture(0, "L").tobytes()
    assert ImageFolder(folder, to_example)[5] == (sum(make_picture(12).tobytes()), 1)


def to_example(row):
    image, label = row
    return sum(image.tobytes()), label


def test_damaged_pictures_are_named(folder):
    path = folder / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    data = ImageFolder(folder)
    with pytest.raises(TaskError, match=r"the picture .*dog/1.png cannot be read: got .*; write the file again"):
        data[4]
    path.write_bytes(b"")
    with pytest.raises(TaskError, match=r"dog/1.png cannot be read"):
        data[4]
    path.unlink()
    with pytest.raises(TaskError, match=r"dog/1.png cannot be read: got No such file"):
        data[4]


def test_folders_without_pictures(tmp_path):
    with pytest.raises(TaskError, match="nowhere cannot be read: got no such folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(TaskError, match="has no pictures: got no sub-folder"):
        ImageFolder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(TaskError, match="has no pictures: got 1 sub-folders without a picture"):
        ImageFolder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TaskError, match="file cannot be read: got a file"):
        ImageFolder(tmp_path / "file")


class PictureModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.toy = Toy()

    def forward(self, x):
        return self.toy(x.flatten(1)[:, :5] / 256)


def to_tensor(row):
    image, label = row
    return torch.from_numpy(np.array(image)).float(), label


@pytest.mark.slow
def test_workers_decode_pictures(folder, tmp_path):
    """The task has no name, so the data set is sent to the workers by pickle."""
    data = ImageFolder(folder, to_tensor)
    task = make_toy_task(tmp_path, PictureModel(), train_data=lambda: data, query_data=lambda: data)
    build(replace_model(task), tmp_path / "alone", CONFIG)
    build(replace_model(task), tmp_path / "workers", replace(CONFIG, workers=2))
    rows = [InfluenceIndex.open(tmp_path / name, task).view().take(range(6)) for name in ("alone", "workers")]
    np.testing.assert_array_equal(*rows)


def replace_model(task):
    """Return the task with functions that pickle."""
    return replace(
        task, model=PictureModel, train_data=_Opener(task.train_data()), query_data=_Opener(task.query_data())
    )


class _Opener:
    def __init__(self, data):
        self.data = data

    def __call__(self):
        return self.data


# Tar shards.

SAMPLES = [[(f"x/{shard}{i}", i) for i in range(3)] for shard in range(2)]


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shards(folder):
    paths = []
    for shard, samples in enumerate(SAMPLES):
        paths.append(folder / f"{shard}.tar")
        with tarfile.open(paths[-1], "w") as archive:
            archive.addfile(tarfile.TarInfo("x/"))
            for key, i in samples:
                add(archive, f"{key}.png", encode(make_picture(10 * shard + i)))
                add(archive, f"{key}.cls", str(i).encode())
                add(archive, f"{key}.meta.JSON", json.dumps({"place": [shard, i]}).encode())
                add(archive, f"{key}.raw", b"\x00\xff")
            add(archive, "README", b"a file without a key")
    return paths


def test_samples_are_files_with_one_key(tmp_path):
    data = TarShards(write_shards(tmp_path))
    assert len(data) == 6
    for row, (shard, i) in enumerate((shard, i) for shard in range(2) for i in range(3)):
        sample = data[row]
        assert sample["png"].tobytes() == make_picture(10 * shard + i).tobytes()
        del sample["png"]
        expected = {"__key__": f"x/{shard}{i}", "cls": i, "meta.json": {"place": [shard, i]}, "raw": b"\x00\xff"}
        assert sample == expected
    assert [sample["cls"] for sample in data[4:]] == [1, 2]


def test_fields_decoded_by_name(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    file = io.BytesIO()
    np.save(file, array)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "0.npy", file.getvalue())
        add(archive, "0.txt", "é".encode())
    data = TarShards(tmp_path / "a.tar")
    np.testing.assert_array_equal(data[0]["npy"], array)
    assert data[0]["txt"] == "é"
    assert TarShards(tmp_path / "a.tar", decode=False)[0]["txt"] == "é".encode()
    assert TarShards(tmp_path / "a.tar", to_text)[0] == "é"


def to_text(sample):
    return sample["txt"]


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    file = io.BytesIO()
    np.save(file, np.array([print], dtype=object), allow_pickle=True)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "0.npy", file.getvalue())
    with pytest.raises(TaskError, match=r"0.npy in .*a.tar cannot be decoded: got ValueError: Object arrays cannot"):
        TarShards(tmp_path / "a.tar")[0]


def test_pickled_shards_read_the_same_files(tmp_path):
    paths = write_shards(tmp_path)
    data = TarShards(paths, decode=False)
    pickled = pickle.dumps(data)
    assert list(pickle.loads(pickled)) == list(data)
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(TaskError, match="1.tar has changed since its records were counted"):
        pickle.loads(pickled)


def test_a_truncated_shard_is_named(tmp_path):
    (path, _) = write_shards(tmp_path)
    content = path.read_bytes()
    used = len(content.rstrip(b"\0"))
    cut_at = [0, 100, 512, 700, 1024, used // 2, used, used - used % 512 + 512]
    for n_bytes in cut_at:
        path.write_bytes(content[:n_bytes])
        with pytest.raises(TaskError, match=r"0.tar cannot be read: got .*; decompress it, or write or download") as e:
            TarShards(path)
        assert "\n" not in str(e.value)


def test_other_shards_are_rejected(tmp_path):
    with pytest.raises(TaskError, match=r"a.tar cannot be read: got No such file"):
        TarShards([tmp_path / "a.tar"])
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        add(archive, "0.txt", b"x")
    with pytest.raises(TaskError, match=r"a.tar cannot be read: got .* expected a complete tar file, not compressed"):
        TarShards([tmp_path / "a.tar"])
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "0.txt", b"x")
        add(archive, "0.TXT", b"y")
    with pytest.raises(TaskError, match=r"a.tar has a file twice: got 0.TXT again"):
        TarShards([tmp_path / "a.tar"])
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "README", b"x")
    with pytest.raises(TaskError, match="the tar files have no samples"):
        TarShards([tmp_path / "a.tar"])
    with pytest.raises(TaskError, match="the tar files have no samples: got no paths"):
        TarShards([])


def test_a_damaged_field_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "0.jpg", encode(make_picture(0), "JPEG")[:100])
        add(archive, "1.cls", b"one")
    data = TarShards(tmp_path / "a.tar")
    with pytest.raises(TaskError, match=r"the picture 0.jpg in .*a.tar cannot be read"):
        data[0]
    with pytest.raises(TaskError, match=r"1.cls in .*a.tar cannot be decoded: got ValueError"):
        data[1]
