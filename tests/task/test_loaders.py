"""Checks of `Task.load`: it fills the model or returns a matching module; models on the meta device are filled too."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_model
from test_model import assert_unchanged
from test_state_dicts import Tempered, Tied, assert_equal, compute_exact_scores, compute_true_scores
from torch import nn

import oracle
from tasks.toy import CONFIG, RATES, Toy, cross_entropy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import Checkpoint, InfluenceIndex, build, plan
from tracin_ann.errors import CheckpointError, TaskError
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.task.checkpoint_loader import CheckpointLoader, tensors_digest

CPU = torch.device("cpu")


def read_weights(path):
    return torch.load(path, weights_only=True)


def load_model(path, make=Toy):
    """Return a new model with the weights of a file."""
    model = make()
    model.load_state_dict(read_weights(path))
    return model


def read_error(task, out, error=CheckpointError):
    with pytest.raises(error) as caught:
        build(task, out, CONFIG)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def load_checkpoints(task, checkpoints=(1, 0)):
    """Return the model after several checkpoints were loaded in turn."""
    model, loader = task.model(), CheckpointLoader(task)
    for checkpoint in checkpoints:
        loader.load(model, checkpoint, CPU)
    return model


FORMS = {
    "returns another": lambda model, path: load_model(path),
    "returns the model": lambda model, path: [model.load_state_dict(read_weights(path)), model][1],
    "returns a part of the model": lambda model, path: [model.load_state_dict(read_weights(path)), model.first][1],
    "returns PyTorch's verdict": lambda model, path: model.load_state_dict(read_weights(path)),
    "assigns": lambda model, path: model.load_state_dict(read_weights(path), assign=True),
    "writes to .data": lambda model, path: (
        [p.data.copy_(read_weights(path)[n]) for n, p in model.named_parameters()] and None
    ),
    "writes through numpy": lambda model, path: (
        [p.detach().numpy().__setitem__(..., read_weights(path)[n].numpy()) for n, p in model.named_parameters()]
        and None
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("held", [False, True], ids=["other weights before", "the last checkpoint's before"])
def test_every_form_of_load_scores_with_the_weights_of_the_checkpoint(tmp_path, form, held):
    checkpoints = save_checkpoints(Toy(), tmp_path)
    models = [load_model(checkpoint.path) for checkpoint in checkpoints]
    model = copy.deepcopy(models[1]) if held else Toy()
    task = make_toy_task(tmp_path, model, checkpoints=checkpoints, load=FORMS[form])
    with assert_unchanged(model):
        found = compute_exact_scores(task, tmp_path / "out")
    wanted = compute_true_scores(models)
    assert abs(found - wanted).max() < 1e-5 * abs(wanted).max()


def test_weights_that_a_loader_stores_and_assigns_are_not_modified(tmp_path):
    checkpoints = save_checkpoints(Toy(), tmp_path)
    weights = {str(c.path): read_weights(c.path) for c in checkpoints}
    held = load_model(checkpoints[1].path)
    task = make_toy_task(
        tmp_path,
        held,
        checkpoints=checkpoints,
        load=lambda model, path: model.load_state_dict(weights[path], assign=True),
    )
    build(task, tmp_path / "out", CONFIG)
    for checkpoint in checkpoints:
        assert all(torch.equal(weights[str(checkpoint.path)][n], t) for n, t in read_weights(checkpoint.path).items())


@pytest.mark.parametrize(
    "load",
    [
        lambda model, path: None,
        lambda model, path: read_weights(path),
        lambda model, path: Toy().load_state_dict(read_weights(path)),
    ],
)
def test_a_load_that_fills_nothing_is_rejected(tmp_path, load):
    last = tmp_path / "checkpoint1.pt"
    assert read_error(make_toy_task(tmp_path, load=load), tmp_path / "out") == (
        f"Task.load does not change the model: got the same parameters and buffers after loading {last} as before, "
        "expected the checkpoint's weights in the model that is passed to Task.load; fill that model in place, or "
        "return a module of the same layers"
    )


def test_a_load_that_fills_nothing_is_rejected_even_if_the_model_had_the_weights(tmp_path):
    checkpoints = save_checkpoints(Toy(), tmp_path)[1:]
    task = make_toy_task(
        tmp_path, load_model(checkpoints[0].path), checkpoints=checkpoints, load=lambda model, path: None
    )
    assert read_error(task, tmp_path / "out").startswith("Task.load does not change the model: ")


def test_a_load_of_some_weights_leaves_the_others(tmp_path):
    """Adapters over a base that Task.model reads: a file with a few weights per checkpoint."""
    base, paths = Toy(), [tmp_path / "a.pt", tmp_path / "b.pt"]
    for seed, path in enumerate(paths):
        torch.save({"second.bias": torch.full((3,), float(seed))}, path)
    held = copy.deepcopy(base)
    held.second.bias.data.fill_(1)

    def load(model, path):
        model.load_state_dict(read_weights(path), strict=False)

    checkpoints = [Checkpoint(path, rate) for path, rate in zip(paths, RATES, strict=True)]
    model = load_checkpoints(make_toy_task(tmp_path, held, checkpoints=checkpoints, load=load))
    assert model.second.bias.tolist() == [0, 0, 0]
    assert torch.equal(model.first.weight, base.first.weight)
    assert torch.equal(model.second.weight, base.second.weight)


def test_a_load_that_reads_one_file_for_all_is_rejected(tmp_path):
    checkpoints = save_checkpoints(Toy(), tmp_path)
    task = make_toy_task(
        tmp_path,
        checkpoints=checkpoints,
        load=lambda model, path: model.load_state_dict(read_weights(checkpoints[0].path)),
    )
    assert read_error(task, tmp_path / "out") == (
        f"Task.load sets the same weights for two checkpoints: got {checkpoints[1].path} and {checkpoints[0].path}, "
        "whose bytes differ, expected different weights; read the path that is passed to Task.load; if the weights "
        "are the same, use one checkpoint with the sum of both learning rates"
    )


def test_a_load_that_fills_nothing_for_some_files_is_rejected(tmp_path):
    checkpoints = save_checkpoints(Toy(), tmp_path)

    def load(model, path):
        if path.endswith("1.pt"):
            model.load_state_dict(read_weights(path))

    task = make_toy_task(tmp_path, checkpoints=checkpoints, load=load)
    assert (
        f"does not change the model: got the same parameters and buffers after loading {checkpoints[0].path} as"
        in read_error(task, tmp_path / "out")
    )


@pytest.mark.parametrize("kind", ["adds", "draws"])
def test_a_load_with_random_weights_is_rejected(tmp_path, kind):
    def load(model, path):
        for name, parameter in model.named_parameters():
            parameter.data += read_weights(path)[name] if kind == "adds" else torch.randn(parameter.shape)

    with pytest.raises(
        CheckpointError, match=r"sets different weights for one checkpoint on each call: got .*1.pt that differ"
    ):
        build(make_toy_task(tmp_path, load=load), tmp_path / "out", CONFIG)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_one_file_under_two_checkpoints_and_a_checkpoint_of_rate_0_may_have_equal_weights(tmp_path):
    path = save_checkpoints(Toy(), tmp_path)[0].path
    torch.save(read_weights(path), tmp_path / "same weights, other bytes.pt")
    checkpoints = [
        Checkpoint(path, 0.5),
        Checkpoint(path, 0.25),
        Checkpoint(tmp_path / "same weights, other bytes.pt", 0),
    ]
    task = make_toy_task(
        tmp_path, checkpoints=checkpoints, load=lambda model, given: model.load_state_dict(read_weights(given))
    )
    found, wanted = compute_exact_scores(task, tmp_path / "out"), compute_true_scores([load_model(path)], [0.75])
    assert abs(found - wanted).max() < 1e-5 * abs(wanted).max()


class Cached(nn.Module):
    """A layer, a buffer that is not in the state_dict, and state that is not a tensor."""

    def __init__(self, shift=0.0, size=3, p=0.5):
        super().__init__()
        self.layer, self.drop = Tempered(5, 3), nn.Dropout(p)
        self.register_buffer("shift", torch.full((size,), shift), persistent=False)

    def forward(self, x):
        return self.drop(self.layer(x)) + self.shift


def test_buffers_and_extra_state_of_a_returned_module_are_copied(tmp_path):
    source = Cached(shift=2.0)
    source.layer.temperature = 0.5
    torch.save(source.state_dict(), tmp_path / "given.pt")
    task = make_toy_task(
        tmp_path,
        Cached(),
        checkpoints=[Checkpoint(tmp_path / "given.pt", 1.0)],
        load=lambda m, p: copy.deepcopy(source),
    )
    model = load_checkpoints(task, [0])
    assert assert_equal(model, source)
    assert model.layer.temperature == 0.5
    assert model.shift.tolist() == [2, 2, 2]
    x = torch.randn(4, 5)
    assert torch.equal(model(x), source.eval()(x))


UNLIKE = {
    "another model": (
        lambda: nn.Linear(5, 3),
        "missing layer.weight; missing layer.bias; missing layer._extra_state; ",
    ),
    "a wrapped one": (lambda: nn.Sequential(Cached()), "missing layer.weight; "),
    "other layers of the same weights": (
        lambda: _with(Cached(), "drop", nn.Identity()),
        "layer drop Identity() instead of Dropout(p=0.5, inplace=False)",
    ),
    "other settings": (
        lambda: Cached(p=0.1),
        "layer drop Dropout(p=0.1, inplace=False) instead of Dropout(p=0.5, inplace=False)",
    ),
    "another buffer": (lambda: Cached(size=1), "buffer shift of shape [1] instead of [3]"),
    "no buffer": (lambda: _with(Cached(), "shift", None), "buffer shift of shape None instead of [3]"),
    "one on meta": (lambda: Cached().to("meta"), "layer.weight on meta; layer.bias on meta; shift on meta"),
}


def _with(model, name, value):
    setattr(model, name, value)
    return model


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_returned_module_of_another_structure_is_rejected(tmp_path, kind):
    make, got = UNLIKE[kind]
    torch.save(Cached().state_dict(), tmp_path / "given.pt")
    task = make_toy_task(
        tmp_path, Cached(), checkpoints=[Checkpoint(tmp_path / "given.pt", 1.0)], load=lambda model, path: make()
    )
    message = read_error(task, tmp_path / "out")
    assert message.startswith(
        f"the module that Task.load returned for {tmp_path}/given.pt does not match that of Task.model: got {got}"
    )
    assert message.endswith("; return the same module from Task.model, or fill the model that is passed to Task.load")


def test_a_failed_load_leaves_no_checkpoint_in_the_model(tmp_path):
    checkpoints = save_checkpoints(Toy(), tmp_path)
    torch.save({**read_weights(checkpoints[1].path), "first.bias": torch.zeros(7)}, checkpoints[1].path)
    with TaskRunner(make_toy_task(tmp_path, checkpoints=checkpoints), RunOptions(CPU)).model() as model:
        model.load(0)
        with pytest.raises(CheckpointError, match="first.bias of shape"):
            model.load(1)
        assert model.checkpoint == -1
        model.load(0)
        assert model.checkpoint == 0


def test_a_load_that_changes_a_type_is_rejected(tmp_path):
    checkpoints = save_checkpoints(Toy(), tmp_path)
    for checkpoint in checkpoints:
        torch.save({n: t.bfloat16() for n, t in read_weights(checkpoint.path).items()}, checkpoint.path)
    task = make_toy_task(
        tmp_path,
        checkpoints=checkpoints,
        load=lambda model, path: model.load_state_dict(read_weights(path), assign=True),
    )
    assert read_error(task, tmp_path / "out", TaskError) == (
        "loading checkpoint 1 changed the model's parameters: got 4 chosen parameters, first.weight [6, 5] "
        "torch.bfloat16, expected the same 4 names, shapes and dtypes as before, first.weight [6, 5] torch.float32; "
        "create parameters of the final dtype in Task.model; only set their values in Task.load"
    )


def test_the_digest_of_weights_covers_parameters_buffers_and_extra_state():
    model = nn.Linear(2, 2)
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("short", torch.ones(3, dtype=torch.bfloat16))
    model.register_buffer("flag", torch.tensor(True))
    model.register_buffer("complex", torch.ones(2, dtype=torch.complex64))
    seen = {tensors_digest(model.named_buffers())}
    for name in ("sparse", "short", "flag", "complex"):
        changed = copy.deepcopy(model)
        setattr(changed, name, getattr(changed, name) * 0)
        seen |= {tensors_digest(source.named_buffers()) for source in (changed, copy.deepcopy(changed))}
    assert len(seen) == 5


def on_meta(make):
    with torch.device("meta"):
        return make()


class Normed(nn.Module):
    """A linear layer over a norm with statistics."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(self.norm(x))


