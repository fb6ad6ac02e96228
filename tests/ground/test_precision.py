"""Settings of GPUs while a model runs: full float32 precision, and recurrent layers without cuDNN."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tracin_ann.device import disable_tf32, run_rnns_without_cudnn
from tracin_ann.task import preserve_model

BACKENDS = torch.backends
HAS_NEW_SETTINGS = hasattr(BACKENDS.cuda.matmul, "fp32_precision")
OPERATORS = {
    "products": lambda: BACKENDS.cuda.matmul,
    "convolutions": lambda: BACKENDS.cudnn.conv,
    "recurrent layers": lambda: BACKENDS.cudnn.rnn,
    "products on CPUs": lambda: BACKENDS.mkldnn.matmul,
    "convolutions on CPUs": lambda: BACKENDS.mkldnn.conv,
    "recurrent layers on CPUs": lambda: BACKENDS.mkldnn.rnn,
}


def read(getter: Callable[[], object]) -> object:
    """Return a setting, or "mixed" if PyTorch rejects to read it because kinds of operators differ."""
    try:
        return getter()
    except RuntimeError:
        return "mixed"


def read_settings() -> dict[str, object]:
    """Return all settings of the precision of float32, and those of cuDNN that a block must not change."""
    older = {
        "precision": torch.get_float32_matmul_precision,
        "products": lambda: BACKENDS.cuda.matmul.allow_tf32,
        "cuDNN": lambda: BACKENDS.cudnn.allow_tf32,
        "benchmark": lambda: BACKENDS.cudnn.benchmark,
        "deterministic": lambda: BACKENDS.cudnn.deterministic,
        "enabled": lambda: BACKENDS.cudnn.enabled,
    }
    newer = {f"{kind}, newer": lambda owner=owner: owner().fp32_precision for kind, owner in OPERATORS.items()}
    groups = {name: lambda owner=owner: owner.fp32_precision for name, owner in (("all", BACKENDS),)}
    found = older | (newer | groups if HAS_NEW_SETTINGS else {})
    return {name: read(getter) for name, getter in found.items()}


def is_full(setting: object) -> bool:
    return setting in ("none", "ieee", False, "highest")


def reset_settings() -> None:
    """Set everything as it is in a new process; another test may have left equivalent settings."""
    if HAS_NEW_SETTINGS:
        BACKENDS.fp32_precision = BACKENDS.cudnn.fp32_precision = "none"
        for owner in OPERATORS.values():
            owner().fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.cudnn.benchmark = BACKENDS.cudnn.deterministic = False
    if HAS_NEW_SETTINGS:
        BACKENDS.cuda.matmul.fp32_precision = BACKENDS.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture
def _restored() -> Iterator[None]:
    reset_settings()
    before = read_settings()
    yield
    reset_settings()
    assert read_settings() == before


def set_older(name: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(name)


def set_newer(owner: Callable[[], Any], value: str) -> Callable[[], None]:
    return lambda: setattr(owner(), "fp32_precision", value)


CHANGES: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    **{f"older, {name}": set_older(name) for name in ("highest", "high", "medium")},
    "older, products": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "older, no cuDNN": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "benchmark": lambda: setattr(BACKENDS.cudnn, "benchmark", True),
    "deterministic": lambda: setattr(BACKENDS.cudnn, "deterministic", True),
    **{f"newer, {kind}": set_newer(owner, "tf32") for kind, owner in OPERATORS.items()},
    "newer, bfloat16 on CPUs": set_newer(OPERATORS["products on CPUs"], "bf16"),
    "newer, all tf32": set_newer(lambda: BACKENDS, "tf32"),
    "newer, all ieee": set_newer(lambda: BACKENDS, "ieee"),
    "newer, cuDNN": set_newer(lambda: BACKENDS.cudnn, "tf32"),
}


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("change", CHANGES)
def test_float32_is_computed_in_full_precision_whatever_the_task_sets(change: str) -> None:
    if change.startswith("newer") and not HAS_NEW_SETTINGS:
        pytest.skip("this PyTorch has the older settings only")
    CHANGES[change]()
    before = read_settings()
    with disable_tf32():
        inside = read_settings()
        with disable_tf32():
            assert read_settings() == inside
    kinds = [name for name in before if name.endswith("newer") or name in ("precision", "products", "cuDNN")]
    newer = change.startswith("newer")
    # After the newer settings, PyTorch may reject to read the older ones, as it does outside of the block.
    wrong = {k: inside[k] for k in kinds if not is_full(inside[k]) and not (newer and inside[k] == "mixed")}
    assert wrong == {}
    assert not inside["benchmark"]
    assert (inside["deterministic"], inside["enabled"]) == (before["deterministic"], before["enabled"])
    after = read_settings()
    assert {k: after[k] for k in after if before[k] != "mixed"} == {k: v for k, v in before.items() if v != "mixed"}


@pytest.mark.usefixtures("_restored")
def test_an_error_restores_the_precision() -> None:
    torch.set_float32_matmul_precision("high")
    before = read_settings()
    with pytest.raises(KeyError), disable_tf32():
        raise KeyError
    assert read_settings() == before


@pytest.mark.usefixtures("_restored")
def test_the_precision_is_full_until_the_last_thread_is_done() -> None:
    torch.set_float32_matmul_precision("medium")
    before = read_settings()
    inside, ended = threading.Event(), threading.Event()

    def work() -> None:
        with disable_tf32():
            inside.set()
            assert ended.wait(10)

    thread = threading.Thread(target=work)
    with disable_tf32():
        thread.start()
        assert inside.wait(10)
    assert torch.get_float32_matmul_precision() == "highest"
    ended.set()
    thread.join()
    assert read_settings() == before


@pytest.mark.usefixtures("_restored")
def test_a_model_may_read_and_change_the_settings_of_cudnn() -> None:
    """`flags` reads all older settings, and fails if kinds of operators differ."""
    with disable_tf32(), BACKENDS.cudnn.flags(enabled=False, allow_tf32=False):
        assert not BACKENDS.cuda.matmul.allow_tf32


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
