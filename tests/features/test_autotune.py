"""Choice of batch size and memory format: it respects memory limits and changes features by rounding only."""

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

from tasks.toy import save_checkpoints
from tracin_ann import BuildConfig, InfluenceIndex, Task, build, plan
from tracin_ann.cli.parameters import MemorySize
from tracin_ann.device import container_memory_bytes
from tracin_ann.errors import UsageError
from tracin_ann.features import LoadedModel, RunOptions, TaskRunner
from tracin_ann.features import autotune as tuning
from tracin_ann.features.extractor import FeatureExtractor
from tracin_ann.store.manifest import read_build_record

CPU = torch.device("cpu")
CONFIG = BuildConfig(dim=64, device="cpu", dtype="float32", index="flat")
N_ROWS = 200


class SmallCnn(nn.Module):
    """Two convolutions with batch norm between, and a head; `flat` flattens the images."""

    def __init__(self, flat: Any = lambda x: x.flatten(1)) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2)
        self.head, self.flat = nn.Linear(6 * 16, 4), flat

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm(self.first(x))), 1)
        return self.head(self.flat(torch.relu(self.second(x))))


def make_images() -> list[tuple[Tensor, int]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 8, 8, generator=g), i % 4) for i in range(N_ROWS)]


def make_image_task(folder: Path, model: nn.Module) -> Task:
    return Task(
        model=lambda: model,
        loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], reduction="none"),
        train_data=make_images,
        query_data=lambda: make_images()[:4],
        checkpoints=save_checkpoints(model, folder),
    )


def build_rows(task: Task, out: Path, **changes: Any) -> np.ndarray:
    build(task, out, replace(CONFIG, **changes))
    return InfluenceIndex.open(out).view().take(range(N_ROWS))


def read_choice(task: Task, tmp_path: Path, **changes: Any) -> tuning.BatchSettings:
    return plan(task, tmp_path / "planned", replace(CONFIG, **changes)).tuned