FILLED = {
    "default": None,
    "assign": lambda model, path: model.load_state_dict(read_weights(path), assign=True),
    "to_empty": lambda model, path: model.to_empty(device="cpu").load_state_dict(read_weights(path)),
    "returned": lambda model, path: load_model(path, Normed),
}


@pytest.mark.parametrize("load", FILLED)
@pytest.mark.parametrize("stored", [False, True], ids=["created each time", "stored by the user"])
def test_a_model_on_meta_is_filled_by_its_checkpoints(tmp_path, load, stored):
    checkpoints = save_checkpoints(Normed(), tmp_path)
    source = on_meta(Normed)
    task = make_toy_task(
        tmp_path,
        model=(lambda: source) if stored else partial(on_meta, Normed),
        checkpoints=checkpoints,
        load=FILLED[load],
    )
    plan(task, tmp_path / "out", CONFIG)
    found, wanted = (
        compute_exact_scores(task, tmp_path / "out"),
        compute_true_scores([load_model(c.path, Normed) for c in checkpoints]),
    )
    assert abs(found - wanted).max() < 1e-5 * abs(wanted).max()
    assert build(task, tmp_path / "out", CONFIG).rows_extracted == 0
    assert all(tensor.is_meta for tensor in (*source.parameters(), *source.buffers()))


