"""State dicts load as by `load_state_dict`, with layer versions and hooks, from wrapped models and from entries."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn import functional as F

import oracle
from tasks.toy import CONFIG, RATES, Toy, cross_entropy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, build, plan
from tracin_ann.cli.build import main
from tracin_ann.errors import CheckpointError
from tracin_ann.task.checkpoint_loader import CheckpointLoader

CPU = torch.device("cpu")


class Scaled(nn.Module):
    """A linear layer whose first version stored half of its weight."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        return x @ self.weight.T

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if (local_metadata.get("version") or 1) < 2:
            state_dict[f"{prefix}weight"] = 2 * state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Renamed(nn.Linear):
    """A linear layer whose weight had another name in earlier files."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Tempered(nn.Linear):
    """A linear layer with state that is not a tensor."""

    temperature = 1.0

    def get_extra_state(self):
        return {"temperature": self.temperature, "steps": [1, 2]}

    def set_extra_state(self, state):
        self.temperature = state["temperature"]

    def forward(self, x):
        return super().forward(x) / self.temperature


class Tied(nn.Module):
    """A model with one matrix for the embedding and the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


class Holder(nn.Module):
    """A model with a submodule that has the name of a wrapper."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(5, 3)

    def forward(self, x):
        return self.module(x)


def load_weights(tmp_path, model, path):
    loader = CheckpointLoader(make_toy_task(tmp_path, model, checkpoints=[Checkpoint(path, 1.0)]))
    loader.load(model, 0, CPU)
    return loader


def write(tmp_path, value):
    torch.save(value, tmp_path / "given.pt")
    return tmp_path / "given.pt"


def read_error(tmp_path, model, path):
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path, model, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def compute_exact_scores(task, out):
    """Return the exact scores [Q, N] of an index of the task."""
    build(task, out, CONFIG)
    answers = InfluenceIndex.open(out, task, device="cpu").query(range(5), options=QueryOptions(k=10, exact=True))
    scores = torch.zeros(5, 10, dtype=torch.float64)
    for answer, row in zip(answers, scores, strict=True):
        for hit in (*answer.proponents, *answer.opponents):
            row[hit.row] = hit.score
    return scores.numpy()


def compute_true_scores(models, rates=RATES):
    """Return the true scores by the oracle, with one model per checkpoint."""
    sides = [
        torch.stack([oracle.gradients(model, cross_entropy, data) for model in models], 1)
        for data in (make_rows(5, seed=2), make_rows(10))
    ]
    return oracle.tracin(*sides, rates)


def assert_equal(one, other):
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name] for name in a
    )


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_the_version_of_a_layer_is_preserved_so_that_nothing_is_converted_twice(tmp_path, prefix):
    models, checkpoints = [Scaled(), Scaled()], []
    for i, model in enumerate(models):
        holding = model
        for name in reversed(prefix.split(".")[:-1]):
            holder = nn.Module()
            holder.add_module(name, holding)
            holding = holder
        torch.save(holding.state_dict(), tmp_path / f"{i}.pt")
        checkpoints.append(Checkpoint(tmp_path / f"{i}.pt", RATES[i]))
    found = compute_exact_scores(make_toy_task(tmp_path, Scaled(), checkpoints=checkpoints), tmp_path / "out")
    assert abs(found - compute_true_scores(models)).max() < 1e-5 * abs(found).max()


def test_an_old_version_is_converted(tmp_path):
    source, model = Scaled(), Scaled()
    load_weights(tmp_path, model, write(tmp_path, {"weight": source.weight.detach() / 2}))
    assert torch.equal(model.weight, source.weight)


def test_names_that_a_layer_maps_are_accepted(tmp_path):
    source, model = Renamed(5, 3), Renamed(5, 3)
    load_weights(tmp_path, model, write(tmp_path, {"kernel": source.weight.detach(), "bias": source.bias.detach()}))
    assert assert_equal(model, source)


def test_weights_from_before_parametrisations_are_accepted(tmp_path):
    source, model = (nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)) for _ in range(2))
    halves = source.parametrizations.weight
    old = {"bias": source.bias, "weight_g": halves.original0, "weight_v": halves.original1}
    load_weights(tmp_path, model, write(tmp_path, {name: value.detach() for name, value in old.items()}))
    assert assert_equal(model, source)


def test_batch_norm_without_a_count_of_batches_is_accepted(tmp_path):
    source, model = (nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)) for _ in range(2))
    source[1].running_mean.fill_(0.5)
    state = {name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    load_weights(tmp_path, model, write(tmp_path, state))
    assert assert_equal(model, source)


def test_state_that_is_not_a_tensor_is_loaded(tmp_path):
    source, model = Tempered(5, 3), Tempered(5, 3)
    source.temperature = 0.25
    load_weights(tmp_path, model, write(tmp_path, source.state_dict()))
    assert model.temperature == 0.25
    state = source.state_dict()
    del state["_extra_state"]
    assert "does not match the model: got missing _extra_state, expected" in read_error(
        tmp_path, model, write(tmp_path, state)
    )


class Odd:
    """An object that weights_only rejects."""


def test_an_object_in_a_file_is_rejected_with_its_class(tmp_path):
    path = write(tmp_path, {**Toy().state_dict(), "_extra_state": Odd()})
    assert (
        f"checkpoint {path} cannot be read: got UnpicklingError: an object of test_state_dicts.Odd, which "
        "weights_only=True rejects, expected a state_dict"
    ) in read_error(tmp_path, Toy(), path)


def test_an_error_in_the_code_of_a_layer_is_reported_in_one_line(tmp_path):
    path = write(tmp_path, {**Tempered(5, 3).state_dict(), "_extra_state": {"steps": []}})
    message = read_error(tmp_path, Tempered(5, 3), path)
    assert message.startswith(f"checkpoint {path} does not match the model: got 'temperature', expected")


@pytest.mark.parametrize("stored", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_tied_weights_may_be_in_a_file_once(tmp_path, stored, form):
    source, model = Tied(), Tied()
    state = {name: value for name, value in source.state_dict().items() if name == stored or "norm" in name}
    if form == "torch":
        path = write(tmp_path, state)
    else:
        path = tmp_path / "given.safetensors"
        save_file(state, path)
    load_weights(tmp_path, model, path)
    assert assert_equal(model, source)
    assert model.head.weight is model.embed.weight


def test_a_file_of_save_model_is_accepted(tmp_path):
    source, model = Tied(), Tied()
    save_model(source, str(tmp_path / "given.safetensors"))
    load_weights(tmp_path, model, tmp_path / "given.safetensors")
    assert assert_equal(model, source)


def test_a_weight_without_a_tied_weight_in_the_file_is_missing(tmp_path):
    model = Tied()
    path = write(tmp_path, {"norm.weight": torch.ones(4), "head.weight": torch.ones(7, 4)})
    assert "got missing norm.bias, expected" in read_error(tmp_path, model, path)
    path = write(tmp_path, {"norm.weight": torch.ones(4), "norm.bias": torch.ones(4)})
    assert "got missing embed.weight; missing head.weight, expected" in read_error(tmp_path, model, path)


WRAPPERS = {
    "module.": "'module.' removed from the names",
    "_orig_mod.": "'_orig_mod.' removed from the names",
    "module._orig_mod.": "'module._orig_mod.' removed from the names",
    "_orig_mod.module.": "'_orig_mod.module.' removed from the names",
}


@pytest.mark.parametrize("entry", ["", "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", *WRAPPERS])
def test_prefixes_and_entries_are_removed_and_reported(tmp_path, prefix, entry):
    source, model = Toy(), Toy()
    state = OrderedDict((f"{prefix}{name}", value) for name, value in source.state_dict().items())
    optimiser = torch.optim.Adam(source.parameters())
    content = (
        {"epoch": 3, entry: state, "optimizer": optimiser.state_dict(), "step": torch.tensor(7)} if entry else state
    )
    loader = load_weights(tmp_path, model, write(tmp_path, content))
    assert assert_equal(model, source)
    parts = [f" from its entry {entry!r}"] * bool(entry) + [f" with {WRAPPERS.get(prefix)}"] * bool(prefix)
    assert loader.notes == ((f"given.pt: weights read{''.join(parts)}",) if parts else ())


def test_separately_compiled_layers_are_read(tmp_path):
    source, model = Toy(), Toy()
    state = {name.replace("first.", "first._orig_mod."): value for name, value in source.state_dict().items()}
    loader = load_weights(tmp_path, model, write(tmp_path, state))
    assert assert_equal(model, source)
    assert loader.notes == ("given.pt: weights read with '._orig_mod.' removed from the names",)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_module_that_has_the_name_of_a_wrapper_keeps_it(tmp_path, wrapped):
    source, model = Holder(), Holder()
    state = nn.ModuleDict({"module": source}).state_dict() if wrapped else source.state_dict()
    loader = load_weights(tmp_path, model, write(tmp_path, state))
    assert assert_equal(model, source)
    assert len(loader.notes) == wrapped


def test_the_matching_one_of_two_entries_is_used(tmp_path):
    source, model = Toy(), Toy()
    content = {"model": source.state_dict(), "state_dict": nn.Linear(2, 2).state_dict()}
    assert load_weights(tmp_path, model, write(tmp_path, content)).notes == (
        "given.pt: weights read from its entry 'model'",
    )
    assert assert_equal(model, source)


def test_two_matching_entries_are_rejected_by_name(tmp_path):
    path = write(tmp_path, {"model": Toy().state_dict(), "state_dict": Toy().state_dict()})
    assert read_error(tmp_path, Toy(), path) == (
        f"checkpoint {path} contains more than one state_dict that fits the model: got 'model' and 'state_dict', "
        "expected one; give Task a load(model, path) that loads one of them"
    )


def test_the_closest_interpretation_names_what_does_not_match(tmp_path):
    state = {f"module.{name}": value for name, value in Toy().state_dict().items() if name != "first.bias"}
    path = write(tmp_path, {"epoch": 1, "model": state})
    assert read_error(tmp_path, Toy(), path).startswith(
        f"checkpoint {path}, read from its entry 'model' with 'module.' removed from the names, does not match the "
        "model: got missing first.bias, expected the 4 entries"
    )


TASK = """
from tasks.toy import make_toy_task
from tracin_ann import Checkpoint

