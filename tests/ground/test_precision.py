"""Settings of GPUs while a model runs: full float32 precision, and recurrent layers without cuDNN."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tracin_ann.device import disable_tf32, run_rnns_without_cudnn
from tracin_ann.task import preserve_model


@pytest.fixture
def _restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_no_product_uses_tf32(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    with disable_tf32():
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.matmul.allow_tf32 == (precision != "highest")


@pytest.mark.usefixtures("_restored")
def test_no_product_uses_tf32_that_newer_settings_allow() -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this PyTorch has the older settings only")
    matmul.fp32_precision = "tf32"
    with disable_tf32():
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"


class Recording(nn.Module):
    """Records whether cuDNN is enabled in a recurrent layer and beside it."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.rnn, self.fails, self.seen = nn.GRU(3, 4), fails, []
        self.rnn.flatten_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(torch.backends.cudnn.enabled)
        self.rnn.register_forward_pre_hook(lambda *_: self.seen.append(torch.backends.cudnn.enabled))
        y = self.rnn(x if not self.fails else x[..., :1])[0]
        self.seen.append(torch.backends.cudnn.enabled)
        return y


def test_recurrent_layers_run_without_cudnn() -> None:
    model = Recording()
    assert torch.backends.cudnn.enabled
    with preserve_model(model):
        model(torch.zeros(2, 1, 3))
    assert model.seen == [True, False, True]
    model.seen.clear()
    model(torch.zeros(2, 1, 3))
    assert set(model.seen) == {True}
    assert not model.rnn._forward_hooks


def test_cudnn_is_enabled_again_after_an_error() -> None:
    model = Recording(fails=True)
    with run_rnns_without_cudnn(model.modules()), pytest.raises(RuntimeError, match="input"):
        model(torch.zeros(2, 1, 3))
    assert model.seen == [True, False]
    assert torch.backends.cudnn.enabled


def test_cudnn_stays_off_until_the_last_thread_is_done() -> None:
    first, second = nn.GRU(3, 4), nn.GRU(3, 4)
    inside, outside, seen = threading.Event(), threading.Event(), []

    def wait(*_: object) -> None:
        inside.set()
        outside.wait(10)
        seen.append(torch.backends.cudnn.enabled)

    with run_rnns_without_cudnn([first, second]):
        first.register_forward_pre_hook(wait)
        thread = threading.Thread(target=first, args=(torch.zeros(2, 1, 3),))
        thread.start()
        assert inside.wait(10)
        second(torch.zeros(2, 1, 3))
        assert not torch.backends.cudnn.enabled
        outside.set()
        thread.join()
    assert seen == [False]
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_in_eval_mode_have_gradients(kind: type[nn.RNNBase], device: torch.device) -> None:
    torch.manual_seed(0)
    layer, x = kind(3, 4, num_layers=2).to(device), torch.randn(5, 2, 3, device=device)
    expected = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    with preserve_model(layer):
        found = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
