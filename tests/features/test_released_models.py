"""A model that is released inside its block: others may use it, and the block goes on as if nothing had happened."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from tasks.toy import Toy, make_toy_task
from tracin_ann.errors import TaskError
from tracin_ann.features import RunOptions, TaskRunner

WAIT = 60


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Toy()


@pytest.fixture(params=[1 << 20, 0], ids=["stored weights", "no memory"])
def runner(request, model, tmp_path) -> TaskRunner:
    runner = TaskRunner(make_toy_task(tmp_path, model), RunOptions(torch.device("cpu"), 4))
    runner.keep_model(request.param)
    return runner


def read_weights(model: nn.Module) -> torch.Tensor:
    return model.first.weight.detach().clone()


def use_elsewhere(runner: TaskRunner, checkpoint: int) -> torch.Tensor:
    """Return the weights of a checkpoint, loaded in a block of another thread."""

    def use() -> torch.Tensor:
        with runner.model("bf16") as loaded:
            loaded.load(checkpoint)
            torch.set_default_dtype(torch.float64)
            return read_weights(loaded.module)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(use).result(WAIT)


@pytest.mark.parametrize("times", [1, 4])
def test_others_use_the_model_while_it_is_released(runner, model, times):
    own, expected = read_weights(model), [use_elsewhere(runner, checkpoint) for checkpoint in (0, 1)]
    with runner.model("fp32") as loaded:
        loaded.load(0)
        for _ in range(times):
            with runner.release_model():
                assert torch.equal(read_weights(model), own), "the model of the user is as it was"
                assert torch.equal(use_elsewhere(runner, 1), expected[1])
            assert (loaded.checkpoint, loaded.precision) == (0, "fp32")
            assert torch.equal(read_weights(loaded.module), expected[0])
            assert torch.get_default_dtype() == torch.float32
    assert torch.equal(read_weights(model), own)


def test_nested_blocks_are_released_and_entered_again(runner, model):
    own = read_weights(model)
    with runner.model("fp32") as outer:
        outer.load(0)
        weights = read_weights(outer.module)
        with runner.model("bf16") as inner:
            inner.load(1)
            with runner.release_model():
                assert torch.equal(read_weights(model), own)
                use_elsewhere(runner, 0)
            assert (inner.checkpoint, inner.precision) == (1, "bf16")
        assert (outer.checkpoint, outer.precision) == (0, "fp32")
        assert torch.equal(read_weights(outer.module), weights)


def test_a_block_inside_a_released_one_is_released_alone(runner, model):
    own = read_weights(model)
    with runner.model("fp32") as outer:
        outer.load(0)
        weights = read_weights(outer.module)
        with runner.release_model():
            with runner.model("bf16") as inner:
                inner.load(1)
                with runner.release_model():
                    assert torch.equal(read_weights(model), own)
                assert (inner.checkpoint, inner.precision) == (1, "bf16")
            assert torch.equal(read_weights(model), own), "nobody uses the model"
            use_elsewhere(runner, 1)
        assert (outer.checkpoint, outer.precision) == (0, "fp32")
        assert torch.equal(read_weights(outer.module), weights)
    assert torch.equal(read_weights(model), own)


def test_a_block_of_another_thread_is_not_released(runner):
    has_model, may_end = threading.Event(), threading.Event()

    def hold() -> int:
        with runner.model() as loaded:
            loaded.load(1)
            has_model.set()
            assert may_end.wait(WAIT)
            return loaded.checkpoint

    with ThreadPoolExecutor(1) as thread:
        held = thread.submit(hold)
        assert has_model.wait(WAIT)
        with runner.release_model():
            may_end.set()
        assert held.result(WAIT) == 1


def test_the_block_goes_on_after_an_error(runner):
    with runner.model() as loaded:
        loaded.load(1)
        weights = read_weights(loaded.module)
        with pytest.raises(InterruptedError), runner.release_model():
            raise InterruptedError
        assert loaded.checkpoint == 1 and torch.equal(read_weights(loaded.module), weights)


def test_a_model_whose_parts_are_replaced_is_not_used_again(runner, model):
    def interrupt() -> None:
        with runner.model() as loaded:
            loaded.load(0)
            with runner.release_model():
                model.second = nn.Linear(6, 3)

    with pytest.raises(TaskError, match="the model has changed while its use was interrupted"):
        interrupt()
    use_elsewhere(runner, 1)


def test_a_model_that_is_not_kept_is_not_released(model, tmp_path):
    runner = TaskRunner(make_toy_task(tmp_path, model), RunOptions(torch.device("cpu"), 4))
    own = read_weights(model)
    with runner.model() as loaded:
        loaded.load(0)
        with runner.release_model():
            assert not torch.equal(read_weights(model), own)
