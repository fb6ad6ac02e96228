"""Layer rules of layers with a forward of their own, and of relative position biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracin_ann.gradients import GradientEngine, materialise
from tracin_ann.gradients.plan import LOOP, RULE, VMAP

WORDS, WIDTH, HEADS, BUCKETS, LENGTH = 11, 6, 2, 7, 5


class Offset(nn.Embedding):
    """Learned positions with an offset, computed from a mask `[B, T]`, as in OPT."""

    def forward(self, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward((mask.cumsum(1) * mask).long() + 2)


class OffsetOfAll(nn.Embedding):
    """The same positions for all examples, `[T]`, as in BART."""

    def forward(self, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.arange(mask.shape[1]) + 2)


class Scaled(nn.Embedding):
    """Words that are scaled after the lookup."""

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) * 1.7


class Written(nn.Linear):
    """A linear layer that is written out, as in Falcon."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Clipped(nn.Linear):
    """Not a linear layer of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.2, 0.2)


class Positions(nn.Module):
    def __init__(self, positions: type[nn.Embedding]) -> None:
        super().__init__()
        self.words, self.positions = Scaled(WORDS, WIDTH), positions(LENGTH + 3, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(index) + self.positions((index > 0).long())))


class Attention(nn.Module):
    """Attention with a bias by distance, `[1, H, T, T]`, which several calls share."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.relative_attention_bias = nn.Embedding(BUCKETS, HEADS)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def compute_bias(self, length: int) -> Tensor:
        place = torch.arange(length)
        bias = self.relative_attention_bias((place[None] - place[:, None]).clamp(-3, 3) + 3)
        if self.layout == "scaled":
            bias = bias * 2
        return bias.permute(2, 0, 1).unsqueeze(0)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bias = self.compute_bias(x.shape[1]) if bias is None else bias
        q, k, v = (part.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = (q @ k.mT + bias).softmax(-1)
        return (scores @ v).transpose(1, 2).flatten(2), bias


class Biased(nn.Module):
    def __init__(self, layout: str = "plain") -> None:
        super().__init__()
        self.words, self.attention, self.head = nn.Embedding(WORDS, WIDTH), Attention(layout), nn.Linear(WIDTH, 3)

    def forward(self, index: Tensor) -> Tensor:
        x, bias = self.attention(self.words(index))
        x, _ = self.attention(x, bias)
        return self.head(x)


def loss(model: nn.Module, batch: Any) -> Tensor:
    index, label = batch
    return nn.functional.cross_entropy(model(index).mean(1), label, reduction="none")


def make_rows(n_rows: int, length: int, generator: torch.Generator) -> list[Any]:
    index = torch.randint(0, WORDS, (n_rows, length), generator=generator)
    return [(row, torch.tensor(i % 3)) for i, row in enumerate(index)]


def make_engine(model: nn.Module) -> GradientEngine:
    model.double().requires_grad_(False).eval()
    return GradientEngine(model, dict(model.named_parameters()), loss, torch.utils.data.default_collate)


def differ_from_autograd(engine: GradientEngine, rows: list[Any]) -> float:
    """Return the largest difference from gradients of single examples, relative to the largest entry."""
    batch = engine.batch(range(len(rows)), rows)
    found: dict[str, Tensor] = {}

    def add(name: str, form: Any, part: slice) -> None:
        zeros = torch.zeros(len(rows), engine.parameters[name].numel(), dtype=torch.float64)
        found.setdefault(name, zeros)[part] += materialise(form)

    engine.run(batch, lambda: (found.clear(), add)[1])
    worst = 0.0
    for i in range(len(rows)):
        _, truth = engine.compute_alone(batch, i)
        mine = torch.cat([found[name][i] for name in engine.parameters])
        worst = max(worst, float((mine - truth).abs().max() / truth.abs().max()))
    return worst


@pytest.mark.parametrize(
    "model",
    [lambda: Positions(Offset), lambda: Positions(OffsetOfAll), Biased],
    ids=["offset", "offset of all", "bias"],
)
@pytest.mark.parametrize("first", [4, LENGTH, 1], ids=lambda n: f"{n} rows first")
def test_lookups_have_layer_rules_that_agree_with_autograd(model, first, generator):
    torch.manual_seed(0)
    engine = make_engine(model())
    engine.choose_methods(engine.batch(range(first), make_rows(first, LENGTH, generator)))
    for n_rows, length in ((3, LENGTH), (LENGTH, LENGTH), (4, 3), (1, LENGTH), (6, 1)):
        assert differ_from_autograd(engine, make_rows(n_rows, length, generator)) < 1e-12
    assert {method.name for method in engine.plan.steps.values()} == {RULE}


def test_a_bias_of_another_form_uses_another_method(generator):
    engine = make_engine(Biased("scaled"))
    engine.choose_methods(engine.batch(range(4), make_rows(4, LENGTH, generator)))
    assert differ_from_autograd(engine, make_rows(3, LENGTH, generator)) < 1e-12
    methods = {name: method.name for name, method in engine.plan.steps.items()}
    assert methods.pop("attention.relative_attention_bias.weight") in (VMAP, LOOP)
    assert set(methods.values()) == {RULE}


@pytest.mark.parametrize(("kind", "expected"), [(Written, {RULE}), (Clipped, {VMAP, LOOP})])
def test_a_linear_layer_with_a_forward_of_its_own_has_the_rule_if_it_is_linear(kind, expected, generator):
    torch.manual_seed(0)
    engine = make_engine(nn.Sequential(nn.Embedding(WORDS, WIDTH), kind(WIDTH, 3)))
    engine.choose_methods(engine.batch(range(4), make_rows(4, LENGTH, generator)))
    assert differ_from_autograd(engine, make_rows(3, LENGTH, generator)) < 1e-12
    assert {engine.plan.steps[name].name for name in ("1.weight", "1.bias")} <= expected


@pytest.mark.parametrize("model", [lambda: Positions(Offset), Biased])
def test_the_model_is_unchanged_after_a_run(model, generator):
    engine = make_engine(model())
    before = {name: set(vars(module)) for name, module in engine._model.named_modules()}
    engine.choose_methods(engine.batch(range(4), make_rows(4, LENGTH, generator)))
    assert {name: set(vars(module)) for name, module in engine._model.named_modules()} == before