def test_a_model_partly_on_meta_is_filled(tmp_path):
    checkpoints = save_checkpoints(Toy(), tmp_path)
    model = Toy()
    model.second = nn.Linear(6, 3, device="meta")
    found = compute_exact_scores(make_toy_task(tmp_path, model, checkpoints=checkpoints), tmp_path / "out")
    wanted = compute_true_scores([load_model(c.path) for c in checkpoints])
    assert abs(found - wanted).max() < 1e-5 * abs(wanted).max()


@pytest.mark.parametrize("form", ["torch", "safetensors", "own"])
def test_tied_weights_on_meta_stay_tied(tmp_path, form):
    source = Tied()
    path = tmp_path / "given.safetensors" if form == "safetensors" else tmp_path / "given.pt"
    if form == "safetensors":
        save_model(source, str(path))
    else:
        torch.save(source.state_dict(), path)
    load = (lambda model, path: model.load_state_dict(read_weights(path), assign=True)) if form == "own" else None
    task = make_toy_task(tmp_path, model=partial(on_meta, Tied), checkpoints=[Checkpoint(path, 1.0)], load=load)
    model = load_checkpoints(task, [0, 0])
    assert assert_equal(model, source)
    assert model.head.weight is model.embed.weight
    assert len(list(model.parameters())) == 3