class Wide(nn.Module):
    """Two layers with `width` activations per row between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, width, bias=False), nn.Linear(width, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x.flatten(1)[:, :3]))


@pytest.mark.parametrize(
    ("width", "size"),
    # 6 bytes per activation: 128 MB, 32 to 512 rows, and at most 2 GB.
    [(8, 512), (60_000, 256), (400_000, 32), (4_000_000, 32), (40_000_000, 8)],
)
def test_the_batch_size_is_a_function_of_the_rows_size(width, size):
    row_bytes = 6 * width
    rule = tuning._ON_CPU.size(row_bytes)
    assert min(rule, tuning._power_of_two(tuning._MOST_BYTES // row_bytes)) == size


@pytest.mark.parametrize(("width", "size"), [(8, 512), (100_000, 128)])
def test_the_batch_size_does_not_depend_on_times_number_of_rows_or_free_memory(width, size, tmp_path, monkeypatch):
    task = make_image_task(tmp_path, Wide(width))
    found = [read_choice(task, tmp_path)]
    few = replace(task, train_data=lambda: make_images()[:3])
    found.append(read_choice(few, tmp_path))
    monkeypatch.setattr(tuning, "perf_counter", iter(np.random.default_rng(0).random(10_000)).__next__)
    monkeypatch.setattr(tuning, "free_memory_bytes", lambda device: 10**10)
    found.append(read_choice(task, tmp_path))
    assert [made.batch_size for made in found] == [size] * 3
    assert found[0].batch_bytes == found[2].batch_bytes


def test_estimated_working_memory_does_not_depend_on_memory_freed_before(tmp_path):
    task, found = make_image_task(tmp_path, SmallCnn()), set()
    for n in range(8):
        held = [torch.empty(2**k) for k in range(n, 20)]
        del held[:: n + 1]
        found.add(read_choice(task, tmp_path).batch_bytes)
    assert len(found) == 1


def test_options_set_batch_size_and_memory_format(tmp_path):
    task = make_image_task(tmp_path, SmallCnn())
    assert read_choice(task, tmp_path).channels_last
    made = read_choice(task, tmp_path, batch_size=24, memory_format="contiguous")
    assert (made.batch_size, made.channels_last) == (24, False)
    build(task, tmp_path / "i", replace(CONFIG, batch_size=24, memory_format="channels-last"))
    record = read_build_record(tmp_path / "i")
    assert (record.batch_size, record.channels_last) == (24, True)
    with pytest.raises(UsageError, match=r"bad --memory-format: got 'nhwc', expected auto or contiguous or channels"):
        replace(CONFIG, memory_format="nhwc")  # type: ignore[arg-type]


def test_the_memory_option_bounds_the_batch(tmp_path):
    task = make_image_task(tmp_path, SmallCnn())
    free = read_choice(task, tmp_path)
    row_bytes = free.batch_bytes // free.batch_size
    # Of one image: the image, the inputs and outputs of each layer, and half of that for backward.
    at_least = 4 * (3 * 64 + 3 * 8 * 64 + 2 * 6 * 16)
    assert at_least < row_bytes < 5 * at_least
    for budget, size in ((100, 64), (33, 32), (2, 2)):
        made = read_choice(task, tmp_path, memory_bytes=budget * row_bytes)
        assert made.batch_bytes <= made.memory_bytes == budget * row_bytes
        assert made.batch_size == size
    with pytest.raises(UsageError, match=r"one row needs more memory than is available.*raise --memory"):
        read_choice(task, tmp_path, memory_bytes=row_bytes // 4)
    with pytest.raises(UsageError, match="one row needs more memory than is available"):
        build(task, tmp_path / "i", replace(CONFIG, memory_bytes=row_bytes // 4))
    assert not (tmp_path / "i").exists()


def test_too_little_free_memory_reduces_the_batch_with_a_warning_and_is_recorded(tmp_path, monkeypatch, caplog):
    task = make_image_task(tmp_path, SmallCnn())
    free = read_choice(task, tmp_path)
    row_bytes = free.batch_bytes // free.batch_size
    assert not caplog.records
    monkeypatch.setattr(tuning, "free_memory_bytes", lambda device: 20 * row_bytes)
    build(task, tmp_path / "i", CONFIG)
    assert read_build_record(tmp_path / "i").batch_size == 16
    assert f"batches of 16 rows instead of {free.batch_size}: only" in caplog.text
    monkeypatch.setattr(tuning, "free_memory_bytes", lambda device: row_bytes // 2)
    with pytest.raises(UsageError, match=r"one row needs more memory than is available.*free memory, or try"):
        read_choice(task, tmp_path)


def test_features_are_the_same_in_either_memory_format(tmp_path):
    task = make_image_task(tmp_path, SmallCnn())
    usual = build_rows(task, tmp_path / "usual", memory_format="contiguous")
    other = build_rows(task, tmp_path / "other", memory_format="channels-last")
    assert (np.linalg.norm(other - usual, axis=1) <= 1e-5 * np.linalg.norm(usual, axis=1)).all()
    assert not np.array_equal(other, usual)


@pytest.mark.parametrize(
    ("flat", "why"),
    [
        (lambda x: x.view(len(x), -1), "view size is not compatible"),  # an error with channels last
        (lambda x: torch.as_strided(x, (len(x), 96), (96, 1)), "different losses"),  # other numbers with channels last
    ],
    ids=["raises", "differs"],
)
def test_a_model_that_does_not_support_channels_last_stays_contiguous_or_is_rejected(flat, why, tmp_path):
    model = SmallCnn(flat)
    strides = {name: p.stride() for name, p in model.named_parameters()}
    task = make_image_task(tmp_path, model)
    assert not read_choice(task, tmp_path).channels_last
    build_rows(task, tmp_path / "i")
    with pytest.raises(UsageError, match=rf"does not support --memory-format channels-last: got .*{why}.*contiguous"):
        build(task, tmp_path / "j", replace(CONFIG, memory_format="channels-last"))
    assert not (tmp_path / "j").exists()
    assert {name: p.stride() for name, p in model.named_parameters()} == strides


def test_a_query_loss_that_does_not_support_channels_last_keeps_images_contiguous(tmp_path):
    def query_loss(net: Any, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1], reduction="none") + 0 * batch[0].view(len(batch[0]), -1).sum(1)

    task = replace(make_image_task(tmp_path, SmallCnn()), query_loss=query_loss)
    assert not read_choice(task, tmp_path).channels_last
    build_rows(task, tmp_path / "i")


def test_images_of_different_sizes_stay_contiguous(tmp_path):
    unlike = [(torch.randn(3, 8, 8 + i % 2), i % 4) for i in range(N_ROWS)]
    task = replace(make_image_task(tmp_path, SmallCnn()), train_data=lambda: unlike)
    task = replace(task, collate=lambda examples: (torch.stack([x[..., :8] for x, _ in examples]), _labels(examples)))
    assert not read_choice(task, tmp_path).channels_last


def _labels(examples: Any) -> Tensor:
    return torch.tensor([y for _, y in examples])


def test_a_borrowed_model_gets_its_memory_format_back(tmp_path):
    model = SmallCnn()
    values = {name: p.clone() for name, p in model.named_parameters()}
    build_rows(make_image_task(tmp_path, model), tmp_path / "i")
    assert read_build_record(tmp_path / "i").channels_last
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous()
        assert torch.equal(parameter, values[name])


def test_a_channels_last_model_runs_in_the_recorded_format_and_gets_its_own_back(tmp_path):
    task = make_image_task(tmp_path, SmallCnn())
    usual = build_rows(task, tmp_path / "usual", memory_format="contiguous")
    model = SmallCnn().to(memory_format=torch.channels_last)
    assert np.array_equal(
        build_rows(replace(task, model=lambda: model), tmp_path / "i", memory_format="contiguous"), usual
    )
    assert model.first.weight.is_contiguous(memory_format=torch.channels_last)


def test_gradient_methods_are_reused_when_a_checkpoint_is_loaded_again(tmp_path):
    runner = TaskRunner(make_image_task(tmp_path, SmallCnn()), RunOptions(CPU, 16))
    options = CONFIG.features(frozenset({"head.weight"}))
    with runner.model() as model:
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
def test_memory_sizes_are_parsed(text, size):
    assert MemorySize().convert(text, None, None) == size


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("1000", "400", 600), ("max", "400", sys.maxsize), ("100", "400", 0), (None, "1", sys.maxsize)],
)
def test_the_memory_limit_of_a_container_is_used(limit, used, left, tmp_path):
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    assert container_memory_bytes(tmp_path) == left


def test_the_file_cache_of_a_container_counts_as_free(tmp_path):
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 300\ninactive_file 500\nslab 7")):
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert container_memory_bytes(tmp_path) == 600


@pytest.mark.parametrize("text", ["", "many", "-1GB", "3 apples"])
def test_invalid_sizes_are_rejected(text):
    with pytest.raises(Exception, match="expected a size such as 512MB or 8GB"):
        MemorySize().convert(text, None, None)