def task(folder):
    return make_toy_task(folder, checkpoints=[Checkpoint(f"{folder}/wrapped{i}.pt", 0.5) for i in (0, 1)])
"""


def test_a_build_and_its_plan_report_it_once(tmp_path, monkeypatch):
    checkpoints = save_checkpoints(Toy(), tmp_path)
    for i, checkpoint in enumerate(checkpoints):
        state = torch.load(checkpoint.path, weights_only=True)
        torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / f"wrapped{i}.pt")
    wrapped = [Checkpoint(tmp_path / f"wrapped{i}.pt", RATES[i]) for i in (0, 1)]
    message = "weights read from its entry 'model' with 'module.' removed from the names"
    task = make_toy_task(tmp_path, checkpoints=wrapped)
    assert plan(task, tmp_path / "out", CONFIG).notes == (f"wrapped0.pt and 1 more: {message}",)
    report = build(task, tmp_path / "out", CONFIG)
    assert report.notes == (f"wrapped0.pt and 1 more: {message}",)
    plain = build(make_toy_task(tmp_path, checkpoints=checkpoints), tmp_path / "plain", CONFIG)
    assert plain.notes == ()
    rows_NF = [InfluenceIndex.open(tmp_path / name, task).view().take(range(10)) for name in ("out", "plain")]
    assert (rows_NF[0] == rows_NF[1]).all()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wrapped_task.py").write_text(TASK)
    words = ["--task", f"{tmp_path}/wrapped_task.py:task", "--task-arg", f"folder={tmp_path}", "--out"]
    for more in (["--dry-run"], []):
        shown = CliRunner().invoke(main, [*words, str(tmp_path / "cli"), "--device", "cpu", *more])
        assert shown.exit_code == 0, shown.output
        assert shown.output.count(message) == 1


def test_scores_of_tied_weights_from_safetensors_equal_the_oracle(tmp_path):
    models, checkpoints = [Tied(), Tied()], []
    for i, model in enumerate(models):
        save_model(model, str(tmp_path / f"{i}.safetensors"))
        checkpoints.append(Checkpoint(tmp_path / f"{i}.safetensors", RATES[i]))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)

    generator = torch.Generator().manual_seed(5)
    data = [tuple(torch.randint(0, 7, (2, 6), generator=generator)) for _ in range(10)]
    task = make_toy_task(
        tmp_path, Tied(), loss=loss, train_data=lambda: data, query_data=lambda: data[:5], checkpoints=checkpoints
    )
    found = compute_exact_scores(task, tmp_path / "out")
    grads = torch.stack([oracle.gradients(model, loss, data) for model in models], 1)
    wanted = oracle.tracin(grads[:5], grads, RATES)
    assert abs(found - wanted).max() < 1e-5 * abs(wanted).max()