def test_tied_weights_of_which_a_loader_fills_one_stay_tied(tmp_path):
    source = Tied()
    save_model(source, str(tmp_path / "given.safetensors"))
    task = make_toy_task(
        tmp_path,
        model=partial(on_meta, Tied),
        checkpoints=[Checkpoint(tmp_path / "given.safetensors", 1.0)],
        load=lambda model, path: model.load_state_dict(load_file(path), strict=False, assign=True),
    )
    model = load_checkpoints(task, [0])
    assert assert_equal(model, source)
    assert model.head.weight is model.embed.weight


def test_a_model_on_meta_keeps_its_types(tmp_path):
    checkpoints = save_checkpoints(Toy(), tmp_path)
    for checkpoint in checkpoints:
        torch.save({n: t.bfloat16() for n, t in read_weights(checkpoint.path).items()}, checkpoint.path)
    task = make_toy_task(tmp_path, model=partial(on_meta, Toy), checkpoints=checkpoints)
    build(task, tmp_path / "out", CONFIG)
    assert InfluenceIndex.open(tmp_path / "out", task, device="cpu").query([0])[0].proponents
    model = load_checkpoints(task)
    assert all(p.dtype is torch.float32 for p in model.parameters())
    assert all(torch.equal(t, read_weights(checkpoints[0].path)[n].float()) for n, t in model.state_dict().items())


