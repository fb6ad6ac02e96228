"""Builds of 1,000 rows with models of realistic complexity, compared with autograd in float64, one row at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import oracle
import ragged
from situations import next_token
from tasks.toy import cross_entropy
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build

N_ROWS, QUERIES, RATE = 1000, 5, 0.1
default = torch.utils.data.default_collate


@dataclass(frozen=True)
class Real:
    """A model with its loss, its rows and a tolerance.

    `truth` returns an equivalent model for the oracle, if autograd cannot differentiate the model itself.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    rows: Callable[[], list[Any]]
    collate: Callable[[Sequence[Any]], Any] = default
    tolerance: float = 1e-4
    truth: Callable[[], nn.Module] | None = None


def ragged_case(name: str) -> Real:
    case, generator = ragged.CASES[name], torch.Generator().manual_seed(3)
    sizes = torch.randint(1, 7, (N_ROWS,), generator=generator).tolist()
    return Real(case.model, case.loss, lambda: [case.example(n, generator) for n in sizes], case.collate)


class LoRA(nn.Module):
    """A frozen Linear plus a trainable low-rank product."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.up(self.down(x))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.v = LoRA(nn.Linear(width, width, bias=False)), LoRA(nn.Linear(width, width, bias=False))
        self.k, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        q, k, v = self.q(hidden), self.k(hidden), self.v(hidden)
        mask = torch.full((x.shape[1], x.shape[1]), -1e9, dtype=x.dtype).triu(1)
        x = x + self.o((q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1) @ v)
        hidden = self.after(x)
        return x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class TinyLlama(nn.Module):
    """A frozen base with adapters, run as in training: checkpointed blocks, and inputs that require gradients."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.tokens = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.head = nn.Linear(8, 13, bias=False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".q." in name or ".v." in name)
            if "base" in name:
                parameter.requires_grad_(False)
        self.tokens.register_forward_hook(lambda module, args, output: output.requires_grad_(True))

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def make_texts() -> list[Tensor]:
    return list(torch.randint(0, 13, (N_ROWS, 6), generator=torch.Generator().manual_seed(1)))


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.slope, self.head = nn.PReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.slope(x).mean(1))


def make_classes(*shape: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(*shape, generator=generator).to(dtype), i % 3) for i in range(N_ROWS)]


def gradient_penalty(critic: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return WGAN-GP's loss of the critic (Gulrajani et al. 2017, eq. 3), one number per pair of examples."""
    real, fake = batch
    mixed = (0.3 * real + 0.7 * fake).detach().requires_grad_(True)
    with torch.enable_grad():
        slope = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)[0]
    return (critic(fake) - critic(real)).squeeze(1) + 10 * (slope.norm(dim=1) - 1).square()


def critic_loss() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 1))


def make_pairs() -> list[tuple[Tensor, Tensor]]:
    return list(zip(*torch.randn(2, N_ROWS, 4, generator=torch.Generator().manual_seed(4)), strict=True))


def make_scripted() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(36, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


def sparse_rows() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(5)
    dense = torch.randn(N_ROWS, 30, generator=generator) * (torch.rand(N_ROWS, 30, generator=generator) < 0.2)
    return [(row.to_sparse(), i % 3) for i, row in enumerate(dense)]


def collate_csr(rows: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that CSR is in beta.
        return torch.stack([x.to_dense() for x, _ in rows]).to_sparse_csr(), torch.tensor([y for _, y in rows])


def csr_model() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 3))


CASES = {
    "graphs of random sizes": ragged_case("graphs"),
    "multiple choice": ragged_case("questions"),
    "packed tokens": ragged_case("packed"),
    "chosen positions": ragged_case("masked"),
    "adapters, checkpointed": Real(lambda: TinyLlama(False), next_token, make_texts),
    "adapters, checkpointed reentrantly": Real(
        lambda: TinyLlama(True), next_token, make_texts, truth=lambda: TinyLlama(False)
    ),
    "bf16 with attention": Real(
        lambda: Attentive().bfloat16(),
        cross_entropy,
        lambda: make_classes(4, 5, dtype=torch.bfloat16),
        tolerance=4e-2,
    ),
    "gradient penalty": Real(critic_loss, gradient_penalty, make_pairs),
    "TorchScript": Real(make_scripted, cross_entropy, lambda: make_classes(1, 7, 7)),
    "CSR": Real(csr_model, cross_entropy, sparse_rows, collate_csr),
}


def make_task(case: Real, folder: Path) -> tuple[Task, nn.Module, list[Any]]:
    torch.manual_seed(0)
    model, rows = case.model(), case.rows()
    torch.save(model.state_dict(), folder / "model.pt")
    task = Task(
        model=lambda: model,
        loss=case.loss,
        train_data=lambda: rows,
        query_data=lambda: rows[:QUERIES],
        checkpoints=[Checkpoint(folder / "model.pt", RATE)],
        collate=case.collate,
    )
    return task, model, rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_exact_scores_of_a_build_of_1000_rows_equal_autograd(name, tmp_path):
    case = CASES[name]
    task, model, rows = make_task(case, tmp_path)
    build(task, tmp_path / "index", BuildConfig(dim=256, device="cpu"))
    chosen = [name for name, p in model.named_parameters() if p.requires_grad]
    if case.truth is not None:
        weights, model = model.state_dict(), case.truth()
        model.load_state_dict(weights)
    gradients = oracle.gradients(model, case.loss, rows, chosen, collate=case.collate)
    truth_QN = oracle.tracin(gradients[:QUERIES, None], gradients[:, None], [RATE])
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    for i, answer in enumerate(index.query(range(QUERIES), options=QueryOptions(k=10, exact=True))):
        found = {hit.row: hit.score for hit in (*answer.proponents, *answer.opponents)}
        off = np.array([score - truth_QN[i, row] for row, score in found.items()])
        assert np.abs(off).max() <= case.tolerance * np.abs(truth_QN[i]).max()
        best = oracle.top_ids(truth_QN[i : i + 1], 10)[0]
        floor = truth_QN[i, best[-1]] - case.tolerance * np.abs(truth_QN[i]).max()
        assert all(truth_QN[i, hit.row] >= floor for hit in answer.proponents)
