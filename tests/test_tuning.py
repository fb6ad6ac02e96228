"""What tuning chooses: within memory, only what is right, and no feature changes but for rounding."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.toy import saved
from tracin_ann import BuildConfig, InfluenceIndex, Task, build, plan, tuning
from tracin_ann.cli.common import MemorySize
from tracin_ann.device import container_memory_bytes
from tracin_ann.errors import UsageError
from tracin_ann.features import FeatureExtractor
from tracin_ann.passes import LoadedModel, Passes, PassOptions

CPU = torch.device("cpu")
CONFIG = BuildConfig(dim=64, device="cpu", dtype="float32", index="flat")
N_ROWS = 200


class Pictures(nn.Module):
    """Two convolutions and a head, with batch norm between; `flat` is how pictures become rows."""

    def __init__(self, flat: Any = lambda x: x.flatten(1)) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2)
        self.head, self.flat = nn.Linear(6 * 16, 4), flat

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm(self.first(x))), 1)
        return self.head(self.flat(torch.relu(self.second(x))))


def rows() -> list[tuple[Tensor, int]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 8, 8, generator=g), i % 4) for i in range(N_ROWS)]


def pictures(folder: Path, model: nn.Module) -> Task:
    return Task(
        model=lambda: model,
        loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], reduction="none"),
        train_data=rows,
        query_data=lambda: rows()[:4],
        checkpoints=saved(model, folder),
    )


def stored(task: Task, out: Path) -> np.ndarray:
    build(task, out, CONFIG)
    index = InfluenceIndex.open(out)
    return index.view().take(range(N_ROWS))


def timed(monkeypatch: pytest.MonkeyPatch, seconds: Any) -> list[tuple[int, bool]]:
    """Let tuning take place and find a row's time by `seconds(batch size, channels last)`; return what it tried."""
    monkeypatch.setattr(tuning, "_ROWS_WORTH_MEASURING", 1)
    monkeypatch.setattr(tuning, "_SHARE_OF_BUILD", float("inf"))
    tried: list[tuple[int, bool]] = []
    run = tuning._Tuning.seconds

    def told(self: Any, size: int, repeats: int = 1) -> float:
        run(self, size, 1)
        tried.append((size, self._model.channels_last))
        return seconds(size, self._model.channels_last)

    monkeypatch.setattr(tuning._Tuning, "seconds", told)
    return tried


def chosen(task: Task, tmp_path: Path, **changes: Any) -> tuning.Tuned:
    return plan(task, tmp_path / "planned", replace(CONFIG, **changes)).tuned


@pytest.mark.parametrize("best", [8, 64, 128])
def test_the_batch_size_with_the_cheapest_rows_is_taken(best, tmp_path, monkeypatch):
    timed(monkeypatch, lambda size, last: 1 + abs(np.log2(size / best)))
    assert chosen(pictures(tmp_path, Pictures()), tmp_path).batch_size == best


def test_a_size_that_is_asked_for_is_kept_and_the_format_still_measured(tmp_path, monkeypatch):
    tried = timed(monkeypatch, lambda size, last: 0.5 if last else 1.0)
    made = chosen(pictures(tmp_path, Pictures()), tmp_path, batch_size=24)
    assert (made.batch_size, made.channels_last) == (24, True)
    assert {size for size, _ in tried} == {24}


def test_small_builds_are_not_measured(tmp_path):
    made = chosen(pictures(tmp_path, Pictures()), tmp_path)
    assert (made.batch_size, made.channels_last) == (tuning.USUAL_SIZE, False)