def test_a_buffer_that_stays_on_meta_is_rejected_by_name(tmp_path):
    torch.save(Cached().state_dict(), tmp_path / "given.pt")
    checkpoints = [Checkpoint(tmp_path / "given.pt", 1.0)]
    task = make_toy_task(tmp_path, model=partial(on_meta, Cached), checkpoints=checkpoints)
    assert read_error(task, tmp_path / "out") == (
        f"checkpoint {tmp_path}/given.pt leaves a part of the model on the meta device: got shift, a buffer that is "
        "not in the state_dict, expected values for every parameter and buffer; create these on the CPU in Task.model, "
        "or fill them in Task.load"
    )

    def load(model, path):
        model.load_state_dict(read_weights(path), assign=True)
        model.shift = torch.zeros(3)

    build(
        make_toy_task(tmp_path, model=partial(on_meta, Cached), checkpoints=checkpoints, load=load),
        tmp_path / "out",
        CONFIG,
    )


def test_a_loader_that_leaves_weights_on_meta_is_rejected_by_name(tmp_path):
    def load(model, path):
        model.first.load_state_dict(
            {n[6:]: t for n, t in read_weights(path).items() if n.startswith("first")}, assign=True
        )

    message = read_error(
        make_toy_task(tmp_path, model=partial(on_meta, Toy), load=load, checkpoints=save_checkpoints(Toy(), tmp_path)),
        tmp_path / "out",
    )
    assert "leaves a part of the model on the meta device: got second.weight; second.bias, expected values" in message


def test_with_a_returned_module_every_example_is_scored_alone(tmp_path):
    """The original defect: `load` returned a pickled model."""
    checkpoints = save_checkpoints(Toy(), tmp_path)
    models = [load_model(c.path) for c in checkpoints]
    for i, model in enumerate(models):
        torch.save(model, tmp_path / f"whole{i}.pt")
    pickled = [Checkpoint(tmp_path / f"whole{i}.pt", rate) for i, rate in enumerate(RATES)]
    task = make_toy_task(tmp_path, checkpoints=pickled, load=lambda model, path: torch.load(path, weights_only=False))
    found = compute_exact_scores(task, tmp_path / "out")
    grads = [
        torch.stack([oracle.gradients(model, cross_entropy, data) for model in models], 1)
        for data in (make_rows(5, seed=2), make_rows(10))
    ]
    wanted = oracle.tracin(*grads, RATES)
    assert abs(found - wanted).max() < 1e-5 * abs(wanted).max()
