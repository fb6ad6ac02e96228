"""Cases of the comparison: a model with synthetic rows, the library's feature stream, and the interface of adapters."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor, nn

from benchmarks.common import models
from tracin_ann import BuildConfig
from tracin_ann.build_job import open_build
from tracin_ann.features.autotune import TuningOptions, tune
from tracin_ann.features.extractor import FeatureExtractor

Row = tuple[Tensor, Tensor]
SIZES = (16, 32, 64, 128)


def _make_llama() -> nn.Module:
    """Return a Hugging Face Llama over characters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  (installed in one environment only)

    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=65, max_position_embeddings=64, use_cache=False))


def _compute_llama_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return models.compute_language_loss(lambda x: model(x).logits, batch)  # type: ignore[arg-type]


# A Llama in addition to the models of the other speed benchmarks.
models.MODELS.setdefault(
    "Llama 4x128", models.Model(_make_llama, _compute_llama_loss, models.MODELS["GPT 4x128"].example, 64)
)


@dataclass(frozen=True)
class Case:
    """The name of a model, D, and the memory limit of a process in bytes."""

    name: str
    dim: int
    memory: int

    @property
    def model(self) -> models.Model:
        return models.MODELS[self.name]

    def make_module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model.make().eval()

    def make_rows(self, n_rows: int) -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            return models.make_task(self.name, folder, n_rows).train_data()

    def count_columns(self, parameters: int) -> int:
        """Return the number of columns of a dense float32 matrix [P, D] that fit in 65% of the memory."""
        columns = int(0.65 * self.memory / (4 * parameters))
        if columns < 1:
            raise MemoryError(f"one column of a dense matrix over {parameters:,} parameters does not fit in memory")
        return min(self.dim, columns)


@dataclass(frozen=True)
class Side:
    """A method of a peer with its fastest settings for one model.

    Attributes:
        run: a function from rows to projected gradients [B, D'], which includes collating.
        dim: D', which some peers restrict.
        covered: number of parameters whose gradients are projected.
        settings: a description for the result file.
        sizes: batch sizes to try; the fastest one is timed.
    """

    run: Callable[[Sequence[Row]], Tensor]
    dim: int
    covered: int
    settings: str
    sizes: tuple[int, ...] = SIZES


Maker = Callable[[Case], Side]


class NotApplicable(Exception):
    """On this model, the side is identical to another one."""


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    return torch.utils.data.default_collate(list(rows))


def use_math_attention() -> contextlib.AbstractContextManager[None]:
    """Return a context with attention by matrix products, because vmap runs fused attention one example at a time."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # type: ignore[no-any-return]


def count_entries(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def find_linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@contextlib.contextmanager
def open_stream(case: Case, n_rows: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that computes features of the first n rows as a build does, without writing them."""
    with tempfile.TemporaryDirectory() as folder:
        task = models.make_task(case.name, folder, n_rows)
        size = case.model.batch_size
        config = BuildConfig(dim=case.dim, batch_size=size, device="cpu")
        work = open_build(task, Path(folder) / "index", config, None)
        with work.runner.model() as model:
            features = config.features(work.examine(model))
            # As in a build, choose the memory format.
            tune(model, features, TuningOptions(size))
            extractor = FeatureExtractor(model, features)

            def run(n: int) -> None:
                for start in range(0, n, 8 * size):
                    rows = extractor.rows("train", range(start, min(n, start + 8 * size)))
                    assert rows.feature_ND.shape[1] == case.dim

            yield run