def test_larger_batches_are_taken_only_as_far_as_memory_goes(tmp_path, monkeypatch):
    timed(monkeypatch, lambda size, last: 1 / size)
    task = pictures(tmp_path, Pictures())
    free = chosen(task, tmp_path)
    assert free.batch_size == 128
    row_bytes = free.batch_bytes // free.batch_size
    # Of one picture: itself, what each layer takes and gives, and half of it again for backward.
    at_least = 4 * (3 * 64 + 3 * 8 * 64 + 2 * 6 * 16)
    assert at_least < row_bytes < 5 * at_least
    for budget in (100, 33, 2):
        made = chosen(task, tmp_path, memory_bytes=budget * row_bytes)
        assert made.batch_bytes <= made.memory_bytes == budget * row_bytes
        assert made.batch_size > budget // 4
    with pytest.raises(UsageError, match=r"one row needs more than the memory budget.*raise --memory"):
        chosen(task, tmp_path, memory_bytes=row_bytes // 4)
    with pytest.raises(UsageError, match="one row needs more than the memory budget"):
        build(task, tmp_path / "i", replace(CONFIG, memory_bytes=row_bytes // 4))
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("last", [False, True])
def test_features_are_the_same_in_either_memory_format(last, tmp_path, monkeypatch):
    task = pictures(tmp_path, Pictures())
    usual = stored(task, tmp_path / "usual")
    tried = timed(monkeypatch, lambda size, is_last: 0.5 if is_last == last else 1.0)
    assert chosen(task, tmp_path).channels_last == last
    other = stored(task, tmp_path / "other")
    assert {is_last for _, is_last in tried} == {False, True}
    assert (np.linalg.norm(other - usual, axis=1) <= 1e-5 * np.linalg.norm(usual, axis=1)).all()


@pytest.mark.parametrize(
    "flat",
    [
        lambda x: x.view(len(x), -1),  # an error with channels last
        lambda x: torch.as_strided(x, (len(x), 96), (96, 1)),  # other numbers with channels last
    ],
    ids=["raises", "differs"],
)
def test_a_model_that_takes_no_channels_last_is_left_as_it_is(flat, tmp_path, monkeypatch):
    model = Pictures(flat)
    strides = {name: p.stride() for name, p in model.named_parameters()}
    timed(monkeypatch, lambda size, last: 0.1 if last else 1.0)
    task = pictures(tmp_path, model)
    assert not chosen(task, tmp_path).channels_last
    stored(task, tmp_path / "i")
    assert {name: p.stride() for name, p in model.named_parameters()} == strides


def test_channels_last_is_taken_back_from_a_borrowed_model(tmp_path, monkeypatch):
    model = Pictures()
    values = {name: p.clone() for name, p in model.named_parameters()}
    timed(monkeypatch, lambda size, last: 0.1 if last else 1.0)
    stored(pictures(tmp_path, model), tmp_path / "i")
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous()
        assert torch.equal(parameter, values[name])


def test_a_proof_holds_when_its_checkpoint_is_loaded_again(tmp_path):
    passes = Passes(pictures(tmp_path, Pictures()), PassOptions(CPU, 16))
    options = CONFIG.features(frozenset({"head.weight"}))
    with passes.model() as model:
        model.load(0)
        before = FeatureExtractor(model, options).rows("train", range(5)).feature_ND
        proven = model.engine("train").plan
        model.load(1)
        FeatureExtractor(model, options).rows("train", range(5))
        model.load(0)
        assert isinstance(model, LoadedModel)
        assert model.engine("train").plan is proven
        assert np.array_equal(FeatureExtractor(model, options).rows("train", range(5)).feature_ND, before)


@pytest.mark.parametrize(
    ("text", "size"), [("512MB", 512_000_000), ("8G", 8 * 10**9), ("1.5 gb", 1_500_000_000), ("4096", 4096)]
)
def test_sizes_are_read(text, size):
    assert MemorySize().convert(text, None, None) == size


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("1000", "400", 600), ("max", "400", sys.maxsize), ("100", "400", 0), (None, "1", sys.maxsize)],
)
def test_a_container_may_take_less_than_the_machine_has(limit, used, left, tmp_path):
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    assert container_memory_bytes(tmp_path) == left


@pytest.mark.parametrize("text", ["", "many", "-1GB", "3 apples"])
def test_other_sizes_are_refused(text):
    with pytest.raises(Exception, match="expected a size such as 512MB or 8GB"):
        MemorySize().convert(text, None, None)
