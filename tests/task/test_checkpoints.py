"""Checkpoints load as state_dicts (torch, safetensors) or by `Task.load`; files that do not match are rejected."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tasks.toy import CONFIG, Toy, make_toy_task
from tracin_ann import Checkpoint, build
from tracin_ann.errors import CheckpointError
from tracin_ann.task.checkpoint_loader import CheckpointLoader, checkpoint_digest

CPU = torch.device("cpu")


def state(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) for key, value in Toy().state_dict().items()}


def load_weights(tmp_path, path, **changes):
    model = Toy().train()
    task = make_toy_task(tmp_path, model, checkpoints=[Checkpoint(path, 1.0)], **changes)
    CheckpointLoader(task).load(model, 0, CPU)
    return model


def read_error(tmp_path, path, **changes):
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path, path, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_state(tmp_path, value, name="given.pt"):
    torch.save(value, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_torch_state_dict_is_read(tmp_path, kind):
    model = load_weights(tmp_path, save_state(tmp_path, kind(state())))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state().items())
    assert not model.training


def test_a_safetensors_file_is_read(tmp_path):
    save_file(state(), tmp_path / "given.safetensors")
    model = load_weights(tmp_path, tmp_path / "given.safetensors")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state().items())


def test_load_of_the_task_gets_the_path_as_a_string_and_ends_in_eval_mode(tmp_path):
    path = save_state(tmp_path, {"epoch": 3, "weights": state()})
    seen = []

    def load(model, given):
        seen.append(given)
        model.load_state_dict(torch.load(given, weights_only=True)["weights"])
        model.train()

    model = load_weights(tmp_path, path, load=load)
    assert seen == [str(path)]
    assert torch.equal(model.first.weight, state()["first.weight"])
    assert not any(module.training for module in model.modules())


def test_loading_and_digest_reject_a_missing_file(tmp_path):
    path = tmp_path / "absent.pt"
    assert read_error(tmp_path, path).startswith(f"a checkpoint is missing: got no file {path}, expected ")
    with pytest.raises(CheckpointError, match=f"^a checkpoint is missing: got no file {path}, .*or train first$"):
        checkpoint_digest(Checkpoint(path, 1.0))


@pytest.mark.parametrize("name", ["given.pt", "given.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint at all"])
def test_an_unreadable_file_is_rejected(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = read_error(tmp_path, tmp_path / name)
    assert message.startswith(f"checkpoint {tmp_path / name} cannot be read: got ")
    assert message.endswith("; save model.state_dict(), or give Task a load(model, path)")


def test_a_truncated_file_is_rejected(tmp_path):
    path = save_state(tmp_path, state())
    path.write_bytes(path.read_bytes()[:-200])
    assert f"checkpoint {path} cannot be read" in read_error(tmp_path, path)


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_code_in_a_checkpoint_is_not_run(tmp_path, save):
    witness, path = tmp_path / "witness", tmp_path / "bomb.pt"
    save({"first.weight": Bomb(witness)}, path)
    assert f"checkpoint {path} cannot be read: got UnpicklingError" in read_error(tmp_path, path)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Bomb(witness)))
    assert witness.exists()


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ({"epoch": 3, "model": {}}, "a dict with epoch, model"),
        ([1, 2], "<class 'list'>"),
        (torch.zeros(3), "<class 'torch.Tensor'>"),
    ],
)
def test_an_object_that_is_not_a_state_dict_is_rejected(tmp_path, value, got):
    path = save_state(tmp_path, value)
    assert read_error(tmp_path, path) == (
        f"checkpoint {path} is not a state_dict: got {got}, expected a dict of tensors by name; "
        "give Task a load(model, path) that reads it"
    )


def test_a_pickled_model_is_rejected(tmp_path):
    assert "cannot be read: got UnpicklingError" in read_error(tmp_path, save_state(tmp_path, nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda s: s.pop("first.bias"), "missing first.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda s: s.update({"first.bias": torch.zeros(7)}), "first.bias of shape [7] instead of [6]"),
        (lambda s: s.update({"first.bias": torch.zeros(6, 1)}), "first.bias of shape [6, 1] instead of [6]"),
        (
            lambda s: [s.update({f"net.{key}": s.pop(key)}) for key in list(s)],
            "missing first.weight; missing first.bias; missing second.weight; missing second.bias and 4 more",
        ),
        (
            lambda s: s.update({"first.bias": torch.zeros(7), "extra": torch.zeros(1)}),
            'Unexpected key(s) in state_dict: "extra".; first.bias of shape [7] instead of [6]',
        ),
    ],
)
def test_entries_that_do_not_match_the_model_are_named(tmp_path, change, got):
    content = state()
    change(content)
    path = save_state(tmp_path, content)
    assert read_error(tmp_path, path) == (
        f"checkpoint {path} does not match the model: got {got}, expected the 4 entries of the model's state_dict; "
        "correct Task.model or the path, or give Task a load(model, path)"
    )


def test_the_last_of_three_checkpoints_is_checked_before_any_work(tmp_path):
    task = make_toy_task(tmp_path)
    bad = save_state(tmp_path, {**state(), "first.bias": torch.zeros(5)}, "third.pt")
    task = make_toy_task(tmp_path, checkpoints=[*task.checkpoints, Checkpoint(bad, 0.1)])
    with pytest.raises(CheckpointError, match="third.pt does not match the model: got first.bias of shape"):
        build(task, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


def test_the_digest_covers_every_byte(tmp_path):
    path = save_state(tmp_path, state())
    before = checkpoint_digest(Checkpoint(path, 1.0))
    assert checkpoint_digest(Checkpoint(path, 0.5)) == before
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert checkpoint_digest(Checkpoint(path, 1.0)) != before


def test_the_digest_of_a_folder_covers_all_files_and_their_names(tmp_path):
    folder = tmp_path / "sharded"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"one")
    (folder / "inner" / "b.bin").write_bytes(b"two")
    digests = {checkpoint_digest(Checkpoint(folder, 1.0))}
    (folder / "inner" / "b.bin").write_bytes(b"twp")
    digests.add(checkpoint_digest(Checkpoint(folder, 1.0)))
    (folder / "inner" / "b.bin").rename(folder / "inner" / "c.bin")
    digests.add(checkpoint_digest(Checkpoint(folder, 1.0)))
    assert len(digests) == 3
