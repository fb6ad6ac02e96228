"""What is timed: a model with made-up rows, our feature stream on it, and the shape that a peer's side must have."""

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

from benchmarks import models
from tracin_ann import BuildConfig
from tracin_ann.build import open_build
from tracin_ann.features.autotune import TuningRequest, tune
from tracin_ann.features.extractor import FeatureExtractor

Row = tuple[Tensor, Tensor]
SIZES = (16, 32, 64, 128)


def _llama() -> nn.Module:
    """Return a Hugging Face Llama over characters, random weights, nothing downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  (one peer's environment has it)

    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=65, max_position_embeddings=64, use_cache=False))


def _llama_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return models.language(lambda x: model(x).logits, batch)  # type: ignore[arg-type]


# Beside the models of the other speed benchmarks: a Llama.
models.MODELS.setdefault("Llama 4x128", models.Model(_llama, _llama_loss, models.MODELS["GPT 4x128"].example, 64))


@dataclass(frozen=True)
class Case:
    """A model by its name, D, and how many bytes a side may take."""

    name: str
    dim: int
    memory: int

    @property
    def chosen(self) -> models.Model:
        return models.MODELS[self.name]

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.chosen.make().eval()

    def rows(self, n_rows: int) -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            return models.task(self.name, folder, n_rows).train_data()

    def block(self, parameters: int) -> int:
        """Return how many columns of a dense float32 matrix [P, D] fit, with a third of the memory for the rest."""
        columns = int(0.65 * self.memory / (4 * parameters))
        if columns < 1:
            raise MemoryError(f"one column of a dense matrix over {parameters:,} parameters does not fit")
        return min(self.dim, columns)


@dataclass(frozen=True)
class Side:
    """A peer at its best settings on one model.

    Attributes:
        run: rows to their projected gradients [B, D']; collating included.
        dim: D', which some peers cannot choose freely.
        covered: parameters whose gradients are in the projection.
        settings: for the reader of the result.
        sizes: batch sizes to try; the fastest is timed.
    """

    run: Callable[[Sequence[Row]], Tensor]
    dim: int
    covered: int
    settings: str
    sizes: tuple[int, ...] = SIZES


Maker = Callable[[Case], Side]


class NotApplicable(Exception):
    """This side would only repeat another one on this model."""


def collated(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    return torch.utils.data.default_collate(list(rows))


def vmappable_attention() -> contextlib.AbstractContextManager[None]:
    """Return a context in which attention is made of products: vmap runs PyTorch's fused one example by example."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # type: ignore[no-any-return]


def count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@contextlib.contextmanager
def our_stream(case: Case, n_rows: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that runs our feature stream over the first n rows, as a build does but for the writing."""
    with tempfile.TemporaryDirectory() as folder:
        task = models.task(case.name, folder, n_rows)
        size = case.chosen.batch_size
        config = BuildConfig(dim=case.dim, batch_size=size, device="cpu")
        work = open_build(task, Path(folder) / "index", config, None)
        with work.passes.model() as model:
            features = config.features(work.examine(model))
            # As in a build: the memory format by its rule.
            tune(model, features, TuningRequest(size))
            extractor = FeatureExtractor(model, features)

            def run(n: int) -> None:
                for start in range(0, n, 8 * size):
                    rows = extractor.rows("train", range(start, min(n, start + 8 * size)))
                    assert rows.feature_ND.shape[1] == case.dim

            yield run
