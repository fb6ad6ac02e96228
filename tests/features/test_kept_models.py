"""An open index: what it remembers between queries, and the changes that it still detects."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

from tasks.toy import CONFIG, Toy, cross_entropy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import InfluenceIndex, QueryOptions, Task, build
from tracin_ann.errors import IndexMismatchError
from tracin_ann.gradients import GradientEngine
from tracin_ann.task import CheckpointLoader, OriginalModel, preserve_globals

N = 31
EXACT = QueryOptions(rerank="exact")


class Temperature:
    """A setting that the loss reads from a global variable."""

    value = 1.0


class Aliased(Toy):
    """A model whose forward reads the first bias through a view that is not a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.view = self.first.bias.data.view(1, 6)

    def forward(self, x):
        return self.second(self.activation(self.first(x) + self.view))


class Counting(Toy):
    """A model whose forward writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Scaled(Toy):
    """A model with an attribute that its loader sets."""

    scale = 1.0

    def forward(self, x):
        return self.scale * super().forward(x)


def load_scaled(model, path):
    model.load_state_dict(torch.load(path, weights_only=True))
    model.scale = 2.0 if str(path).endswith("0.pt") else 3.0


def tempered(model, batch):
    return F.cross_entropy(model(batch[0]) / Temperature.value, batch[1], reduction="none")


def make_live(folder, model, **changes) -> Task:
    return make_toy_task(folder, model, train_data=lambda: make_rows(N), **changes)


def make_fresh(folder, make, **changes) -> Task:
    return make_toy_task(folder, make(), model=make, train_data=lambda: make_rows(N), **changes)


TASKS = {
    "a live model": lambda folder: make_live(folder, Toy()),
    "a new model at every call": lambda folder: make_fresh(folder, Toy),
    "a view of a parameter": lambda folder: make_live(folder, Aliased()),
    "a buffer that forward changes": lambda folder: make_live(folder, Counting()),
    "an attribute set by the loader": lambda folder: make_live(folder, Scaled(), load=load_scaled),
    "another query loss": lambda folder: make_live(folder, Toy(), query_loss=tempered),
    "a model on the meta device": lambda folder: make_fresh(
        folder, lambda: Toy().to(device="meta"), checkpoints=save_checkpoints(Toy(), folder)
    ),
}


def open_index(folder, task) -> InfluenceIndex:
    return InfluenceIndex.open(folder / "out", task, device="cpu", batch_size=4)


def read_hits(index, query, options=None):
    (answer,) = index.query([query], options=options)
    return [(hit.row, round(hit.score, 6)) for hit in (*answer.proponents, *answer.opponents)]


@pytest.fixture
def built(tmp_path):
    """Return a function that builds an index of a task in the folder and opens it."""

    def build_and_open(task):
        build(task, tmp_path / "out", CONFIG)
        return open_index(tmp_path, task)

    return build_and_open


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("options", [None, EXACT], ids=["stored", "exact"])
def test_an_index_that_stays_open_gives_the_answers_of_a_new_one(name, options, built, tmp_path):
    task = TASKS[name](tmp_path)
    index = built(task)
    for query in (0, 1, 2, 3, 4, 0, 1, 2):
        assert read_hits(index, query, options) == read_hits(open_index(tmp_path, task), query, options)


@pytest.mark.parametrize("options", [None, EXACT], ids=["stored", "exact"])
@pytest.mark.parametrize("name", ["a live model", "a new model at every call", "another query loss"])
def test_later_queries_neither_load_checkpoints_nor_prove_gradients(name, options, built, tmp_path, monkeypatch):
    index = built(TASKS[name](tmp_path))
    expected = [read_hits(index, query, options) for query in (0, 1, 2)]

    def fail(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(CheckpointLoader, "load", fail)
    monkeypatch.setattr(GradientEngine, "choose_methods", fail)
    assert [read_hits(index, query, options) for query in (0, 1, 2)] == expected


@pytest.mark.parametrize("name", ["a view of a parameter", "an attribute set by the loader"])
def test_weights_are_read_again_if_stored_ones_give_other_losses(name, built, tmp_path, monkeypatch):
    index = built(TASKS[name](tmp_path))
    for query in (0, 1, 2):
        read_hits(index, query)
    loads, load = [], CheckpointLoader.load
    monkeypatch.setattr(CheckpointLoader, "load", lambda self, *args: (loads.append(args[1]), load(self, *args)))
    read_hits(index, 3)
    assert 0 in loads or 1 in loads


def test_equal_weights_of_several_checkpoints_share_their_memory(built, tmp_path):
    model = Toy()
    checkpoints = save_checkpoints(model, tmp_path)
    states = [torch.load(checkpoint.path, weights_only=True) for checkpoint in checkpoints]
    states[1] = {**states[0], "second.bias": states[1]["second.bias"]}
    torch.save(states[1], checkpoints[1].path)
    index = built(make_live(tmp_path, model, checkpoints=checkpoints))
    for query in (0, 1, 2):
        read_hits(index, query)
    with index.runner.model() as loaded:
        own = sum(p.nbytes for p in model.parameters())
        assert loaded._cache.n_bytes == own + model.second.bias.nbytes


@pytest.mark.parametrize("models", [0, 1, 2])
def test_answers_do_not_depend_on_the_memory_for_weights(models, built, tmp_path):
    task = make_live(tmp_path, Toy())
    built(task)
    n_bytes = models * sum(p.nbytes for p in Toy().parameters())
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu", batch_size=4, memory_bytes=n_bytes)
    for query in (0, 1, 2, 3, 4):
        assert read_hits(index, query) == read_hits(open_index(tmp_path, task), query)
    with index.runner.model() as loaded:
        assert models == (0 if loaded._cache is None else len(loaded._cache._stored))


def test_weights_that_are_not_needed_make_room(built, tmp_path):
    task = make_live(tmp_path, Toy())
    built(task)
    index = InfluenceIndex.open(
        tmp_path / "out", task, device="cpu", memory_bytes=sum(p.nbytes for p in Toy().parameters())
    )
    for checkpoint in (0, 0, 0, 1, 1, 1):
        index.query([0], options=QueryOptions(checkpoints=(checkpoint,)))
    with index.runner.model() as loaded:
        assert list(loaded._cache._stored) == [1]


@pytest.mark.parametrize("n_before", [0, 1, 2, 5])
@pytest.mark.parametrize("changed", [0, 1])
def test_changed_weights_are_rejected_by_open_and_new_indexes(n_before, changed, built, tmp_path):
    task = make_live(tmp_path, Toy())
    index, path = built(task), task.checkpoints[changed].path
    expected = read_hits(open_index(tmp_path, task), 0)
    for query in range(n_before):
        read_hits(index, query)
    original = path.read_bytes()
    state = torch.load(path, weights_only=True)
    torch.save({name: value + 0.5 for name, value in state.items()}, path)
    for _ in range(2):
        with pytest.raises(IndexMismatchError, match=f"checkpoint {changed}|has changed since index"):
            index.query([0])
    with pytest.raises(IndexMismatchError, match=f"checkpoint {changed}"):
        open_index(tmp_path, task).query([0])
    path.write_bytes(original)
    assert read_hits(index, 0) == expected


def test_a_checkpoint_that_is_written_again_with_equal_content_is_accepted(built, tmp_path):
    task = make_live(tmp_path, Toy())
    index = built(task)
    expected = [read_hits(index, query) for query in (0, 1, 2)]
    for checkpoint in task.checkpoints:
        content = checkpoint.path.read_bytes()
        os.unlink(checkpoint.path)
        checkpoint.path.write_bytes(content)
    assert [read_hits(index, query) for query in (0, 1, 2)] == expected


@pytest.mark.parametrize("n_before", [1, 2, 6])
@pytest.mark.parametrize("options", [None, EXACT, QueryOptions(checkpoints=(1,))], ids=["stored", "exact", "one"])
@pytest.mark.parametrize("losses", [{"loss": tempered}, {"query_loss": tempered}], ids=["loss", "query loss"])
def test_a_changed_loss_is_rejected_by_open_and_new_indexes(losses, options, n_before, built, tmp_path, monkeypatch):
    task = make_live(tmp_path, Toy(), **losses)
    index = built(task)
    for query in range(n_before):
        expected = read_hits(index, query % 5, options)
    monkeypatch.setattr(Temperature, "value", 1.5)
    for _ in range(3):
        with pytest.raises(IndexMismatchError, match="has changed since index"):
            index.query([0], options=options)
    with pytest.raises(IndexMismatchError, match="has changed since index"):
        open_index(tmp_path, task).query([0], options=options)
    monkeypatch.undo()
    assert read_hits(index, (n_before - 1) % 5, options) == expected


def test_a_changed_training_loss_is_rejected_though_queries_have_their_own(built, tmp_path, monkeypatch):
    index = built(make_live(tmp_path, Toy(), loss=tempered, query_loss=cross_entropy))
    read_hits(index, 0, EXACT)
    monkeypatch.setattr(Temperature, "value", 1.5)
    with pytest.raises(IndexMismatchError, match="has changed since index"):
        index.query([0], options=EXACT)
    with pytest.raises(IndexMismatchError, match="has changed since index"):
        index.self_influence(3, exact=True)


@pytest.mark.parametrize("n_before", [1, 2, 6])
def test_a_changed_forward_is_rejected(n_before, built, tmp_path, monkeypatch):
    index = built(make_live(tmp_path, Toy()))
    for query in range(n_before):
        read_hits(index, query % 5)
    monkeypatch.setattr(Toy, "forward", lambda self, x: self.second(torch.relu(self.first(x))))
    with pytest.raises(IndexMismatchError, match="has changed since index"):
        index.query([0])


def test_a_forward_that_changes_gradients_but_not_losses_is_rejected_within_some_queries(built, tmp_path, monkeypatch):
    index = built(make_live(tmp_path, Toy()))
    for query in (0, 1, 2):
        read_hits(index, query)
    monkeypatch.setattr(Toy, "forward", lambda self, x: self.second(self.activation(self.first(x)).detach()))

    def ask_all():
        for _ in range(8 * len(index.task.checkpoints)):
            index.query([0])

    with pytest.raises(IndexMismatchError, match="has changed since index"):
        ask_all()


@pytest.mark.parametrize("side", ["train", "query"])
def test_changed_data_is_rejected_by_open_and_new_indexes(side, built, tmp_path):
    rows = {"train": make_rows(N), "query": make_rows(5, seed=2)}
    task = make_live(tmp_path, Toy(), query_data=lambda: rows["query"])
    task = make_toy_task(
        tmp_path,
        Toy(),
        train_data=lambda: rows["train"],
        query_data=lambda: rows["query"],
        checkpoints=task.checkpoints,
    )
    index = built(task)
    read_hits(index, 0)
    read_hits(index, 1)
    for place, (x, label) in enumerate(rows[side]):
        rows[side][place] = (x, (label + 1) % 3)

    def ask_all():
        # Every call reads one canary of the two data sets again.
        for _ in range(2 * 8):
            index.query([0])

    with pytest.raises(IndexMismatchError, match=f"the gradient of {side} row"):
        ask_all()
    with pytest.raises(IndexMismatchError):
        open_index(tmp_path, task).query([0])


def test_threads_that_share_an_index_get_the_answers_of_one_thread(built, tmp_path):
    index = built(make_live(tmp_path, Toy()))
    cases = [(query, options) for query in range(5) for options in (None, EXACT, QueryOptions(checkpoints=(1,)))]
    expected = [read_hits(index, *case) for case in cases]
    wrong: list[object] = []

    def work(seed):
        for place in np.random.default_rng(seed).integers(len(cases), size=30):
            try:
                found = read_hits(index, *cases[place])
            except Exception as error:  # noqa: BLE001 - reported below
                found = error
            if found != expected[place]:
                wrong.append((cases[place], found))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", TASKS)
def test_the_users_model_is_unchanged_between_queries(name, built, tmp_path):
    task = TASKS[name](tmp_path)
    index = built(task)
    model = task.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    memory = {key: value.data_ptr() for key, value in model.state_dict().items()}
    for query in range(5):
        read_hits(index, query, EXACT)
        if not next(model.parameters()).is_meta:
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            assert memory == {key: value.data_ptr() for key, value in model.state_dict().items()}
        assert modes == [module.training for module in model.modules()]
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_goes_on_between_queries(built, tmp_path):
    model = Toy()
    task = make_live(tmp_path, model)
    index = built(task)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for query in (0, 1, 2, 3, 4):
        expected = read_hits(open_index(tmp_path, task), query)
        optimizer.zero_grad()
        x, y = torch.utils.data.default_collate(make_rows(8, seed=3))
        before = nn.functional.cross_entropy(model(x), y)
        before.backward()
        assert read_hits(index, query) == expected
        optimizer.step()
        assert float(nn.functional.cross_entropy(model(x), y).detach()) < float(before.detach())


def faint(model, batch):
    return 1e-7 * tempered(model, batch)


def share_parameters(layer: nn.Linear) -> nn.Linear:
    other = nn.Linear(layer.in_features, layer.out_features)
    other.weight, other.bias = layer.weight, layer.bias
    return other


def count_loads(monkeypatch) -> list[int]:
    """Return a list to which every load of a file adds its checkpoint."""
    loads, load = [], CheckpointLoader.load
    monkeypatch.setattr(CheckpointLoader, "load", lambda self, *args: (loads.append(args[1]), load(self, *args)))
    return loads


@pytest.mark.parametrize("loss", [cross_entropy, faint], ids=["usual losses", "small losses"])
@pytest.mark.parametrize("make", [make_live, lambda folder, model, **c: make_fresh(folder, type(model), **c)])
def test_an_attribute_set_by_the_loader_is_that_of_the_checkpoint_in_any_order(make, loss, built, tmp_path):
    task = make(tmp_path, Scaled(), load=load_scaled, loss=loss)
    index = built(task)
    for chosen in [(0, 1), (0,), (0,), (0,), (0, 1), (0, 1), (0, 1), (1,), (1,), (1,), (0, 1), (0, 1), (0,), (1,)]:
        expected = open_index(tmp_path, task).features("query", [0], chosen)
        assert np.allclose(index.features("query", [0], chosen), expected, rtol=1e-4, atol=0)


def test_a_changed_attribute_is_set_again_by_the_loader(built, tmp_path):
    model = Scaled()
    task = make_live(tmp_path, model, load=load_scaled, checkpoints=save_checkpoints(model, tmp_path)[:1])
    index = built(task)
    expected = [read_hits(index, query) for query in (0, 1, 2)]
    model.scale = 7.0
    assert [read_hits(index, query) for query in (0, 1, 2)] == expected


@pytest.mark.parametrize("n_before", [0, 1, 2, 3])
@pytest.mark.parametrize("change", [copy.deepcopy, share_parameters])
def test_a_layer_that_the_user_replaces_is_used_by_the_next_query(change, n_before, built, tmp_path):
    model = Toy()
    index = built(make_live(tmp_path, model))
    expected = [read_hits(index, query) for query in (0, 1, 2)]
    for _ in range(n_before):
        read_hits(index, 0)
    model.first = change(model.first)
    assert [read_hits(index, query) for query in (0, 1, 2)] == expected
    model.first.weight = nn.Parameter(torch.zeros(6, 5))
    assert [read_hits(index, query) for query in (0, 1, 2)] == expected
    assert not model.first.weight.any()


@pytest.mark.parametrize("n_before", [2, 3])
def test_a_change_at_one_checkpoint_is_rejected_whatever_checkpoints_other_queries_have(
    n_before, built, tmp_path, monkeypatch
):
    task = make_live(tmp_path, Toy())
    index, bias = built(task), torch.load(task.checkpoints[0].path, weights_only=True)["second.bias"]
    for query in range(n_before):
        read_hits(index, query)
    forward = Toy.forward
    monkeypatch.setattr(
        Toy, "forward", lambda self, x: forward(self, x) * (2 if torch.equal(self.second.bias, bias) else 1)
    )

    def ask_all():
        for _ in range(4):
            index.query([0])
            index.query([0], options=QueryOptions(checkpoints=(1,)))

    with pytest.raises(IndexMismatchError, match="has changed since index"):
        ask_all()


def test_small_losses_are_compared(built, tmp_path, monkeypatch):
    index = built(make_live(tmp_path, Toy(), loss=faint))
    for query in (0, 1, 2):
        read_hits(index, query)
    monkeypatch.setattr(Temperature, "value", 1.5)
    with pytest.raises(IndexMismatchError, match="has changed since index"):
        index.query([0])


@pytest.mark.usefixtures("emulated_bf16")
def test_weights_are_stored_for_features_in_bf16_and_exact_scores_in_fp32(tmp_path, monkeypatch):
    task = make_live(tmp_path, Toy())
    build(task, tmp_path / "out", replace(CONFIG, precision="bf16"))
    index = open_index(tmp_path, task)
    for query in (0, 1, 2):
        read_hits(index, query, EXACT)
    loads = count_loads(monkeypatch)
    read_hits(index, 0, EXACT)
    assert not loads


def test_a_file_that_is_written_again_is_read_twice(built, tmp_path, monkeypatch):
    task = make_live(tmp_path, Toy())
    index = built(task)
    for query in (0, 1, 2):
        read_hits(index, query)
    path = task.checkpoints[0].path
    content = path.read_bytes()
    os.unlink(path)
    path.write_bytes(content)
    loads = count_loads(monkeypatch)
    for query in (0, 1, 2, 3):
        read_hits(index, query)
    assert loads == [0, 0]


@pytest.mark.parametrize("n_before", [0, 1, 3])
def test_a_query_inside_a_block_leaves_the_checkpoint_of_the_block(n_before, built, tmp_path):
    index = built(make_live(tmp_path, Toy()))
    for query in range(n_before):
        read_hits(index, query)
    with index.runner.model() as model:
        model.load(0)
        weights = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
        index.features("query", [0])
        assert model.checkpoint == 0
        assert all(torch.equal(parameter, weights[name]) for name, parameter in model.parameters.items())


@pytest.mark.parametrize("memory_bytes", [0, 1])
def test_weights_that_are_not_stored_are_released(memory_bytes, built, tmp_path, monkeypatch):
    task = TASKS["a model on the meta device"](tmp_path)
    built(task)
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu", batch_size=4, memory_bytes=memory_bytes)
    loaded, load = [], CheckpointLoader.load

    def load_and_note(self, model, *args):
        load(self, model, *args)
        loaded.extend(weakref.ref(parameter) for parameter in model.parameters())

    monkeypatch.setattr(CheckpointLoader, "load", load_and_note)
    for query in (0, 1, 2):
        read_hits(index, query, EXACT)
    gc.collect()
    assert loaded
    assert not any(parameter() is not None for parameter in loaded)


def test_a_use_that_fails_at_its_start_does_not_affect_the_next_one(built, tmp_path, monkeypatch):
    model = Toy()
    task = make_live(tmp_path, model)
    expected = read_hits(built(task), 0)
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu", batch_size=4, memory_bytes=0)
    before = copy.deepcopy(model.state_dict())
    read_hits(index, 0)

    def fail(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(OriginalModel, "prepare_overwrite", fail)
        with pytest.raises(MemoryError):
            index.query([0])
    assert read_hits(index, 0) == expected
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("owner", "name"), [(GradientEngine, "loss_values"), (torch.Tensor, "clone"), (nn.Module, "load_state_dict")]
)
def test_an_interrupted_query_does_not_affect_the_next_one(owner, name, built, tmp_path, monkeypatch):
    model = Toy()
    task = make_live(tmp_path, model)
    expected = [read_hits(built(task), query) for query in (0, 1, 2)]
    before = copy.deepcopy(model.state_dict())
    original = getattr(owner, name)
    for n_before in range(12):
        index, calls = open_index(tmp_path, task), []
        read_hits(index, 0)

        def fail(*args, calls=calls, n_before=n_before, **kwargs):
            calls.append(name)
            if len(calls) > n_before:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(owner, name, fail)
            for query in (0, 1, 2):
                read_hits(index, query)
        assert model.training
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [read_hits(index, query) for query in (0, 1, 2)] == expected


def test_settings_of_the_process_are_restored_when_the_last_thread_leaves():
    fused, reentrant = torch.backends.mha.get_fastpath_enabled(), torch.utils.checkpoint.CheckpointFunction
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first():
        with preserve_globals():
            first_is_in.set()
            second_is_in.wait()
        first_is_out.set()

    def second():
        first_is_in.wait()
        with preserve_globals():
            second_is_in.set()
            first_is_out.wait()
            inside.append(torch.backends.mha.get_fastpath_enabled())

    inside: list[bool] = []
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [False]
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert torch.utils.checkpoint.CheckpointFunction is reentrant
